"""Results of a study: means over seeds, differences with intervals, and the paper's figures, as text, JSON and CSV."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import scipy

from ..utils.tables import format_text_table
from .definitions import CORRUPTION_METRIC, METRICS, MIXING_RESULTS, PAPER_MODEL_AND_DATASET, Study, StudyRow

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedDifference:
    """Mean over seeds of the difference between two rows, and its 95 % interval by Student's t distribution.

    The runs of a seed have the same initial weights and data order, so the difference varies less than the values.

    Attributes:
        mean: Mean difference.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class MetricResult:
    """Values of one metric and row.

    Attributes:
        values: Value by seed.
        paired: Difference to the reference row; None with fewer than two seeds that both rows have.
    """

    values: Mapping[int, float] = field(default_factory=dict)
    paired: PairedDifference | None = None

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None without any seed."""
        return mean(self.values.values()) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None with fewer than two seeds."""
        return stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class RowResult:
    """Accuracies of one row.

    Attributes:
        row: The row.
        top1: Top-1 accuracy in percent by seed.
        difference: Difference of the mean to that of the reference row; None if either is missing.
        paper_difference: The same for the paper's figures.
        mixing: What HTM did, as means over the seeds of `MIXING_RESULTS`; empty without HTM.
        paired: Mean over seeds of the difference in top-1, in percent, to the reference row; None with fewer than two
            seeds that both rows have.
        metrics: The study's further metrics, by name.
    """

    row: StudyRow
    top1: Mapping[int, float]
    difference: float | None = None
    paper_difference: float | None = None
    mixing: Mapping[str, float] = field(default_factory=dict)
    paired: PairedDifference | None = None
    metrics: Mapping[str, MetricResult] = field(default_factory=dict)

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


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> PairedDifference | None:
    """Compare two rows by the seeds that both have. None with fewer than two such seeds.

    Args:
        values: Value by seed.
        reference: Value of the other row by seed.
    """
    differences = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    count = len(differences)
    if count < 2:
        return None
    quantile = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    center, radius = mean(differences), float(quantile) * stdev(differences) / count**0.5
    return PairedDifference(center, center - radius, center + radius)


def summarize(
    study: Study,
    top1: Mapping[str, Mapping[int, float]],
    mixing: Mapping[str, Mapping[str, float]] | None = None,
    metrics: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None,
) -> list[RowResult]:
    """Compare the rows of a study with its reference row.

    Args:
        study: The rows.
        top1: Top-1 accuracy in percent by seed, by the keys of the rows. Rows without results may be missing.
        mixing: What HTM did, by the keys of the rows, as `hf_tokenmixup.studies.runner.collect_mixing` returns it.
        metrics: Values of the study's further metrics by seed, by the keys of the rows and the names of the metrics,
            as `hf_tokenmixup.studies.runner.collect_metrics` returns them.

    Returns:
        One result per row, in order.
    """
    reference = study.rows[study.reference]
    reference_mean = RowResult(reference, top1.get(reference.key, {})).mean
    metrics = metrics or {}
    results = []
    for row in study.rows:
        result = RowResult(row, top1.get(row.key, {}), mixing=(mixing or {}).get(row.key, {}))
        values = {name: metrics.get(row.key, {}).get(name, {}) for name in study.metrics}
        if row is reference:
            found = {name: MetricResult(by_seed) for name, by_seed in values.items()}
            results.append(replace(result, metrics=found))
            continue
        others = metrics.get(reference.key, {})
        result = replace(
            result,
            difference=_difference(result.mean, reference_mean),
            paper_difference=_difference(row.paper, reference.paper),
            paired=paired_difference(result.top1, top1.get(reference.key, {})),
            metrics={
                name: MetricResult(by_seed, paired_difference(by_seed, others.get(name, {})))
                for name, by_seed in values.items()
            },
        )
        results.append(result)
    return results


def find_best(results: Sequence[RowResult], metric: str = "top1") -> RowResult | None:
    """Return the row with the best mean if it is better than the reference row by an interval that excludes 0.

    Args:
        results: One result per row.
        metric: `top1`, or another metric of the study.
    """
    sign = 1 if metric == "top1" else METRICS[metric].sign
    candidates = [(result, result if metric == "top1" else result.metrics[metric]) for result in results]
    candidates = [(result, values) for result, values in candidates if values.mean is not None]
    if not candidates:
        return None
    best, values = max(candidates, key=lambda candidate: sign * candidate[1].mean)
    if values.paired is None:
        return None
    return best if min(sign * values.paired.low, sign * values.paired.high) > 0 else None


def format_table(study: Study, results: Sequence[RowResult]) -> str:
    """Format results for a terminal, with columns for the paper if it reports any of the rows."""
    seeds = sorted({seed for result in results for seed in result.top1})
    header = ["", "n", "top-1", "diff"]
    metrics = [name for name in study.metrics if any(result.metrics[name].values for result in results)]
    best = {name: find_best(results, name) for name in ("top1", *metrics)}
    has_paper = any(result.row.paper is not None for result in results)
    if has_paper:
        header += ["paper", "diff"]
    header += [title for name in metrics for title in (METRICS[name].title, "diff")]
    has_mixing = any(result.mixing for result in results)
    if has_mixing:
        header += ["images", "tokens", "labels"]
    lines = [header]
    for result in results:
        top1 = _format_number(result.mean) + ("" if result.std is None else f" ± {result.std:.2f}")
        difference = _format_number(result.difference, "+")
        if result.nothing_mixed:
            difference = "nothing mixed"
        elif result.paired is not None:
            difference = _format_paired(result.paired, 2, marked=result is best["top1"])
        line = [result.row.name, str(len(result.top1)), top1, difference]
        if has_paper:
            line += [_format_number(result.row.paper), _format_number(result.paper_difference, "+")]
        for name in metrics:
            values, digits = result.metrics[name], METRICS[name].digits
            cell = "" if values.mean is None else f"{values.mean:.{digits}f}"
            cell += "" if values.std is None else f" ± {values.std:.{digits}f}"
            marked = result is best[name]
            line += [cell, "" if values.paired is None else _format_paired(values.paired, digits, marked)]
        if has_mixing:
            line += [_format_percent(result.mixing.get(name)) for name in MIXING_RESULTS]
        lines.append(line)
    note = "top-1 in percent" + (", mean ± standard deviation" if len(seeds) > 1 else "")
    if seeds:
        note += f", {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    note += f"; differences to {study.rows[study.reference].name}"
    if seeds and not results[study.reference].top1:
        note += ", which has no finished run"
    if any(result.paired is not None for result in results):
        note += ", paired by seed, ± half of the 95 % interval (Student t)"
    if any(best.values()):
        note += "; *: best mean, and the interval does not contain 0"
    if has_paper:
        note += f"; paper: {PAPER_MODEL_AND_DATASET}"
    if CORRUPTION_METRIC in metrics:
        note += "; corrupted: mean top-1 in percent on corrupted images"
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
            **_describe_paired("paired_difference", result.paired),
            **{key: value for name in study.metrics for key, value in _describe(name, result.metrics[name]).items()},
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
        row
        | {"top1": {str(seed): result.top1[seed] for seed in sorted(result.top1)}}
        | {
            name: {str(seed): values.values[seed] for seed in sorted(values.values)}
            for name, values in result.metrics.items()
        }
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


def _describe(name: str, result: MetricResult) -> dict[str, float | None]:
    paired = _describe_paired(f"{name}_paired_difference", result.paired)
    return {f"{name}_mean": result.mean, f"{name}_std": result.std, **paired}


def _describe_paired(name: str, paired: PairedDifference | None) -> dict[str, float | None]:
    values = (None, None, None) if paired is None else (paired.mean, paired.low, paired.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _format_paired(paired: PairedDifference, digits: int, marked: bool) -> str:
    radius = (paired.high - paired.low) / 2
    return f"{paired.mean:+.{digits}f} ± {radius:.{digits}f}{'*' if marked else ''}"


def _format_percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _format_number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.2f}"
