"""Benchmark results as text tables."""

import math
from collections.abc import Mapping, Sequence

from ..utils.tables import format_text_table
from .compared_models import NUM_LABELS, ModelCosts, PaperModel
from .operators import Work
from .timing import Quartiles, Timing

MIB = 2**20


def timing_table(
    timings: Mapping[str, Timing],
    reference: str | None = None,
    *,
    peak_memory: Mapping[str, int] | None = None,
    work: Mapping[str, Work] | None = None,
    relative_gain: Mapping[str, float] | None = None,
    device_idle: Mapping[str, float] | None = None,
) -> str:
    """Format latencies in milliseconds as median and quartiles, and as ratios to a reference.

    Args:
        timings: Timings by name.
        reference: Name of the timing that the ratios refer to.
        peak_memory: Bytes by name.
        work: What is computed, by name. The table has the number of operators beyond the reference's, and operations
            and bytes as ratios to the reference's.
        relative_gain: Fractions in [0, 1] for some of the names.
        device_idle: Fractions in [0, 1] of the time in which the device computes nothing, by name.
    """
    header = ["", "ms", "quartiles"] + ([f"of {reference}", "quartiles"] if reference else [])
    header += ["peak MiB", f"of {reference}"] if peak_memory else []
    header += ["operators", "FLOPs", "bytes moved"] if work else []
    header += ["relative gain"] if relative_gain else []
    header += ["device idle"] if device_idle else []
    rows = [header]
    for name, timing in timings.items():
        row = [name, *_format_quartiles(timing.seconds, 1000)]
        if reference:
            row += _format_quartiles(timing.ratio) if timing.ratio else ["1", ""]
        if peak_memory:
            row += [f"{peak_memory[name] / MIB:.1f}", f"{peak_memory[name] / peak_memory[reference]:.3f}"]
        if work:
            row += _format_work(work[name], None if name == reference else work[reference])
        if relative_gain:
            row += [f"{relative_gain[name]:.1%}" if name in relative_gain else ""]
        if device_idle:
            row += [f"{device_idle[name]:.1%}"]
        rows.append(row)
    return format_text_table(rows, separator="   ")


def parameter_table(table: int, counted: Sequence[tuple[PaperModel, ModelCosts | None]]) -> str:
    """Format Table 1 or 2 of the paper with the counted parameters and MACs next to the printed ones.

    Args:
        table: 1 or 2.
        counted: Rows of the tables with their costs, None for models that cannot be built.
    """
    counts = NUM_LABELS[table]
    header = [f"Table {table}", "parameters: paper", *(f"{count} classes" for count in counts)]
    rows = [[*header, "MACs: paper", "all products", "of weights alone"]]
    for model, costs in counted:
        if model.table != table:
            continue
        parameters = [f"{costs.parameters[count] / 1e6:.2f} M" if costs else "not built" for count in counts]
        macs = [f"{value / 1e9:.2f} G" for value in (costs.macs, costs.macs_weights_only)] if costs else ["", ""]
        rows.append([model.name, model.parameters, *parameters, model.macs, *macs])
    return format_text_table(rows, separator="   ")


def _format_work(work: Work, reference: Work | None) -> list[str]:
    if reference is None:
        return [f"{work.operators}", f"{work.flops / 1e9:.4g} G", f"{work.moved_bytes / 2**30:.2f} GiB"]
    ratios = (work.flops / reference.flops, work.moved_bytes / reference.moved_bytes)
    return [f"{work.operators - reference.operators:+d}", *(f"{ratio:.3f}" for ratio in ratios)]


def _format_quartiles(values: Quartiles, factor: float = 1.0) -> list[str]:
    median, low, high = (_format_number(factor * value) for value in (values.median, values.low, values.high))
    return [median, f"{low} to {high}"]


def _format_number(value: float) -> str:
    """Format with four significant digits and up to four decimals."""
    decimals = 3 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(4, max(0, decimals))}f}"
