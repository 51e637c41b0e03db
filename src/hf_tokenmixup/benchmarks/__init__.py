"""Benchmarks: time and memory of the method's operations, of training steps and of complete runs."""

from .throughput import measure_throughput
from .timing import Quartiles, Timing, interleave, peak_memory

__all__ = ["Quartiles", "Timing", "interleave", "measure_throughput", "peak_memory"]
