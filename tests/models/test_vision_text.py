"""Checkpoints of models of images and texts, of which a classifier reads the image encoder."""

import pytest
import torch
from helpers.families import build_tiny
from transformers import AutoModelForImageClassification, CLIPModel, MetaClip2Model, SiglipModel

from hf_tokenmixup.hub.model_summary import summarize_model
from hf_tokenmixup.models import FAMILIES, load_classifier
from hf_tokenmixup.training import add_lora

BASE_MODELS = {"siglip": SiglipModel, "clip": CLIPModel, "metaclip_2": MetaClip2Model}


@pytest.fixture(params=BASE_MODELS)
def base_model(request, tmp_path):
    """Model of images and texts, saved in a folder, as checkpoints on the Hub are."""
    base_class = BASE_MODELS[request.param]
    config = base_class.config_class.from_dict(build_tiny(request.param).config.to_dict())
    model = base_class(
        base_class.config_class(**{name: getattr(config, name) for name in ("vision_config", "text_config")})
    )
    model.save_pretrained(tmp_path)
    return model.eval()


def encode(model, images):
    with torch.no_grad():
        return model.eval().vision_model(images).last_hidden_state


def test_from_pretrained_base_checkpoint_reports_keys_of_plain_class(base_model, tmp_path):
    model_class = FAMILIES[base_model.config.model_type][1]
    model, info = model_class.from_pretrained(tmp_path, horizontal_layers=[1], output_loading_info=True)
    _, expected = model_class.base_model_class.from_pretrained(tmp_path, output_loading_info=True)
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert sorted(info[name]) == sorted(expected[name])
    assert sorted(info["missing_keys"]) == ["classifier.bias", "classifier.weight"]
    images = torch.randn(2, 3, 20, 20)
    assert torch.equal(encode(model, images), encode(base_model, images))


def test_load_classifier_base_checkpoint_with_new_classes(base_model, tmp_path):
    model = load_classifier(str(tmp_path), label_names=["cat", "dog", "cow"], tokenmixup={"horizontal_layers": [1]})
    assert model.classifier.out_features == 3 and model.config.id2label == {0: "cat", 1: "dog", 2: "cow"}
    images = torch.randn(2, 3, 20, 20)
    assert torch.equal(encode(model, images), encode(base_model, images))
    model.to_plain_model().save_pretrained(tmp_path / "exported")
    opened, info = AutoModelForImageClassification.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(opened.eval()(images).logits, model.eval()(images).logits)


def test_load_classifier_reorders_classes(base_model, tmp_path):
    model = load_classifier(str(tmp_path), label_names=["cat", "dog", "cow"])
    model.save_pretrained(tmp_path / "trained")
    reordered = load_classifier(str(tmp_path / "trained"), label_names=["cow", "cat", "dog"])
    assert torch.equal(reordered.classifier.weight, model.classifier.weight[[2, 0, 1]])


def test_add_lora_adapts_image_encoder(base_model, tmp_path):
    pytest.importorskip("peft")
    model = add_lora(load_classifier(str(tmp_path), label_names=["cat", "dog"], tokenmixup={"horizontal_layers": [1]}))
    adapted = {name.split(".self_attn.")[1].split(".")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted == {"q_proj", "v_proj"}
    assert model(torch.randn(2, 3, 20, 20), labels=torch.tensor([0, 1])).loss.isfinite()


def test_summarize_model_names_architecture(base_model):
    summary = summarize_model(base_model.config)
    assert summary.name in ("SigLIP", "CLIP", "MetaCLIP 2") and summary.image_size == (20, 20)
    assert ("hidden size", "24") in summary.sizes and summary.supports_tokenmixup
    default = summarize_model(type(base_model.config)())
    assert (
        default.name == {"siglip": "SigLIP-B/16", "clip": "CLIP-B/32", "metaclip_2": "MetaCLIP 2-B/32"}[default.family]
    )
