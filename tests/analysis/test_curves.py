"""The picture of a training."""

import math
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_tokenmixup.analysis import plot_training_curves

HISTORY = [
    {"epoch": 0.5, "step": 1, "loss": 2.0, "mixed_samples": 1.0, "easy_samples": 3.0, "scorenet_loss": 2.2},
    {"epoch": 1.0, "step": 2, "loss": 1.0, "mixed_samples": 4.0, "easy_samples": 6.0, "scorenet_loss": 1.9},
    {"epoch": 1.0, "step": 2, "eval_top1": 0.25, "eval_top5": 0.75, "eval_loss": 1.5},
    {"epoch": 2.0, "step": 4, "eval_top1": 0.5, "eval_top5": 1.0, "eval_loss": math.nan},
    {"epoch": 2.0, "step": 4, "train_runtime": 3.0, "loss": None},
]


@pytest.fixture
def figure(monkeypatch):
    """The figures that are saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return saved


def lines(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_three_panels_show_the_logged_values(tmp_path, figure):
    path = plot_training_curves(HISTORY, tmp_path / "new folder" / "curves.png")
    assert path == tmp_path / "new folder" / "curves.png"
    accuracy, loss, mixing = figure[0].axes
    assert lines(accuracy) == {
        "top-1 (last 50.0%)": ([1.0, 2.0], [0.25, 0.5]),
        "top-5 (last 100.0%)": ([1.0, 2.0], [0.75, 1.0]),
    }
    assert lines(loss) == {
        "training": ([0.5, 1.0], [2.0, 1.0]),
        "evaluation": ([1.0], [1.5]),
        "ScoreNet (training)": ([0.5, 1.0], [2.2, 1.9]),
    }
    assert lines(mixing) == {"mixed": ([0.5, 1.0], [1.0, 4.0]), "easy": ([0.5, 1.0], [3.0, 6.0])}
    assert all(axes.get_xlabel() == "epoch" and axes.get_legend() for axes in figure[0].axes)


def test_the_picture_is_not_empty(tmp_path):
    drawn = matplotlib.image.imread(plot_training_curves(HISTORY, tmp_path / "a.png"))
    empty = matplotlib.image.imread(plot_training_curves([], tmp_path / "b.png"))
    assert drawn.shape[1] > 1000
    assert np.abs(drawn - empty).max() > 0.5


def test_a_panel_without_values_says_so(tmp_path, figure):
    plot_training_curves([{"epoch": 0, "eval_loss": 1.0}], tmp_path / "curves.png")
    texts = [[text.get_text() for text in axes.texts] for axes in figure[0].axes]
    assert texts == [["no evaluation was logged"], [], ["no horizontal TokenMixup was logged"]]


def test_pyplot_is_left_alone(tmp_path):
    code = (
        "import sys; from hf_tokenmixup.analysis import plot_training_curves;"
        f"plot_training_curves([], {str(tmp_path / 'curves.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
