"""Loading, saving and export of all model families."""

import logging

import pytest
import torch
from helpers.families import BOTH, SIZE
from helpers.family_steps import CLEAN, layer_path, loading_info, plain_classes
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

from hf_tokenmixup.models import TokenMixupViTForImageClassification, load_classifier


def test_model_that_needs_newer_transformers_raises(build, monkeypatch):
    model_class, config = type(build()), build().config
    monkeypatch.setattr(model_class, "min_transformers_version", "99.1")
    with pytest.raises(
        ValueError, match=r"needs transformers 99.1 or newer, found .*pip install 'transformers>=99.1'"
    ):
        model_class(config)


def test_from_pretrained_loads_plain_checkpoint(build, tmp_path, caplog):
    model = build()
    plain_class, config_class = plain_classes(model)
    plain = plain_class(config_class.from_dict(model.config.to_dict()))
    plain.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model, info = loading_info(type(model), tmp_path, **BOTH)
    assert info == CLEAN
    said = [record.message for record in caplog.records if "ScoreNet" in record.message]
    path = layer_path(model)
    (message,) = said
    assert message.startswith("ScoreNet is newly initialized, as for every model that is not a training checkpoint")
    assert message.endswith(f"there is no {path}.1.scorenet.")
    weights = model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items())
    scorenet = model.get_transformer_layers()[1].scorenet.classifier
    assert scorenet.weight.std().item() == pytest.approx(0.2, rel=0.3) and not scorenet.bias.any()


def test_from_pretrained_loads_checkpoint_of_transformers_4(tmp_path):
    from safetensors.torch import load_file

    ViTForImageClassification(ViTConfig(**SIZE)).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names
    _, info = loading_info(TokenMixupViTForImageClassification, tmp_path, **BOTH)
    assert info == CLEAN


def test_from_pretrained_checkpoint_without_classifier(tmp_path):
    ViTModel(ViTConfig(**SIZE), add_pooling_layer=False).save_pretrained(tmp_path)
    _, info = loading_info(TokenMixupViTForImageClassification, tmp_path, **BOTH)
    # The classifier alone, but for transformers 5.9, which finds no layer of such a checkpoint.
    assert info == loading_info(ViTForImageClassification, tmp_path)[1]
    assert {"classifier.bias", "classifier.weight"} <= set(info["missing_keys"])


def test_from_pretrained_other_number_of_classes(build, tmp_path):
    first = build(**BOTH)
    first.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(first).from_pretrained(tmp_path, num_labels=3)
    model = type(first).from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    classifier = model.get_submodule(build.case.classifier)
    assert classifier.out_features == model.get_transformer_layers()[1].scorenet.classifier.out_features == 3
    assert model.train()(torch.randn(2, 3, 20, 20), labels=torch.tensor([0, 2])).loss.isfinite()


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_save_and_load_keeps_weights_and_settings(build, pooling, tmp_path):
    model = build(**BOTH, scorenet_pooling=pooling)
    model.save_pretrained(tmp_path)
    again, info = loading_info(type(model), tmp_path)
    assert info == CLEAN
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys() and any("scorenet" in name for name in weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert again.config.to_diff_dict().items() >= BOTH.items()


def test_disabling_htm_drops_scorenet_without_warning(build, tmp_path):
    model = build(**BOTH)
    model.save_pretrained(tmp_path)
    _, info = loading_info(type(model), tmp_path, horizontal_layers=[])
    assert info == CLEAN


def test_to_plain_model_returns_base_model(build, tmp_path, images):
    model = build(**BOTH).eval()
    exported = model.to_plain_model()
    plain_class, _ = plain_classes(model)
    assert type(exported) is plain_class and not exported.training
    exported_classifier, classifier = (item.get_submodule(build.case.classifier) for item in (exported, model))
    assert exported_classifier.weight.data_ptr() == classifier.weight.data_ptr()
    exported.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 20, "width": 20}).save_pretrained(tmp_path)
    for model_class in (plain_class, AutoModelForImageClassification):
        opened, info = loading_info(model_class, tmp_path)
        assert info == CLEAN and type(opened) is plain_class
        weights = opened.state_dict()
        kept = {name: tensor for name, tensor in model.state_dict().items() if "scorenet" not in name}
        assert weights.keys() == kept.keys() and all(torch.equal(weights[name], kept[name]) for name in kept)
        torch.testing.assert_close(opened.eval()(images).logits, model(images).logits, atol=1e-6, rtol=1e-6)
    ours, info = loading_info(type(model), tmp_path)
    assert info == CLEAN and ours.config.horizontal_layers == [1] and ours.config.horizontal_tau is None

    from PIL import Image

    classify = pipeline("image-classification", model=str(tmp_path))
    assert len(classify(Image.new("RGB", (40, 30), "red"))) == 5


def test_push_to_hub_uploads_base_model(build, monkeypatch):
    pushed = []
    model = build(**BOTH)
    plain_class, _ = plain_classes(model)
    monkeypatch.setattr(plain_class, "push_to_hub", lambda self, *a, **k: pushed.append((self, a, k)))
    model.push_to_hub("user/repo", private=True)
    ((model, args, kwargs),) = pushed
    assert type(model) is plain_class and args == ("user/repo",) and kwargs == {"private": True}
    assert not any("scorenet" in name for name in model.state_dict())


def test_load_at_another_image_size_interpolates_as_the_plain_model_and_mixes_all_tokens(build, tmp_path):
    settings = {
        "horizontal_layers": [1],
        "horizontal_tau": None,
        "horizontal_rho_relative": 0.1,
        "vertical_layers": [2],
    }
    build().to_plain_model().save_pretrained(tmp_path)
    plain = load_classifier(str(tmp_path), image_size=40, plain=True).eval()
    model = load_classifier(str(tmp_path), image_size=40, tokenmixup=settings)
    larger = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(model.eval()(larger).logits, plain(larger).logits)
    output = model.train()(larger, labels=torch.tensor([0, 1, 2, 3]))
    rows, columns = model.token_grid(40, 40)
    assert output.horizontal[0].replaced.shape == (4, rows * columns)
    assert output.mixing_metrics["mixed_samples"] == 4 and output.loss.isfinite()
