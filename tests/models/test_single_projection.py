"""One projection of a layer's input, and one attention map, for the saliency of its tokens and for its attention."""

from contextlib import nullcontext

import pytest
import torch
from helpers.family_steps import step
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_tokenmixup.models import (
    CctConfig,
    CctForImageClassification,
    TokenMixupCctConfig,
    TokenMixupCctForImageClassification,
    add_tokenmixup,
)
from hf_tokenmixup.models.cct.modeling_cct import CctAttention
from hf_tokenmixup.models.cct.modeling_tokenmixup_cct import TokenMixupCctLayer
from hf_tokenmixup.models.gradient_checkpointing import enable_checkpointing
from hf_tokenmixup.saliency import received_attention

WIDTH, TOKENS, BATCH = 32, 64, 6
SIZE = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 5, "image_size": 32}
SIZE |= {"num_conv_layers": 2, "num_hidden_layers": 4}


def build(**settings):
    torch.manual_seed(0)
    return TokenMixupCctForImageClassification(TokenMixupCctConfig(**(SIZE | settings))).train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, 3, 32, 32, generator=generator), torch.arange(BATCH) % 5


def run_step(model, batch, **kwargs):
    with FlopCounterMode(display=False) as counter:
        output, gradients = step(model, *batch, **kwargs)
    return output, gradients, counter.get_total_flops()


def run_separately(model, batch, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TokenMixupCctLayer, "project_input", lambda self, hidden: None)
        return run_step(model, batch)


def assert_close_steps(result, expected):
    torch.testing.assert_close(result[0].loss, expected[0].loss)
    torch.testing.assert_close(result[0].logits, expected[0].logits)
    assert result[1].keys() == expected[1].keys()
    for name, gradient in result[1].items():
        torch.testing.assert_close(gradient, expected[1][name], msg=name)


PROJECTION = 2 * BATCH * TOKENS * WIDTH * 2 * WIDTH  # operations: queries and keys
MAP = 2 * BATCH * TOKENS * TOKENS * WIDTH  # their product
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0}  # then the attention of a CPU computes no complete maps
VTM = {"vertical_layers": [2], "vertical_kappa": 3}  # layers 0 and 1 provide tokens
CLS_TOKEN = {"pooling": "cls", "tokenizer": "patch", "patch_size": 4}
THRESHOLDS = {"horizontal_tau": None, "horizontal_rho": 0.0}  # all images are easy, any gain replaces a token
HTM = {"horizontal_layers": [1], **THRESHOLDS} | {f"{name}_relative": None for name in THRESHOLDS}
# Settings, number of detections, and those among them that read the map of the layer's own attention.
VALUES = {
    "vtm": (VTM, 2, 2),
    "vtm detached": (VTM | {"vertical_detach": True}, 2, 2),
    "vtm, eager attention": (VTM | NO_DROPOUT | {"attn_implementation": "eager"}, 2, 2),
    "vtm, eager attention with dropout": (VTM | {"attn_implementation": "eager"}, 2, 2),
    "vtm without dropout": (VTM | NO_DROPOUT, 2, 0),
    "vtm, three heads": (VTM | {"hidden_size": 36, "num_attention_heads": 3}, 2, 2),
    "vtm with a CLS token": (VTM | CLS_TOKEN | {"saliency_query": "mean"}, 2, 2),
    "htm": (HTM, 1, 0),
    "htm twice": (HTM | {"horizontal_layers": [0, 3]}, 2, 0),
    "both": (VTM | HTM, 3, 2),
    "both without dropout": (VTM | HTM | NO_DROPOUT, 3, 0),
    "both, random choices": (VTM | HTM | {"assignment": "random", "token_selection": "random"}, 3, 2),
    "complete maps": (VTM | HTM | {"saliency_route": "output_attentions"}, 3, 0),
}


@pytest.mark.parametrize("case", VALUES)
def test_single_projection_has_values_of_separate_ones_and_saves_their_products(case, batch, monkeypatch):
    mixing, num_detections, num_maps = VALUES[case]
    model = build(**mixing)
    result, expected = run_step(model, batch), run_separately(model, batch, monkeypatch)
    # The product of a row may depend on its place in the batch, by rounding, and so do the routes to a map.
    if "horizontal_layers" not in mixing and not num_maps:
        assert torch.equal(result[0].loss, expected[0].loss) and torch.equal(result[0].logits, expected[0].logits)
    assert_close_steps(result, expected)
    records = result[0].horizontal or ()
    assert len(records) == len(mixing.get("horizontal_layers", ())) and all(r.replaced.any() for r in records)
    scale, tokens = model.config.hidden_size / WIDTH, TOKENS + model.config.num_prefix_tokens
    projections = num_detections * PROJECTION * scale**2 * tokens / TOKENS
    assert expected[2] - result[2] == projections + num_maps * MAP * scale * (tokens / TOKENS) ** 2


def attentions(model):
    return [module for module in model.modules() if isinstance(module, CctAttention)]


def add_hook(model):
    for attention in attentions(model):
        attention.qkv.register_forward_hook(lambda *args: None)


def add_attention_hook(model):
    for attention in attentions(model):
        attention.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))


def add_backward_hook(model):
    for attention in attentions(model):
        attention.qkv.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))


def add_attention_backward_hook(model):
    for attention in attentions(model):
        attention.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0], *inputs[1:]))


def patch_forward(model):
    for attention in attentions(model):
        attention.qkv.forward = lambda tokens, forward=attention.qkv.forward: 2 * forward(tokens)


def patch_attention_forward(model):
    for attention in attentions(model):
        attention.forward = lambda tokens, *args, forward=attention.forward, **kwargs: forward(
            2 * tokens, *args, **kwargs
        )


def add_adapter(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


SEPARATE = {
    "a CLS query": (CLS_TOKEN, None, None),
    "random saliency": ({"saliency_detector": "random"}, None, None),
    "autocast": ({}, None, torch.bfloat16),
    "hooks of the projection": ({}, add_hook, None),
    "hooks of the attention": ({}, add_attention_hook, None),
    "backward hooks of the projection": ({}, add_backward_hook, None),
    "backward hooks of the attention": ({}, add_attention_backward_hook, None),
    "a patched projection": ({}, patch_forward, None),
    "a patched attention": ({}, patch_attention_forward, None),
    "an adapter": ({}, add_adapter, None),
    "gradient checkpointing": ({}, enable_checkpointing, None),
}


@pytest.mark.parametrize("mixing", [HTM, VTM], ids=["htm", "vtm"])
@pytest.mark.parametrize("case", SEPARATE)
def test_project_input_unsupported_setting_projects_separately(case, mixing, batch, monkeypatch):
    settings, change, dtype = SEPARATE[case]
    model = build(**mixing, **settings)
    if change is not None:
        change(model)
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        _, gradients, flops = run_step(model, batch)
        _, expected_gradients, expected_flops = run_separately(model, batch, monkeypatch)
    assert flops == expected_flops
    assert all(torch.equal(gradient, expected_gradients[name]) for name, gradient in gradients.items())


def test_single_projection_vertical_layer_that_provides_tokens_projects_its_memory_too(batch, monkeypatch):
    model = build(vertical_layers=[1, 2], vertical_kappa=3)
    result, expected = run_step(model, batch), run_separately(model, batch, monkeypatch)
    assert_close_steps(result, expected)
    assert expected[2] - result[2] == PROJECTION + MAP  # layer 0 alone


def test_single_projection_output_attentions_has_the_attention_of_each_layer(batch):
    model = build(vertical_layers=[2], attention_probs_dropout_prob=0.0, attn_implementation="eager", vertical_kappa=3)
    output, *_ = run_step(model, batch, output_attentions=True)
    assert [tuple(attention.shape[2:]) for attention in output.attentions] == [
        (TOKENS, TOKENS),
        (TOKENS, TOKENS),
        (TOKENS, TOKENS + 6),
        (TOKENS, TOKENS),
    ]
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(BATCH, 2, TOKENS))


def test_single_projection_gradients_match_gradient_checkpointing(batch):
    model = build(vertical_layers=[2], vertical_kappa=3)
    result = run_step(model, batch)
    enable_checkpointing(model)
    assert_close_steps(result, run_step(model, batch))


def test_single_projection_attention_rollout_projects_layers_separately(batch, monkeypatch):
    model = build(**HTM, rollout_steps=1)
    output, gradients, flops = run_step(model, batch)
    expected_output, expected_gradients, expected_flops = run_separately(model, batch, monkeypatch)
    assert flops == expected_flops and torch.equal(output.logits, expected_output.logits)
    assert all(torch.equal(gradient, expected_gradients[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("mixing", [HTM, VTM], ids=["htm", "vtm"])
def test_single_projection_forward_hook_of_attention_sees_its_input(mixing, batch, monkeypatch):
    model, seen = build(**mixing), []
    for attention in attentions(model):
        attention.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    _, _, flops = run_step(model, batch)
    once, seen[:] = list(seen), []
    _, _, expected_flops = run_separately(model, batch, monkeypatch)
    assert flops < expected_flops and len(once) == len(seen) == 4
    for tokens, expected in zip(once, seen, strict=True):
        torch.testing.assert_close(tokens, expected)


class DoubledAttention(CctAttention):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return super().forward(2 * hidden_states, attention_mask, **kwargs)


def test_add_tokenmixup_with_htm_leaves_an_attention_of_another_class(batch):
    torch.manual_seed(0)
    plain = CctForImageClassification(CctConfig(**SIZE))
    for attention in attentions(plain):
        attention.__class__ = DoubledAttention
    expected = plain.eval()(batch[0]).logits
    model = add_tokenmixup(plain, **HTM)
    assert {type(attention) for attention in attentions(model)} == {DoubledAttention}
    assert torch.equal(model.eval()(batch[0]).logits, expected)
    assert all(record.replaced.any() for record in run_step(model.train(), batch)[0].horizontal)


def test_attention_of_projection_appends_saliency_and_returns_the_usual_output():
    model = build(**VTM | {"hidden_size": 36, "num_attention_heads": 3})
    attention, projected, received = model.cct.layers[0].attention, torch.randn(BATCH, TOKENS, 3 * 36), []
    torch.manual_seed(1)
    output, _ = attention(None, projected=projected, received=received)
    torch.manual_seed(1)
    torch.testing.assert_close(output, attention(None, projected=projected)[0])
    query, key, _ = attention.split_heads(projected, 3)
    torch.testing.assert_close(received[0], received_attention(query, key, attention.scaling))
    assert not received[0].requires_grad


def test_single_map_forward_hooks_of_attention_receive_and_change_the_usual_output(batch, monkeypatch):
    model, lengths = build(**VTM), []

    def double(module, args, output):
        lengths.append(len(output))
        return 2 * output[0], *output[1:]

    for attention in attentions(model):
        attention.register_forward_hook(double)
    result, expected = run_step(model, batch), run_separately(model, batch, monkeypatch)
    assert lengths == 8 * [2] and expected[2] - result[2] == 2 * (PROJECTION + MAP)
    assert_close_steps(result, expected)


def test_single_map_is_used_after_an_evaluation_with_hidden_states(batch, monkeypatch):
    model = build(**VTM)
    model.eval()(batch[0], output_hidden_states=True)
    result, expected = run_step(model.train(), batch), run_separately(model, batch, monkeypatch)
    assert expected[2] - result[2] == 2 * (PROJECTION + MAP)


def test_single_map_is_not_used_with_arguments_of_the_attention(batch, monkeypatch):
    model = build(**VTM)
    result = run_step(model, batch, is_causal=True)
    with monkeypatch.context() as patch:
        patch.setattr(TokenMixupCctLayer, "project_input", lambda self, hidden: None)
        expected = run_step(model, batch, is_causal=True)
    assert_close_steps(result, expected)
    assert expected[2] - result[2] == 2 * PROJECTION


def test_single_map_is_not_used_with_a_registered_attention_function(batch, monkeypatch):
    model, calls = build(**VTM), []

    def attention_function(*args, **kwargs):
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention_function)
    run_step(model, batch)
    assert len(calls) == 4


def test_computes_map_half_precision_is_false():
    attention, projected = build(**VTM).cct.layers[0].attention, torch.randn(1, TOKENS, 3 * WIDTH)
    assert attention.computes_map(projected) and not attention.computes_map(projected.bfloat16())
    assert not attention.eval().computes_map(projected)


@pytest.mark.parametrize(
    "mixing", [HTM, VTM, VTM | {"attn_implementation": "eager"}], ids=["htm", "vtm", "vtm, eager attention"]
)
def test_single_projection_functional_gradient_equals_backward(mixing, batch):
    model = build(**mixing, attention_probs_dropout_prob=0.0, drop_path_rate=0.0)
    images, labels = batch
    _, gradients, _ = run_step(model, batch)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (images,), {"labels": labels}).loss

    functional = torch.func.grad(loss)(parameters)
    for name, gradient in gradients.items():
        torch.testing.assert_close(functional[name], gradient, msg=name)
