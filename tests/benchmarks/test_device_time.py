"""The idle time of a device, against counted instants and a simulated trace."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from hf_tokenmixup.benchmarks import device_time
from hf_tokenmixup.benchmarks.device_time import device_idle_fraction, idle_fraction


@pytest.mark.parametrize("seed", range(5))
def test_idle_fraction_matches_counted_instants(seed):
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 60, (8,), generator=generator)
    ends = starts + torch.randint(1, 12, (8,), generator=generator)
    busy = torch.zeros(80, dtype=torch.bool)
    for start, end in zip(starts, ends, strict=True):
        busy[start:end] = True
    period = busy[starts.min() : ends.max()]
    intervals = list(zip(starts.tolist(), ends.tolist(), strict=True))
    assert idle_fraction(intervals) == pytest.approx((~period).float().mean().item())


@pytest.mark.parametrize("intervals", [[], [(3.0, 3.0)], [(0.0, 4.0), (1.0, 2.0)]])
def test_idle_fraction_without_gap_is_zero(intervals):
    assert idle_fraction(intervals) == 0


def test_device_idle_fraction_counts_kernels_of_the_device_alone(monkeypatch):
    def event(start, end, device_type=DeviceType.CUDA, **attributes):
        return SimpleNamespace(time_range=SimpleNamespace(start=start, end=end), device_type=device_type, **attributes)

    class Trace:
        def __init__(self, activities):
            assert activities == [ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            return [
                event(0, 2),
                event(6, 8, is_user_annotation=False),
                event(0, 8, is_user_annotation=True),
                event(1, 30, DeviceType.CPU),
            ]

    calls = []
    monkeypatch.setattr(device_time, "profile", Trace)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    assert device_idle_fraction(lambda: calls.append("step"), "cuda", calls=2) == 0.5
    assert calls == ["wait", "step", "step", "wait"]  # the trace ends after the device is done
