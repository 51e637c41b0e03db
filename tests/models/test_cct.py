"""Compact Transformers without TokenMixup."""

import json

import pytest
import torch
from helpers import golden_cases
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from hf_tokenmixup.models import (
    CctConfig,
    CctForImageClassification,
    CctModel,
    TokenMixupCctConfig,
    TokenMixupCctForImageClassification,
)

COUNTS = json.loads((golden_cases.FOLDER / "param_counts.json").read_text())
UPSTREAM = COUNTS["upstream_compact_transformers/100cls"]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "config, expected",
    [
        (CctConfig.cct_7_3x1(num_labels=100), COUNTS["cct_7_3x1_32/100cls/baseline"]["total"]),
        (CctConfig.cct_7_3x1(num_labels=10), COUNTS["cct_7_3x1_32/10cls/baseline"]["total"]),
        (CctConfig.cvt_6_4(num_labels=100), UPSTREAM["cvt_6_4_32"]["total"]),
        (CctConfig.cvt_6_4(num_labels=100, num_hidden_layers=7), UPSTREAM["cvt_7_4_32"]["total"]),
        (CctConfig.vit_lite_6_4(num_labels=100), UPSTREAM["vit_6_4_32"]["total"]),
        (CctConfig.vit_lite_7_4(num_labels=100), UPSTREAM["vit_7_4_32"]["total"]),
    ],
)
def test_cct_parameter_counts_match_released_models(config, expected):
    assert parameters(CctForImageClassification(config)) == expected


@pytest.mark.parametrize("classes", [10, 100])
def test_cct_parameter_counts_with_tokenmixup(classes):
    def count(**settings):
        return parameters(TokenMixupCctForImageClassification(TokenMixupCctConfig(num_labels=classes, **settings)))

    for name, settings in {
        "baseline": {},
        "htm": {"horizontal_layers": [2]},
        "vtm": {"vertical_layers": [2]},
        "htm_vtm": {"horizontal_layers": [3], "vertical_layers": [2]},
    }.items():
        assert count(**settings) == COUNTS[f"cct_7_3x1_32/{classes}cls/{name}"]["total"]


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_conv_layers": 2},
        {"conv_kernel_size": 7, "conv_padding": 3, "conv_stride": 2},
        {"tokenizer": "patch"},
        {"tokenizer": "patch", "patch_size": 8, "pooling": "cls"},
        {"image_size": [24, 40], "position_embedding": "none"},
        {"image_size": (24, 40), "position_embedding": "sinusoidal", "pooling": "cls"},
    ],
)
def test_cct_number_of_tokens_matches_config(changes):
    config = CctConfig(**SMALL, **changes)
    model = CctModel(config).eval()
    size = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
    hidden = model(torch.randn(2, 3, *size)).last_hidden_state
    assert hidden.shape == (2, config.num_patch_tokens + config.num_prefix_tokens, 16)


def test_cct_learned_positions_other_size_raises_or_interpolates():
    config = CctConfig(**SMALL, pooling="cls")
    model = CctForImageClassification(config).eval()
    images = torch.randn(2, 3, 48, 32)
    with pytest.raises(ValueError, match="for images of 32x32 pixels, got 48x32.*interpolate_pos_encoding=True"):
        model(images)
    positions = model.cct.embeddings.learned_positions(48, 32, True)
    grid = config.grid_size(48, 32)
    assert positions.shape == (1, 1 + grid[0] * grid[1], 16)
    own = model.cct.embeddings.position_embeddings
    assert torch.equal(positions[:, 0], own[:, 0])
    across = positions[:, 1:].unflatten(1, grid).mean(dim=(1, 2))
    torch.testing.assert_close(across, own[:, 1:].mean(dim=1), atol=0.05, rtol=0)
    assert model(images, interpolate_pos_encoding=True).logits.shape == (2, 2)
    free = CctForImageClassification(CctConfig(**SMALL, position_embedding="sinusoidal"))
    assert free(images).logits.shape == (2, 2)


def test_cct_initialization_matches_released_code():
    torch.manual_seed(0)
    model = CctForImageClassification(CctConfig(num_labels=100, pooling="cls"))
    assert model.cct.embeddings.position_embeddings.std().item() == pytest.approx(0.2 * 0.88, rel=0.15)
    assert not model.cct.embeddings.cls_token.any() and not model.classifier.bias.any()
    assert model.cct.layers[0].linear1.weight.std().item() == pytest.approx(0.02, rel=0.15)
    fan_in = 3 * 3 * 3
    tokenizer = model.cct.embeddings.tokenizer.layers[0].weight
    assert tokenizer.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)


def test_cct_drop_path_rate_is_linear():
    model = CctModel(CctConfig(**{**SMALL, "num_hidden_layers": 5}, drop_path_rate=0.2))
    assert [layer.drop_path.drop_prob for layer in model.layers] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_cct_auto_classes_are_registered(tmp_path):
    model = CctForImageClassification(CctConfig(**SMALL, num_labels=3))
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is CctConfig
    opened = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(opened) is CctForImageClassification
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in weights.items())
    headless = AutoModel.from_pretrained(tmp_path)
    assert type(headless) is CctModel
    assert torch.equal(headless.norm.weight, model.cct.norm.weight)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer": "conv"}, "tokenizer"),
        ({"pooling": "mean"}, "pooling"),
        ({"position_embedding": "sine"}, "position_embedding"),
        ({"hidden_size": 18, "num_attention_heads": 4}, "multiple of num_attention_heads"),
    ],
)
def test_cct_invalid_config_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        CctConfig(**changes)


def test_cct_other_number_of_channels_raises():
    with pytest.raises(ValueError, match="Expected images with 3 channels, got 1"):
        CctModel(CctConfig(**SMALL))(torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize("layers", [1, 2])
def test_cct_tokenizer_pooling_before_relu_matches_released_order(layers):
    torch.manual_seed(0)
    tokenizer = CctModel(CctConfig(hidden_size=16, num_conv_layers=layers, num_attention_heads=2)).embeddings.tokenizer
    images = torch.randn(2, 3, 32, 32)

    def released_order(hidden):
        for convolution in tokenizer.layers:
            hidden = tokenizer.pool(convolution(hidden.contiguous(memory_format=torch.channels_last)).relu())
        return hidden.flatten(2).transpose(1, 2)

    results = []
    for run in (tokenizer, released_order):
        pixels = images.clone().requires_grad_()
        tokens = run(pixels)
        weights = [convolution.weight for convolution in tokenizer.layers]
        results.append([tokens, *torch.autograd.grad(tokens.square().sum(), [pixels, *weights])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
