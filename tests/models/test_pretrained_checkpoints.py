"""Checkpoints of pretraining, whose classes are others than the classifier's."""

import json
import logging

import pytest
import torch
from helpers.families import BOTH, SIZE
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    IJepaConfig,
    IJepaForImageClassification,
    IJepaModel,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

from hf_tokenmixup.models import FAMILIES, load_classifier

DECODER = {"decoder_hidden_size": 24, "decoder_num_attention_heads": 3, "decoder_num_hidden_layers": 1}
SHARED_BIAS = {"use_shared_relative_position_bias": True, "use_mask_token": True}


@pytest.mark.parametrize(
    "stored, plain_class",
    [
        (lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZE)), DeiTForImageClassification),
        (lambda: IJepaModel(IJepaConfig(**SIZE)), IJepaForImageClassification),
        (lambda: BeitForMaskedImageModeling(BeitConfig(**SIZE, **SHARED_BIAS)), BeitForImageClassification),
    ],
)
def test_from_pretrained_reports_same_keys_as_base_model(stored, plain_class, tmp_path):
    model = stored()
    model.save_pretrained(tmp_path)
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    reports = []
    for model_class in (plain_class, FAMILIES[model.config.model_type][1]):
        loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        reports.append({key: sorted(info[key]) for key in keys})
    assert reports[0] == reports[1] and {"classifier.bias", "classifier.weight"} <= set(reports[0]["missing_keys"])
    weights, expected = loaded.base_model.state_dict(), model.base_model.state_dict()
    assert sum(torch.equal(weights[name], tensor) for name, tensor in expected.items() if name in weights) > 50


@pytest.mark.parametrize("stored_class", [ViTMAEForPreTraining, ViTMAEModel])
def test_autoencoder_loads_and_is_exported_as_vit(stored_class, tmp_path, caplog):
    stored = stored_class(ViTMAEConfig(**SIZE, **DECODER))
    stored.base_model.embeddings.position_embeddings.data.normal_()
    stored.save_pretrained(tmp_path / "mae")
    with caplog.at_level(logging.WARNING):
        model = load_classifier(str(tmp_path / "mae"), label_names=["a", "b", "c"], tokenmixup=BOTH)
    assert not any("instantiate a model" in record.message for record in caplog.records)
    expected = stored.base_model.state_dict()
    weights = model.base_model.state_dict()
    assert {name for name in expected if not name.startswith("decoder.")} == {
        name for name in weights if ".scorenet." not in name
    }
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items() if name in weights)

    model.eval().to_plain_model().save_pretrained(tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    assert config["model_type"] == "vit" and config["architectures"] == ["ViTForImageClassification"]
    assert not any(name.startswith(("decoder_", "mask_ratio", "norm_pix")) for name in config)
    opened, info = ViTForImageClassification.from_pretrained(tmp_path / "vit", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    images = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(opened.eval()(images).logits, model(images).logits)
