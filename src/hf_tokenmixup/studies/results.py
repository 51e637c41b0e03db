"""Results of a study: mean and standard deviation over seeds next to the paper's figures, as text, JSON and CSV."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..utils.tables import format_text_table
from .definitions import MIXING_RESULTS, PAPER_MODEL_AND_DATASET, Study, StudyRow


@dataclass(frozen=True)
class RowResult:
    """Accuracies of one row.

    Attributes:
        row: The row.
        top1: Top-1 accuracy in percent by seed.
        difference: Difference of the mean to that of the reference row; None if either is missing.
        paper_difference: The same for the paper's figures.
        mixing: What HTM did, as means over the seeds of `MIXING_RESULTS`; empty without HTM.
    """

    row: StudyRow
    top1: Mapping[int, float]
    difference: float | None = None
    paper_difference: float | None = None
    mixing: Mapping[str, float] = field(default_factory=dict)

    @property
    def nothing_mixed(self) -> bool:
        """Whether HTM was enabled, but mixed no image with any seed."""
        return self.mixing.get("mixed_fraction") == 0

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None without any seed."""
        return mean(self.top1.values()) if self.top1 else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None with fewer than two seeds."""
        return stdev(self.top1.values()) if len(self.top1) > 1 else None


def summarize(
    study: Study, top1: Mapping[str, Mapping[int, float]], mixing: Mapping[str, Mapping[str, float]] | None = None
) -> list[RowResult]:
    """Compare the rows of a study with its reference row.

    Args:
        study: The rows.
        top1: Top-1 accuracy in percent by seed, by the keys of the rows. Rows without results may be missing.
        mixing: What HTM did, by the keys of the rows, as `hf_tokenmixup.studies.runner.collect_mixing` returns it.

    Returns:
        One result per row, in order.
    """
    reference = study.rows[study.reference]
    reference_mean = RowResult(reference, top1.get(reference.key, {})).mean
    results = []
    for row in study.rows:
        result = RowResult(row, top1.get(row.key, {}))
        difference, paper_difference = None, None
        if row is not reference:
            difference = _difference(result.mean, reference_mean)
            paper_difference = _difference(row.paper, reference.paper)
        results.append(RowResult(row, result.top1, difference, paper_difference, (mixing or {}).get(row.key, {})))
    return results


def format_table(study: Study, results: Sequence[RowResult]) -> str:
    """Format results for a terminal, with columns for the paper if it reports any of the rows."""
    seeds = sorted({seed for result in results for seed in result.top1})
    header = ["", "n", "top-1", "diff"]
    has_paper = any(result.row.paper is not None for result in results)
    if has_paper:
        header += ["paper", "diff"]
    has_mixing = any(result.mixing for result in results)
    if has_mixing:
        header += ["images", "tokens", "labels"]
    lines = [header]
    for result in results:
        top1 = _format_number(result.mean) + ("" if result.std is None else f" ± {result.std:.2f}")
        difference = "nothing mixed" if result.nothing_mixed else _format_number(result.difference, "+")
        line = [result.row.name, str(len(result.top1)), top1, difference]
        if has_paper:
            line += [_format_number(result.row.paper), _format_number(result.paper_difference, "+")]
        if has_mixing:
            line += [_format_percent(result.mixing.get(name)) for name in MIXING_RESULTS]
        lines.append(line)
    note = "top-1 in percent" + (", mean ± standard deviation" if len(seeds) > 1 else "")
    if seeds:
        note += f", {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    note += f"; differences to {study.rows[study.reference].name}"
    if has_paper:
        note += f"; paper: {PAPER_MODEL_AND_DATASET}"
    if has_mixing:
        note += "; HTM: images mixed, tokens replaced in them, label weight moved"
    return "\n".join([study.title, note, "", format_text_table(lines)])


def save_results(study: Study, results: Sequence[RowResult], folder: Path, **metadata: Any) -> None:
    """Write the results to `NAME.json` and `NAME.csv`, where NAME is that of the study.

    Args:
        study: The study.
        results: One result per row, in order.
        folder: Output folder, created if missing.
        metadata: Further entries of the JSON file.
    """
    rows = [
        {
            "row": result.row.name,
            "recipe": result.row.recipe,
            "options": " ".join(result.row.options),
            "n": len(result.top1),
            "top1_mean": result.mean,
            "top1_std": result.std,
            "difference": result.difference,
            "paper_top1": result.row.paper,
            "paper_difference": result.paper_difference,
            **{name: result.mixing.get(name) for name in MIXING_RESULTS},
        }
        for result in results
    ]
    content = {
        "study": study.title,
        "unit": "percent",
        "compared_with": study.rows[study.reference].name,
        **metadata,
    }
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
    """Write a file in UTF-8 so that readers never see a partial one, even if this process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(text.encode())
    temporary.replace(path)


def _difference(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else round(value - reference, 6)


def _format_percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _format_number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.2f}"
