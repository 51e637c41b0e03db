"""Timing with a simulated clock, and peak memory against tensors counted by hand."""

import dataclasses
import itertools
from statistics import median

import pytest
import torch

from hf_tokenmixup.benchmarks import timing
from hf_tokenmixup.benchmarks.cases import make_training_step, training_models
from hf_tokenmixup.benchmarks.model_presets import MODEL_PRESETS
from hf_tokenmixup.benchmarks.tables import timing_table
from hf_tokenmixup.benchmarks.timing import Quartiles, peak_memory, time_interleaved


class Clock:
    """A simulated clock. Calls take a fixed time multiplied by a factor that depends on the call's index."""

    def __init__(self):
        self.now = 0.0
        self.calls = []
        self.factor = lambda index: 1.0

    def perf_counter(self):
        return self.now

    def make_call(self, name, seconds):
        def call():
            self.now += seconds * self.factor(len(self.calls))
            self.calls.append(name)

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_time_interleaved_measures_between_reference_calls(clock):
    cases = {name: clock.make_call(name, 1.0) for name in ("a", "ref", "b")}
    timings = time_interleaved(cases, reference="ref", rounds=2, warmup=3)
    warm, measured = clock.calls[: 3 * 4], clock.calls[3 * 4 :]
    assert [warm.count(name) for name in cases] == [4, 4, 4]  # one more call estimates the latency
    assert measured == ["ref", "a", "ref", "b", "ref", "a", "ref", "b", "ref"]
    assert list(timings) == ["a", "ref", "b"] and timings["ref"].ratio is None


def test_time_interleaved_ratio_is_robust_to_slowdown(clock):
    clock.factor = lambda index: 1 + 0.05 * index
    cases = {
        "plain": clock.make_call("plain", 2.0),
        "more": clock.make_call("more", 3.0),
        "less": clock.make_call("less", 0.5),
    }
    timings = time_interleaved(cases, reference="plain", rounds=5)
    assert dataclasses.astuple(timings["more"].ratio) == pytest.approx((1.5, 1.5, 1.5))
    assert dataclasses.astuple(timings["less"].ratio) == pytest.approx((0.25, 0.25, 0.25))
    assert timings["more"].seconds.low < timings["more"].seconds.median < timings["more"].seconds.high


def test_time_interleaved_without_reference_returns_quartiles(clock):
    """Calls alternate; the measured ones have the indices 6, 7, 8, ..."""
    clock.factor = lambda index: 1 + index**2
    timings = time_interleaved({"a": clock.make_call("a", 1.0), "b": clock.make_call("b", 10.0)}, rounds=5)
    assert clock.calls[6:] == ["a", "b"] * 5
    for name, first, seconds in (("a", 6, 1.0), ("b", 7, 10.0)):
        samples = [seconds * (1 + index**2) for index in range(first, first + 10, 2)]
        spread = timings[name].seconds
        assert (spread.low, spread.median, spread.high) == pytest.approx((samples[1], median(samples), samples[3]))
        assert timings[name].ratio is None


def test_time_interleaved_repeats_short_calls(clock):
    cases = {"short": clock.make_call("short", 0.003), "long": clock.make_call("long", 0.5)}
    timings = time_interleaved(cases, reference="long", rounds=4, warmup=1, min_run_time=0.02)
    assert clock.calls[4:] == ["long", *(["short"] * 7 + ["long"]) * 4]
    assert timings["short"].seconds.median == pytest.approx(0.003)
    assert timings["short"].ratio.median == pytest.approx(0.006)


def test_time_interleaved_call_without_duration(clock):
    timings = time_interleaved({"nothing": clock.make_call("nothing", 0.0)}, rounds=2, min_run_time=1.0)
    assert timings["nothing"].seconds == Quartiles(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rounds": 1}, "got 1 and 2"),
        ({"warmup": 0}, "got 20 and 0"),
        ({"reference": "c"}, "one of 'a', 'b', got 'c'"),
    ],
)
def test_time_interleaved_invalid_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        time_interleaved({"a": int, "b": int}, **options)


def test_time_interleaved_on_cuda_uses_device_events(monkeypatch, clock):
    """A call takes one second on the device and no time on the CPU."""
    device = {"now": 0.0, "waited": 0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            assert device["waited"] > 0
            self.at = device["now"]

        def synchronize(self):
            device["waited"] += 1

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "synchronize", lambda device_: device.update(waited=device["waited"] + 1))

    def call():
        device["now"] += 1.0

    timings = time_interleaved({"a": call}, rounds=3, device="cuda", min_run_time=2.0)
    assert timings["a"].seconds == Quartiles(1.0, 1.0, 1.0) and clock.now == 0
    assert device["now"] == 2 + 1 + 3 * 2


def test_peak_memory_counts_tensors_that_exist_at_once():
    def call():
        first = torch.ones(1000)
        second = torch.ones(500)
        del first
        third = torch.ones(2000)
        return (second, third, torch.ones(10))[:0]

    assert peak_memory(call) == 4 * (500 + 2000 + 10)
    assert peak_memory(lambda: torch.ones(1000) + torch.ones(1000)) == 4 * 3000
    assert peak_memory(lambda: None) == 0


def test_peak_memory_counts_temporary_tensors_of_operations():
    """Cross-entropy allocates the log-softmax, and scalars for the loss and the sum of class weights."""
    logits, labels = torch.zeros(1000, 10), torch.zeros(1000, dtype=torch.int64)
    assert peak_memory(lambda: torch.nn.functional.cross_entropy(logits, labels)) == 4 * (1000 * 10 + 2)


def test_peak_memory_ignores_tensors_from_before():
    earlier, cache = [torch.ones(5000)], []

    def call():
        earlier.clear()
        if not cache:
            cache.append(torch.ones(3000))
        return torch.ones(100)

    assert peak_memory(call) == 400


def test_peak_memory_counts_gradients_and_activations():
    layer = torch.nn.Linear(100, 100, bias=False)
    step = make_training_step(SumLossModel(layer), torch.ones(1, 100), None)
    # At the end of the backward pass: gradients of weights and output, the loss and its gradient.
    assert peak_memory(step) == 4 * (100 * 100 + 100 + 2)
    assert layer.weight.grad is None


class SumLossModel(torch.nn.Module):
    """A model whose loss is the sum of its squared outputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, pixel_values, labels):
        return type("Output", (), {"loss": self.layer(pixel_values).square().sum()})


def test_peak_memory_of_tokenmixup_is_close_to_base_model():
    preset = MODEL_PRESETS["cct-2-3x2"]
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    configs = {name: preset.tokenmixup_configs[name] for name in ("HTM", "VTM")}
    models = training_models(preset.build().train(), configs)
    steps = {name: make_training_step(models[name], images, labels) for name in ("plain", "HTM", "VTM")}
    memory = {name: peak_memory(step) for name, step in steps.items()}
    assert memory == {name: peak_memory(step) for name, step in steps.items()}
    # Hidden states of a layer: 16 images, 64 tokens, 128 dimensions, float32.
    hidden = 16 * 64 * 128 * 4
    assert memory["plain"] > 20 * hidden
    assert memory["plain"] < memory["HTM"] < 1.03 * memory["plain"] and memory["VTM"] < 1.03 * memory["plain"]


def test_peak_memory_on_cuda_reads_the_allocator(monkeypatch):
    calls = itertools.count()
    allocator = {"memory_allocated": 700, "max_memory_allocated": 1000}
    for name, value in allocator.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    reset = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: reset.append(next(calls)))
    assert peak_memory(lambda: next(calls), "cuda") == 300
    assert reset == [1]  # after the first of two calls


def test_peak_memory_other_device_raises():
    with pytest.raises(ValueError, match="'cpu' or 'cuda' .*, got 'meta'"):
        peak_memory(int, "meta")


def test_timing_table_shows_ratios_memory_and_gain(clock):
    cases = {
        "plain": clock.make_call("plain", 2.0),
        "HTM": clock.make_call("HTM", 2.02),
        "random": clock.make_call("r", 0.00002),
    }
    timings = time_interleaved(cases, reference="plain", rounds=2)
    memory = {"plain": 100 * 2**20, "HTM": 103 * 2**20, "random": 2**19}
    lines = timing_table(timings, "plain", peak_memory=memory).splitlines()
    assert [line.split() for line in lines[1:]] == [
        "plain 2000 2000 to 2000 1 100.0 1.000".split(),
        "HTM 2020 2020 to 2020 1.010 1.010 to 1.010 103.0 1.030".split(),
        "random 0.0200 0.0200 to 0.0200 0.0000 0.0000 to 0.0000 0.5 0.005".split(),
    ]
    assert lines[0].split("   ")[-1].strip() == "of plain" and len({len(line) for line in lines[2:]}) == 1
    lines = timing_table(timings, relative_gain={"HTM": 0.9876}).splitlines()
    assert [line.split()[-1] for line in lines] == ["gain", "2000", "98.8%", "0.0200"]
