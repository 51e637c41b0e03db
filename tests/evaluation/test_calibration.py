"""Forecasts against brute force, against full attention maps, and against the training forward pass."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.families import WITH_MAPS, build_tiny
from helpers.tiny_training import plain_vit
from scipy.optimize import linear_sum_assignment

from hf_tokenmixup.evaluation import calibration
from hf_tokenmixup.evaluation.calibration import calibrate, forecast_settings
from hf_tokenmixup.evaluation.scorenet_fit import fit_scorenet_difficulty
from hf_tokenmixup.models.layer_inputs import layer_inputs

CASES = {name: (name, {"initializer_factor": 8.0} if "clip" in name else {}) for name in WITH_MAPS} | {
    "vit, mean query": ("vit", {"saliency_query": "mean"}),
    "cct, convolution": ("cct", {"tokenizer": "convolution"}),
}
# For code that does not depend on the attention of a family.
general = pytest.mark.parametrize("build", ["vit", "cct, convolution"], indirect=True)
IMAGE_SIZES = [(20, 20), (15, 25)]
RHO, TAU, KAPPA = (0.2, 0.6, 4.0), (0.1, 0.5, 1.0), (1, 3, 6)


@pytest.fixture(params=CASES)
def build(request):
    model_type, settings = CASES[request.param]
    settings = {"initializer_range": 0.3, "hidden_dropout_prob": 0.0} | settings
    return lambda **changes: build_tiny(model_type, **settings | changes)


def make_batches(height=20, width=20, sizes=(8, 6)):
    """Batches of images of different contrast, so that their saliency differs."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for size in sizes:
        pixels = torch.randn(size, 3, height, width, generator=generator)
        pixels = pixels * torch.linspace(0.2, 3, size).view(-1, 1, 1, 1)
        batches.append({"pixel_values": pixels, "labels": torch.randint(5, (size,), generator=generator)})
    return batches


def attention_maps(build, batch, **changes):
    """Attention (B, H, N, N) and input (B, N, D) of each layer, from the eager implementation of transformers."""
    model = build(attn_implementation="eager", **changes).eval()
    with torch.no_grad():
        kwargs = {"output_attentions": True, "output_hidden_states": True, "interpolate_pos_encoding": True}
        output = model(batch["pixel_values"], **kwargs)
    return output.attentions, output.hidden_states, model


def read_saliency(attention, config):
    attention = attention.mean(dim=1)
    rows = attention[:, 0] if config.effective_saliency_query == "cls" else attention.mean(dim=1)
    return rows[:, config.num_prefix_tokens :]


def mix_by_hand(saliency, rho):
    """Mixed images, replaced fractions and label weights of mixed images, and both gains, with loops over images."""
    size = len(saliency)
    gain = [[(saliency[j] - saliency[i] - rho).clamp(min=0).sum().item() for j in range(size)] for i in range(size)]
    rows, columns = linear_sum_assignment(gain, maximize=True)
    fractions, weights = [], []
    for i, j in zip(rows, columns, strict=True):
        replaced = saliency[j] - saliency[i] > rho
        if replaced.any():
            received, retained = saliency[j][replaced].sum(), saliency[i][~replaced].sum()
            fractions.append(replaced.float().mean().item())
            weights.append((received / (received + retained)).item())
    matched = sum(gain[i][j] for i, j in zip(rows, columns, strict=True))
    return fractions, weights, matched, sum(map(sum, gain)) / size


@pytest.mark.parametrize("height, width", IMAGE_SIZES)
def test_calibrate_saliency_and_rho_match_brute_force(build, height, width):
    batches = make_batches(height, width)
    result = calibrate(build(), batches, rho_ladder=RHO)
    maps = [attention_maps(build, batch) for batch in batches]
    num_images = result.num_images
    assert (num_images, result.batch_size, result.num_labels) == (14, 8, 5)
    assert [layer.layer for layer in result.layers] == [0, 1, 2, 3]
    for layer in result.layers:
        config = maps[0][2].config
        saliency = [read_saliency(attentions[layer.layer], config) for attentions, *_ in maps]
        tokens = torch.cat(saliency)
        num_tokens = tokens.shape[1]
        assert result.num_patch_tokens == num_tokens
        assert layer.saliency_mean == pytest.approx(tokens.mean().item(), rel=1e-5)
        assert layer.saliency_std == pytest.approx(tokens.std(correction=0).item(), rel=1e-4)
        assert layer.saliency_mean_relative == pytest.approx(tokens.mean().item() * num_tokens, rel=1e-5)
        assert layer.saliency_std_relative == pytest.approx(layer.saliency_std * num_tokens)
        assert layer.patch_attention == pytest.approx(tokens.sum().item() / num_images, rel=1e-5)
        for relative, forecast in zip(RHO, layer.rho, strict=True):
            by_hand = [mix_by_hand(batch, relative / num_tokens) for batch in saliency]
            fractions, weights = (sum((list(part[i]) for part in by_hand), []) for i in (0, 1))
            matched, random = (sum(part[i] for part in by_hand) for i in (2, 3))
            assert forecast.horizontal_rho_relative == relative
            assert forecast.horizontal_rho == relative / num_tokens
            assert forecast.images_mixed == len(fractions) / num_images
            assert forecast.tokens_replaced == pytest.approx(sum(fractions) / max(len(fractions), 1))
            # With few tokens above a large rho, several assignments have the same gain, and similar label weights.
            assert forecast.label_mass == pytest.approx(sum(weights) / max(len(weights), 1), rel=1e-2)
            assert forecast.matched_gain == pytest.approx(matched / num_images, rel=1e-4, abs=1e-6)
            assert forecast.random_gain == pytest.approx(random / num_images, rel=1e-4, abs=1e-6)
    replaced = [forecast.tokens_replaced for layer in result.layers for forecast in layer.rho]
    assert max(replaced) > 2 * min(replaced)


@pytest.mark.parametrize("height, width", IMAGE_SIZES)
def test_calibrate_attention_mass_matches_softmax_over_memory(build, height, width):
    (batch,) = make_batches(height, width, sizes=(5,))
    result = calibrate(build(), [batch], kappa_ladder=KAPPA)
    attentions, inputs, model = attention_maps(build, batch)
    prefix = model.config.num_prefix_tokens
    assert result.layers[0].kappa == ()
    for measured, kappa in itertools.product(result.layers[1:], KAPPA):
        index = measured.layer
        collected = []
        for hidden, attention in zip(inputs[:index], attentions[:index], strict=True):
            order = read_saliency(attention, model.config).argsort(dim=1, descending=True)[:, :kappa] + prefix
            collected.append(torch.stack([tokens[chosen] for tokens, chosen in zip(hidden, order, strict=True)]))
        vertical = build(attn_implementation="eager", vertical_layers=[index], vertical_kappa=kappa).eval()
        layer = vertical.get_transformer_layers()[index]
        hidden, layer_kwargs = layer_inputs(vertical, batch["pixel_values"])[index]
        outputs = []
        layer.attention_module.register_forward_hook(lambda module, args, output, seen=outputs: seen.append(output))
        with torch.no_grad():
            layer.base_forward(hidden, memory=torch.cat(collected, dim=1), **{"attention_mask": None} | layer_kwargs)
        probabilities = outputs[-1][1]
        assert probabilities.shape[-1] == hidden.shape[1] + index * kappa
        mass = probabilities[..., hidden.shape[1] :].sum(dim=-1).mean().item()
        forecast = measured.kappa[KAPPA.index(kappa)]
        assert (forecast.vertical_kappa, forecast.collected_tokens) == (kappa, index * kappa)
        assert forecast.attention_mass == pytest.approx(mass, rel=1e-4)


@general
def test_calibrate_attention_mass_of_limited_images_is_that_of_first_images(build, monkeypatch):
    batches = make_batches()
    complete = calibrate(build(), [{name: tensor[:3] for name, tensor in batches[0].items()}])
    monkeypatch.setattr(calibration, "MAX_MEMORY_IMAGES", 3)
    monkeypatch.setattr(calibration, "MAX_FORWARD_IMAGES", 2)
    monkeypatch.setattr(calibration, "MAX_ATTENTION_MAP_ELEMENTS", 1)
    limited = calibrate(build(), batches)
    for first, second in zip(complete.layers, limited.layers, strict=True):
        for expected, forecast in zip(first.kappa, second.kappa, strict=True):
            assert forecast.attention_mass == pytest.approx(expected.attention_mass, rel=1e-5)


@pytest.mark.parametrize("rho", [{"horizontal_rho_relative": 0.4}, {"horizontal_rho": 0.01}])
@pytest.mark.parametrize("relabel", ["saliency", "count"])
def test_forecast_settings_equals_training_forward(build, rho, relabel):
    batches = make_batches()
    for layer in (0, 2):
        model = build(horizontal_layers=[layer], horizontal_tau=None, relabel=relabel, **rho)
        forecast = forecast_settings(model, batches).horizontal[layer]
        assert model.training
        records, weights = [], []
        for batch in batches:
            # The labels of an image and its partner differ, so that the new label shows the weights.
            labels = torch.arange(len(batch["labels"]))
            wide = build(
                horizontal_layers=[layer], horizontal_tau=None, relabel=relabel, num_labels=len(labels), **rho
            )
            output = wide(pixel_values=batch["pixel_values"], labels=labels)
            weights.append(1 - output.targets.diagonal())
            records.append(model(**batch).horizontal[0])
        replaced = torch.cat([record.replaced for record in records])
        mixed = replaced.any(dim=1)
        assert mixed.sum() > 0 and replaced.float().mean() < 0.9
        assert forecast.images_mixed == mixed.double().mean().item()
        assert forecast.tokens_replaced == pytest.approx(replaced[mixed].double().mean().item(), abs=1e-12)
        assert forecast.label_mass == pytest.approx(torch.cat(weights)[mixed].mean().item(), rel=1e-5)


def test_forecast_settings_of_all_layers_has_values_of_calibrate(build):
    model = build(horizontal_layers=[0, 2], vertical_layers=[1, 3], vertical_kappa=3, horizontal_rho_relative=0.6)
    forecast, result = forecast_settings(model, make_batches()), calibrate(model, make_batches())
    assert {*forecast.horizontal} == {0, 2} and {*forecast.vertical} == {1, 3}
    expected = calibrate(model, make_batches(), [0, 2], rho_ladder=[0.6]).layers
    assert [forecast.horizontal[layer.layer].images_mixed for layer in expected] == [
        layer.rho[0].images_mixed for layer in expected
    ]
    for index in (1, 3):
        (kappa,) = [item for item in result.layers[index].kappa if item.vertical_kappa == 3]
        assert forecast.vertical[index].collected_tokens == kappa.collected_tokens
        assert forecast.vertical[index].attention_mass == pytest.approx(kappa.attention_mass, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_forecast_settings_with_rollout_equals_training_forward(build, steps):
    model = build(horizontal_layers=[1], horizontal_tau=None, horizontal_rho_relative=0.1, rollout_steps=steps)
    (batch,) = make_batches(sizes=(8,))
    forecast = forecast_settings(model, [batch]).horizontal[1]
    replaced = model(**batch).horizontal[0].replaced
    assert replaced.any() and forecast.images_mixed == replaced.any(dim=1).double().mean().item()
    mixed = replaced[replaced.any(dim=1)]
    assert forecast.tokens_replaced == pytest.approx(mixed.double().mean().item(), abs=1e-12)


def test_forecast_settings_with_gradient_detector_equals_training_forward(build):
    model = build(
        horizontal_layers=[1], horizontal_tau=None, horizontal_rho_relative=0.3, saliency_detector="gradient"
    )
    (batch,) = make_batches(sizes=(8,))
    forecast = forecast_settings(model, [batch]).horizontal[1]
    replaced = model(**batch).horizontal[0].replaced
    assert replaced.any() and forecast.images_mixed == replaced.any(dim=1).double().mean().item()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_calibrate_trained_scorenet_is_used_as_it_is(build):
    model, batches = build(horizontal_layers=[2]), make_batches()
    result = calibrate(model, batches, [1, 2], tau_ladder=TAU)
    assert [layer.scorenet for layer in result.layers] == ["fitted", "trained"]
    losses = []
    for batch in batches:
        _, inputs, eager = attention_maps(build, batch, horizontal_layers=[2])
        with torch.no_grad():
            logits = eager.get_transformer_layers()[2].scorenet(inputs[2])
        losses.append(F.cross_entropy(logits, batch["labels"], reduction="none"))
    losses = torch.cat(losses)
    measured = result.layers[1]
    assert measured.difficulty == pytest.approx(losses.mean().item(), rel=1e-5)
    for relative, forecast in zip(TAU, measured.tau, strict=True):
        tau = relative * math.log(5)
        assert (forecast.horizontal_tau_relative, forecast.horizontal_tau) == (relative, tau)
        assert forecast.easy_images == (losses < tau).double().mean().item()
    assert calibrate(model, batches, [2], fit_scorenet=True).layers[0].scorenet == "fitted"


@general
def test_calibrate_is_reproducible_and_does_not_change_the_model(build):
    model = build(hidden_dropout_prob=0.5, saliency_detector="random", assignment="random", token_selection="random")
    model.get_transformer_layers()[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (calibrate(model, make_batches(), seed=3) for _ in range(2))
    assert first == second != calibrate(model, make_batches(), seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and not model.get_transformer_layers()[2].training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@general
def test_calibrate_to_dict_is_json_with_all_numbers(build):
    result = calibrate(build(), make_batches(), [1, 3])
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert [layer["layer"] for layer in values["layers"]] == [1, 3]
    assert values["layers"][1]["rho"][2]["images_mixed"] == result.layers[1].rho[2].images_mixed
    assert values["layers"][0]["tau"][4]["horizontal_tau_relative"] == 0.43
    num_tokens = result.num_patch_tokens
    assert [item["vertical_kappa"] for item in values["layers"][0]["kappa"]] == [
        *(kappa for kappa in (1, 3, 5, 10, 20, 50) if kappa < num_tokens),
        num_tokens,
    ]
    settings = build(**values["suggestion"]).config
    assert settings.horizontal_layers == [1] and settings.vertical_layers == [3]


@general
def test_calibrate_accepts_class_distributions(build):
    batches = make_batches()
    soft = [batch | {"labels": F.one_hot(batch["labels"], 5).float()} for batch in batches]
    assert calibrate(build(), soft, [1]) == calibrate(build(), batches, [1])


@general
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": [4]}, "layer must be between 0 and 3, got 4"),
        ({"layers": []}, "layers must name at least one layer"),
        ({"rho_ladder": [-1.0]}, "rho_ladder must have one or more values of at least 0, got \\[-1.0\\]"),
        ({"tau_ladder": []}, "tau_ladder must have one or more values"),
        ({"kappa_ladder": [1000]}, "kappa must be between 1 and the number of patch tokens, [0-9]+, got \\[1000\\]"),
    ],
)
def test_calibrate_with_wrong_argument_raises(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate(build(), make_batches(), **arguments)


@general
def test_calibrate_with_one_image_raises(build):
    with pytest.raises(ValueError, match="needs at least 2 images, .* got 1"):
        calibrate(build(), make_batches(sizes=(1,)))


@general
def test_calibrate_with_non_finite_weights_raises(build):
    model = build()
    with torch.no_grad():
        model.get_transformer_layers()[1].pre_norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="The saliency of layer 1 is not finite"):
        calibrate(model, make_batches(), [1])


def test_calibrate_plain_model_raises():
    with pytest.raises(ValueError, match="Expected a ViT or CCT with TokenMixup"):
        calibrate(plain_vit(), make_batches())


def test_fit_scorenet_difficulty_of_separable_features_is_low_and_of_noise_is_chance():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=generator)
    targets, noise = F.one_hot(labels, 4).float(), torch.randn(200, 16, generator=generator)
    features = 5.0 + noise
    features[:, :4] += 8 * targets
    separable = fit_scorenet_difficulty(features, targets, torch.Generator().manual_seed(1))
    assert len(separable) == 100 and separable.mean() < 0.2
    chance = fit_scorenet_difficulty(noise, targets, torch.Generator().manual_seed(1))
    assert 1.2 < chance.mean() <= math.log(4) + 1e-6
    # Features that are the same for all images, such as the CLS token of layer 0.
    constant = fit_scorenet_difficulty(torch.ones(200, 16), targets, torch.Generator().manual_seed(1))
    assert chance.mean() > 1.2 and constant.mean() == pytest.approx(math.log(4), abs=0.05)


def test_fit_scorenet_difficulty_measures_images_that_were_not_fitted():
    targets = F.one_hot(torch.arange(40) % 4, 4).float()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    # Only the fitted half has a feature that shows the class.
    features = torch.zeros(40, 8)
    features[order[:20], :4] = targets[order[:20]]
    losses = fit_scorenet_difficulty(features, targets, torch.Generator().manual_seed(1))
    assert losses.mean() > 1.3
