"""Content of the figures, read from their axes and files."""

import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from hf_tokenmixup.visualization import plots
from hf_tokenmixup.visualization.figure_utils import BLUE, ORANGE, save_figure
from hf_tokenmixup.visualization.inspection import HorizontalMixTrace, VerticalMemoryTrace, min_max
from hf_tokenmixup.visualization.plots import plot_horizontal_mixup, plot_saliency, plot_vertical_memory, short_name
from hf_tokenmixup.visualization.token_grid import TokenGrid

TOKEN_GRID = TokenGrid(rows=(0, 4, 8), columns=(0, 3, 6, 9), exact=True)
IMAGES = torch.rand(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
NAMES = ["Egyptian cat, Felis catus", "tabby", "black-and-tan coonhound"]


def make_trace(**changes):
    """Image 0 gets two tokens of image 2, image 2 gets one of image 0, and image 1 none."""
    replaced = torch.zeros(3, 2, 3, dtype=torch.bool)
    replaced[0, 0, 1] = replaced[0, 1, 2] = replaced[2, 1, 0] = True
    values = {
        "layer": 3, "rho": 0.01, "detector": "attention", "token_selection": "saliency", "relabel": "saliency",
        "easy": torch.tensor([True, True, True]), "saliency": torch.arange(18).view(3, 2, 3) / 100,
        "partner": torch.tensor([2, 1, 0]), "replaced": replaced, "targets": torch.eye(3)[[0, 1, 2]],
        "mixed_targets": torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0], [0.1, 0.0, 0.9]]),
    }  # fmt: skip
    return HorizontalMixTrace(**values | changes)


def title(figure):
    return " ".join(figure.get_suptitle().split())


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def grid(figure, columns):
    axes = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    return np.array(axes).reshape(-1, columns)


def get_image(axes):
    """The only image in the axes, channels last."""
    (image,) = axes.images
    return np.asarray(image.get_array())


def get_heatmap(axes, image):
    """The map in the axes, after a check that it lies over the image (3, H, W) in shades of gray."""
    below, heatmap = axes.images
    np.testing.assert_allclose(np.asarray(below.get_array()), image.mean(dim=0).numpy(), rtol=1e-6)
    assert below.cmap.name == "gray" and 0.3 < heatmap.get_alpha() < 0.9
    # The border that belongs to no token is visible too.
    assert axes.get_xlim() == (-0.5, image.shape[2] - 0.5) and axes.get_ylim() == (image.shape[1] - 0.5, -0.5)
    return np.asarray(heatmap.get_array())


def channels_last(image):
    return image.permute(1, 2, 0).numpy()


def test_plot_saliency_shows_images_and_maps():
    maps = {"gradient": torch.rand(3, 2, 3), "1-step": torch.rand(3, 2, 3), "full rollout": torch.rand(3, 2, 3)}
    figure = plot_saliency(IMAGES, maps, ["a", "b", "c"], TOKEN_GRID, layer=2, num_layers=12, note="Guessed.")
    panels = grid(figure, 4)
    assert [axes.get_title() for axes in panels[0]] == [
        "Image", "Gradient\nof the loss", "Attention, 1-step\n(layer 2)", "Attention, full rollout\n(layers 2 to 11)",
    ]  # fmt: skip
    for index, row in enumerate(panels):
        np.testing.assert_array_equal(get_image(row[0]), channels_last(IMAGES[index]))
        assert row[0].get_xlabel() == "abc"[index]
        for axes, saliency in zip(row[1:], maps.values(), strict=True):
            np.testing.assert_array_equal(get_heatmap(axes, IMAGES[index]), min_max(saliency)[index].numpy())
            assert axes.images[1].norm.vmin == 0 and axes.images[1].norm.vmax == 1
            assert tuple(axes.images[1].get_extent()) == (-0.5, 8.5, 7.5, -0.5)
    assert "before layer 2" in title(figure) and title(figure).endswith("Guessed.")
    (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert "[0, 1]" in bar.get_ylabel() and bar.get_ylim() == (0, 1)


def test_plot_saliency_of_last_layer_has_single_layer_heading():
    figure = plot_saliency(IMAGES, {"full rollout": torch.rand(3, 2, 3)}, "abc", TOKEN_GRID, layer=3, num_layers=4)
    assert grid(figure, 2)[0, 1].get_title() == "Attention, full rollout\n(layer 3)"


def test_plot_horizontal_mixup_shows_pairs_and_labels():
    figure = plot_horizontal_mixup(IMAGES, make_trace(), NAMES, TOKEN_GRID)
    rows = grid(figure, 7)
    assert len(rows) == 2
    image, saliency, partner, partner_saliency, mask, mixed, label = rows[0]
    for axes, index, color in ((image, 0, BLUE), (partner, 2, ORANGE)):
        np.testing.assert_array_equal(get_image(axes), channels_last(IMAGES[index]))
        assert axes.get_xlabel() == ["Egyptian cat", "", "black-and-tan coonh…"][index]
        assert axes.spines["left"].get_visible() and to_rgb(axes.spines["left"].get_edgecolor()) == to_rgb(color)
    np.testing.assert_allclose(get_heatmap(saliency, IMAGES[0]), make_trace().saliency[0])
    np.testing.assert_allclose(get_heatmap(partner_saliency, IMAGES[2]), make_trace().saliency[2])
    assert saliency.images[1].norm is partner_saliency.images[1].norm
    assert get_image(mask).tolist() == [[0, 1, 0], [0, 0, 1]] and mask.get_xlabel() == "2 of 6 replaced"
    assert [to_rgb(color) for color in mask.images[0].cmap.colors] == [
        to_rgb(BLUE),
        to_rgb(ORANGE),
    ]
    expected = IMAGES[0].clone()
    expected[:, 0:4, 3:6], expected[:, 4:8, 6:9] = IMAGES[2, :, 0:4, 3:6], IMAGES[2, :, 4:8, 6:9]
    np.testing.assert_array_equal(get_image(mixed), channels_last(expected))
    assert [text.get_text() for text in label.texts] == ["25% Egyptian cat", "75% black-and-tan coonh…"]
    assert [(bar.get_x(), bar.get_width(), bar.get_facecolor()[:3]) for bar in label.patches] == [
        (0.0, 0.25, to_rgb(BLUE)),
        (0.25, 0.75, to_rgb(ORANGE)),
    ]
    assert legend(figure) == ["image", "partner"]
    assert "2 of 3 images are mixed" in title(figure) and "more than rho = 0.01" in title(figure)
    assert [text.get_text() for text in rows[1, 6].texts] == ["90% black-and-tan coonh…", "10% Egyptian cat"]


def test_plot_horizontal_mixup_pair_of_one_class_has_one_label():
    targets = torch.eye(3)[[1, 1, 1]]
    figure = plot_horizontal_mixup(IMAGES, make_trace(targets=targets, mixed_targets=targets), NAMES, TOKEN_GRID)
    assert [text.get_text() for text in grid(figure, 7)[0, 6].texts] == ["100% tabby"]


def test_plot_horizontal_mixup_captions_follow_the_settings():
    other = make_trace(detector="gradient", token_selection="random", relabel="count")
    figure = plot_horizontal_mixup(IMAGES, other, NAMES, TokenGrid(TOKEN_GRID.rows, TOKEN_GRID.columns, exact=False))
    assert "Random tokens" in title(figure) and "number of tokens" in title(figure)
    assert grid(figure, 7)[0, 5].get_title() == "Mixed image\n(approximately)"
    (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert "gradient of the loss" in bar.get_xlabel()


def test_plot_horizontal_mixup_without_pair_raises_with_hint():
    unmixed = make_trace(replaced=torch.zeros(3, 2, 3, dtype=torch.bool), easy=torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match=r"at rho = 0.01: 1 of 3 images are easy.* by up to 0.17: use"):
        plot_horizontal_mixup(IMAGES, unmixed, NAMES, TOKEN_GRID)
    none_easy = make_trace(replaced=unmixed.replaced, easy=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="0 of 3 images are easy, .* use a higher tau"):
        plot_horizontal_mixup(IMAGES, none_easy, NAMES, TOKEN_GRID)


def test_plot_vertical_memory_frames_and_ranks_tokens():
    tokens = torch.tensor([[[0, 4], [1, 2], [3, 5]], [[5, 3], [0, 1], [2, 4]]])
    trace = VerticalMemoryTrace(layer=2, grid=(2, 3), tokens=tokens)
    figure = plot_vertical_memory(IMAGES, trace, ["a", "b", "c"], TOKEN_GRID)
    panels = grid(figure, 3)
    assert [axes.get_title() for axes in panels[0]] == ["Image", "From layer 0", "From layer 1"]
    axes = panels[0, 2]
    paths = axes.collections[0].get_paths()
    boxes = [(*path.vertices.min(axis=0), *path.vertices.max(axis=0)) for path in paths]
    assert boxes == [(5.5, 3.5, 8.5, 7.5), (-0.5, 3.5, 2.5, 7.5)]  # left, top, right, bottom
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("1", (7.75, 4.5)), ("2", (1.75, 4.5))]
    expected = 0.35 * IMAGES[0] + 0.65
    expected[:, 4:8, 6:9], expected[:, 4:8, 0:3] = IMAGES[0, :, 4:8, 6:9], IMAGES[0, :, 4:8, 0:3]
    np.testing.assert_array_equal(get_image(axes), channels_last(expected))
    assert "layer 2" in title(figure) and "2 most salient of each earlier layer, as 4 more keys and values" in title(
        figure
    )
    assert legend(figure) == ["token collected for layer 2, 1 is the most salient"]


def test_plot_vertical_memory_without_ranks_for_many_tokens():
    token_grid = TokenGrid(tuple(range(0, 9, 2)), tuple(range(0, 11, 2)), exact=False)
    trace = VerticalMemoryTrace(layer=1, grid=(4, 5), tokens=torch.arange(10).expand(1, 3, 10))
    figure = plot_vertical_memory(IMAGES, trace, ["a", "b", "c"], token_grid)
    axes = grid(figure, 2)[0, 1]
    assert len(axes.collections[0].get_paths()) == 10 and not axes.texts
    assert legend(figure) == ["token collected for layer 1 (approximate)"]


def test_save_figure_png_and_pdf(tmp_path):
    figure = plot_horizontal_mixup(IMAGES, make_trace(), NAMES, TOKEN_GRID)
    png = save_figure(figure, tmp_path / "new" / "a.PNG")
    pdf = save_figure(figure, str(tmp_path / "a.pdf"))
    assert png.read_bytes().startswith(b"\x89PNG") and pdf.read_bytes().startswith(b"%PDF")
    pixels = matplotlib.image.imread(png, format="png")
    assert pixels.shape[1] > 1000 and pixels.std() > 0.1
    with pytest.raises(ValueError, match=r"must end in .png or .pdf, got 'a.jpg'"):
        save_figure(figure, tmp_path / "a.jpg")


@pytest.mark.parametrize("plot", ["saliency", "vertical"])
def test_text_is_inside_the_figure(plot):
    """A narrow image in a single row."""
    images = torch.rand(1, 3, 30, 6)
    token_grid = TokenGrid((0, 15, 30), (0, 6), exact=False)
    if plot == "saliency":
        maps = {"full rollout": torch.rand(1, 2, 1)}
        figure = plot_saliency(images, maps, ["a name"], token_grid, layer=0, num_layers=12, note="Guessed. " * 9)
    else:
        trace = VerticalMemoryTrace(layer=1, grid=(2, 1), tokens=torch.zeros(1, 1, 1, dtype=torch.int64))
        figure = plot_vertical_memory(images, trace, ["a name"], token_grid, note="Guessed. " * 9)
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    texts = [figure._suptitle, *(axes.title for axes in figure.axes), *(axes.xaxis.label for axes in figure.axes)]
    texts += [text for item in figure.legends for text in item.get_texts()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) >= 4
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)


def test_short_name():
    assert short_name("tench, Tinca tinca") == "tench" and short_name("a" * 20) == "a" * 20
    assert short_name("a" * 21) == "a" * 19 + "…" and short_name("one two three", 5) == "one…"


def test_plots_do_not_import_pyplot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import would fail
    figure = plot_horizontal_mixup(IMAGES, make_trace(), NAMES, TOKEN_GRID)
    assert save_figure(figure, tmp_path / "a.png").stat().st_size > 0
    assert save_figure(figure, tmp_path / "a.pdf").stat().st_size > 0


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.0, "0%"), (0.004, "0.4%"), (0.01, "1%"), (0.5, "50%"), (0.996, "99.6%"), (1.0, "100%")]
)
def test_format_percent_does_not_round_to_0_or_100(fraction, text):
    assert plots._format_percent(fraction) == text
