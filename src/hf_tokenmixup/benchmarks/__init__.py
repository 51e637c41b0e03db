"""Benchmarks: latency and memory of TokenMixup's operations and of training steps, and training throughput."""

from .throughput import measure_throughput
from .timing import Quartiles, Timing, peak_memory, time_interleaved

__all__ = ["Quartiles", "Timing", "measure_throughput", "peak_memory", "time_interleaved"]
