"""Benchmarked functions return the values of a training forward pass, and parts match brute force."""

from itertools import permutations

import pytest
import torch
from helpers.tiny_training import CLASSES, VIT, tokenmixup_vit

from hf_tokenmixup.benchmarks.cases import (
    clone_with_config,
    compute_layer_input,
    copy_cases,
    detection_cases,
    layer_saliency,
    make_training_step,
    relative_gain,
    set_easy_fraction,
    step_cases,
    training_models,
)
from hf_tokenmixup.models import TokenMixupCctConfig, TokenMixupCctForImageClassification

OFF = {"horizontal_layers": [], "vertical_layers": []}
HTM = {"horizontal_layers": [1], "horizontal_tau": None, "horizontal_rho": 0.0}
BATCH = 6


def vit():
    return tokenmixup_vit(**OFF).train()


def cct():
    """A CCT without dropout and stochastic depth."""
    torch.manual_seed(1)
    sizes = {name: size for name, size in VIT.items() if name != "patch_size"}
    config = TokenMixupCctConfig(**sizes, attention_probs_dropout_prob=0.0, drop_path_rate=0.0)
    return TokenMixupCctForImageClassification(config).train()


@pytest.fixture(params=[vit, cct], ids=["vit", "cct"])
def model(request):
    return request.param()


@pytest.fixture
def images():
    return torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 3, 1, 0])


@pytest.fixture
def saliency():
    return torch.rand(4, 5, generator=torch.Generator().manual_seed(3)).softmax(dim=1)


def gain_matrix(saliency, rho):
    return (saliency[None] - saliency[:, None] - rho).clamp(min=0).sum(dim=2).double()


def test_clone_with_config_shares_weights(model, images, labels):
    other = clone_with_config(model, **HTM, saliency_detector="random")
    assert (other.config.horizontal_layers, other.config.saliency_detector) == ([1], "random")
    assert model.config.horizontal_layers == [] and other.training
    assert torch.equal(other.eval()(images).logits, model.eval()(images).logits)
    other.train()(images, labels=labels).loss.backward()
    assert all(torch.equal(one.grad, shared.grad) for one, shared in shared_parameters(model, other))
    third = clone_with_config(other, horizontal_rho=0.5)
    assert third.config.horizontal_layers == [1]
    assert all(one is shared for one, shared in shared_parameters(other, third))
    scorenets = [dict(one.named_parameters()) for one in (other, third)]
    names = [name for name in scorenets[0] if ".scorenet." in name]
    assert names and all(scorenets[0][name] is not scorenets[1][name] for name in names)


def shared_parameters(one, other):
    others = dict(other.named_parameters())
    return [(parameter, others[name]) for name, parameter in one.named_parameters() if ".scorenet." not in name]


@pytest.mark.parametrize(
    "case, settings",
    [
        ("attention", {}),
        ("full maps", {"saliency_route": "output_attentions"}),
        ("full rollout", {"rollout_steps": 1}),
        ("gradient", {"saliency_detector": "gradient"}),
    ],
)
def test_detection_cases_match_training_forward(model, images, labels, case, settings):
    targets = torch.nn.functional.one_hot(labels, CLASSES).float()
    detected = detection_cases(model, images, targets, layer=1)[case]()
    (step,) = clone_with_config(model, **HTM, **settings)(images, labels=labels).horizontal
    assert torch.equal(detected, step.saliency) and detected.std() > 0
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_detection_cases_random_differs_between_calls(model, images, labels):
    detect = detection_cases(model, images, torch.eye(CLASSES)[labels], layer=1)["random"]
    first, second = detect(), detect()
    assert first.shape == (BATCH, model.config.num_patch_tokens) and not torch.equal(first, second)
    assert torch.allclose(first.sum(dim=1), torch.ones(BATCH))


def test_compute_layer_input_splits_large_batches(model):
    images = torch.randn(100, 3, 8, 8)
    hidden = compute_layer_input(model, images, 2)
    inputs = []
    layer = model.get_transformer_layers()[2]
    hook = layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model.eval()(images)
    hook.remove()
    assert torch.allclose(hidden, inputs[0], atol=1e-6)


def test_step_cases_match_the_complete_step(saliency):
    hidden, targets = torch.randn(4, 6, 3), torch.eye(4)
    cases = step_cases(hidden, saliency, targets, rho=0.01, num_prefix_tokens=1, group_sizes=[2])
    assert torch.allclose(cases["gain"](), gain_matrix(saliency, 0.01))
    complete = cases["complete step"]()
    assert torch.equal(cases["assignment"](), complete.partner) and complete.replaced.any()
    tokens, mixed = cases["mixing"]()
    assert torch.equal(tokens, complete.hidden) and torch.equal(mixed, complete.targets)
    gain, partner = cases["transfer"]()
    assert torch.equal(gain, cases["gain"]()) and torch.equal(partner, complete.partner)
    assert {frozenset(group.tolist()) for group in cases["assignment, groups of 2"]().split(2)} == {
        frozenset({0, 1}),
        frozenset({2, 3}),
    }


def test_relative_gain_matches_brute_force(saliency):
    gain = gain_matrix(saliency, 0.01)

    def best(images):
        return max(
            sum(gain[image, partner].item() for image, partner in zip(images, order, strict=True))
            for order in permutations(images)
        )

    full_batch = best([0, 1, 2, 3])
    fractions = relative_gain(saliency, 0.01, [2, 3, 4])
    pairs = (best([0, 1]) + best([2, 3])) / full_batch
    assert fractions == pytest.approx({2: pairs, 3: pairs, 4: 1.0}) and 0 < pairs < 1
    assert relative_gain(saliency, 1.0, [2]) == {2: 1.0}


def test_make_training_step_deletes_gradients(model, images, labels):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model.classifier.weight.register_hook(lambda gradient: seen.append(gradient.abs().sum() > 0))
    make_training_step(model, images, labels)()
    make_training_step(model, images, labels, torch.bfloat16)()
    assert seen == [torch.float32, True, torch.bfloat16, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_training_models_have_the_settings_and_share_weights(model, images, labels):
    vertical = {"vertical_layers": [2], "vertical_kappa": 1}
    models = training_models(model, {"HTM": HTM, "both": HTM | vertical}, group_sizes=[3], rhos=[0.25])
    assert type(models.pop("plain")) is model.base_model_class
    outputs = {name: one(images, labels=labels) for name, one in models.items()}
    assert list(outputs) == ["HTM", "both", *(f"HTM, {name}" for name in VARIANTS)]
    collected = {name: "vertical_tokens" in output.mixing_metrics for name, output in outputs.items()}
    assert [name for name, value in collected.items() if value] == ["both"]
    for name, (setting, value) in VARIANTS.items():
        assert getattr(models[f"HTM, {name}"].config, setting) == value
    partner = outputs["HTM, groups of 3"].horizontal[0].partner
    assert sorted(partner[:3].tolist()) == [0, 1, 2]
    assert all(all(one is shared for one, shared in shared_parameters(model, clone)) for clone in models.values())


VARIANTS = {
    "gradient": ("saliency_detector", "gradient"),
    "random": ("saliency_detector", "random"),
    "random partners": ("assignment", "random"),
    "full rollout": ("rollout_steps", 1),
    "rho 0.25": ("horizontal_rho", 0.25),
    "groups of 3": ("assignment_group_size", 3),
    "full maps": ("saliency_route", "output_attentions"),
}


def test_training_models_without_htm_vary_detectors_only(model):
    models = training_models(model, {"VTM": {"vertical_layers": [1], "vertical_kappa": 1}}, group_sizes=[3])
    assert list(models) == ["plain", "VTM", "VTM, gradient", "VTM, random", "VTM, full maps"]
    assert models["VTM, gradient"].config.vertical_layers == [1]


def test_layer_saliency_depends_on_rollout_steps(model, images):
    hidden = compute_layer_input(model, images, 0)
    one, two, three = (layer_saliency(model, hidden, 0, steps) for steps in range(3))
    assert not torch.equal(one, two) and not torch.equal(two, three)


@pytest.mark.parametrize("easy", [1, 3, 5])
def test_set_easy_fraction_makes_that_fraction_easy(images, labels, easy):
    model = clone_with_config(vit(), **HTM)
    set_easy_fraction(model, images, labels, (easy - 0.5) / (BATCH - 1))
    (record,) = model(pixel_values=images, labels=labels).horizontal
    assert record.easy.sum() == easy
    assert record.difficulty[record.easy].max() < record.difficulty[~record.easy].min()


def test_copy_cases_differ_in_the_wait_alone(images, labels, monkeypatch):
    model, losses, copies = vit(), [], []
    forward, to = model.forward, torch.Tensor.to
    monkeypatch.setattr(model, "forward", lambda **batch: losses.append(forward(**batch)) or losses[-1])
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: copies.append(kwargs) or to(self, *args))
    cases = copy_cases(model, images, labels, torch.device("cpu"))
    for name, non_blocking in (("blocking copy", False), ("non-blocking copy", True)):
        copies.clear()
        cases[name]()
        assert copies.count({"non_blocking": non_blocking}) == 2
    assert torch.equal(losses[0].loss, losses[1].loss) and torch.isfinite(losses[0].loss)


@pytest.mark.parametrize("mode", ["eager", "default", "reduce-overhead"])
def test_make_training_step_compiles_in_the_mode(images, labels, mode, monkeypatch):
    modes, calls = [], []

    def compile_model(model, mode):
        modes.append(mode)
        return lambda **batch: calls.append(mode) or model(**batch)

    monkeypatch.setattr(torch, "compile", compile_model)
    step = make_training_step(vit(), images, labels, compile_mode=mode)
    step()
    step()
    expected = [] if mode == "eager" else [mode]
    assert modes == expected and calls == 2 * expected  # compiled once
