"""Training curves: accuracy, loss and the trend of mixing over the epochs (the paper's Figure 4) in one picture.

Drawn with matplotlib's objects, so that no display, backend or global figure of the caller is touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Okabe and Ito's palette: told apart with every kind of colour vision. Line styles differ too, for print in grey.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_SOLID, _DASHED, _DOTTED = "-", (0, (5, 1.5)), (0, (1, 1))


@dataclass(frozen=True)
class _Curve:
    """A value of the log records, and how it is drawn."""

    key: str
    label: str
    color: str
    style: str | tuple
    marker: str = ""


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    curves: Sequence[_Curve]
    missing: str
    percent: bool = False


_PANELS = (
    _Panel(
        title="Evaluation accuracy",
        unit="images classified right",
        curves=(
            _Curve("eval_top1", "top-1", _BLUE, _SOLID, "o"),
            _Curve("eval_top5", "top-5", _ORANGE, _DASHED, "s"),
        ),
        missing="no evaluation was logged",
        percent=True,
    ),
    _Panel(
        title="Loss",
        unit="nats",
        curves=(
            _Curve("loss", "training", _BLUE, _SOLID),
            _Curve("eval_loss", "evaluation", _ORANGE, _DASHED, "s"),
            _Curve("scorenet_loss", "ScoreNet (training)", _GREEN, _DOTTED),
        ),
        missing="no loss was logged",
    ),
    _Panel(
        title="Instances mixed by TokenMixup",
        unit="images per batch",
        curves=(
            _Curve("mixed_samples", "mixed", _BLUE, _SOLID),
            _Curve("easy_samples", "easy", _ORANGE, _DASHED),
        ),
        missing="no horizontal TokenMixup was logged",
    ),
)


def plot_training_curves(log_history: list[dict], path: str | Path) -> Path:
    """Draw the curves of one training as a PNG with three panels: accuracy, loss, mixed instances.

    Args:
        log_history: The log records of a Trainer (`trainer.state.log_history`, or the lines of `training_log.jsonl`):
            dicts with `epoch` and any of `eval_top1` and `eval_top5` (in [0, 1]), `loss`, `eval_loss` and
            `scorenet_loss` (nats), `mixed_samples` and `easy_samples` (images per batch). Other records and keys are
            passed over, as are values that are None or not finite. A panel without any value says so.
        path: Where to write the picture; missing folders are made.

    Returns:
        The path written.
    """
    path = Path(path)
    figure = Figure(figsize=(13.5, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        _draw(axes, panel, log_history)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _draw(axes: Axes, panel: _Panel, log_history: list[dict]) -> None:
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set_xlabel("epoch")
    axes.set_ylabel(panel.unit)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = 0
    for curve in panel.curves:
        epochs, values = _series(log_history, curve.key)
        if not epochs:
            continue
        drawn += 1
        label = curve.label
        if panel.percent:
            label += f" (last {values[-1]:.1%})"
        # A single point makes no line, and many markers hide one.
        marker = (curve.marker or "o") if len(epochs) == 1 else curve.marker
        every = max(1, len(epochs) // 12)
        axes.plot(
            epochs,
            values,
            label=label,
            color=curve.color,
            linestyle=curve.style,
            linewidth=1.8,
            marker=marker,
            markersize=4,
            markevery=every,
            clip_on=False,
        )
    if not drawn:
        axes.text(0.5, 0.5, panel.missing, transform=axes.transAxes, ha="center", va="center", color="0.4")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.grid(True, color="0.9", linewidth=0.8)
    last = max(line.get_xdata()[-1] for line in axes.lines)
    axes.set_xlim(0, 1.03 * last or 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=last >= 3))
    if panel.percent:
        axes.set_ylim(top=1)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _series(log_history: list[dict], key: str) -> tuple[list[float], list[float]]:
    """The epochs at which `key` was logged, and its values; a resumed or repeated record counts once, the last."""
    points = {
        record["epoch"]: record[key]
        for record in log_history
        if record.get("epoch") is not None and record.get(key) is not None and isfinite(record[key])
    }
    epochs = sorted(points)
    return epochs, [points[epoch] for epoch in epochs]
