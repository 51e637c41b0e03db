"""Figures of TokenMixup in a model (Figures 1 to 3 of the paper).

Images are (B, 3, H, W) with values in [0, 1]: the model's input before normalization.
"""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from .figure_utils import BLUE, ORANGE, add_legend, add_title, image_grid
from .inspection import HorizontalMixTrace, VerticalMemoryTrace, min_max
from .token_grid import TokenGrid, render_mixed_images

COLORMAP = "viridis"
HEATMAP_ALPHA = 0.65
MAX_NAME_LENGTH = 20
MAX_RANKS = 9  # with more tokens, their ranks are not shown
TOKEN_SELECTION_CAPTIONS = {
    "saliency": "Tokens are replaced if the partner's saliency is higher by more than rho = {rho:.3g}.",
    "random": "Random tokens are replaced, as many as are more salient in the partner by more than rho = {rho:.3g}.",
}
LABEL_MIXING_CAPTIONS = {
    "saliency": "The new label is weighted by the saliency that each image contributes.",
    "count": "The new label is weighted by the number of tokens that each image contributes.",
}
DETECTOR_CAPTIONS = {
    "attention": "attention to a token",
    "gradient": "gradient of the loss at a token's pixels",
    "random": "random values",
}


def plot_saliency(
    images: torch.Tensor,
    maps: dict[str, torch.Tensor],
    captions: Sequence[str],
    token_grid: TokenGrid,
    *,
    layer: int,
    num_layers: int,
    note: str = "",
) -> Figure:
    """Plot images and their saliency by each detector over them, each map scaled to [0, 1] (Figure 3 of the paper).

    Args:
        images: (B, 3, H, W) in [0, 1].
        maps: Result of `saliency_maps`.
        captions: One line per image.
        token_grid: Token grid of these images.
        layer: Index of the inspected layer.
        num_layers: Number of layers of the model.
        note: A further line below the title.
    """
    last = num_layers - 1
    headings = {
        "gradient": "Gradient\nof the loss",
        "1-step": f"Attention, 1-step\n(layer {layer})",
        "full rollout": f"Attention, full rollout\n({_format_layer_range(layer, last)})",
    }
    figure, grid = image_grid(
        images.shape[2:], len(images), ["Image", *(headings.get(name, name) for name in maps)], right=1.7
    )
    add_title(
        figure,
        f"Salient tokens before layer {layer}",
        "Gradient: gradient of the loss at a token's pixels. Attention: attention to a token, in one layer or through "
        "this and all later layers.",
        note,
    )
    for row, image, caption in zip(grid, images, captions, strict=True):
        _show_image(row[0], image, caption)
    for column, saliency in enumerate(maps.values(), start=1):
        for row, image, scaled in zip(grid, images, min_max(saliency), strict=True):
            _plot_heatmap(row[column], image, scaled, token_grid, Normalize(0, 1))
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), COLORMAP), ax=grid, shrink=min(1.0, 2 / len(images)), aspect=20
    )
    bar.set_label("saliency, each map scaled to [0, 1]", fontsize=11)
    bar.set_ticks([0, 0.5, 1], labels=["0  lowest", "0.5", "1  highest"])
    return figure


def plot_horizontal_mixup(
    images: torch.Tensor,
    trace: HorizontalMixTrace,
    class_names: Sequence[str],
    token_grid: TokenGrid,
    *,
    note: str = "",
) -> Figure:
    """Plot each mixed image of a batch with its partner, both saliency maps, replaced tokens and label (Figure 1).

    Args:
        images: (B, 3, H, W) in [0, 1].
        trace: Trace of these images.
        class_names: Names of the C classes.
        token_grid: Token grid of these images.
        note: A further line below the title.

    Raises:
        ValueError: No image has a replaced token.
    """
    mixed = trace.mixed
    if not mixed:
        easy = int(trace.easy.sum())
        saliency_range = trace.saliency.max() - trace.saliency.min()
        if len(images) == 1:
            hint = "An image needs a partner: use more images."
        elif not easy:
            hint = "Only easy images are mixed: use a higher tau, or None."
        else:
            hint = (
                f"Saliency values differ by up to {saliency_range:.2g}: use a much lower rho, more images, or no tau."
            )
        raise ValueError(
            f"No image is mixed at rho = {trace.rho:g}: {easy} of {len(images)} images are easy, and no token is "
            f"replaced. {hint}"
        )
    headings = [
        "Image",
        "Saliency",
        "Partner",
        "Partner's saliency",
        "Replaced tokens",
        "Mixed image" if token_grid.exact else "Mixed image\n(approximately)",
        "New label",
    ]
    figure, grid = image_grid(images.shape[2:], len(mixed), headings, bottom=0.7)
    add_title(
        figure,
        f"Horizontal TokenMixup before layer {trace.layer}: {len(mixed)} of {len(images)} images are mixed",
        TOKEN_SELECTION_CAPTIONS[trace.token_selection].format(rho=trace.rho)
        + " "
        + LABEL_MIXING_CAPTIONS[trace.relabel],
        note,
    )
    mixed_images = render_mixed_images(images, trace.partner, trace.replaced, token_grid)
    # On a linear scale, a few very salient tokens would make all others dark.
    norm = PowerNorm(0.5, 0, float(trace.saliency.max()))
    for row, index in zip(grid, mixed, strict=True):
        partner = int(trace.partner[index])
        _show_image(row[0], images[index], _class_name(trace.targets[index], class_names), frame=BLUE)
        _plot_heatmap(row[1], images[index], trace.saliency[index], token_grid, norm)
        _show_image(row[2], images[partner], _class_name(trace.targets[partner], class_names), frame=ORANGE)
        _plot_heatmap(row[3], images[partner], trace.saliency[partner], token_grid, norm)
        _plot_replacement_mask(row[4], trace.replaced[index], token_grid)
        _show_image(row[5], mixed_images[index], "")
        _plot_label_bar(row[6], trace, index, class_names)
    bar = figure.colorbar(
        ScalarMappable(norm, COLORMAP), ax=grid[:, 1:4], location="bottom", shrink=0.7, aspect=30, pad=0.02
    )
    bar.set_label(f"saliency: {DETECTOR_CAPTIONS[trace.detector]}", fontsize=11)
    bar.locator = MaxNLocator(4)
    add_legend(figure, Patch(color=BLUE, label="image"), Patch(color=ORANGE, label="partner"), side="right")
    return figure


def plot_vertical_memory(
    images: torch.Tensor,
    trace: VerticalMemoryTrace,
    captions: Sequence[str],
    token_grid: TokenGrid,
    *,
    note: str = "",
) -> Figure:
    """Plot the tokens of each earlier layer that a vertical layer attends to (Figure 2 of the paper).

    Args:
        images: (B, 3, H, W) in [0, 1].
        trace: Trace of these images.
        captions: One line per image.
        token_grid: Token grid of these images.
        note: A further line below the title.
    """
    layers, _, kappa = trace.tokens.shape
    figure, grid = image_grid(
        images.shape[2:], len(images), ["Image", *(f"From layer {layer}" for layer in range(layers))], bottom=0.4
    )
    add_title(
        figure,
        f"Vertical TokenMixup: tokens that layer {trace.layer} also attends to",
        f"Layer {trace.layer} attends to its own tokens and to the {kappa} most salient of each earlier layer, as "
        f"{layers * kappa} more keys and values.",
        note,
    )
    for position, (row, image, caption) in enumerate(zip(grid, images, captions, strict=True)):
        _show_image(row[0], image, caption)
        for layer in range(layers):
            _plot_selected_tokens(row[1 + layer], image, trace.tokens[layer, position].tolist(), token_grid)
    ranks = ", 1 is the most salient" if kappa <= MAX_RANKS else ""
    approximate = "" if token_grid.exact else " (approximate)"
    label = f"token collected for layer {trace.layer}{approximate}{ranks}"
    add_legend(figure, Patch(facecolor="none", edgecolor=ORANGE, linewidth=2, label=label), side="left")
    return figure


def short_name(name: str, max_length: int = MAX_NAME_LENGTH) -> str:
    """Shorten a class name to the first of several synonyms and to `max_length` characters."""
    name = name.split(",")[0].strip()
    return name if len(name) <= max_length else name[: max_length - 1].rstrip() + "…"


def _show_image(axes: Axes, image: torch.Tensor, caption: str, frame: str | None = None) -> None:
    axes.imshow(image.clamp(0, 1).permute(1, 2, 0).cpu().numpy())
    axes.set_xlabel(caption, fontsize=10)
    if frame is not None:
        axes.spines[:].set(visible=True, color=frame, linewidth=3)


def _plot_heatmap(
    axes: Axes, image: torch.Tensor, saliency: torch.Tensor, token_grid: TokenGrid, norm: Normalize
) -> None:
    """Plot saliency in color over the image in shades of gray."""
    gray = image.clamp(0, 1).mean(dim=0).cpu().numpy()
    axes.imshow(gray, cmap="gray", norm=Normalize(0, 1))
    axes.imshow(
        saliency.cpu().numpy(),
        cmap=COLORMAP,
        norm=norm,
        extent=_extent(token_grid),
        interpolation="nearest",
        alpha=HEATMAP_ALPHA,
    )
    # The second image would cut off a border that belongs to no token.
    axes.set_xlim(-0.5, gray.shape[1] - 0.5)
    axes.set_ylim(gray.shape[0] - 0.5, -0.5)


def _plot_replacement_mask(axes: Axes, replaced: torch.Tensor, token_grid: TokenGrid) -> None:
    axes.imshow(
        replaced.float().cpu().numpy(),
        cmap=ListedColormap([BLUE, ORANGE]),
        norm=Normalize(0, 1),
        extent=_extent(token_grid),
        interpolation="nearest",
    )
    axes.set_xlabel(f"{int(replaced.sum())} of {replaced.numel()} replaced", fontsize=10)


def _plot_label_bar(axes: Axes, trace: HorizontalMixTrace, index: int, class_names: Sequence[str]) -> None:
    """Plot a label as a stacked bar: first the classes of the image, then those of its partner."""
    mixed, targets = trace.mixed_targets[index], trace.targets[index]
    classes = sorted(mixed.nonzero().flatten().tolist(), key=lambda label: (targets[label] == 0, -mixed[label]))
    start = 0.0
    for line, label in enumerate(classes):
        color, probability = BLUE if targets[label] > 0 else ORANGE, float(mixed[label])
        axes.barh(0, probability, left=start, color=color, edgecolor="white", height=0.5)
        text = f"{_format_percent(probability)} {short_name(class_names[label])}"
        axes.text(0, -0.5 - 0.4 * line, text, color=color, fontsize=11)
        start += probability
    axes.set_xlim(0, 1)
    axes.set_ylim(-1.5, 0.8)


def _format_percent(fraction: float) -> str:
    """Format without decimals, or with one below 1% and above 99%, which would be rounded to 0% and 100%."""
    return f"{fraction:.1%}" if 0 < fraction < 0.01 or 0.99 < fraction < 1 else f"{fraction:.0%}"


def _plot_selected_tokens(axes: Axes, image: torch.Tensor, tokens: Sequence[int], token_grid: TokenGrid) -> None:
    """Plot the image in pale colors except for the selected tokens, which have a frame and their rank."""
    columns = len(token_grid.columns) - 1
    boxes = []
    pale = 0.35 * image + 0.65
    for token in tokens:
        row, column = divmod(token, columns)
        top, bottom = token_grid.rows[row], token_grid.rows[row + 1]
        left, right = token_grid.columns[column], token_grid.columns[column + 1]
        pale[:, top:bottom, left:right] = image[:, top:bottom, left:right]
        boxes.append(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top))
    _show_image(axes, pale, "")
    axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=ORANGE, linewidth=1.5))
    if len(tokens) > MAX_RANKS:
        return
    # Inside its token, so that neighbors are not confused.
    for rank, box in enumerate(boxes, start=1):
        axes.annotate(
            str(rank),
            (box.get_x() + 0.75 * box.get_width(), box.get_y() + 0.25 * box.get_height()),
            fontsize=8,
            fontweight="bold",
            color="white",
            ha="center",
            va="center",
            bbox={"boxstyle": "circle,pad=0.15", "facecolor": ORANGE, "edgecolor": "none"},
            annotation_clip=False,
        )


def _extent(token_grid: TokenGrid) -> tuple[float, float, float, float]:
    return (
        token_grid.columns[0] - 0.5,
        token_grid.columns[-1] - 0.5,
        token_grid.rows[-1] - 0.5,
        token_grid.rows[0] - 0.5,
    )


def _class_name(target: torch.Tensor, class_names: Sequence[str]) -> str:
    return short_name(class_names[int(target.argmax())])


def _format_layer_range(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first} to {last}"
