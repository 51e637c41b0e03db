"""Top-1 and top-5 accuracy against a count by hand, in the package and loaded on its own."""

import ast
import socket
import sys
import time
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

import hf_tokenmixup.metrics
from hf_tokenmixup.metrics import TopKAccuracy, compute_metrics, top_classes

FILE = Path(hf_tokenmixup.metrics.__file__)


@pytest.fixture
def metric(tmp_path):
    return TopKAccuracy(keep_in_memory=True, cache_dir=str(tmp_path))


def test_counts_first_and_first_five(metric):
    predictions = np.array([[3, 1, 2, 0, 4, 9], [3, 1, 2, 0, 4, 9], [3, 1, 2, 0, 4, 9], [3, 1, 2, 0, 4, 9]])
    # First place, fifth place, sixth place (no longer counted), absent.
    result = metric.compute(predictions=predictions, references=[3, 4, 9, 7])
    assert result == {"top1": 0.25, "top5": 0.5}
    assert all(type(value) is float for value in result.values())


def test_fewer_than_five_classes_and_batches(metric):
    metric.add_batch(predictions=[[0, 1, 2], [1, 0, 2]], references=[0, 0])
    metric.add_batch(predictions=[[2, 0, 1]], references=[1])
    assert metric.compute() == {"top1": pytest.approx(1 / 3), "top5": 1.0}


def test_rows_of_unequal_length_are_an_error(metric):
    with pytest.raises(ValueError, match=r"2 images with \[1, 2\] classes each"):
        metric.compute(predictions=[[0, 1], [1]], references=[0, 1])


def test_agrees_with_ranking_the_logits(metric):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(400, 20, generator=generator), torch.randint(20, (400,), generator=generator)
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    result = compute_metrics(EvalPrediction(top_classes(logits).numpy(), labels.numpy()))
    assert result["top1"] == pytest.approx((rank == 0).float().mean().item())
    assert result["top5"] == pytest.approx((rank < 5).float().mean().item())


def test_top_classes_takes_tuples_and_few_classes():
    logits = torch.tensor([[0.1, 0.7, 0.2], [3.0, 1.0, 2.0]])
    expected = [[1, 2, 0], [0, 2, 1]]
    assert top_classes((logits, "something else"), torch.tensor([0, 1])).tolist() == expected
    assert top_classes(logits, k=1).tolist() == [[1], [0]]


def test_global_generators_are_left_alone(metric):
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    metric.compute(predictions=[[0, 1]], references=[1])
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])  # noqa: NPY002


def test_fifty_thousand_images_are_quick(metric):
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(0, 1000, (50_000, 5)), generator.integers(0, 1000, 50_000)
    start = time.perf_counter()
    result = metric.compute(predictions=predictions, references=references)
    # 0.4 to 0.7 s on one slow core; whole logits would take minutes.
    assert time.perf_counter() - start < 10
    assert result["top1"] == pytest.approx((predictions[:, 0] == references).mean())


def test_loads_by_itself_without_network(tmp_path, monkeypatch):
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


def test_file_imports_nothing_of_the_package():
    imports = [node for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [[alias.name for alias in node.names] for node in imports if isinstance(node, ast.Import)] == [
        ["datasets"],
        ["evaluate"],
        ["numpy"],
        ["torch"],
    ]
    assert not [node for node in imports if isinstance(node, ast.ImportFrom)]
