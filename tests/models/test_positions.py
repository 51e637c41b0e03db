"""Other image sizes: interpolated positions and uncovered pixels."""

import logging

import pytest
import torch
from helpers.families import build_tiny
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_tokenmixup.models import (
    FAMILIES,
    CctConfig,
    CctForImageClassification,
    TokenMixupCctForImageClassification,
    TokenMixupViTConfig,
    TokenMixupViTForImageClassification,
    border_hint,
    load_classifier,
)

SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
VIT = SIZE | {"image_size": 16, "patch_size": 4}


def logits(model, height, width, **kwargs):
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(pixel_values=images, **kwargs).logits


@pytest.fixture
def vit(tmp_path):
    model = ViTForImageClassification(ViTConfig(**VIT))
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("size", [24, 8, [24, 40]])
@pytest.mark.parametrize("ignore", [False, True])
def test_from_pretrained_vit_at_another_size_interpolates_positions(vit, tmp_path, caplog, size, ignore):
    model = TokenMixupViTForImageClassification.from_pretrained(
        tmp_path, image_size=size, horizontal_layers=[1], ignore_mismatched_sizes=ignore
    )
    height, width = size if isinstance(size, list) else (size, size)
    expected = logits(vit, height, width, interpolate_pos_encoding=True)
    assert torch.equal(logits(model, height, width), expected)
    assert torch.equal(logits(model.to_plain_model(), height, width), expected)
    assert model.config.image_size == size
    assert f"grid of 4x4 tokens. Its positions are interpolated to {height // 4}x{width // 4}" in caplog.text


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("given", [{"image_size": 24}, {"config_overrides": {"image_size": 24}}])
def test_load_classifier_at_another_size_interpolates_positions(vit, tmp_path, plain, given):
    model = load_classifier(str(tmp_path), plain=plain, **given)
    assert torch.equal(logits(model, 24, 24), logits(vit, 24, 24, interpolate_pos_encoding=True))


def test_load_classifier_of_another_family_interpolates_positions(tmp_path):
    deit = DeiTForImageClassification(DeiTConfig(**VIT))  # with two prefix tokens
    deit.save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), config_overrides={"image_size": [24, 32]})
    assert torch.equal(logits(model, 24, 32), logits(deit, 24, 32, interpolate_pos_encoding=True))


@pytest.mark.parametrize("pooling", ["sequence", "cls"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
def test_from_pretrained_cct_of_wide_images_interpolates_positions(tmp_path, pooling, positions):
    config = CctConfig(**SIZE, image_size=[16, 24], pooling=pooling, position_embedding=positions)
    cct = CctForImageClassification(config)
    cct.save_pretrained(tmp_path)
    model = TokenMixupCctForImageClassification.from_pretrained(tmp_path, image_size=[24, 40], vertical_layers=[2])
    assert torch.equal(logits(model, 24, 40), logits(cct, 24, 40, interpolate_pos_encoding=True))


def test_from_pretrained_vertical_kappa_above_tokens_of_checkpoint(vit, tmp_path):
    model = TokenMixupViTForImageClassification.from_pretrained(
        tmp_path, image_size=24, vertical_layers=[2], vertical_kappa=20
    )
    assert model.config.vertical_kappa == 20
    output = model.train()(pixel_values=torch.randn(2, 3, 24, 24), labels=torch.tensor([0, 1]))
    assert output.mixing_metrics["vertical_tokens"] == 2 * 2 * 20


def test_from_pretrained_with_other_patches_interpolates_positions(vit, tmp_path):
    model = TokenMixupViTForImageClassification.from_pretrained(
        tmp_path, image_size=16, patch_size=8, ignore_mismatched_sizes=True
    )
    assert model.vit.embeddings.position_embeddings.shape == (1, 5, 16)
    cls = model.vit.embeddings.position_embeddings[:, 0]
    assert torch.equal(cls, vit.vit.embeddings.position_embeddings[:, 0])


def test_from_pretrained_half_precision_is_float32_unless_asked(vit, tmp_path):
    vit.half().save_pretrained(tmp_path)
    model_class = TokenMixupViTForImageClassification
    assert model_class.from_pretrained(tmp_path).dtype == torch.float32
    assert model_class.from_pretrained(tmp_path, image_size=24).dtype == torch.float32
    assert model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert model_class.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16


def test_border_hint_names_uncovered_pixels_and_sizes():
    hint = border_hint(TokenMixupViTConfig(**VIT | {"image_size": [18, 16]}))
    assert "Images of 18x16" in hint and "patches of 4x4" in hint and "last 2 rows and 0 columns" in hint
    assert "image_size 16 or [20, 16]" in hint
    assert border_hint(TokenMixupViTConfig(**VIT)) is None


@pytest.mark.parametrize(
    "tokenizer, lost",
    [
        ({}, 0),
        ({"tokenizer": "patch", "patch_size": 4}, 2),
        ({"conv_kernel_size": 4, "conv_stride": 4, "conv_padding": 0, "pooling_stride": 1}, 2),
        ({"num_conv_layers": 2}, 0),
    ],
)
def test_uncovered_pixels_have_no_gradient(tokenizer, lost):
    config = CctConfig(**SIZE, image_size=18, position_embedding="none", **tokenizer)
    images = torch.rand(1, 3, 18, 18, requires_grad=True)
    tokens = CctForImageClassification(config).cct.embeddings.tokenizer.layers
    hidden = images
    for layer in tokens:
        hidden = layer(hidden)
        if config.tokenizer == "convolution":
            window = (config.pooling_kernel_size, config.pooling_stride, config.pooling_padding)
            hidden = torch.nn.functional.avg_pool2d(hidden, *window)
    hidden.sum().backward()
    assert config.uncovered_pixels(18) == lost == int((images.grad.abs().sum((0, 1, 2)) == 0).sum())


def test_model_with_uncovered_pixels_warns(caplog):
    with caplog.at_level(logging.WARNING):
        TokenMixupViTForImageClassification(TokenMixupViTConfig(**VIT | {"image_size": 22}))
        load_classifier(model_type="vit", from_scratch=True, plain=True, config_overrides=VIT | {"image_size": 23})
    assert "Images of 22x22" in caplog.text and "Images of 23x23" in caplog.text


@pytest.mark.parametrize("model_type", ["siglip", "clip", "metaclip_2"])
@pytest.mark.parametrize("size", [30, [30, 30], 10])
def test_load_classifier_of_vision_config_at_another_size_interpolates_positions(model_type, size, tmp_path):
    plain = build_tiny(model_type).to_plain_model()
    plain.save_pretrained(tmp_path)
    side = size if isinstance(size, int) else size[0]
    expected = logits(plain, side, side, interpolate_pos_encoding=True)
    for given in (
        {"image_size": size},
        {"config_overrides": {"image_size": side}},
        {"plain": True, "image_size": size},
    ):
        model = load_classifier(str(tmp_path), **given)
        assert torch.equal(logits(model, side, side), expected)
        assert model.config.vision_config.image_size == model.vision_model.config.image_size == side
    model = FAMILIES[model_type][1].from_pretrained(tmp_path, image_size=size, vertical_layers=[2])
    assert torch.equal(logits(model.to_plain_model(), side, side), expected)
    model.to_plain_model().save_pretrained(tmp_path / "exported")
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "exported")
    assert torch.equal(logits(opened, side, side), expected)


@pytest.mark.parametrize("plain", [False, True])
def test_load_classifier_of_vision_config_at_wide_size_raises(tmp_path, plain):
    build_tiny("clip").to_plain_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"image_size .* one number"):
        load_classifier(str(tmp_path), plain=plain, image_size=[20, 30])


def test_load_classifier_from_scratch_nests_overrides_in_vision_config():
    sizes = {name: value for name, value in VIT.items() if name not in ("num_labels", "image_size")}
    model = load_classifier(model_type="siglip", from_scratch=True, image_size=24, config_overrides=sizes)
    network = model.config.network
    assert (network.hidden_size, network.num_layers) == (16, 3)
    assert (network.image_size, network.patch_size) == ((24, 24), (4, 4))
    with pytest.raises(ValueError, match="no attribute 'hiden_size': did you mean 'hidden_size'"):
        load_classifier(model_type="siglip", from_scratch=True, config_overrides={"hiden_size": 8})
