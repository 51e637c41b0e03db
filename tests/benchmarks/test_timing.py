"""Timing with a clock that the test turns, and memory against tensors counted by hand."""

import dataclasses
import itertools
from statistics import median

import pytest
import torch

from hf_tokenmixup.benchmarks import timing as benchmark
from hf_tokenmixup.benchmarks.cases import training_models, training_step
from hf_tokenmixup.benchmarks.model_presets import MODEL_PRESETS
from hf_tokenmixup.benchmarks.tables import timing_table
from hf_tokenmixup.benchmarks.timing import Quartiles, interleave, peak_memory


class Clock:
    """Calls take what they are told to, times a factor that may change from call to call."""

    def __init__(self):
        self.now = 0.0
        self.calls = []
        self.factor = lambda number: 1.0

    def perf_counter(self):
        return self.now

    def call(self, name, seconds):
        def called():
            self.now += seconds * self.factor(len(self.calls))
            self.calls.append(name)

        return called


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(benchmark, "time", clock)
    return clock


def test_every_call_stands_between_two_of_the_reference(clock):
    cases = {name: clock.call(name, 1.0) for name in ("a", "ref", "b")}
    timings = interleave(cases, reference="ref", rounds=2, warmup=3)
    warm, measured = clock.calls[: 3 * 4], clock.calls[3 * 4 :]
    assert [warm.count(name) for name in cases] == [4, 4, 4]  # once more, to see how long they take
    assert measured == ["ref", "a", "ref", "b", "ref", "a", "ref", "b", "ref"]
    assert list(timings) == ["a", "ref", "b"] and timings["ref"].ratio is None


def test_a_machine_that_slows_down_does_not_change_the_ratio(clock):
    clock.factor = lambda number: 1 + 0.05 * number
    cases = {"plain": clock.call("plain", 2.0), "more": clock.call("more", 3.0), "less": clock.call("less", 0.5)}
    timings = interleave(cases, reference="plain", rounds=5)
    assert dataclasses.astuple(timings["more"].ratio) == pytest.approx((1.5, 1.5, 1.5))
    assert dataclasses.astuple(timings["less"].ratio) == pytest.approx((0.25, 0.25, 0.25))
    assert timings["more"].seconds.low < timings["more"].seconds.median < timings["more"].seconds.high


def test_median_and_quartiles(clock):
    """Without a reference the calls come in turn: the measured ones are those numbered 6, 7, 8, ..."""
    clock.factor = lambda number: 1 + number**2
    timings = interleave({"a": clock.call("a", 1.0), "b": clock.call("b", 10.0)}, rounds=5)
    assert clock.calls[6:] == ["a", "b"] * 5
    for name, first, seconds in (("a", 6, 1.0), ("b", 7, 10.0)):
        own = [seconds * (1 + number**2) for number in range(first, first + 10, 2)]
        spread = timings[name].seconds
        assert (spread.low, spread.median, spread.high) == pytest.approx((own[1], median(own), own[3]))
        assert timings[name].ratio is None


def test_what_is_short_is_repeated(clock):
    cases = {"short": clock.call("short", 0.003), "long": clock.call("long", 0.5)}
    timings = interleave(cases, reference="long", rounds=4, warmup=1, min_run_time=0.02)
    assert clock.calls[4:] == ["long", *(["short"] * 7 + ["long"]) * 4]
    assert timings["short"].seconds.median == pytest.approx(0.003)
    assert timings["short"].ratio.median == pytest.approx(0.006)


def test_a_call_that_takes_no_time(clock):
    timings = interleave({"nothing": clock.call("nothing", 0.0)}, rounds=2, min_run_time=1.0)
    assert timings["nothing"].seconds == Quartiles(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rounds": 1}, "got 1 and 2"),
        ({"warmup": 0}, "got 20 and 0"),
        ({"reference": "c"}, "one of 'a', 'b', got 'c'"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        interleave({"a": int, "b": int}, **options)


def test_on_cuda_the_device_keeps_the_time(monkeypatch, clock):
    """The device is behind: what a call tells it to do takes a second there and nothing here."""
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
    monkeypatch.setattr(benchmark, "synchronize", lambda device_: device.update(waited=device["waited"] + 1))

    def call():
        device["now"] += 1.0

    timings = interleave({"a": call}, rounds=3, device="cuda", min_run_time=2.0)
    assert timings["a"].seconds == Quartiles(1.0, 1.0, 1.0) and clock.now == 0
    assert device["now"] == 2 + 1 + 3 * 2


def test_the_peak_is_that_of_what_lives_at_once():
    def call():
        first = torch.ones(1000)
        second = torch.ones(500)
        del first
        third = torch.ones(2000)
        return (second, third, torch.ones(10))[:0]

    assert peak_memory(call) == 4 * (500 + 2000 + 10)
    assert peak_memory(lambda: torch.ones(1000) + torch.ones(1000)) == 4 * 3000
    assert peak_memory(lambda: None) == 0


def test_temporary_tensors_inside_an_operation_count():
    """The logarithms of the softmax, which no name holds; the loss and the sum of the classes' weights are numbers."""
    logits, labels = torch.zeros(1000, 10), torch.zeros(1000, dtype=torch.int64)
    assert peak_memory(lambda: torch.nn.functional.cross_entropy(logits, labels)) == 4 * (1000 * 10 + 2)


def test_what_was_held_before_does_not_count():
    held, kept = [torch.ones(5000)], []

    def call():
        held.clear()
        if not kept:
            kept.append(torch.ones(3000))  # as a cache is filled at first
        return torch.ones(100)

    assert peak_memory(call) == 400


def test_gradients_and_activations_count():
    layer = torch.nn.Linear(100, 100, bias=False)
    step = training_step(Sum(layer), torch.ones(1, 100), None)
    # At the end of the backward pass: gradients of the weights and of the output; the loss, and its gradient of one.
    assert peak_memory(step) == 4 * (100 * 100 + 100 + 2)
    assert layer.weight.grad is None


class Sum(torch.nn.Module):
    """The sum of a layer's outputs as the loss."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, pixel_values, labels):
        return type("Output", (), {"loss": self.layer(pixel_values).square().sum()})


def test_tokenmixup_takes_hardly_more_memory_than_the_plain_model():
    network = MODEL_PRESETS["cct-2-3x2"]
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    models = training_models(network.build().train(), {"HTM": network.systems["HTM"], "VTM": network.systems["VTM"]})
    steps = {name: training_step(models[name], images, labels) for name in ("plain", "HTM", "VTM")}
    memory = {name: peak_memory(step) for name, step in steps.items()}
    assert memory == {name: peak_memory(step) for name, step in steps.items()}
    # A layer's hidden states are 64 tokens of 128 numbers in float32 for each of 16 images.
    hidden = 16 * 64 * 128 * 4
    assert memory["plain"] > 20 * hidden
    assert memory["plain"] < memory["HTM"] < 1.03 * memory["plain"] and memory["VTM"] < 1.03 * memory["plain"]


def test_on_cuda_the_allocator_is_asked(monkeypatch):
    calls = itertools.count()
    asked = {"memory_allocated": 700, "max_memory_allocated": 1000}
    for name, value in asked.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    reset = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: reset.append(next(calls)))
    assert peak_memory(lambda: next(calls), "cuda") == 300
    assert reset == [1]  # behind the first of two calls


def test_memory_of_another_device():
    with pytest.raises(ValueError, match="'cpu' and 'cuda', got 'meta'"):
        peak_memory(int, "meta")


def test_the_table_of_timings(clock):
    cases = {"plain": clock.call("plain", 2.0), "HTM": clock.call("HTM", 2.02), "random": clock.call("r", 0.00002)}
    timings = interleave(cases, reference="plain", rounds=2)
    memory = {"plain": 100 * 2**20, "HTM": 103 * 2**20, "random": 2**19}
    lines = timing_table(timings, "plain", peak_memory=memory).splitlines()
    assert [line.split() for line in lines[1:]] == [
        "plain 2000 2000 to 2000 1 100.0 1.000".split(),
        "HTM 2020 2020 to 2020 1.010 1.010 to 1.010 103.0 1.030".split(),
        "random 0.0200 0.0200 to 0.0200 0.0000 0.0000 to 0.0000 0.5 0.005".split(),
    ]
    assert lines[0].split("   ")[-1].strip() == "of plain" and len({len(line) for line in lines[2:]}) == 1
    lines = timing_table(timings, relative_gain={"HTM": 0.9876}).splitlines()
    assert [line.split()[-1] for line in lines] == ["kept", "2000", "98.8%", "0.0200"]
