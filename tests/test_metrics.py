"""Top-1 and top-5 accuracy, and the calibration error."""

import ast
import socket
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

import hf_tokenmixup.metrics
from hf_tokenmixup.metrics import (
    ComputeMetrics,
    TopKAccuracy,
    calibration_error,
    compute_metrics,
    top_classes,
    top_predictions,
)

FILE = Path(hf_tokenmixup.metrics.__file__)


@pytest.fixture
def metric(tmp_path):
    return TopKAccuracy(keep_in_memory=True, cache_dir=str(tmp_path))


def test_metric_top1_and_top5(metric):
    predictions = np.array([[3, 1, 2, 0, 4, 9], [3, 1, 2, 0, 4, 9], [3, 1, 2, 0, 4, 9], [3, 1, 2, 0, 4, 9]])
    # First place, fifth place, sixth place (no longer counted), absent.
    result = metric.compute(predictions=predictions, references=[3, 4, 9, 7])
    assert result == {"top1": 0.25, "top5": 0.5}
    assert all(type(value) is float for value in result.values())


def test_metric_fewer_than_five_classes_in_batches(metric):
    metric.add_batch(predictions=[[0, 1, 2], [1, 0, 2]], references=[0, 0])
    metric.add_batch(predictions=[[2, 0, 1]], references=[1])
    assert metric.compute() == {"top1": pytest.approx(1 / 3), "top5": 1.0}


def test_metric_unequal_rows_raise(metric):
    with pytest.raises(ValueError, match=r"2 images with \[1, 2\] classes each"):
        metric.compute(predictions=[[0, 1], [1]], references=[0, 1])


def test_metric_matches_ranked_logits(metric):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(400, 20, generator=generator), torch.randint(20, (400,), generator=generator)
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    result = compute_metrics(EvalPrediction(top_classes(logits).numpy(), labels.numpy()))
    assert result["top1"] == pytest.approx((rank == 0).float().mean().item())
    assert result["top5"] == pytest.approx((rank < 5).float().mean().item())


def predictions(sizes=(8, 8, 5)):
    """Class indices and labels of batches of these sizes."""
    generator = np.random.default_rng(0)
    return [(generator.permuted(np.tile(np.arange(9), (n, 1)), axis=1), generator.integers(0, 9, n)) for n in sizes]


def reference(batches):
    """Counted by hand."""
    rows = [(row, label) for classes, labels in batches for row, label in zip(classes, labels, strict=True)]
    hits = {"top1": [row[0] == label for row, label in rows], "top5": [label in row[:5] for row, label in rows]}
    return {name: pytest.approx(np.mean(values)) for name, values in hits.items()}


@pytest.mark.parametrize("sizes", [(8, 8, 5), (8,) * 8, (1,), (3, 3, 3)])
def test_compute_metrics_list_of_batches_is_concatenated(sizes):
    batches = predictions(sizes)
    classes, labels = map(list, zip(*batches, strict=True))
    assert compute_metrics(EvalPrediction(classes, labels)) == reference(batches)
    outputs = [(batch, "something else") for batch in classes]
    assert compute_metrics(EvalPrediction(outputs, labels)) == reference(batches)
    joined = EvalPrediction((np.concatenate(classes), "something else"), np.concatenate(labels))
    assert compute_metrics(joined) == reference(batches)


def test_compute_metrics_batch_by_batch_counts_each_once():
    metrics, batches = ComputeMetrics(), predictions()
    for _ in range(2):
        for classes, labels in batches[:-1]:
            given = EvalPrediction(torch.from_numpy(classes), torch.from_numpy(labels))
            assert metrics(given, compute_result=False) == {}
        assert metrics(EvalPrediction(*batches[-1]), compute_result=True) == reference(batches)
    metrics(EvalPrediction(*batches[0]), compute_result=False)
    # All images at once are not mixed with the batches before, nor are those after a reset.
    assert metrics(EvalPrediction(*batches[1])) == reference(batches[1:2])
    metrics.reset()
    assert metrics(EvalPrediction(*batches[2]), compute_result=True) == reference(batches[2:])


def test_compute_metrics_logits_are_ranked():
    logits = np.array([[0.1, 0.7, 0.2], [3.0, 1.0, 2.0]], dtype=np.float32)
    assert compute_metrics(EvalPrediction(logits, np.array([1, 1]))) == {"top1": 0.5, "top5": 1.0}


def test_compute_metrics_without_images_or_labels_raises():
    with pytest.raises(ValueError, match="at least one image, got 0"):
        compute_metrics(EvalPrediction(np.empty((0, 5), dtype=np.int64), np.empty(0, dtype=np.int64)))
    with pytest.raises(ValueError, match="at least one image, got 0"):
        compute_metrics(EvalPrediction([], []))
    with pytest.raises(ValueError, match="got 2 predictions and 1 labels"):
        compute_metrics(EvalPrediction(np.zeros((2, 5), dtype=np.int64), np.zeros(1, dtype=np.int64)))


def test_top_classes_tuple_and_few_classes():
    logits = torch.tensor([[0.1, 0.7, 0.2], [3.0, 1.0, 2.0]])
    expected = [[1, 2, 0], [0, 2, 1]]
    assert top_classes((logits, "something else"), torch.tensor([0, 1])).tolist() == expected
    assert top_classes(logits, k=1).tolist() == [[1], [0]]


def test_metric_does_not_change_global_rng(metric):
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    metric.compute(predictions=[[0, 1]], references=[1])
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])  # noqa: NPY002


def test_metric_reads_five_classes_per_image(metric):
    """All logits of a thousand classes would take minutes."""
    assert top_classes(torch.randn(2, 1000)).shape == (2, 5)
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(0, 1000, (50_000, 5)), generator.integers(0, 1000, 50_000)
    result = metric.compute(predictions=predictions, references=references)
    assert result["top1"] == pytest.approx((predictions[:, 0] == references).mean())
    assert result["top5"] == pytest.approx((predictions == references[:, None]).any(axis=1).mean())


def test_metric_file_loads_offline(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, name)
    alone = tmp_path / "alone" / "metrics.py"
    alone.parent.mkdir()
    alone.write_bytes(FILE.read_bytes())
    metric = evaluate.load(str(alone), keep_in_memory=True, cache_dir=str(tmp_path / "cache"))
    assert type(metric).__module__.startswith("evaluate_modules.")
    result = metric.compute(predictions=[[2, 0], [0, 1], [0, 1]], references=[2, 1, 2])
    assert result == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)}


def test_metric_file_imports_nothing_of_package():
    imports = [node for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [[alias.name for alias in node.names] for node in imports if isinstance(node, ast.Import)] == [
        ["datasets"],
        ["evaluate"],
        ["numpy"],
        ["torch"],
    ]
    modules = [node.module for node in imports if isinstance(node, ast.ImportFrom)]
    assert modules == ["torchmetrics.functional.classification"]


def calibration_error_by_hand(confidences, correct):
    total = 0.0
    for index in range(15):
        inside = [i for i, value in enumerate(confidences) if index / 15 <= value < (index + 1) / 15]
        if inside:
            accuracy = sum(bool(correct[i]) for i in inside) / len(inside)
            total += len(inside) / len(confidences) * abs(accuracy - sum(confidences[i] for i in inside) / len(inside))
    return total


def calibration_data():
    generator = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(400, 9, generator=generator), torch.randint(9, (400,), generator=generator)
    # Half of the labels are the best class, so that the bins differ in accuracy.
    labels[::2] = logits[::2].argmax(1)
    confidences = np.exp(logits.double().numpy())
    confidences = (confidences / confidences.sum(1, keepdims=True)).max(1)
    return logits, labels, calibration_error_by_hand(confidences.tolist(), (logits.argmax(1) == labels).tolist())


def test_calibration_error_equals_brute_force():
    logits, labels, expected = calibration_data()
    confidences, correct = top_predictions(logits)[1], logits.argmax(1) == labels
    assert 0.1 < expected < 0.9
    assert calibration_error(confidences, correct) == pytest.approx(expected, rel=1e-6)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert calibration_error(confidences[order], correct[order]) == pytest.approx(expected, rel=1e-6)


def test_calibration_error_of_calibrated_and_overconfident_predictions():
    correct = torch.tensor([True, False, True, False])
    assert calibration_error(torch.full((4,), 0.5), correct) == 0
    assert calibration_error(torch.full((4,), 1.0), correct) == 0.5
    assert calibration_error(torch.tensor([0.75, 0.25, 0.75, 0.25]), correct) == 0.25


def test_top_predictions_in_half_precision_have_float32_confidences():
    logits = torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.bfloat16)
    classes, confidences = top_predictions((logits, "something else"), k=2)
    assert classes.tolist() == [[0, 2]] and confidences.dtype == torch.float32
    assert confidences.item() == pytest.approx(1 / (1 + np.exp(-2) + np.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("batch_size", [400, 150])
def test_compute_metrics_with_confidences_returns_calibration_error(batch_size):
    logits, labels, expected = calibration_data()
    batches = [tuple(part.numpy() for part in top_predictions(rows)) for rows in logits.split(batch_size)]
    targets = [rows.numpy() for rows in labels.split(batch_size)]
    result = compute_metrics(EvalPrediction(batches, targets))
    assert result["calibration_error"] == pytest.approx(expected, rel=1e-6)
    assert result["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    metrics = ComputeMetrics()
    for index, (batch, target) in enumerate(zip(batches, targets, strict=True)):
        by_batch = metrics(EvalPrediction(batch, target), compute_result=index == len(batches) - 1)
    assert by_batch == result
