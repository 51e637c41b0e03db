"""Classifier and task of a base model."""

import json

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_tokenmixup.models import load_classifier, validate_evaluated_task, validate_single_label

VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 16}
VIT |= {"patch_size": 8}
OURS = ["cat", "dog", "owl"]


def saved(folder, names=(), **settings):
    ids = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model = ViTForImageClassification(ViTConfig(**VIT, **{"num_labels": 3} | (ids if names else {}) | settings))
    model.save_pretrained(folder)
    return model


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("plain", [False, True])
def test_load_classifier_same_classes_in_another_order_reorders_rows(tmp_path, caplog, plain):
    base = saved(tmp_path, ["Dog", "owl", "cat"])
    model = load_classifier(str(tmp_path), label_names=OURS, plain=plain)
    assert torch.equal(model.classifier.weight, base.classifier.weight[[2, 0, 1]])
    assert torch.equal(model.classifier.bias, base.classifier.bias[[2, 0, 1]])
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert "another order" in caplog.text


def test_load_classifier_of_resnet_in_another_order_reorders_rows(tmp_path):
    names = {"id2label": {0: "owl", 1: "cat", 2: "dog"}, "label2id": {"owl": 0, "cat": 1, "dog": 2}}
    base = ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], **names))
    base.save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), label_names=OURS)
    assert torch.equal(model.classifier[1].weight, base.classifier[1].weight[[1, 2, 0]])


def test_load_classifier_reorders_scorenet_of_checkpoint(tmp_path):
    options = {"model_type": "vit", "from_scratch": True, "config_overrides": VIT}
    settings = {"horizontal_layers": [1]}
    base = load_classifier(**options, label_names=["dog", "cat", "owl"], tokenmixup=settings)
    base.save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), label_names=OURS, tokenmixup=settings)
    for head in ("classifier", "vit.layers.1.scorenet.classifier"):
        assert torch.equal(model.get_submodule(head).weight, base.get_submodule(head).weight[[1, 0, 2]])


def test_load_classifier_same_classes_keeps_rows_without_warning(tmp_path, caplog):
    base = saved(tmp_path, ["Cat", "dog", "OWL"])
    model = load_classifier(str(tmp_path), label_names=OURS)
    assert torch.equal(model.classifier.weight, base.classifier.weight)
    assert not caplog.text


@pytest.mark.parametrize("names", [["car", "bus", "van"], ["cat", "dog", "van"], ["cat", "cat", "dog"]])
def test_load_classifier_other_classes_needs_ignore_mismatched_sizes(tmp_path, caplog, names):
    base = saved(tmp_path, names, initializer_range=0.5)
    # Duplicate names are those of a config.json that was written by hand.
    change_config(tmp_path, id2label=dict(enumerate(names)), initializer_range=0.02)
    with pytest.raises(
        ValueError, match="those of the dataset are 'cat', 'dog', 'owl'. Pass `ignore_mismatched_sizes`"
    ):
        load_classifier(str(tmp_path), label_names=OURS)
    model = load_classifier(str(tmp_path), label_names=OURS, ignore_mismatched_sizes=True)
    assert model.classifier.weight.std() < 0.05 < base.classifier.weight.std()
    assert torch.equal(model.classifier.bias, torch.zeros(3))
    assert torch.equal(model.vit.layers[0].mlp.fc1.weight, base.vit.layers[0].mlp.fc1.weight)
    assert "newly initialized" in caplog.text


@pytest.mark.parametrize("names, label_names", [((), OURS), (OURS, ["0", "1", "2"])])
def test_load_classifier_without_names_reuses_rows_with_warning(tmp_path, caplog, names, label_names):
    base = saved(tmp_path, names)
    model = load_classifier(str(tmp_path), label_names=label_names)
    assert torch.equal(model.classifier.weight, base.classifier.weight)
    assert "There are no class names in" in caplog.text and "by index" in caplog.text


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
@pytest.mark.parametrize("plain", [False, True])
def test_load_classifier_for_training_is_single_label(tmp_path, caplog, problem_type, plain):
    saved(tmp_path, OURS, problem_type=problem_type)
    change_config(tmp_path, output_attentions=True, output_hidden_states=True, return_dict=False)
    model = load_classifier(
        str(tmp_path), label_names=OURS, plain=plain, tokenmixup={"horizontal_layers": [1], "horizontal_tau": None}
    )
    assert model.config.problem_type == "single_label_classification"
    assert f"problem_type of the base model is '{problem_type}'" in caplog.text
    output = model.train()(pixel_values=torch.randn(3, 3, 16, 16), labels=torch.tensor([0, 1, 2]))
    assert output.attentions is None and output.hidden_states is None
    expected = torch.nn.functional.cross_entropy(output.logits, getattr(output, "targets", torch.tensor([0, 1, 2])))
    assert torch.isclose(output.loss - (0 if plain else output.scorenet_loss), expected)
    assert not plain or type(model) is ViTForImageClassification


def test_load_classifier_single_output_raises(tmp_path, caplog):
    saved(tmp_path, ["score"], num_labels=1, problem_type="regression")
    with pytest.raises(ValueError, match="trained for 1 classes, but the data has 3"):
        load_classifier(str(tmp_path), label_names=OURS)
    caplog.clear()
    options = {"tokenmixup": {"horizontal_layers": [1]}, "ignore_mismatched_sizes": True}
    model = load_classifier(str(tmp_path), label_names=OURS, **options)
    assert model.config.problem_type == "single_label_classification" and model.classifier.out_features == 3
    assert "class names" not in caplog.text


def test_validate_single_label_one_class_raises():
    with pytest.raises(ValueError, match="num_labels is 1, but classification needs at least 2"):
        validate_single_label(ViTConfig(**VIT, num_labels=1))


def test_validate_evaluated_task_multi_label_warns_and_one_output_raises(caplog):
    validate_evaluated_task({"id2label": {"0": "a", "1": "b"}, "problem_type": "single_label_classification"}, "it")
    assert not caplog.text
    validate_evaluated_task({"id2label": {"0": "a", "1": "b"}, "problem_type": "multi_label_classification"}, "it")
    assert "it was trained with problem_type 'multi_label_classification'" in caplog.text
    with pytest.raises(ValueError, match="it has 1 output"):
        validate_evaluated_task({"id2label": {"0": "a"}, "problem_type": "regression"}, "it")
