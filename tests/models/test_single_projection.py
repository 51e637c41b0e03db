"""One projection of a layer's input for the saliency of its tokens and for its attention, in CCT."""

from contextlib import nullcontext

import pytest
import torch
from helpers.family_steps import step
from torch.utils.flop_counter import FlopCounterMode

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

WIDTH, TOKENS, BATCH = 32, 64, 6
SIZE = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 5, "image_size": 32}
SIZE |= {"num_conv_layers": 2, "num_hidden_layers": 4}


def build(**settings):
    torch.manual_seed(0)
    return TokenMixupCctForImageClassification(TokenMixupCctConfig(**SIZE, **settings)).train()


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


VTM = {"vertical_layers": [2], "vertical_kappa": 3}  # layers 0 and 1 provide tokens
THRESHOLDS = {"horizontal_tau": None, "horizontal_rho": 0.0}  # all images are easy, any gain replaces a token
HTM = {"horizontal_layers": [1], **THRESHOLDS} | {f"{name}_relative": None for name in THRESHOLDS}
VALUES = {
    "vtm": (VTM, 2),
    "vtm detached": (VTM | {"vertical_detach": True}, 2),
    "htm": (HTM, 1),
    "htm twice": (HTM | {"horizontal_layers": [0, 3]}, 2),
    "both": (VTM | HTM, 3),
    "both, random choices": (VTM | HTM | {"assignment": "random", "token_selection": "random"}, 3),
    "complete maps": (VTM | HTM | {"saliency_route": "output_attentions"}, 3),
}


@pytest.mark.parametrize("case", VALUES)
def test_single_projection_has_values_of_separate_ones_and_saves_their_products(case, batch, monkeypatch):
    mixing, num_detections = VALUES[case]
    model = build(**mixing)
    output, gradients, flops = run_step(model, batch)
    expected_output, expected_gradients, expected_flops = run_separately(model, batch, monkeypatch)
    if "horizontal_layers" in mixing:  # the product of a row may depend on its place in the batch, by rounding
        torch.testing.assert_close(output.logits, expected_output.logits)
    else:
        assert torch.equal(output.loss, expected_output.loss) and torch.equal(output.logits, expected_output.logits)
    records = output.horizontal or ()
    assert len(records) == len(mixing.get("horizontal_layers", ())) and all(r.replaced.any() for r in records)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=name)
    query_and_key = 2 * BATCH * TOKENS * WIDTH * 2 * WIDTH
    assert expected_flops - flops == num_detections * query_and_key


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
    "a CLS query": ({"pooling": "cls", "tokenizer": "patch", "patch_size": 4}, None, None),
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
    output, _, flops = run_step(model, batch)
    expected_output, _, expected_flops = run_separately(model, batch, monkeypatch)
    assert torch.equal(output.logits, expected_output.logits)
    assert expected_flops - flops == 2 * BATCH * TOKENS * WIDTH * 2 * WIDTH  # layer 0 alone


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
    output, gradients, _ = run_step(model, batch)
    enable_checkpointing(model)
    checkpointed, checkpointed_gradients, _ = run_step(model, batch)
    assert torch.equal(output.logits, checkpointed.logits) and gradients.keys() == checkpointed_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, checkpointed_gradients[name], msg=name)


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


@pytest.mark.parametrize("mixing", [HTM, VTM], ids=["htm", "vtm"])
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
