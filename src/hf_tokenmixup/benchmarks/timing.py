"""Timing what is to be compared in turn, and the memory that a call takes at its peak."""

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
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Of at least two values."""
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)


@dataclass(frozen=True)
class Timing:
    """How long a call takes.

    Attributes:
        seconds: of one call.
        ratio: to the reference's calls before and after it; None for the reference, and where there is none.
    """

    seconds: Quartiles
    ratio: Quartiles | None = None


def interleave(
    cases: Mapping[str, Call],
    *,
    reference: str | None = None,
    rounds: int = 20,
    warmup: int = 2,
    min_run_time: float = 0.0,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time calls in turn, so that a slow moment of the machine hits all of them.

    With a reference, every call stands between two of it and is divided by their mean.

    Args:
        cases: what to call, by name.
        reference: the name of the call that the others are compared with.
        rounds: how often each is measured.
        warmup: calls of each beforehand that are not measured.
        min_run_time: a shorter call is repeated until a measurement takes so long, and divided by the number.
        device: where the work is done. On CUDA the time is that between two events on the device.

    Returns:
        The timing of each, by name, in the order of ``cases``.

    Raises:
        ValueError: fewer than two rounds, less than one warm-up, or a reference that is none of the cases.
    """
    if rounds < 2 or warmup < 1:
        raise ValueError(f"Expected rounds of at least 2 and a warmup of at least 1, got {rounds} and {warmup}.")
    if reference is not None and reference not in cases:
        raise ValueError(f"The reference must be one of {', '.join(map(repr, cases))}, got {reference!r}.")
    device = torch.device(device)
    for call in cases.values():
        for _ in range(warmup):
            call()
    times = {name: _repetitions(measure_latency(call, 1, device), min_run_time) for name, call in cases.items()}

    def measure(name: str) -> float:
        return measure_latency(cases[name], times[name], device)

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    ratios: dict[str, list[float]] = {name: [] for name in cases if name != reference}
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
        name: Timing(Quartiles.of(values), Quartiles.of(ratios[name]) if ratios.get(name) else None)
        for name, values in seconds.items()
    }


def measure_latency(call: Call, times: int, device: torch.device) -> float:
    """Seconds of one of so many calls in a row, until the device has done all of them."""
    synchronize(device)
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / times
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / times


def peak_memory(call: Call, device: torch.device | str = "cpu") -> int:
    """Bytes of tensors at the peak of a call, above what was held before it.

    On CUDA torch's allocator keeps the count. On a CPU the profiler records every tensor's memory as it is taken and
    given back, the temporary ones inside an operation too; so the number is exact and the same each time, which the
    memory of the process is not. Scratch memory that a library takes by itself is not in it.

    Args:
        call: called twice: what the first call leaves behind for good does not count.
        device: where the tensors lie, a CPU or CUDA.

    Raises:
        ValueError: for another kind of device.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Memory is measured on the device types 'cpu' and 'cuda', got {device.type!r}.")
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
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


def _repetitions(seconds: float, min_run_time: float) -> int:
    return max(1, math.ceil(min_run_time / seconds)) if seconds > 0 else 1
