"""Adapters of peft in a TokenMixup model."""

import copy

import pytest
import torch
from helpers.families import BOTH, TESTED, build_tiny
from helpers.peft_versions import skip_without_add_adapter
from transformers import set_seed
from transformers.integrations import peft as integration

from hf_tokenmixup.models import find_adapter_layers, merge_adapters
from hf_tokenmixup.models import peft_utils as adapters
from hf_tokenmixup.models.layer_inputs import layer_inputs
from hf_tokenmixup.saliency import attention_saliency

peft = pytest.importorskip("peft")

IMAGES = torch.randn(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.fixture(params=TESTED)
def build(request):
    """Builds a small model of a family, in training mode, always from the same seed."""
    settings = BOTH | {"attention_probs_dropout_prob": 0.1}
    return lambda **changes: build_tiny(request.param, **settings | changes)


def adapt(model, dropout=0.0, trained=False, **changes):
    """Give `model` adapters; `trained`: with other weights than those it starts with."""
    config = {"r": 2, "lora_alpha": 8, "lora_dropout": dropout, "target_modules": list(model.lora_target_modules)}
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(**config | {"modules_to_save": ["classifier", "scorenet.attention"]} | changes)
    ).train()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if trained and parameter.requires_grad:
                parameter.normal_(std=0.3)
    return adapted


@pytest.mark.parametrize(
    "settings", [{}, {"rollout_steps": 1, "horizontal_layers": [0, 1]}, {"saliency_detector": "gradient"}]
)
def test_untrained_adapters_do_not_change_forward(build, settings):
    # Frozen as the adapted one is: how torch 2.6 multiplies depends on it, and so does the last bit.
    plain, adapted = build(**settings).requires_grad_(False), adapt(build(**settings))
    outputs = []
    for model in (plain, adapted):
        set_seed(3)
        outputs.append(model(pixel_values=IMAGES, labels=LABELS))
    for name in ("loss", "logits", "targets", "scorenet_loss"):
        torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=1e-6, atol=1e-6, msg=name)
    assert outputs[0].horizontal[-1].replaced.any()
    for name, count in outputs[0].mixing_metrics.items():
        torch.testing.assert_close(count, outputs[1].mixing_metrics[name], rtol=1e-6, atol=1e-6)


def test_saliency_includes_adapters_without_dropout(build):
    """No dropout in front of the adapters, no number drawn, by either route; and what merged weights would give."""
    model = build()
    adapted = adapt(model, dropout=0.5, trained=True)
    merged = merge_adapters(model)
    _, layer_kwargs = layer_inputs(model, IMAGES[:3])[1]
    hidden = torch.randn(3, 16 + model.config.num_prefix_tokens, 24)
    prefix, query = model.config.num_prefix_tokens, model.config.effective_saliency_query

    def seen(network, count, route):
        state = type("State", (), {"saliency": None})
        layers = network.get_transformer_layers()[1 : 1 + count]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers[0].config, "saliency_route", route)
            return layers[0]._detect_saliency(layers, state, hidden, layer_kwargs=layer_kwargs)

    for count, route in ((1, "auto"), (1, "output_attentions"), (2, "auto")):
        adapted.train()
        random_state = torch.get_rng_state()
        saliency = seen(model, count, route)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(module.training for module in model.modules())
        adapted.eval()
        layers = model.get_transformer_layers()[1 : 1 + count]
        expected = attention_saliency(layers, hidden, prefix, query, route, layer_kwargs)
        assert torch.equal(saliency, expected)
        torch.testing.assert_close(saliency, seen(merged, count, route))
        with adapted.disable_adapter():
            assert not torch.allclose(saliency, seen(model, count, route), atol=1e-3)
    torch.testing.assert_close(seen(model, 1, "auto"), seen(model, 1, "output_attentions"))


@pytest.mark.parametrize("route", ["peft", "transformers"])
def test_to_plain_model_merges_adapters(build, route):
    model = build()
    names = set(model.to_plain_model().state_dict())
    if route == "peft":
        outer = adapt(model, dropout=0.5, trained=True)
    else:
        skip_without_add_adapter()
        targets = list(model.lora_target_modules)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"]))
        outer = model
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
    before = copy.deepcopy(outer.state_dict())
    outer.train()
    exported = model.to_plain_model()
    assert type(exported) is model.base_model_class and set(exported.state_dict()) == names
    assert all(parameter.requires_grad for parameter in exported.parameters())
    assert not find_adapter_layers(exported) and find_adapter_layers(model)

    logits = exported.eval()(IMAGES).logits
    torch.testing.assert_close(outer.eval()(pixel_values=IMAGES).logits, logits)
    with torch.no_grad():
        # Only weights below an adapter are copies.
        addresses = {parameter.data_ptr() for parameter in model.parameters()}
        copied = {name for name, tensor in exported.named_parameters() if tensor.data_ptr() not in addresses}
        assert copied == {name for name in names if name.rpartition(".")[0].endswith(tuple(model.lora_target_modules))}
    after = outer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    if route == "peft":
        with outer.disable_adapter():
            assert not torch.allclose(outer(pixel_values=IMAGES).logits, logits, atol=1e-2)


def test_add_adapter_old_peft_raises_with_version(build, monkeypatch):
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "99.0")
    monkeypatch.setattr(adapters, "MIN_PEFT_VERSION", "99.0")
    message = (
        f"needs peft 99.0 or newer .* peft {peft.__version__} is installed. Run `pip install 'peft>=99.0'`, or use"
    )
    with pytest.raises(ValueError, match=message):
        build().add_adapter(peft.LoraConfig(target_modules=["q_proj", "qkv"]))


def test_merge_adapters_without_adapters_returns_model(build):
    model = build()
    assert merge_adapters(model) is model
