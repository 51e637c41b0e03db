"""Curves and metrics of a run, also while it trains, without Gradio."""

import json
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ..visualization.training_curves import draw_training_curves, parse_training_log

LOG_NAME, RESULTS_NAME = "training_log.jsonl", "all_results.json"


@dataclass(frozen=True)
class RunSummary:
    """State of a run.

    Attributes:
        curves: Accuracy, loss and mixing over the epochs.
        rows: Names and values of the metrics.
        status: One sentence about the run.
        version: Sizes and times of the files, by which `read_run` recognizes a change.
    """

    curves: Figure
    rows: list[tuple[str, str]]
    status: str
    version: list


def read_run(folder: str | Path, version: list | None = None) -> RunSummary | None:
    """Read the log of a run, and its results if it has ended.

    Args:
        folder: Output folder of the run.
        version: `RunSummary.version` of an earlier call.

    Returns:
        The state of the run; None if it has not changed since `version`.

    Raises:
        ValueError: The folder has no log, or a file cannot be read.
    """
    log, results = Path(folder) / LOG_NAME, Path(folder) / RESULTS_NAME
    if not log.is_file():
        raise ValueError(f"{log} does not exist. Enter the output folder of a run.")
    stats = [path.stat() if path.is_file() else None for path in (log, results)]
    current = [str(folder), *([stat.st_size, stat.st_mtime_ns] if stat else None for stat in stats)]
    if current == version:
        return None
    text = log.read_text(encoding="utf-8", errors="replace")
    # The last line may be incomplete while the run writes it.
    records = parse_training_log(text[: text.rfind("\n") + 1], log)
    metrics: dict = {}
    for record in records:
        metrics |= record
    # A resumed run has the results of its first part until it ends again.
    ended = stats[1] is not None and stats[1].st_mtime_ns >= stats[0].st_mtime_ns
    if ended:
        try:
            metrics |= json.loads(results.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{results} must be a JSON object: {error}.") from error
    epoch, step = metrics.pop("epoch", None), metrics.pop("step", None)
    at = "" if epoch is None else f" at epoch {epoch:.4g}" + ("" if step is None else f", step {step}")
    status = "The run has ended." if ended else f"The run has not ended: its last record is{at or ' missing'}."
    rows = [(name, _format(value)) for name, value in sorted(metrics.items()) if value is not None]
    return RunSummary(draw_training_curves(records), rows, status, current)


def _format(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
