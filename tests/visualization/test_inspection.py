"""Traces against the training forward pass, full attention maps, and brute force."""

import pytest
import torch
import torch.nn.functional as F
from helpers.families import WITH_MAPS, build_tiny
from helpers.tiny_training import plain_vit

from hf_tokenmixup.vertical import VerticalMemory
from hf_tokenmixup.visualization.inspection import (
    layer_inputs,
    min_max,
    predicted_classes,
    saliency_maps,
    trace_horizontal_mixup,
    trace_vertical_memory,
)
from hf_tokenmixup.visualization.token_grid import TokenGrid, compute_token_grid, render_mixed_images

WIDE = {"image_size": (12, 20), "patch_size": 4}
# Family, settings, and rows and columns of tokens.
CASES = {name: (name, {}, (4, 4)) for name in WITH_MAPS} | {
    "wide vit": ("vit", WIDE, (3, 5)),
    "wide cct": ("cct", WIDE | {"tokenizer": "convolution"}, (6, 10)),
    "wide cct with CLS": ("cct", WIDE | {"pooling": "cls", "saliency_query": "cls"}, (3, 5)),
}
LABELS = torch.tensor([0, 3, 1, 4])


@pytest.fixture(params=CASES)
def build(request):
    model_type, settings, grid = CASES[request.param]
    settings = {"initializer_range": 0.3, "hidden_dropout_prob": 0.0} | settings

    def build_model(**changes):
        return build_tiny(model_type, **settings | changes)

    build_model.grid = grid
    build_model.images = noise(*build_model().config.network.image_size)
    return build_model


def noise(height, width):
    """Images of different contrast, so that their saliency differs."""
    pixels = torch.randn(4, 3, height, width, generator=torch.Generator().manual_seed(1))
    return pixels * torch.linspace(0.5, 2, 4).view(4, 1, 1, 1)


def attention_maps(build, pixels, **changes):
    """Head-averaged attention of every layer from transformers."""
    model = build(attn_implementation="eager", **changes).eval()
    with torch.no_grad():
        maps = model(pixels, output_attentions=True, interpolate_pos_encoding=bool(changes) or None).attentions
    return [attention.mean(dim=1) for attention in maps], model.config


def read_saliency(rollout, config, grid):
    row = rollout[:, 0] if config.effective_saliency_query == "cls" else rollout.mean(dim=1)
    return row[:, config.num_prefix_tokens :].unflatten(1, grid)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_attention_maps_are_products_of_attention_maps(build, layer):
    maps, config = attention_maps(build, build.images)
    rollout = maps[layer]
    for attention in maps[layer + 1 :]:
        rollout = attention @ rollout
    saliency = saliency_maps(build(), build.images, LABELS, layer)
    assert list(saliency) == ["gradient", "1-step", "full rollout"]
    torch.testing.assert_close(saliency["1-step"], read_saliency(maps[layer], config, build.grid))
    torch.testing.assert_close(saliency["full rollout"], read_saliency(rollout, config, build.grid))
    assert torch.equal(saliency["1-step"], saliency["full rollout"]) == (layer == 3)


def test_saliency_maps_of_other_image_size(build):
    other = {"image_size": 40, "patch_size": 10}
    maps, config = attention_maps(build, noise(40, 20), **other)
    model = build(**other)
    grid = model.token_grid(40, 20)
    assert grid[0] == 2 * grid[1]
    saliency = saliency_maps(model, noise(40, 20), LABELS, 3)
    torch.testing.assert_close(saliency["full rollout"], read_saliency(maps[3], config, grid))
    assert saliency["gradient"].shape == (4, *grid)


def test_saliency_maps_gradient_matches_autograd(build):
    model = build()
    pixels = build.images.clone().requires_grad_(True)
    F.cross_entropy(model.eval()(pixels).logits, LABELS).backward()
    strength = pixels.grad.square().mean(dim=1).sqrt()
    rows, columns = build.grid
    cells = strength.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).mean(dim=(2, 4))
    expected = cells / cells.sum(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(saliency_maps(model, build.images, LABELS, 1)["gradient"], expected)
    soft = F.one_hot(LABELS, 5).float()
    torch.testing.assert_close(saliency_maps(model, build.images, soft, 1)["gradient"], expected)
    assert not torch.allclose(saliency_maps(model, build.images, LABELS.flip(0), 1)["gradient"], expected)


def test_inspection_uses_no_randomness_and_keeps_the_model(build):
    model = build(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, horizontal_layers=[1])
    model.get_transformer_layers()[2].eval()
    state = torch.get_rng_state()
    first, second = (saliency_maps(model, build.images, LABELS, 1) for _ in range(2))
    trace_horizontal_mixup(model, build.images, LABELS, 1, tau=2.0, rho=0.0)
    trace_vertical_memory(model, build.images, LABELS, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.training and not model.get_transformer_layers()[2].training


def test_predicted_classes_match_logits(build):
    model = build()
    predicted = predicted_classes(model, build.images)
    assert torch.equal(predicted, model.eval()(build.images).logits.argmax(dim=1))


def test_min_max():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[4.0, 4.0], [4.0, 4.0]]])
    assert min_max(maps).tolist() == [[[0.0, 0.5], [0.25, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize(
    "settings",
    [
        {"horizontal_tau": None},
        {"horizontal_tau": 3.0},
        {"horizontal_tau": None, "rollout_steps": 2, "relabel": "count"},
        {"horizontal_tau": None, "saliency_detector": "gradient"},
        {"horizontal_tau": None, "assignment_group_size": 2},
    ],
)
def test_trace_horizontal_mixup_matches_training_forward(build, settings):
    model = build(horizontal_layers=[1], horizontal_rho=0.001, **settings)
    trace = trace_horizontal_mixup(model, build.images, LABELS, 1, tau=settings["horizontal_tau"])
    trained = model(build.images, labels=LABELS)
    (step,) = trained.horizontal
    assert torch.equal(trace.easy, step.easy) and torch.equal(trace.partner, step.partner)
    assert torch.equal(trace.replaced.flatten(1), step.replaced) and step.replaced.any()
    torch.testing.assert_close(trace.saliency.flatten(1), step.saliency)
    torch.testing.assert_close(trace.mixed_targets, trained.targets)
    assert trace.mixed == step.replaced.any(dim=1).nonzero().flatten().tolist()
    assert trace.saliency.shape == (4, *build.grid) and (trace.layer, trace.rho) == (1, 0.001)
    assert trace.detector == model.config.saliency_detector and trace.relabel == model.config.relabel


def test_trace_horizontal_mixup_tau_selects_easy_images(build):
    model = build(horizontal_layers=[1])
    difficulty = model(build.images, labels=LABELS).horizontal[0].difficulty
    tau = float(difficulty.sort().values[1:3].mean())
    trace = trace_horizontal_mixup(model, build.images, LABELS, 1, tau=tau, rho=0.0)
    assert trace.easy.tolist() == (difficulty < tau).tolist() and trace.easy.sum() == 2
    assert set(trace.mixed) <= set(trace.easy.nonzero().flatten().tolist())


def test_trace_horizontal_mixup_is_reproducible_with_generator(build):
    model = build(assignment="random", token_selection="random", saliency_detector="random")
    one, same, other = (
        trace_horizontal_mixup(model, build.images, LABELS, 2, rho=0.0, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(one.replaced, same.replaced) and torch.equal(one.saliency, same.saliency)
    assert not torch.equal(one.replaced, other.replaced)


@pytest.mark.parametrize("settings", [{}, {"saliency_detector": "gradient"}])
def test_trace_vertical_memory_matches_training_forward(build, monkeypatch, settings):
    model = build(vertical_layers=[3], vertical_kappa=4, **settings)
    collected, tokens = [], VerticalMemory.tokens
    monkeypatch.setattr(VerticalMemory, "tokens", lambda self: collected.append(tokens(self)) or collected[-1])
    trace = trace_vertical_memory(model, build.images, LABELS, 3)
    model(build.images, labels=LABELS)
    assert (trace.layer, trace.grid, trace.tokens.shape) == (3, build.grid, (3, 4, 4))
    for layer, (hidden, _) in enumerate(layer_inputs(model, build.images)[:3]):
        index = trace.tokens[layer] + model.config.num_prefix_tokens
        chosen = torch.stack([hidden[image, index[image]] for image in range(4)])
        torch.testing.assert_close(chosen, collected[0][:, 4 * layer : 4 * (layer + 1)])


def test_trace_vertical_memory_selects_most_salient_tokens(build):
    trace = trace_vertical_memory(build(), build.images, LABELS, 2, kappa=3)
    for layer in range(2):
        saliency = saliency_maps(build(), build.images, LABELS, layer)["1-step"].flatten(1)
        expected = sorted(range(saliency.shape[1]), key=lambda token: -saliency[1, token])[:3]
        assert trace.tokens[layer, 1].tolist() == expected


@pytest.mark.parametrize("size", [(15, 20), (16, 24)])
def test_render_mixed_images_has_partner_pixels_in_replaced_cells(build, size):
    model = build(image_size=15, patch_size=5)
    pixels = noise(*size)
    cells = compute_token_grid(model, *size)
    rows, columns = model.token_grid(*size)
    assert (len(cells.rows), len(cells.columns)) == (rows + 1, columns + 1)
    assert cells.exact == (getattr(model.config, "tokenizer", "patch") == "patch")
    trace = trace_horizontal_mixup(model, pixels, LABELS, 1, rho=0.0)
    mixed = render_mixed_images(pixels, trace.partner, trace.replaced, cells)
    expected = pixels.clone()
    for image in range(4):
        for row in range(rows):
            for column in range(columns):
                if trace.replaced[image, row, column]:
                    top, bottom = cells.rows[row], cells.rows[row + 1]
                    left, right = cells.columns[column], cells.columns[column + 1]
                    part = pixels[trace.partner[image], :, top:bottom, left:right]
                    expected[image, :, top:bottom, left:right] = part
    assert torch.equal(mixed, expected) and not torch.equal(mixed, pixels)


def test_compute_token_grid_cells_contain_the_pixels_of_tokens(build):
    """Changing a pixel changes the token of its cell, and no other token if tokens are patches."""
    model = build(position_embedding="none") if "cct" in build().config.model_type else build()
    size = build.images.shape[2:]
    cells, (_, columns) = compute_token_grid(model, *size), model.token_grid(*size)
    before = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(5))
    for row, column in [(0, 0), (5, 9), (11, 3)]:
        after = before.clone()
        after[..., row, column] += 100.0
        one, other = (
            layer_inputs(model, pixels)[0].hidden[0, model.config.num_prefix_tokens :] for pixels in (before, after)
        )
        changed = (one != other).any(dim=1).nonzero().flatten().tolist()
        token = sum(edge <= row for edge in cells.rows[1:]) * columns + sum(
            edge <= column for edge in cells.columns[1:]
        )
        assert token in changed and (changed == [token] or not cells.exact)


def test_compute_token_grid_size_not_multiple_of_patch_size():
    model = build_tiny("vit", image_size=12, patch_size=4)
    assert compute_token_grid(model, 13, 22) == TokenGrid((0, 4, 8, 12), (0, 4, 8, 12, 16, 20), exact=True)


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (saliency_maps, {"layer": 4}, "layer must be between 0 and 3, got 4"),
        (saliency_maps, {"layer": -1}, "layer must be between 0 and 3, got -1"),
        (trace_vertical_memory, {"layer": 0}, "between 1 and 3, got 0 .layer 0 has no earlier layers"),
        (trace_vertical_memory, {"layer": 1, "kappa": 0}, "kappa must be between 1 and .*, got 0"),
        (trace_vertical_memory, {"layer": 1, "kappa": 61}, "number of patch tokens, (15|16|60), got 61"),
        (trace_horizontal_mixup, {"layer": 2, "tau": 1.0}, "layer 2 has none .* Omit tau"),
        (trace_horizontal_mixup, {"layer": 1, "rho": -0.1}, "rho must be at least 0, got -0.1"),
        (saliency_maps, {"layer": 1, "targets": torch.tensor([0, 1])}, r"shape \(B,\) = \(4,\)"),
        (trace_horizontal_mixup, {"layer": 1, "targets": torch.tensor([0, 1, 2, 5])}, "got 5 for image 3"),
    ],
)
def test_invalid_arguments_raise(build, function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(build(horizontal_layers=[1]), build.images, **{"targets": LABELS} | arguments)


def test_layer_inputs_of_plain_model_raises():
    with pytest.raises(ValueError, match="loaded with load_classifier, got ViTForImageClassification"):
        layer_inputs(plain_vit(), torch.zeros(1, 3, 8, 8))
