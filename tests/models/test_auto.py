"""Loading of image classifiers."""

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_tokenmixup.models import (
    FAMILIES,
    TokenMixupViTConfig,
    TokenMixupViTForImageClassification,
    describe_unsupported,
    load_classifier,
)
from hf_tokenmixup.models.families import collect_families

VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 16}
VIT |= {"patch_size": 8}


def test_load_classifier_vit_checkpoint_with_tokenmixup_and_new_classes(tmp_path):
    plain = ViTForImageClassification(ViTConfig(**VIT, num_labels=2))
    plain.save_pretrained(tmp_path)
    model = load_classifier(
        str(tmp_path),
        label_names=["a", "b", "c"],
        tokenmixup={"horizontal_layers": [1], "horizontal_tau": None},
        ignore_mismatched_sizes=True,
    )
    assert type(model) is TokenMixupViTForImageClassification
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and model.config.label2id["c"] == 2
    assert model.config.horizontal_layers == [1] and model.config.horizontal_tau is None
    assert model.classifier.out_features == 3
    assert torch.equal(model.vit.layers[0].mlp.fc1.weight, plain.vit.layers[0].mlp.fc1.weight)


def test_load_classifier_with_another_number_of_classes_does_not_warn_about_names(tmp_path, capfd):
    ViTForImageClassification(ViTConfig(**VIT, num_labels=5)).save_pretrained(tmp_path)
    load_classifier(str(tmp_path), label_names=["a", "b", "c"], ignore_mismatched_sizes=True)
    assert "incompatible" not in capfd.readouterr().err


def test_load_classifier_keeps_other_settings_of_checkpoint(tmp_path):
    options = {"model_type": "vit", "from_scratch": True, "config_overrides": VIT}
    first = load_classifier(**options, tokenmixup={"vertical_layers": [1], "vertical_kappa": 2})
    first.to_plain_model().save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path), tokenmixup={"vertical_kappa": 3})
    assert (again.config.vertical_layers, again.config.vertical_kappa) == ([1], 3)


def test_load_classifier_from_scratch_uses_only_config(tmp_path):
    plain = ViTForImageClassification(ViTConfig(**VIT, num_labels=2))
    plain.save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), from_scratch=True, config_overrides={"num_hidden_layers": 3})
    assert len(model.vit.layers) == 3
    assert not torch.equal(model.vit.layers[0].mlp.fc1.weight, plain.vit.layers[0].mlp.fc1.weight)


def test_load_classifier_other_family_with_tokenmixup_raises(tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
    resnet = ResNetForImageClassification(config)
    resnet.save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), label_names=["a", "b", "c"])
    assert type(model) is ResNetForImageClassification and model.config.id2label[2] == "c"
    assert torch.equal(model.classifier[1].weight, resnet.classifier[1].weight)
    with pytest.raises(ValueError, match="model types .*cct.*vit, .*got 'resnet'. Remove vertical_kappa"):
        load_classifier(str(tmp_path), tokenmixup={"vertical_kappa": 2})
    built = load_classifier(
        model_type="resnet", from_scratch=True, config_overrides={"depths": [1], "hidden_sizes": [8]}
    )
    assert built.config.depths == [1]


@pytest.mark.parametrize(
    "model_type, reason",
    [("swin", "windows"), ("swinv2", "windows"), ("hiera", "pooled"), ("pvt", "pooled"), ("siglip2", "grids")],
)
def test_load_classifier_unsupported_family_raises_with_reason(model_type, reason):
    with pytest.raises(
        ValueError, match=rf"types .*cct.*vit, .*got '{model_type}': .*{reason}.*\. Remove vertical_kappa"
    ):
        load_classifier(model_type=model_type, from_scratch=True, tokenmixup={"vertical_kappa": 2})


@pytest.mark.parametrize(
    "architecture, reason",
    [("cait_s24_224", "heads"), ("xcit_nano_12_p16_224", "channels"), ("naflexvit_base_patch16_gap", "grids")],
)
def test_describe_unsupported_timm_architecture_has_reason(architecture, reason):
    stored = {"model_type": "timm_wrapper", "architecture": architecture}
    assert reason in describe_unsupported(stored) and repr(architecture) in describe_unsupported(stored)


def test_families_are_collected_from_modules(monkeypatch):
    assert FAMILIES["vit"] == (TokenMixupViTConfig, TokenMixupViTForImageClassification)
    assert list(FAMILIES) == sorted(FAMILIES) and all(
        FAMILIES[config_class.model_type] == (config_class, model_class) and model_class.config_class is config_class
        for config_class, model_class in FAMILIES.values()
    )
    assert FAMILIES["vit_mae"] == FAMILIES["vit"]
    monkeypatch.setattr("hf_tokenmixup.models.vit.MODEL_TYPES", {"other": FAMILIES["vit"]})
    assert collect_families().keys() == FAMILIES.keys() - {"vit", "vit_mae"} | {"other"}


def test_dinov3_is_refused_with_timm_model_while_transformers_has_no_classifier():
    assert "dinov3_vit" not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, (
        "transformers has an image classifier for DINOv3 now: add the family models/dinov3.py, and remove its entry "
        "from UNSUPPORTED in models/families.py."
    )
    for tokenmixup in ({}, {"vertical_kappa": 2}):
        with pytest.raises(ValueError, match=r"'dinov3_vit'.*timm/vit_small_patch16_dinov3\.lvd1689m\)\."):
            load_classifier(model_type="dinov3_vit", from_scratch=True, tokenmixup=tokenmixup)


def test_load_classifier_half_precision_checkpoint_is_float32(tmp_path):
    ViTForImageClassification(ViTConfig(**VIT)).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path)).dtype == torch.float32


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "There is no model"),
        ({"model_type": "vit"}, "There is no model"),
        ({"from_scratch": True}, "There is no model"),
        (
            {"model_type": "vit", "from_scratch": True, "config_overrides": {"hiden_size": 8}},
            "no attribute 'hiden_size': did you mean 'hidden_size'",
        ),
    ],
)
def test_load_classifier_invalid_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        load_classifier(**options)


def test_load_classifier_unknown_attribute_raises(tmp_path):
    ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'hidden_dropout_prob'"):
        load_classifier(str(tmp_path), config_overrides={"hidden_dropout": 0.1})


def test_load_classifier_other_number_of_classes_raises(tmp_path):
    ViTForImageClassification(ViTConfig(**VIT, num_labels=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the data has 3 classes.*Pass `ignore_mismatched_sizes`"):
        load_classifier(str(tmp_path), label_names=["a", "b", "c"])


def test_load_classifier_plain_returns_transformers_class(tmp_path):
    options = {"model_type": "vit", "from_scratch": True, "config_overrides": VIT}
    load_classifier(**options, tokenmixup={"horizontal_layers": [1]}).to_plain_model().save_pretrained(tmp_path)
    assert type(load_classifier(str(tmp_path), plain=True)) is ViTForImageClassification
