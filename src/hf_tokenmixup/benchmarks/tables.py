"""What the benchmark measured, as text."""

import math
from collections.abc import Mapping, Sequence

from .compared_models import NUM_LABELS, ModelCosts, PaperModel
from .timing import Quartiles, Timing

MIB = 2**20


def timing_table(
    timings: Mapping[str, Timing],
    reference: str | None = None,
    *,
    peak_memory: Mapping[str, int] | None = None,
    relative_gain: Mapping[str, float] | None = None,
) -> str:
    """Milliseconds and, with a reference, ratios, each as median and quartiles.

    Args:
        timings: by case.
        reference: the case that the ratios are to.
        peak_memory: bytes by case.
        relative_gain: share in [0, 1] for some of the cases.
    """
    head = ["", "ms", "quartiles"] + ([f"of {reference}", "quartiles"] if reference else [])
    head += ["peak MiB", f"of {reference}"] if peak_memory else []
    head += ["gain kept"] if relative_gain else []
    rows = [head]
    for case, timing in timings.items():
        row = [case, *_spread(timing.seconds, 1000)]
        if reference:
            row += _spread(timing.ratio) if timing.ratio else ["1", ""]
        if peak_memory:
            row += [f"{peak_memory[case] / MIB:.1f}", f"{peak_memory[case] / peak_memory[reference]:.3f}"]
        if relative_gain:
            row += [f"{relative_gain[case]:.1%}" if case in relative_gain else ""]
        rows.append(row)
    return _aligned(rows)


def parameter_table(table: int, counted: Sequence[tuple[PaperModel, ModelCosts | None]]) -> str:
    """The paper's Table 1 or 2: its parameters and MACs, and beside them what was counted, by number of classes."""
    counts = NUM_LABELS[table]
    rows = [[f"Table {table}", "parameters: paper", *(f"{count} classes" for count in counts)]]
    rows[0] += ["MACs: paper", "all products", "of weights alone"]
    for system, costs in counted:
        if system.table != table:
            continue
        own = [f"{costs.parameters[count] / 1e6:.2f} M" if costs else "not built" for count in counts]
        macs = [f"{value / 1e9:.2f} G" for value in (costs.macs, costs.macs_weights_only)] if costs else ["", ""]
        rows.append([system.name, system.parameters, *own, system.macs, *macs])
    return _aligned(rows)


def _spread(values: Quartiles, factor: float = 1.0) -> list[str]:
    median, low, high = (_number(factor * value) for value in (values.median, values.low, values.high))
    return [median, f"{low} to {high}"]


def _number(value: float) -> str:
    """Four digits and at most as many behind the point."""
    decimals = 3 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(4, max(0, decimals))}f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        for first, *cells in rows
    )
    return "\n".join("   ".join(line).rstrip() for line in lines)
