"""Reference values in tests/golden."""

import pytest
import torch
from helpers import golden_cases

from hf_tokenmixup import functional
from hf_tokenmixup.saliency import attention_saliency

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
CASES = [*golden_cases.list_cases("vit_"), *golden_cases.list_cases("cct_")]
TRAINING_CASES = [name for name in CASES if "_eval" not in name]


def build(name, case, **changes):
    return (golden_cases.build_vit if name.startswith("vit_") else golden_cases.build_cct)(case, **changes)


@pytest.mark.parametrize("name", golden_cases.list_cases("htm_op_"))
def test_golden_functional(name):
    case, tensors = golden_cases.load_case(name)
    hidden = tensors["in.tokens"].requires_grad_()
    easy, saliency = tensors["in.easy_mask"], tensors["in.saliency"]
    mix = functional.horizontal_mix(hidden, tensors["in.targets"], saliency, easy, case["rho"], int(case["has_cls"]))
    mix.hidden.backward(tensors["in.upstream_grad"])

    assert torch.equal(mix.hidden, tensors["paper.tokens"])
    torch.testing.assert_close(mix.targets, tensors["paper.targets"], atol=1e-6, rtol=0)
    torch.testing.assert_close(hidden.grad, tensors["paper.tokens_grad"], atol=1e-6, rtol=0)
    if "paper.replace_mask" in tensors:
        assert torch.equal(mix.replaced[easy], tensors["paper.replace_mask"])
    assert not mix.replaced[~easy].any()
    if case["compare_partner"] and "out.partner_index" in tensors:
        gain = functional.saliency_gain(saliency, case["rho"])
        assert torch.equal(mix.partner[easy], tensors["out.partner_index"])
        torch.testing.assert_close(gain[easy].float(), tensors["out.gain_matrix"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_golden_evaluation(name, attention):
    case, tensors = golden_cases.load_case(name)
    model = build(name, case, attn_implementation=attention).eval()
    torch.testing.assert_close(model(tensors["in.pixel_values"]).logits, tensors["eval.logits"], **TOLERANCE)
    if "eval.tokens_first2" in tensors:
        tokens = model.cct.embeddings.tokenizer(tensors["in.pixel_values"][:2])
        torch.testing.assert_close(tokens, tensors["eval.tokens_first2"], **TOLERANCE)


@pytest.mark.parametrize("name", TRAINING_CASES)
@pytest.mark.parametrize("route", ["auto", "output_attentions"])
def test_golden_training(name, route):
    case, tensors = golden_cases.load_case(name)
    model = build(name, case, saliency_route=route)
    convention = "paper_postmix" if "paper_postmix.logits" in tensors else "paper"
    expected = {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith("paper.")}
    expected |= {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{convention}.")}
    memories = []
    for layer in model.config.vertical_layers:
        vertical = model.get_transformer_layers()[layer]
        norm = vertical.layernorm_before if name.startswith("vit_") else vertical.pre_norm
        norm.register_forward_hook(lambda module, args, output: memories.append(args[0]))

    output = model(tensors["in.pixel_values"], labels=tensors["in.targets"])
    output.loss.backward()

    torch.testing.assert_close(output.logits, expected["logits"], **TOLERANCE)
    torch.testing.assert_close(output.loss, expected["total_loss"], **TOLERANCE)
    if model.config.horizontal_layers:
        compare_horizontal(output, expected, case["rho"])
    if model.config.vertical_layers:
        shape = expected["vtm_memory"].shape
        memory = next(tensor for tensor in memories if tensor.shape == shape)
        compare_memory(memory, expected["vtm_memory"], expected["vtm_topk_index"].shape[0])
    if convention == "paper":
        compare_gradients(model, expected, case)


def compare_horizontal(output, expected, rho):
    (step,) = output.horizontal
    torch.testing.assert_close(output.targets, expected["targets"], **TOLERANCE)
    torch.testing.assert_close(output.scorenet_loss, expected["scorenet_loss"], **TOLERANCE)
    torch.testing.assert_close(output.scorenet_logits[0], expected["scorenet_logits"], **TOLERANCE)
    torch.testing.assert_close(step.difficulty, 10 * expected["difficulty"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(step.saliency, expected["saliency"], atol=1e-6, rtol=0)
    easy = step.easy
    assert torch.equal(easy, expected["easy_mask"])
    assert torch.equal(step.partner[easy], expected["partner_index"])
    assert torch.equal(step.replaced[easy], expected["replace_mask"])
    gain = functional.saliency_gain(step.saliency, rho)[easy].float()
    torch.testing.assert_close(gain, expected["gain_matrix"], atol=1e-6, rtol=0)
    assert output.mixing_metrics["easy_samples"] == easy.sum()
    assert output.mixing_metrics["replaced_tokens"] == expected["replace_mask"].sum()
    assert output.mixing_metrics["mixed_samples"] == expected["replace_mask"].any(dim=1).sum()


def compare_memory(memory, expected, layers):
    """Equal as sets within each source layer: the order of its kappa tokens is free."""
    for tokens, reference in zip(memory.chunk(layers, dim=1), expected.chunk(layers, dim=1), strict=True):
        distance = torch.cdist(tokens, reference)
        assert distance.amin(dim=1).max() < 1e-4
        assert distance.amin(dim=2).max() < 1e-4


def compare_gradients(model, expected, case):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    largest = max(case["grad_norms"].values())
    compared = 0
    for name, reference in expected.items():
        if name.startswith("grad."):
            gradient = own_gradient(name.removeprefix("grad."), gradients, case)
            assert (gradient - reference).abs().max() <= 1e-4 * reference.abs().max() + 1e-7, name
            compared += 1
    assert compared >= 7
    for name, norm in case["grad_norms"].items():
        if norm > 1e-4 * largest:
            assert own_gradient(name, gradients, case).norm().item() == pytest.approx(norm, rel=1e-3), name


def own_gradient(name, gradients, case):
    """Our gradient of a parameter under its reference name."""
    if not case["case"].startswith("cct_"):
        if name.startswith("scorenet."):
            name = f"vit.layers.{case['horizontal_layer']}.{name.replace('scorenet.', 'scorenet.classifier.')}"
        return gradients[name]
    own, part = golden_cases.convert_cct_name(name)
    if name.endswith(("query.weight", "key.weight", "value.weight")):
        return gradients[own].chunk(3)[part]
    return gradients[own]


def test_golden_selected_tokens():
    case, tensors = golden_cases.load_case("vit_vtm")
    model = golden_cases.build_vit(case)
    hidden = model.eval()(tensors["in.pixel_values"], output_hidden_states=True).hidden_states
    for layer, index in enumerate(tensors["paper.vtm_topk_index"]):
        saliency = attention_saliency([model.vit.layers[layer]], hidden[layer], 1)
        chosen = saliency.topk(case["kappa"]).indices
        assert torch.equal(chosen.sort().values, index.sort().values)
        picked = functional.select_salient_tokens(hidden[layer], saliency, case["kappa"], 1)
        assert torch.equal(picked, hidden[layer].gather(1, 1 + chosen[..., None].expand_as(picked)))
