"""What came out of a study: mean and deviation over seeds, beside the paper's figures; as text, JSON and CSV."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .definitions import PAPER_MODEL_AND_DATASET, Row, Study


@dataclass(frozen=True)
class RowResult:
    """A row's top-1 in percent by seed, and the differences of its mean and of the paper's figure to the reference."""

    row: Row
    top1: Mapping[int, float]
    difference: float | None = None
    paper_difference: float | None = None

    @property
    def mean(self) -> float | None:
        return mean(self.top1.values()) if self.top1 else None

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation; None with fewer than two seeds."""
        return stdev(self.top1.values()) if len(self.top1) > 1 else None


def summarize(study: Study, top1: Mapping[str, Mapping[int, float]]) -> list[RowResult]:
    """Results of a study's rows in order.

    Args:
        study: the rows.
        top1: percent by seed, by the rows' keys; rows without any are there with no seed.
    """
    reference = study.rows[study.reference]
    expected = RowResult(reference, top1.get(reference.key, {})).mean
    results = []
    for row in study.rows:
        found = RowResult(row, top1.get(row.key, {}))
        here, paper = None, None
        if row is not reference:
            here = _difference(found.mean, expected)
            paper = _difference(row.paper, reference.paper)
        results.append(RowResult(row, found.top1, here, paper))
    return results


def format_table(study: Study, results: Sequence[RowResult]) -> str:
    """The results for a terminal; columns of the paper only where it has figures."""
    seeds = sorted({seed for result in results for seed in result.top1})
    header = ["", "n", "top-1", "diff"]
    told = any(result.row.paper is not None for result in results)
    if told:
        header += ["paper", "diff"]
    lines = [header]
    for result in results:
        here = _number(result.mean) + ("" if result.deviation is None else f" ± {result.deviation:.2f}")
        line = [result.row.name, str(len(result.top1)), here, _number(result.difference, "+")]
        if told:
            line += [_number(result.row.paper), _number(result.paper_difference, "+")]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = (
        "  ".join(cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    )
    note = "top-1 in percent" + (", mean ± standard deviation" if len(seeds) > 1 else "")
    if seeds:
        note += f", {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    note += f"; differences to {study.rows[study.reference].name}"
    if told:
        note += f"; the paper's: {PAPER_MODEL_AND_DATASET}"
    return "\n".join([study.title, note, "", *(line.rstrip() for line in table)])


def save_results(study: Study, results: Sequence[RowResult], folder: Path, **about: Any) -> None:
    """Write `NAME.json` and `NAME.csv` for a study of that name; `about` goes into the former as it is."""
    rows = [
        {
            "row": result.row.name,
            "recipe": result.row.recipe,
            "options": " ".join(result.row.options),
            "n": len(result.top1),
            "top1_mean": result.mean,
            "top1_std": result.deviation,
            "difference": result.difference,
            "paper_top1": result.row.paper,
            "paper_difference": result.paper_difference,
        }
        for result in results
    ]
    content = {"study": study.title, "unit": "percent", "compared_with": study.rows[study.reference].name, **about}
    content["rows"] = [
        row | {"top1": {str(seed): result.top1[seed] for seed in sorted(result.top1)}}
        for row, result in zip(rows, results, strict=True)
    ]
    atomic_write_text(folder / f"{study.name}.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(folder / f"{study.name}.csv", text.getvalue())


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file that whoever reads finds whole, the old one or the new one, also if this process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(text.encode())
    unfinished.replace(path)


def _difference(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else round(value - reference, 6)


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.2f}"
