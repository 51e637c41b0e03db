"""Counting: against each image by itself, over processes, with ties; and what tells weights apart."""

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
from hf_tokenmixup.evaluation import evaluate as evaluation
from hf_tokenmixup.evaluation.evaluate import EvaluationResult, evaluate_classifier, model_revision

SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Recorded(ImageClassificationData):
    """Keeps the indices that are read."""

    def __getitems__(self, indices):
        self.read = [*getattr(self, "read", []), *indices]
        return super().__getitems__(indices)


@pytest.fixture(scope="module")
def digits():
    return load_digits_dataset()["test"].select(range(101))


@pytest.fixture
def data(digits):
    return Recorded(digits, ImageProcessorTransform(ViTImageProcessor(size={"height": 16, "width": 16})))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(intermediate_size=32, num_labels=10, hidden_dropout_prob=0.5, **SIZES))
    nn.init.normal_(model.classifier.weight)
    return model


class Constant(nn.Module):
    """The same logits for every image."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.logits.expand(len(pixel_values), -1))


def one_by_one(model, data):
    """Rank of the label and loss of each image, without a batch and in double precision."""
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
def test_counts_are_those_of_the_images_one_by_one(model, data, batch_size, workers):
    ranks, losses = one_by_one(model, data)
    counts = evaluate_classifier(model.train(), data, batch_size=batch_size, num_workers=workers)
    assert (counts.num_images, counts.top1, counts.top5) == (101, (ranks == 0).sum(), (ranks < 5).sum())
    assert 0 < counts.top1 < counts.top5 < 101
    assert counts.loss == pytest.approx(losses.sum(), rel=1e-6)
    assert model.training and counts.seconds > 0


@pytest.mark.parametrize("world", [2, 3, 150])
def test_processes_read_every_image_once_and_agree(model, data, monkeypatch, world):
    whole = evaluate_classifier(model, data, batch_size=16)
    sent, data.read = [], []
    monkeypatch.setattr(evaluation, "gather_object", lambda part: sent.extend(part) or sent)
    for rank in range(world):
        state = SimpleNamespace(process_index=rank, num_processes=world, wait_for_everyone=lambda: None)
        together = evaluate_classifier(model, data, batch_size=16, state=state)
    assert sorted(data.read) == list(range(101)) and len(sent) == world
    assert (together.num_images, together.top1, together.top5) == (101, whole.top1, whole.top5)
    assert together.loss == pytest.approx(whole.loss, rel=1e-6)
    assert together.seconds == max(part.seconds for part in sent)
    assert max(part.num_images for part in sent) - min(part.num_images for part in sent) <= 1


def test_equal_logits_favour_the_lower_class_not_the_label(data):
    labels = np.asarray(data.labels)
    counts = evaluate_classifier(Constant(*[0.0] * 10), data, batch_size=32)
    assert (counts.top1, counts.top5) == ((labels == 0).sum(), (labels < 5).sum())
    counts = evaluate_classifier(Constant(*[0.0] * 8, 1.0, 1.0), data, batch_size=32)
    assert (counts.top1, counts.top5) == ((labels == 8).sum(), np.isin(labels, [8, 9, 0, 1, 2]).sum())
    assert counts.loss == pytest.approx(101 * np.log(8 + 2 * np.e) - np.isin(labels, [8, 9]).sum(), rel=1e-6)


def test_with_few_classes_every_image_counts_for_top_5(digits):
    transform = ImageProcessorTransform(ViTImageProcessor(size={"height": 8, "width": 8}))
    data = ImageClassificationData(digits, transform, label_map=[number % 3 for number in range(10)])
    counts = evaluate_classifier(Constant(0.0, 1.0, 2.0), data, batch_size=32)
    assert (counts.top1, counts.top5) == ((np.asarray(digits["label"]) % 3 == 2).sum(), 101)


def test_half_precision_is_autocast(model, data):
    seen = []
    model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    full = evaluate_classifier(model, data, batch_size=64)
    half = evaluate_classifier(model, data, batch_size=64, dtype=torch.bfloat16)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2 and model.dtype == torch.float32
    assert half.loss != full.loss and half.loss == pytest.approx(full.loss, rel=0.02)


def test_weights_in_half_precision(model, data):
    full = evaluate_classifier(model, data, batch_size=64)
    half = evaluate_classifier(model.to(torch.bfloat16), data, batch_size=64)
    assert half.loss != full.loss and half.loss == pytest.approx(full.loss, rel=0.02)


def test_batch_normalisation_and_every_module_s_mode_stay(data):
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
        (Constant(0.0, float("nan"), *[0.0] * 8), {}, "loss of 101 of 101 images is .* not a number with float32"),
        (Constant(*[float("-inf")] * 5, *[0.0] * 5), {}, r"loss of \d\d of 101 images"),
        (Constant(0.0, 0.0, 0.0), {}, "The model has 3 classes, and an image the label 9"),
        (Constant(0.0), {"batch_size": 0}, "batch_size of at least 1 .* got 0 and 0"),
        (Constant(0.0), {"num_workers": -1}, "got 16 and -1"),
    ],
)  # fmt: skip
def test_what_cannot_be_counted(data, model, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_classifier(model, data, **{"batch_size": 16} | options)


def test_no_images(digits, data):
    empty = ImageClassificationData(digits.select([]), data.transform)
    with pytest.raises(ValueError, match="the split is empty"):
        evaluate_classifier(Constant(0.0), empty, batch_size=16)


def test_the_revision_of_a_folder_is_that_of_its_weights(tmp_path):
    first = resnet()
    first.save_pretrained(tmp_path)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert model_revision(str(tmp_path)) == f"sha256:{digest[:16]}"
    (tmp_path / "README.md").write_text("other")
    assert model_revision(str(tmp_path)) == f"sha256:{digest[:16]}"

    first.save_pretrained(tmp_path / "parts", max_shard_size="1KB")
    parts = sorted((tmp_path / "parts").glob("*.safetensors"))
    whole = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    assert len(parts) > 1 and model_revision(str(tmp_path / "parts")) == f"sha256:{whole[:16]}"

    with torch.no_grad():
        first.classifier[1].bias += 1
    first.save_pretrained(tmp_path)
    assert model_revision(str(tmp_path)) not in (f"sha256:{digest[:16]}", None)
    (tmp_path / "empty").mkdir()
    assert model_revision(str(tmp_path / "empty")) is None


def test_the_table_holds_what_was_measured():
    result = EvaluationResult(
        model="vit", model_revision="sha256:12", num_parameters=85800000, macs=16900000000, dataset="a/data",
        dataset_config="plain", dataset_revision=None, dataset_fingerprint="f00d", split="test", num_images=10000,
        top1=0.12344, top5=0.5, loss=2.34567, images_per_second=1234.56, batch_size=64, num_processes=2,
        hardware="2 x GPU", dtype="bf16", command="python scripts/evaluate.py vit",
    )  # fmt: skip
    rows = dict(line.split(maxsplit=1) for line in result.table().splitlines())
    assert rows["model"] == "vit (sha256:12)" and rows["dataset"] == "a/data plain (f00d)"
    assert (rows["split"], rows["top-1"], rows["loss"]) == ("test, 10,000 images", "12.34%", "2.3457")
    assert (rows["parameters"], rows["MACs/image"]) == ("85,800,000", "16,900,000,000")
    assert rows["images/s"] == "1,234.6, batches of 64, 2 processes" and rows["hardware"] == "2 x GPU, bf16"
