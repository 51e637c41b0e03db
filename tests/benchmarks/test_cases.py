"""What the benchmark calls is what a training forward does: the same values, and each piece by brute force."""

from itertools import permutations

import pytest
import torch
from helpers.tiny_training import CLASSES, VIT, tokenmixup_vit

from hf_tokenmixup.benchmarks.cases import (
    clone_with_config,
    compute_layer_input,
    detection_cases,
    layer_saliency,
    relative_gain,
    step_cases,
    training_models,
    training_step,
)
from hf_tokenmixup.models import TokenMixupCctConfig, TokenMixupCctForImageClassification

OFF = {"horizontal_layers": [], "vertical_layers": []}
HTM = {"horizontal_layers": [1], "horizontal_tau": None, "horizontal_rho": 0.0}
BATCH = 6


def vit():
    return tokenmixup_vit(**OFF).train()


def cct():
    """Without what is random in training."""
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


def test_settings_change_and_weights_are_shared(model, images, labels):
    other = clone_with_config(model, **HTM, saliency_detector="random")
    assert (other.config.horizontal_layers, other.config.saliency_detector) == ([1], "random")
    assert model.config.horizontal_layers == [] and other.training
    assert torch.equal(other.eval()(images).logits, model.eval()(images).logits)
    other.train()(images, labels=labels).loss.backward()
    assert all(torch.equal(own.grad, shared.grad) for own, shared in with_the_same_name(model, other))
    third = clone_with_config(other, horizontal_rho=0.5)
    assert third.config.horizontal_layers == [1]
    assert all(own is shared for own, shared in with_the_same_name(other, third))
    scorenets = [dict(one.named_parameters()) for one in (other, third)]
    names = [name for name in scorenets[0] if ".scorenet." in name]
    assert names and all(scorenets[0][name] is not scorenets[1][name] for name in names)


def with_the_same_name(one, other):
    others = dict(other.named_parameters())
    return [(own, others[name]) for name, own in one.named_parameters() if ".scorenet." not in name]


@pytest.mark.parametrize(
    "case, settings",
    [
        ("attention", {}),
        ("whole maps", {"saliency_route": "output_attentions"}),
        ("full rollout", {"rollout_steps": 1}),
        ("gradient", {"saliency_detector": "gradient"}),
    ],
)
def test_a_detection_finds_what_a_training_forward_finds(model, images, labels, case, settings):
    targets = torch.nn.functional.one_hot(labels, CLASSES).float()
    detected = detection_cases(model, images, targets, layer=1)[case]()
    (step,) = clone_with_config(model, **HTM, **settings)(images, labels=labels).horizontal
    assert torch.equal(detected, step.saliency) and detected.std() > 0
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_random_saliency_is_drawn_each_time(model, images, labels):
    detect = detection_cases(model, images, torch.eye(CLASSES)[labels], layer=1)["random"]
    first, second = detect(), detect()
    assert first.shape == (BATCH, model.config.num_patch_tokens) and not torch.equal(first, second)
    assert torch.allclose(first.sum(dim=1), torch.ones(BATCH))


def test_large_batches_go_through_in_chunks(model):
    images = torch.randn(100, 3, 8, 8)
    hidden = compute_layer_input(model, images, 2)
    seen = []
    layer = model.get_transformer_layers()[2]
    hook = layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model.eval()(images)
    hook.remove()
    assert torch.allclose(hidden, seen[0], atol=1e-6)


def test_the_pieces_of_the_step_make_the_whole(saliency):
    hidden, targets = torch.randn(4, 6, 3), torch.eye(4)
    cases = step_cases(hidden, saliency, targets, rho=0.01, num_prefix_tokens=1, group_sizes=[2])
    assert torch.allclose(cases["gain"](), gain_matrix(saliency, 0.01))
    whole = cases["whole"]()
    assert torch.equal(cases["assignment"](), whole.partner) and whole.replaced.any()
    tokens, mixed = cases["mixing"]()
    assert torch.equal(tokens, whole.hidden) and torch.equal(mixed, whole.targets)
    on_host, back = cases["transfer"]()
    assert torch.equal(on_host, cases["gain"]()) and torch.equal(back, whole.partner)
    assert {frozenset(group.tolist()) for group in cases["assignment, groups of 2"]().split(2)} == {
        frozenset({0, 1}),
        frozenset({2, 3}),
    }


def test_the_share_of_the_gain_that_groups_keep(saliency):
    gain = gain_matrix(saliency, 0.01)

    def best(images):
        return max(
            sum(gain[image, partner].item() for image, partner in zip(images, order, strict=True))
            for order in permutations(images)
        )

    whole = best([0, 1, 2, 3])
    kept = relative_gain(saliency, 0.01, [2, 3, 4])
    pairs = (best([0, 1]) + best([2, 3])) / whole
    assert kept == pytest.approx({2: pairs, 3: pairs, 4: 1.0}) and 0 < pairs < 1
    assert relative_gain(saliency, 1.0, [2]) == {2: 1.0}


def test_a_training_step_leaves_no_gradient(model, images, labels):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model.classifier.weight.register_hook(lambda gradient: seen.append(gradient.abs().sum() > 0))
    training_step(model, images, labels)()
    training_step(model, images, labels, torch.bfloat16)()
    assert seen == [torch.float32, True, torch.bfloat16, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_systems_of_a_training(model, images, labels):
    vertical = {"vertical_layers": [2], "vertical_kappa": 1}
    models = training_models(model, {"HTM": HTM, "both": HTM | vertical}, group_sizes=[3])
    assert type(models.pop("plain")) is model.base_model_class
    outputs = {name: one(images, labels=labels) for name, one in models.items()}
    assert list(outputs) == ["HTM", "both", *(f"HTM, {name}" for name in VARIANTS)]
    collected = {name: "vertical_tokens" in output.mixing_metrics for name, output in outputs.items()}
    assert [name for name, value in collected.items() if value] == ["both"]
    for name, (setting, value) in VARIANTS.items():
        assert getattr(models[f"HTM, {name}"].config, setting) == value
    partner = outputs["HTM, groups of 3"].horizontal[0].partner
    assert sorted(partner[:3].tolist()) == [0, 1, 2]
    assert all(all(own is shared for own, shared in with_the_same_name(model, one)) for one in models.values())


VARIANTS = {
    "gradient": ("saliency_detector", "gradient"),
    "random": ("saliency_detector", "random"),
    "full rollout": ("rollout_steps", 1),
    "groups of 3": ("assignment_group_size", 3),
}


def test_detectors_without_htm(model):
    models = training_models(model, {"VTM": {"vertical_layers": [1], "vertical_kappa": 1}}, group_sizes=[3])
    assert list(models) == ["plain", "VTM", "VTM, gradient", "VTM, random"]
    assert models["VTM, gradient"].config.vertical_layers == [1]


def test_steps_of_rollout(model, images):
    hidden = compute_layer_input(model, images, 0)
    one, two, three = (layer_saliency(model, hidden, 0, steps) for steps in range(3))
    assert not torch.equal(one, two) and not torch.equal(two, three)
