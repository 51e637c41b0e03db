"""Latency of several functions measured in turn, and peak memory of a function."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from torch.profiler import ProfilerActivity, profile

from .throughput import synchronize

Call = Callable[[], object]


@dataclass(frozen=True)
class Quartiles:
    """Median, first and third quartile of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def from_samples(cls, samples: Sequence[float]) -> "Quartiles":
        """Compute the quartiles of at least two samples."""
        low, _, high = quantiles(samples, n=4, method="inclusive")
        return cls(median(samples), low, high)


@dataclass(frozen=True)
class Timing:
    """Latency of a function.

    Attributes:
        seconds: Seconds per call.
        ratio: Ratio to the reference's calls before and after; None for the reference, and without a reference.
    """

    seconds: Quartiles
    ratio: Quartiles | None = None


# torch.utils.benchmark measures one statement after the other. Here every round measures all functions, each between
# two calls of the reference, so that a slow phase of the machine affects all of them and cancels in the ratios.
def time_interleaved(
    functions: Mapping[str, Call],
    *,
    reference: str | None = None,
    rounds: int = 20,
    warmup: int = 2,
    min_run_time: float = 0.0,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Measure the latency of functions in turn.

    With a reference, every measurement is divided by the mean of the reference's measurements before and after it.

    Args:
        functions: Functions by name.
        reference: Name of the function that the others are compared with.
        rounds: Number of measurements per function.
        warmup: Number of calls per function before the first measurement.
        min_run_time: Seconds per measurement. Shorter functions are called repeatedly.
        device: Device of the computation. On CUDA, time is measured by events on the device.

    Returns:
        Timings by name, in the order of `functions`.

    Raises:
        ValueError: rounds is below 2, warmup is below 1, or reference is not in functions.
    """
    if rounds < 2 or warmup < 1:
        raise ValueError(f"rounds must be at least 2 and warmup at least 1, got {rounds} and {warmup}.")
    if reference is not None and reference not in functions:
        raise ValueError(f"reference must be one of {', '.join(map(repr, functions))}, got {reference!r}.")
    device = torch.device(device)
    for function in functions.values():
        for _ in range(warmup):
            function()
    repeats = {
        name: _num_repeats(measure_latency(function, 1, device), min_run_time) for name, function in functions.items()
    }

    def measure(name: str) -> float:
        return measure_latency(functions[name], repeats[name], device)

    seconds: dict[str, list[float]] = {name: [] for name in functions}
    ratios: dict[str, list[float]] = {name: [] for name in functions if name != reference}
    before = measure(reference) if reference else math.nan
    for _ in range(rounds):
        for name in ratios:
            seconds[name].append(measure(name))
            if reference:
                after = measure(reference)
                seconds[reference].append(after)
                ratios[name].append(2 * seconds[name][-1] / (before + after))
                before = after
    return {
        name: Timing(
            Quartiles.from_samples(samples), Quartiles.from_samples(ratios[name]) if ratios.get(name) else None
        )
        for name, samples in seconds.items()
    }


def measure_latency(function: Call, repeats: int, device: torch.device) -> float:
    """Measure the mean seconds per call over `repeats` calls, including the work on the device."""
    synchronize(device)
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def peak_memory(function: Call, device: torch.device | str = "cpu") -> int:
    """Measure the peak memory of tensors during a call, in bytes above what was allocated before.

    On CUDA, torch's caching allocator counts. On CPU, the profiler records every allocation of a tensor, temporary
    ones inside operations too, so unlike the memory of the process the number is exact and reproducible. Memory that a
    library allocates itself is not included.

    Args:
        function: Is called twice. What the first call allocates permanently does not count.
        device: Device of the tensors, CPU or CUDA.

    Raises:
        ValueError: The device is neither a CPU nor a CUDA device.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be of type 'cpu' or 'cuda' to measure memory, got {device.type!r}.")
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    records = [event for event in events if event["name"] == "[memory]"]
    if not records:
        return 0
    first = min(records, key=lambda event: event["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]
    return max(0, max(event["args"]["Total Allocated"] for event in records) - before)


def _num_repeats(seconds: float, min_run_time: float) -> int:
    return max(1, math.ceil(min_run_time / seconds)) if seconds > 0 else 1
