"""Training curves of one run and of several runs."""

import json
import math
import subprocess
import sys

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_tokenmixup.visualization.figure_utils import BLUE, SKY
from hf_tokenmixup.visualization.training_curves import plot_runs, plot_training_curves, read_training_log

HISTORY = [
    {"epoch": 0.5, "step": 1, "loss": 2.0, "mixed_samples": 1.0, "easy_samples": 3.0, "scorenet_loss": 2.2},
    {"epoch": 1.0, "step": 2, "loss": 1.0, "mixed_samples": 4.0, "easy_samples": 6.0, "scorenet_loss": 1.9},
    {"epoch": 1.0, "step": 2, "eval_top1": 0.25, "eval_top5": 0.75, "eval_loss": 1.5},
    {"epoch": 2.0, "step": 4, "eval_top1": 0.5, "eval_top5": 1.0, "eval_loss": math.nan},
    {"epoch": 2.0, "step": 4, "train_runtime": 3.0, "loss": None},
]


@pytest.fixture
def figure(monkeypatch):
    """Figures that are saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return saved


def lines(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_plot_training_curves_shows_logged_values(tmp_path, figure):
    path = plot_training_curves(HISTORY, tmp_path / "new folder" / "curves.png")
    assert path == tmp_path / "new folder" / "curves.png"
    accuracy, loss, mixing = figure[0].axes
    assert lines(accuracy) == {
        "top-1 (last 50.00%)": ([1.0, 2.0], [0.25, 0.5]),
        "top-5 (last 100.00%)": ([1.0, 2.0], [0.75, 1.0]),
    }
    assert lines(loss) == {
        "training": ([0.5, 1.0], [2.0, 1.0]),
        "evaluation": ([1.0], [1.5]),
        "ScoreNet (training)": ([0.5, 1.0], [2.2, 1.9]),
    }
    # A log without fractions.
    assert mixing.get_ylabel() == "images per step"
    assert lines(mixing) == {"mixed": ([0.5, 1.0], [1.0, 4.0]), "easy": ([0.5, 1.0], [3.0, 6.0])}
    assert all(axes.get_xlabel() == "epoch" and axes.get_legend() for axes in figure[0].axes)


FRACTIONS = [
    {"epoch": 1.0, "loss": 2.5, "classification_loss": 1.5, "scorenet_loss": 1.0, "easy_fraction": 0.0},
    {"epoch": 2.0, "loss": 1.5, "classification_loss": 1.0, "scorenet_loss": 0.5, "easy_fraction": 0.75},
]
FRACTIONS[0] |= {"easy_samples": 0.0, "mixed_samples": 0.0, "mixed_fraction": 0.0}
FRACTIONS[1] |= {"easy_samples": 6.0, "mixed_samples": 6.0, "mixed_fraction": 0.75}
FRACTIONS[1] |= {"replaced_fraction": 0.25, "label_mass_moved": 0.375}


def test_plot_training_curves_shows_losses_and_fractions(tmp_path, figure):
    plot_training_curves(FRACTIONS, tmp_path / "curves.png")
    _, loss, mixing = figure[0].axes
    assert lines(loss) == {
        "training": ([1.0, 2.0], [2.5, 1.5]),
        "classification (training)": ([1.0, 2.0], [1.5, 1.0]),
        "ScoreNet (training)": ([1.0, 2.0], [1.0, 0.5]),
    }
    assert lines(mixing) == {
        "easy images": ([1.0, 2.0], [0.0, 0.75]),
        "mixed images": ([1.0, 2.0], [0.0, 0.75]),
        "replaced tokens": ([2.0], [0.25]),
        "moved label mass": ([2.0], [0.375]),
    }
    low, high = mixing.get_ylim()
    assert low == 0 and 0.75 < high <= 1
    assert tick_labels(mixing.yaxis)[0] == "0%"


def test_plot_training_curves_without_mixed_images_has_range_above_zero(tmp_path, figure):
    plot_training_curves(FRACTIONS[:1], tmp_path / "curves.png")
    low, high = figure[0].axes[2].get_ylim()
    assert low == 0 and 0 < high <= 1


@pytest.mark.parametrize(
    ("values", "note"), [([0.0, 0.0], ["no image was mixed"]), ([0.0, 0.1], []), ([], [])], ids=["none", "some", "off"]
)
@pytest.mark.parametrize("key", ["mixed_fraction", "mixed_samples"])
def test_plot_training_curves_without_mixed_images_says_so(key, values, note, tmp_path, figure):
    easy = {"mixed_fraction": "easy_fraction", "mixed_samples": "easy_samples"}[key]
    log = [{"epoch": float(epoch), key: value, easy: 0.5} for epoch, value in enumerate(values)]
    plot_training_curves(log, tmp_path / "curves.png")
    expected = note if values else ["no horizontal TokenMixup was logged"]
    assert [text.get_text() for text in figure[0].axes[2].texts] == expected


@pytest.mark.parametrize(
    ("panel", "below", "above"), [(1, "loss", "classification_loss"), (2, "easy_fraction", "mixed_fraction")]
)
def test_plot_training_curves_coinciding_lines_are_both_visible(panel, below, above, tmp_path):
    log = [{"epoch": float(epoch), below: 0.5, above: 0.5} for epoch in range(3)]
    image = matplotlib.image.imread(plot_training_curves(log, tmp_path / "curves.png"))[..., :3]
    width = image.shape[1] // 3
    # A column of pixels right of the middle of the panel, where no legend is.
    column = image[:, int((panel + 0.8) * width)]
    visible = [(np.abs(column - matplotlib.colors.to_rgb(color)).max(axis=1) < 0.1).sum() for color in (SKY, BLUE)]
    assert min(visible) >= 2, visible


def test_plot_training_curves_draws_lines(tmp_path):
    figure = matplotlib.image.imread(plot_training_curves(HISTORY, tmp_path / "a.png"))
    empty = matplotlib.image.imread(plot_training_curves([], tmp_path / "b.png"))
    assert figure.shape[1] > 1000
    assert np.abs(figure - empty).max() > 0.5


def test_plot_training_curves_notes_missing_values(tmp_path, figure):
    plot_training_curves([{"epoch": 0, "eval_loss": 1.0}], tmp_path / "curves.png")
    texts = [[text.get_text() for text in axes.texts] for axes in figure[0].axes]
    assert texts == [["no evaluation was logged"], [], ["no horizontal TokenMixup was logged"]]


def tick_labels(axis) -> list[str]:
    axis.axes.figure.draw_without_rendering()
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [label.get_text() for position, label in ticks if low <= position <= high]


def constant_growth(start, step, **scale):
    """A log with small changes of its values; `scale` has factors by key."""
    return [
        {"epoch": 1000 + epoch / 100} | {key: factor * (start + step * epoch) for key, factor in scale.items()}
        for epoch in range(4)
    ]


@pytest.mark.parametrize("fractions", [False, True])
@pytest.mark.parametrize(("start", "step"), [(0.15, 1e-3), (0.9991, 1e-5), (0.0, 1e-6), (0.5, 0.1)])
def test_tick_labels_of_narrow_ranges_differ(start, step, fractions, tmp_path, figure):
    scale = {"eval_top1": 1, "loss": 15, "eval_loss": 1e-5, "mixed_samples": 1e6, "replaced_tokens": 3e7}
    scale |= {"mixed_fraction": 1} if fractions else {}
    log = constant_growth(start, step, **scale)
    plot_training_curves(log, tmp_path / "curves.png")
    for axes in [*plot_runs({"a": log, "b": log[:3]}).axes, *figure[0].axes]:
        for labels in map(tick_labels, (axes.xaxis, axes.yaxis)):
            assert len(labels) >= 2 and len(set(labels)) == len(labels), labels
            # Labels are complete, without an offset text.
            assert not axes.yaxis.get_offset_text().get_text().startswith("+")


def test_plot_runs_axis_limits_are_in_valid_range():
    for top1 in (0.0, 1.0):
        accuracy, loss = plot_runs({"a": [{"epoch": 1.0, "eval_top1": top1, "loss": 0.0}]}).axes
        assert accuracy.get_ylim()[0] >= 0 and accuracy.get_ylim()[1] <= 1 and loss.get_ylim()[0] >= 0
        low, high = accuracy.get_ylim()
        assert low <= top1 <= high and low < high


def test_plot_training_curves_png_and_pdf(tmp_path):
    assert plot_training_curves(HISTORY, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert plot_training_curves(HISTORY, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="must end in .png or .pdf, got 'a.svg'"):
        plot_training_curves(HISTORY, tmp_path / "a.svg")


OTHER = [
    {"epoch": 1.0, "loss": 3.0, "eval_top1": 0.125, "eval_loss": 2.5},
    {"epoch": 3.0, "loss": 2.5, "eval_top1": 0.375, "eval_loss": None},
]
MIXING = [{"epoch": 1.0, "mixed_samples": 2.0, "replaced_tokens": 40.0}]


def test_plot_runs_shows_all_runs_in_each_panel():
    figure = plot_runs({"htm": HISTORY, "baseline": OTHER, "short": MIXING})
    accuracy, training, evaluation, mixed, replaced = figure.axes
    assert lines(accuracy) == {"htm": ([1.0, 2.0], [0.25, 0.5]), "baseline": ([1.0, 3.0], [0.125, 0.375])}
    assert lines(training) == {"htm": ([0.5, 1.0], [2.0, 1.0]), "baseline": ([1.0, 3.0], [3.0, 2.5])}
    assert lines(evaluation) == {"htm": ([1.0], [1.5]), "baseline": ([1.0], [2.5])}
    assert lines(mixed) == {"htm": ([0.5, 1.0], [1.0, 4.0]), "short": ([1.0], [2.0])}
    assert lines(replaced) == {"short": ([1.0], [40.0])}
    styles = {
        name: {
            (line.get_color(), str(line._dash_pattern))
            for axes in figure.axes
            for line in axes.lines
            if line.get_label() == name
        }
        for name in ("htm", "baseline", "short")
    }
    assert [len(style) for style in styles.values()] == [1, 1, 1] and len(set.union(*styles.values())) == 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "htm (last 50.00% top-1)",
        "baseline (last 37.50% top-1)",
        "short",
    ]
    assert [line.get_color() for line in legend.get_lines()] == [next(iter(style))[0] for style in styles.values()]
    # Every point is inside its axes, and a single point has a marker.
    for axes in figure.axes:
        for line in axes.lines:
            assert all(axes.viewLim.contains(*point) for point in line.get_xydata())
    assert replaced.lines[0].get_marker() == "o"


def test_plot_runs_compares_classification_losses():
    panel = plot_runs({"htm": FRACTIONS, "baseline": OTHER}).axes[1]
    assert lines(panel) == {"htm": ([1.0, 2.0], [1.5, 1.0]), "baseline": ([1.0, 3.0], [3.0, 2.5])}


def test_plot_runs_omits_panels_without_values():
    assert [axes.get_title(loc="left") for axes in plot_runs({"a": MIXING}).axes] == [
        "Images mixed by TokenMixup",
        "Tokens replaced by TokenMixup",
    ]
    with pytest.raises(ValueError, match="None of a, b logged any of eval_top1, loss, "):
        plot_runs({"a": [], "b": [{"epoch": 1.0, "loss": math.nan}]})


def test_plot_runs_skips_values_that_are_not_numbers():
    log = [{"epoch": "one", "loss": 1.0}, {"epoch": 1.0, "loss": "x", "eval_loss": [1]}, {"epoch": 2.0, "loss": 3.0}]
    (axes,) = plot_runs({"a": log}).axes
    assert lines(axes) == {"a": ([2.0], [3.0])}


def test_plot_runs_styles_of_ten_runs_differ():
    figure = plot_runs({str(index): OTHER for index in range(10)})
    styles = {(line.get_color(), str(line._dash_pattern)) for line in figure.axes[0].lines}
    assert len(styles) == 10


def test_read_training_log(tmp_path):
    path = tmp_path / "training_log.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in OTHER))
    assert read_training_log(path) == OTHER
    path.write_text('{"epoch": 1.0}\n[1]\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*training_log.jsonl must be a JSON object, got '\[1\]'"):
        read_training_log(path)
    path.write_text('{"epoch": 1.0}\n{"epo')
    with pytest.raises(ValueError, match="Line 2 of"):
        read_training_log(path)
    with pytest.raises(ValueError, match="none.jsonl does not exist"):
        read_training_log(tmp_path / "none.jsonl")


def test_training_curves_do_not_import_pyplot(tmp_path):
    code = (
        "import sys; from hf_tokenmixup.visualization import plot_runs, plot_training_curves, read_training_log;"
        f"plot_training_curves([], {str(tmp_path / 'curves.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
