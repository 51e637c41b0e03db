"""Time in which a CUDA device computes nothing, from a trace of torch's profiler."""

from collections.abc import Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .timing import Call


def idle_fraction(intervals: Iterable[tuple[float, float]]) -> float:
    """Fraction of a period in which no interval runs.

    Args:
        intervals: start and end of each, in one unit, in any order. They may overlap.

    Returns:
        Fraction in [0, 1] of the time between the first start and the last end; 0 if this time is 0.

    Example:
        >>> idle_fraction([(0.0, 2.0), (1.0, 3.0), (7.0, 8.0)])
        0.5
    """
    ordered = sorted(intervals)
    if not ordered:
        return 0.0
    first, idle = ordered[0][0], 0.0
    last = first
    for start, end in ordered:
        idle += max(0.0, start - last)
        last = max(last, end)
    return idle / (last - first) if last > first else 0.0


def device_idle_fraction(function: Call, device: torch.device | str, calls: int = 3) -> float:
    """Fraction of the time of some calls in which no kernel and no copy runs on a CUDA device.

    Args:
        function: is called `calls` times.
        device: CUDA device.
        calls: number of calls. The time between two calls counts.
    """
    torch.cuda.synchronize(device)
    # To trace the calls of the CPU too would delay them.
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            function()
        torch.cuda.synchronize(device)
    # Annotations span the kernels of a region and the time between them.
    return idle_fraction(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
