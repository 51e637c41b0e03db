"""Gradient and random saliency detectors and manifold mixup in all model families."""

import pytest
import torch
from helpers.families import TESTED, build_tiny
from transformers import set_seed

from hf_tokenmixup.functional import select_salient_tokens
from hf_tokenmixup.models.layer_inputs import layer_inputs

WIDE = {"image_size": (16, 24), "patch_size": 4}
CASES = {name: (name, {}) for name in TESTED} | {
    "wide vit": ("vit", WIDE),
    "wide cct": ("cct", WIDE | {"tokenizer": "convolution"}),
}
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
MIXING = {"horizontal_layers": [1, 2], "horizontal_tau": None, "horizontal_rho": 0.0, "vertical_layers": [3]}
TARGETS = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)).softmax(dim=1)


@pytest.fixture(params=CASES)
def build(request):
    model_type, settings = CASES[request.param]
    return lambda **changes: build_tiny(model_type, **settings | changes)


def images_for(model):
    return torch.randn(6, 3, *model.config.network.image_size, generator=torch.Generator().manual_seed(1))


def forward(model, seed=3):
    set_seed(seed)
    return model(images_for(model), labels=TARGETS)


def assert_used_parameters_have_gradients(model):
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or model.is_unused_parameter(name), name


def collected(model, layer):
    """What a layer's collection for VTM gets: tokens (B, N, D) and saliency (B, T)."""
    seen = []
    chosen = model.get_transformer_layers()[layer]
    original = chosen._detect_saliency

    def watch(layers, state, hidden, **kwargs):
        saliency = original(layers, state, hidden, **kwargs)
        seen.append((hidden, saliency))
        return saliency

    chosen._detect_saliency = watch
    return seen


def test_gradient_detector_uses_input_images(build):
    model = build(**MIXING, **DROPOUT, saliency_detector="gradient")
    first, second = forward(model).horizontal
    pixels = images_for(model).requires_grad_(True)
    logits = model.eval()(pixels).logits
    torch.nn.functional.cross_entropy(logits, TARGETS).backward()
    rows, columns = model.token_grid(*pixels.shape[2:])
    expected = pixels.grad.square().mean(dim=1).sqrt()
    expected = expected.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).mean(dim=(2, 4)).flatten(1)
    torch.testing.assert_close(first.saliency, expected / expected.sum(dim=1, keepdim=True))
    # A token that goes to another image takes its saliency along.
    taken = torch.where(first.replaced, first.saliency[first.partner], first.saliency)
    assert first.replaced.any() and torch.equal(second.saliency, taken)


def test_gradient_detector_changes_no_state(build):
    model, other = (build(**MIXING, **DROPOUT, saliency_detector=name) for name in ("gradient", "attention"))
    frozen = model.get_transformer_layers()[0].eval()
    other.get_transformer_layers()[0].eval()
    forward(other)
    state = torch.get_rng_state()
    output = forward(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training and not frozen.training and model.get_transformer_layers()[1].training
    output.loss.backward()
    assert_used_parameters_have_gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = forward(model)
    assert torch.equal(half.horizontal[0].saliency, output.horizontal[0].saliency)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="plain ViT does not compile either: a host decorator")
@pytest.mark.parametrize("build", ["wide vit", "wide cct"], indirect=True)
def test_gradient_detector_compiled_matches_eager(build):
    model = build(**MIXING, saliency_detector="gradient", drop_path_rate=0.0)
    expected = forward(model)
    output = torch.compile(model, backend="aot_eager")(images_for(model), labels=TARGETS)
    torch.testing.assert_close(output.horizontal[0].saliency, expected.horizontal[0].saliency)
    torch.testing.assert_close(output.loss, expected.loss)


def test_random_detector_draws_for_each_layer_and_step(build):
    model = build(**MIXING, saliency_detector="random")
    maps = [step.saliency for seed in (3, 4) for step in forward(model, seed).horizontal]
    assert all(torch.equal(a, b.saliency) for a, b in zip(maps[:2], forward(model, 3).horizontal, strict=True))
    for number, saliency in enumerate(maps):
        torch.testing.assert_close(saliency.sum(dim=1), torch.ones(6))
        assert not any(torch.equal(saliency, other) for other in maps[:number])


@pytest.mark.parametrize("detector", ["gradient", "random"])
def test_vertical_layers_use_detected_saliency(build, detector):
    model = build(vertical_layers=[2], vertical_kappa=2, saliency_detector=detector)
    seen = collected(model, 1)
    taken = []
    layer = model.get_transformer_layers()[2]
    plain = layer.base_forward
    layer.base_forward = lambda hidden, mask, memory, **kwargs: (
        taken.append(memory) or plain(hidden, mask, memory, **kwargs)
    )
    forward(model)
    # The gradient takes a plain forward of its own, before.
    (hidden, saliency), memory = seen[0], taken[-1]
    expected = select_salient_tokens(hidden, saliency, 2, model.config.num_prefix_tokens)
    assert torch.equal(memory[:, 2:], expected) and not torch.equal(memory[:, :2], expected)


def test_manifold_mixup_mixes_input_of_one_layer(build):
    model = build(manifold_mixup_layers=[2], manifold_mixup_alpha=1.5, drop_path_rate=0.0)
    plain = build(drop_path_rate=0.0)
    plain.eval()
    with torch.no_grad():
        hidden = layer_inputs(plain, images_for(plain))[2].hidden
    entered = []
    model.get_transformer_layers()[2].pre_norm.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    output = forward(model)

    set_seed(3)
    torch.randint(1, ())
    alpha = torch.tensor([1.5])
    share, partner = torch.distributions.Beta(alpha, alpha).sample(), torch.randperm(6)
    torch.testing.assert_close(entered[0], share * hidden + (1 - share) * hidden[partner])
    torch.testing.assert_close(output.targets, share * TARGETS + (1 - share) * TARGETS[partner])
    expected = torch.nn.functional.cross_entropy(output.logits, output.targets)
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(model.eval()(images_for(model)).logits, plain(images_for(plain)).logits)


def test_manifold_mixup_draws_layer_and_precedes_htm(build):
    model = build(**MIXING, manifold_mixup_layers=[0, 2])
    mixed = []

    def watched(layer):
        original = layer._apply_manifold_mixup

        def mix(hidden, state):
            before, targets = hidden.clone(), state.targets.clone()
            hidden = original(hidden, state)
            if not torch.equal(hidden, before):
                assert not torch.equal(state.targets, targets)
                mixed.append(layer.layer_index)
            else:
                assert torch.equal(state.targets, targets)
            return hidden

        return mix

    for layer in model.get_transformer_layers():
        layer._apply_manifold_mixup = watched(layer)
    for seed in range(12):
        assert forward(model, seed).horizontal[1].replaced.any()
    assert set(mixed) == {0, 2} and len(mixed) == 12
    forward(model).loss.backward()
    assert_used_parameters_have_gradients(model)


def test_assignment_group_size_applies_in_forward(build):
    complete, grouped = (forward(build(**MIXING, **more)) for more in ({}, {"assignment_group_size": 2}))
    assert torch.equal(complete.horizontal[0].saliency, grouped.horizontal[0].saliency)
    partner = grouped.horizontal[0].partner
    assert torch.equal(partner // 2, torch.arange(6) // 2) and not torch.equal(partner, complete.horizontal[0].partner)
