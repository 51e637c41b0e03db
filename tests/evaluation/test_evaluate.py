"""Evaluation: sums against image-by-image results, several processes, ties, and revisions of weights."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny_training import resnet
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_tokenmixup.data import ImageClassificationData, load_digits_dataset
from hf_tokenmixup.data.transforms import ImageProcessorTransform
from hf_tokenmixup.evaluation import evaluate
from hf_tokenmixup.evaluation.evaluate import EvaluationResult, evaluate_classifier, resolve_model_revision

SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class RecordingData(ImageClassificationData):
    """A dataset that records which indices are read."""

    def __getitems__(self, indices):
        self.read = [*getattr(self, "read", []), *indices]
        return super().__getitems__(indices)


@pytest.fixture(scope="module")
def digits():
    return load_digits_dataset()["test"].select(range(101))


@pytest.fixture
def data(digits):
    return RecordingData(digits, ImageProcessorTransform(ViTImageProcessor(size={"height": 16, "width": 16})))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(intermediate_size=32, num_labels=10, hidden_dropout_prob=0.5, **SIZES))
    nn.init.normal_(model.classifier.weight)
    return model


class ConstantModel(nn.Module):
    """A model with the same logits for every image."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.logits.expand(len(pixel_values), -1))


def evaluate_image_by_image(model, data):
    """Rank of the label and loss of each image, without batches and in float64."""
    ranks, losses = [], []
    for index in range(len(data)):
        example = data[index]
        with torch.no_grad():
            logits = model.eval()(pixel_values=example["pixel_values"][None]).logits[0].double().numpy()
        order = np.argsort(-logits, kind="stable")
        ranks.append(int(np.flatnonzero(order == example["labels"])[0]))
        losses.append(np.log(np.exp(logits).sum()) - logits[example["labels"]])
    return np.array(ranks), np.array(losses)


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (16, 0), (50, 1), (1000, 0)])
def test_evaluate_classifier_matches_image_by_image_results(model, data, batch_size, workers):
    ranks, losses = evaluate_image_by_image(model, data)
    counts = evaluate_classifier(model.train(), data, batch_size=batch_size, num_workers=workers)
    assert (counts.num_images, counts.top1, counts.top5) == (101, (ranks == 0).sum(), (ranks < 5).sum())
    assert 0 < counts.top1 < counts.top5 < 101
    assert counts.loss == pytest.approx(losses.sum(), rel=1e-6)
    assert counts.correct.tolist() == (ranks == 0).tolist() and len(counts.confidences) == 101
    assert model.training and counts.seconds > 0


@pytest.mark.parametrize("world", [2, 3, 150])
def test_evaluate_classifier_with_processes_reads_every_image_once(model, data, monkeypatch, world):
    expected = evaluate_classifier(model, data, batch_size=16)
    sent, data.read = [], []
    monkeypatch.setattr(evaluate, "gather_object", lambda part: sent.extend(part) or sent)
    for rank in range(world):
        state = SimpleNamespace(process_index=rank, num_processes=world, wait_for_everyone=lambda: None)
        result = evaluate_classifier(model, data, batch_size=16, state=state)
    assert sorted(data.read) == list(range(101)) and len(sent) == world
    assert (result.num_images, result.top1, result.top5) == (101, expected.top1, expected.top5)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.calibration_error() == pytest.approx(expected.calibration_error(), rel=1e-6)
    assert len(result.confidences) == 101
    assert result.seconds == max(part.seconds for part in sent)
    assert max(part.num_images for part in sent) - min(part.num_images for part in sent) <= 1


def test_evaluate_classifier_equal_logits_rank_lower_class_first(data):
    labels = np.asarray(data.labels)
    counts = evaluate_classifier(ConstantModel(*[0.0] * 10), data, batch_size=32)
    assert (counts.top1, counts.top5) == ((labels == 0).sum(), (labels < 5).sum())
    counts = evaluate_classifier(ConstantModel(*[0.0] * 8, 1.0, 1.0), data, batch_size=32)
    assert (counts.top1, counts.top5) == ((labels == 8).sum(), np.isin(labels, [8, 9, 0, 1, 2]).sum())
    assert counts.loss == pytest.approx(101 * np.log(8 + 2 * np.e) - np.isin(labels, [8, 9]).sum(), rel=1e-6)
    # All images have the same confidence, so they are in one bin.
    expected = abs((labels == 8).mean() - np.e / (8 + 2 * np.e))
    assert counts.calibration_error() == pytest.approx(expected, rel=1e-6)


def test_evaluate_classifier_few_classes_counts_every_image_for_top5(digits):
    transform = ImageProcessorTransform(ViTImageProcessor(size={"height": 8, "width": 8}))
    data = ImageClassificationData(digits, transform, label_map=[index % 3 for index in range(10)])
    counts = evaluate_classifier(ConstantModel(0.0, 1.0, 2.0), data, batch_size=32)
    assert (counts.top1, counts.top5) == ((np.asarray(digits["label"]) % 3 == 2).sum(), 101)


def test_evaluate_classifier_half_precision_uses_autocast(model, data):
    dtypes = []
    model.classifier.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    full = evaluate_classifier(model, data, batch_size=64)
    half = evaluate_classifier(model, data, batch_size=64, dtype=torch.bfloat16)
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2 and model.dtype == torch.float32
    assert half.loss != full.loss and half.loss == pytest.approx(full.loss, rel=0.02)


def test_evaluate_classifier_half_precision_weights(model, data):
    full = evaluate_classifier(model, data, batch_size=64)
    half = evaluate_classifier(model.to(torch.bfloat16), data, batch_size=64)
    assert half.loss != full.loss and half.loss == pytest.approx(full.loss, rel=0.02)


def test_evaluate_classifier_keeps_batch_norm_and_modes(data):
    model = resnet().train()
    model.resnet.embedder.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data.labels = data.labels % 4
    evaluate_classifier(model, data, batch_size=64)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and not model.resnet.embedder.training


@pytest.mark.parametrize(
    "model, options, message",
    [
        (ConstantModel(0.0, float("nan"), *[0.0] * 8), {}, "loss of 101 of 101 images is not finite in float32"),
        (ConstantModel(*[float("-inf")] * 5, *[0.0] * 5), {}, r"loss of \d\d of 101 images"),
        (ConstantModel(0.0, 0.0, 0.0), {}, "The model has 3 classes, but an image has the label 9"),
        (ConstantModel(0.0), {"batch_size": 0}, "batch_size must be at least 1 .* got 0 and 0"),
        (ConstantModel(0.0), {"num_workers": -1}, "got 16 and -1"),
    ],
)  # fmt: skip
def test_evaluate_classifier_invalid_input_raises(data, model, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_classifier(model, data, **{"batch_size": 16} | options)


def test_evaluate_classifier_empty_split_raises(digits, data):
    empty = ImageClassificationData(digits.select([]), data.transform)
    with pytest.raises(ValueError, match="The split is empty"):
        evaluate_classifier(ConstantModel(0.0), empty, batch_size=16)


def test_resolve_model_revision_of_folder_hashes_weight_files(tmp_path):
    first = resnet()
    first.save_pretrained(tmp_path)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert resolve_model_revision(str(tmp_path)) == f"sha256:{digest[:16]}"
    (tmp_path / "README.md").write_text("other")
    assert resolve_model_revision(str(tmp_path)) == f"sha256:{digest[:16]}"

    first.save_pretrained(tmp_path / "parts", max_shard_size="1KB")
    parts = sorted((tmp_path / "parts").glob("*.safetensors"))
    digest_of_parts = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    assert len(parts) > 1 and resolve_model_revision(str(tmp_path / "parts")) == f"sha256:{digest_of_parts[:16]}"

    with torch.no_grad():
        first.classifier[1].bias += 1
    first.save_pretrained(tmp_path)
    assert resolve_model_revision(str(tmp_path)) not in (f"sha256:{digest[:16]}", None)
    (tmp_path / "empty").mkdir()
    assert resolve_model_revision(str(tmp_path / "empty")) is None


def test_evaluation_result_table():
    result = EvaluationResult(
        model="vit", model_revision="sha256:12", num_parameters=85800000, macs=16900000000, dataset="a/data",
        dataset_config="plain", dataset_revision=None, dataset_fingerprint="f00d", split="test", num_images=10000,
        top1=0.12344, top5=0.5, loss=2.34567, calibration_error=0.01236, images_per_second=1234.56,
        batch_size=64, num_processes=2, hardware="2 x GPU", dtype="bf16", command="python scripts/evaluate.py vit",
    )  # fmt: skip
    rows = dict(line.split(maxsplit=1) for line in result.table().splitlines())
    assert rows["model"] == "vit (sha256:12)" and rows["dataset"] == "a/data plain (f00d)"
    assert (rows["split"], rows["top-1"], rows["loss"]) == ("test, 10,000 images", "12.34%", "2.3457")
    assert rows["ECE"] == "0.0124"
    assert (rows["parameters"], rows["MACs/image"]) == ("85,800,000", "16,900,000,000")
    assert rows["images/s"] == "1,234.6, batches of 64, 2 processes" and rows["hardware"] == "2 x GPU, bf16"
