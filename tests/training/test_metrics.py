"""MixingMetrics: sums of forwards, means over steps, and their state."""

import json

import pytest
import torch
from accelerate import Accelerator

from hf_tokenmixup.training.metrics import MixingMetrics

FORWARDS = [
    ({"mixed_samples": torch.tensor(3), "difficulty": torch.tensor(1.0)}, 4),
    ({"mixed_samples": torch.tensor(1), "difficulty": torch.tensor(4.0)}, 2),
    ({"mixed_samples": torch.tensor(2), "difficulty": torch.tensor(2.5)}, 4),
]


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def add_all(metrics, forwards):
    for values, images in forwards:
        metrics.update(values, images)
        metrics.step()
    return metrics


def test_mixing_metrics_compute_sums_samples_per_step_and_averages_losses_per_image(accelerator):
    metrics = MixingMetrics()
    metrics.update(*FORWARDS[0])
    metrics.update(*FORWARDS[1])
    metrics.step()
    metrics.update(*FORWARDS[2])
    metrics.step()
    expected = {"mixed_samples": (3 + 1 + 2) / 2, "difficulty": (4 * 1.0 + 2 * 4.0 + 4 * 2.5) / 10}
    expected |= {"mixed_fraction": (3 + 1 + 2) / 10}
    assert metrics.compute(accelerator) == pytest.approx(expected)


def test_mixing_metrics_loaded_state_continues_as_without_interruption(accelerator):
    complete = add_all(MixingMetrics(), FORWARDS)
    first = add_all(MixingMetrics(), FORWARDS[:2])
    second = MixingMetrics()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(accelerator))), accelerator)
    add_all(second, FORWARDS[2:])
    assert second.compute(accelerator) == pytest.approx(complete.compute(accelerator), rel=1e-6)


def test_mixing_metrics_without_steps_computes_nothing(accelerator):
    metrics = MixingMetrics()
    metrics.update({"mixed_samples": torch.tensor(3)}, 0)
    assert metrics.compute(accelerator) == {}
