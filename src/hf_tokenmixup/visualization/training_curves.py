"""Training curves over the epochs (Figure 4 of the paper), of one run or of several runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .figure_utils import (
    BLUE,
    DASHED,
    DOTTED,
    GREEN,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    SOLID,
    STYLES,
    new_figure,
    save_figure,
)


@dataclass(frozen=True)
class _Curve:
    """A key of the log records and its line style."""

    key: str
    label: str
    color: str
    style: str | tuple
    marker: str = ""
    width: float = 1.8


@dataclass(frozen=True)
class _Panel:
    """Curves that share axes, and what is shown if none of them was logged: another panel, or a note.

    The axis of an accuracy ends at 100 %, and its legend shows the last values. `nothing` is a key of the log records
    and a note that is shown where all of its values are 0.
    """

    title: str
    unit: str
    curves: Sequence[_Curve]
    missing: "str | _Panel"
    percent: bool = False
    accuracy: bool = False
    nothing: tuple[str, str] | None = None


# A wide line remains visible below the line that is drawn next, where both have the same values.
_WIDE = 4.5
_PANELS = (
    _Panel(
        title="Evaluation accuracy",
        unit="accuracy",
        curves=(
            _Curve("eval_top1", "top-1", BLUE, SOLID, "o"),
            _Curve("eval_top5", "top-5", ORANGE, DASHED, "s"),
        ),
        missing="no evaluation was logged",
        percent=True,
        accuracy=True,
    ),
    _Panel(
        title="Loss",
        unit="nats",
        curves=(
            _Curve("loss", "training", SKY, SOLID, width=_WIDE),
            _Curve("classification_loss", "classification (training)", BLUE, SOLID),
            _Curve("scorenet_loss", "ScoreNet (training)", GREEN, DOTTED),
            _Curve("eval_loss", "evaluation", ORANGE, DASHED, "s"),
        ),
        missing="no loss was logged",
    ),
    _Panel(
        title="Horizontal TokenMixup",
        unit="fraction (tokens, labels: of mixed images)",
        curves=(
            _Curve("easy_fraction", "easy images", SKY, SOLID, width=_WIDE),
            _Curve("mixed_fraction", "mixed images", BLUE, SOLID),
            _Curve("replaced_fraction", "replaced tokens", ORANGE, DASHED),
            _Curve("label_mass_moved", "moved label mass", PURPLE, DOTTED),
        ),
        # Logs of earlier versions have no fractions.
        missing=_Panel(
            title="Images mixed by TokenMixup",
            unit="images per step",
            curves=(
                _Curve("easy_samples", "easy", SKY, SOLID, width=_WIDE),
                _Curve("mixed_samples", "mixed", BLUE, SOLID),
            ),
            missing="no horizontal TokenMixup was logged",
            nothing=("mixed_samples", "no image was mixed"),
        ),
        nothing=("mixed_fraction", "no image was mixed"),
        percent=True,
    ),
)


@dataclass(frozen=True)
class _Measure:
    """A key of the log records that runs are compared by; `preferred` replaces it in runs that logged that key."""

    key: str
    title: str
    unit: str
    percent: bool = False
    preferred: str = ""

    def series(self, log_history: list[dict]) -> tuple[list[float], list[float]]:
        """Return the epochs and the values of a run."""
        preferred = _series(log_history, self.preferred)
        return preferred if preferred[0] else _series(log_history, self.key)


_MEASURES = (
    _Measure("eval_top1", "Evaluation accuracy", "top-1 accuracy", percent=True),
    # ScoreNet's loss is part of `loss`, and would make runs with HTM look worse than others.
    _Measure("loss", "Training loss", "nats (HTM: mixed labels)", preferred="classification_loss"),
    _Measure("eval_loss", "Evaluation loss", "nats"),
    _Measure("mixed_samples", "Images mixed by TokenMixup", "images per step"),
    _Measure("replaced_tokens", "Tokens replaced by TokenMixup", "tokens per step"),
)


def plot_training_curves(log_history: list[dict], path: str | Path) -> Path:
    """Plot the curves of one run in three panels: accuracy, loss and mixing.

    Args:
        log_history: The log records of a Trainer (`trainer.state.log_history`, or the lines of `training_log.jsonl`):
            dicts with `epoch` and any of `eval_top1` and `eval_top5` (in [0, 1]), `loss`, `classification_loss`,
            `scorenet_loss` and `eval_loss` (nats), and `easy_fraction`, `mixed_fraction`, `replaced_fraction` and
            `label_mass_moved` (in [0, 1]). In a log without these fractions, `mixed_samples` and `easy_samples`
            (images per step) are plotted. Other records and keys are ignored, as are values that are None or not
            finite. A panel without values shows a note.
        path: Path of the figure, `.png` or `.pdf`. Missing folders are created.

    Returns:
        The path of the figure.

    Raises:
        ValueError: The suffix is neither `.png` nor `.pdf`.
    """
    return save_figure(draw_training_curves(log_history), path)


def draw_training_curves(log_history: list[dict]) -> Figure:
    """Plot the curves of one run as `plot_training_curves` does, and return the figure."""
    figure = new_figure(13.5, 4.0)
    for axes, panel in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        _plot_panel(axes, panel, log_history)
    return figure


def plot_runs(logs: Mapping[str, list[dict]]) -> Figure:
    """Plot the curves of several runs in one figure, with a panel for each measure and a color for each run.

    Args:
        logs: Log records as for `plot_training_curves`, by the name of the run.

    Returns:
        A figure with panels for those of `eval_top1`, `loss`, `eval_loss`, `mixed_samples` and `replaced_tokens` that
        any run logged. `classification_loss` replaces `loss` in runs that logged it.

    Raises:
        ValueError: No run logged any of them.
    """
    measures = [measure for measure in _MEASURES if any(measure.series(log)[0] for log in logs.values())]
    if not measures:
        raise ValueError(f"None of {', '.join(logs)} logged any of {', '.join(m.key for m in _MEASURES)}.")
    columns = min(len(measures), 3)
    rows = -(-len(measures) // columns)
    legend_columns = max(1, 4 * columns // 3)
    figure = new_figure(4.8 * columns, 3.6 * rows + 0.3 * -(-len(logs) // legend_columns))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(measures) :]:
        axes.remove()
    legend_entries = {}
    for axes, measure in zip(panels, measures, strict=False):
        _set_axes_labels(axes, measure.title, measure.unit)
        for index, (name, log) in enumerate(logs.items()):
            series = measure.series(log)
            if not series[0]:
                continue
            style = _Curve(measure.key, name, PALETTE[index % len(PALETTE)], STYLES[index % len(STYLES)])
            line = _plot_curve(axes, style, *series)
            legend_entries.setdefault(name, (line, name))
            if measure.percent:
                legend_entries[name] = line, f"{name} (last {series[1][-1]:.2%} top-1)"
        _set_scales(axes, measure.percent, accuracy=measure.percent)
        if measure.key in ("loss", "eval_loss", "eval_top1"):
            # The differences between runs are small compared with the values, so the axis does not start at 0.
            axes.autoscale(axis="y")
            bottom, top = axes.get_ylim()
            axes.set_ylim(max(bottom, 0), min(top, 1) if measure.percent else top)
    lines, labels = zip(*(legend_entries[name] for name in logs if name in legend_entries), strict=True)
    figure.legend(
        lines, labels, loc="outside upper left", ncols=legend_columns, handlelength=3, frameon=False, fontsize=11
    )
    return figure


def read_training_log(path: str | Path) -> list[dict]:
    """Read the log records of a run from its `training_log.jsonl`.

    Raises:
        ValueError: The file does not exist, or a line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Use the training_log.jsonl in the output folder of a run.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, with a JSON object in each line: {error}.") from error
    return parse_training_log(text, path)


def parse_training_log(text: str, path: Path) -> list[dict]:
    """Parse the text of a `training_log.jsonl`; `path` is for messages.

    Raises:
        ValueError: A line is not a JSON object.
    """
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"Line {number} of {path} must be a JSON object, got {line[:60]!r}.")
        records.append(record)
    return records


def _plot_panel(axes: Axes, panel: _Panel, log_history: list[dict]) -> None:
    if isinstance(panel.missing, _Panel) and not any(_series(log_history, curve.key)[0] for curve in panel.curves):
        panel = panel.missing
    _set_axes_labels(axes, panel.title, panel.unit)
    for curve in panel.curves:
        epochs, values = _series(log_history, curve.key)
        if not epochs:
            continue
        last = f" (last {values[-1]:.2%})" if panel.accuracy else ""
        _plot_curve(axes, replace(curve, label=curve.label + last), epochs, values)
    if not axes.lines:
        axes.text(0.5, 0.5, panel.missing, transform=axes.transAxes, ha="center", va="center", color="0.4")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    _set_scales(axes, panel.percent, panel.accuracy)
    if panel.nothing is not None:
        key, note = panel.nothing
        values = _series(log_history, key)[1]
        if values and not any(values):
            axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", va="center", color="0.4")
    axes.legend(frameon=False)


def _set_axes_labels(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_curve(axes: Axes, curve: _Curve, epochs: list[float], values: list[float]) -> Line2D:
    (line,) = axes.plot(
        epochs,
        values,
        label=curve.label,
        color=curve.color,
        linestyle=curve.style,
        linewidth=curve.width,
        # A single point needs a marker, as it has no line.
        marker=(curve.marker or "o") if len(epochs) == 1 else curve.marker,
        markersize=4,
        markevery=max(1, len(epochs) // 12),
        clip_on=False,
    )
    return line


def _set_scales(axes: Axes, percent: bool, accuracy: bool) -> None:
    axes.grid(True, color="0.9", linewidth=0.8)
    last = max(line.get_xdata()[-1] for line in axes.lines)
    axes.set_xlim(0, 1.03 * last or 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=last >= 3))
    if accuracy:
        axes.set_ylim(top=1)
    else:
        axes.set_ylim(bottom=0)
    if percent:
        axes.set_ylim(top=min(1, axes.get_ylim()[1]))
        # decimals=None: as many decimals as the ticks need to differ.
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    else:
        axes.ticklabel_format(axis="y", useOffset=False)


def _series(log_history: list[dict], key: str) -> tuple[list[float], list[float]]:
    """Return the epochs at which `key` was logged, and its values. Of several records of an epoch the last counts."""
    points = {
        record["epoch"]: record[key]
        for record in log_history
        if _is_number(record.get("epoch")) and _is_number(record.get(key))
    }
    epochs = sorted(points)
    return epochs, [points[epoch] for epoch in epochs]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and isfinite(value)
