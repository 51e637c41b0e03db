"""Text tables for a terminal."""

from collections.abc import Sequence


def format_text_table(rows: Sequence[Sequence[str]], separator: str = "  ") -> str:
    """Align the columns of a table: the first one to the left, the others to the right.

    pandas, which comes with datasets, aligns all columns to the same side and does not strip trailing spaces.

    Args:
        rows: Rows of equal length, the header first.
        separator: Text between two columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        for first, *cells in rows
    )
    return "\n".join(separator.join(line).rstrip() for line in lines)
