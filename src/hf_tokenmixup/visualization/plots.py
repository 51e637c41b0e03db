"""Pictures of what TokenMixup looks at and does (the paper's Figures 1 to 3).

Images are (B, 3, H, W) with values in [0, 1], as the model saw them: cropped and resized, before normalisation.
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
MAX_NAME_LENGTH = 20
MAX_RANKS = 9  # above, numbers in the tokens would say little
CHOICE = {
    "saliency": "A token is replaced where the partner's is more salient by more than rho = {rho:g}.",
    "random": "At random, as many tokens are replaced as are more salient in the partner by more than rho = {rho:g}.",
}
LABEL_MIXING_CAPTIONS = {
    "saliency": "The new label goes by the saliency that each of the two contributes.",
    "count": "The new label goes by the number of tokens that each of the two contributes.",
}
DETECTOR_CAPTIONS = {
    "attention": "the attention that a token gets",
    "gradient": "how much the loss depends on a token's pixels",
    "random": "drawn at random",
}


def plot_saliency(
    images: torch.Tensor,
    maps: dict[str, torch.Tensor],
    captions: Sequence[str],
    cells: TokenGrid,
    *,
    layer: int,
    num_layers: int,
    note: str = "",
) -> Figure:
    """Images beside their saliency by each detector, each map scaled to [0, 1] (Figure 3).

    Args:
        images: (B, 3, H, W) in [0, 1].
        maps: from :func:`~hf_tokenmixup.visualization.saliency_maps`.
        captions: a line for each image.
        cells: of these images.
        layer: the layer that was looked at, of `num_layers`.
        note: a further line of the title.
    """
    last = num_layers - 1
    headings = {
        "gradient": "Gradient\nof the loss",
        "1-step": f"Attention, 1-step\n(layer {layer})",
        "full rollout": f"Attention, full rollout\n({_span(layer, last)})",
    }
    figure, grid = image_grid(
        images.shape[2:], len(images), ["Image", *(headings.get(name, name) for name in maps)], right=1.7
    )
    add_title(
        figure,
        f"Which tokens are salient in front of layer {layer}",
        "Gradient: how much the loss depends on a token's pixels. Attention: how much of it the token gets, in one "
        "layer or through all that follow.",
        note,
    )
    for row, image, caption in zip(grid, images, captions, strict=True):
        _show_image(row[0], image, caption)
    for column, saliency in enumerate(maps.values(), start=1):
        for row, scaled in zip(grid, min_max(saliency), strict=True):
            _plot_heatmap(row[column], scaled, cells, Normalize(0, 1))
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), COLORMAP), ax=grid, shrink=min(1.0, 2 / len(images)), aspect=20
    )
    bar.set_label("saliency, each map scaled to [0, 1]", fontsize=11)
    bar.set_ticks([0, 0.5, 1], labels=["0  least", "0.5", "1  most"])
    return figure


def plot_horizontal_mixup(
    images: torch.Tensor,
    observation: HorizontalMixTrace,
    class_names: Sequence[str],
    cells: TokenGrid,
    *,
    note: str = "",
) -> Figure:
    """Each mixed image of a batch: its partner, both saliencies, the tokens that are replaced, the mixed image as its
    tokens imply it, and the new label (Figure 1).

    Args:
        images: (B, 3, H, W) in [0, 1].
        observation: of these images.
        class_names: the C classes.
        cells: of these images.
        note: a further line of the title.

    Raises:
        ValueError: if no token of any image is replaced.
    """
    mixed = observation.mixed
    if not mixed:
        easy = int(observation.easy.sum())
        highest = observation.saliency.max() - observation.saliency.min()
        if len(images) == 1:
            hint = "An image needs a partner: show more images."
        elif not easy:
            hint = "Only easy images are mixed: choose a higher tau, or none."
        else:
            hint = f"All saliency is within {highest:.2g}: choose a rho well below that, more images, or no tau."
        raise ValueError(
            f"There is no pair to show: of {len(images)} images, {easy} easy ones, none gets a token at rho = "
            f"{observation.rho:g}. {hint}"
        )
    headings = [
        "Image",
        "Its saliency",
        "Partner",
        "Partner's saliency",
        "Where the tokens\ncome from",
        "Mixed image" if cells.exact else "Mixed image\n(approximately)",
        "New label",
    ]
    figure, grid = image_grid(images.shape[2:], len(mixed), headings, bottom=0.7)
    add_title(
        figure,
        f"Horizontal TokenMixup in front of layer {observation.layer}: {len(mixed)} of {len(images)} images are mixed",
        CHOICE[observation.token_selection].format(rho=observation.rho)
        + " "
        + LABEL_MIXING_CAPTIONS[observation.relabel],
        note,
    )
    implied = render_mixed_images(images, observation.partner, observation.replaced, cells)
    # A few tokens far above the rest would leave all others dark on a linear scale.
    norm = PowerNorm(0.5, 0, float(observation.saliency.max()))
    for row, index in zip(grid, mixed, strict=True):
        partner = int(observation.partner[index])
        _show_image(row[0], images[index], _class_name(observation.targets[index], class_names), frame=BLUE)
        _plot_heatmap(row[1], observation.saliency[index], cells, norm)
        _show_image(row[2], images[partner], _class_name(observation.targets[partner], class_names), frame=ORANGE)
        _plot_heatmap(row[3], observation.saliency[partner], cells, norm)
        _plot_replacement_mask(row[4], observation.replaced[index], cells)
        _show_image(row[5], implied[index], "")
        _plot_label_bar(row[6], observation, index, class_names)
    bar = figure.colorbar(
        ScalarMappable(norm, COLORMAP), ax=grid[:, 1:4], location="bottom", shrink=0.7, aspect=30, pad=0.02
    )
    bar.set_label(f"saliency: {DETECTOR_CAPTIONS[observation.detector]}", fontsize=11)
    bar.locator = MaxNLocator(4)
    add_legend(
        figure, Patch(color=BLUE, label="the image itself"), Patch(color=ORANGE, label="its partner"), side="right"
    )
    return figure


def plot_vertical_memory(
    images: torch.Tensor,
    observation: VerticalMemoryTrace,
    captions: Sequence[str],
    cells: TokenGrid,
    *,
    note: str = "",
) -> Figure:
    """The tokens of each earlier layer that a vertical layer attends to besides its own (Figure 2).

    Args:
        images: (B, 3, H, W) in [0, 1].
        observation: of these images.
        captions: a line for each image.
        cells: of these images.
        note: a further line of the title.
    """
    layers, _, kappa = observation.tokens.shape
    figure, grid = image_grid(
        images.shape[2:], len(images), ["Image", *(f"From layer {layer}" for layer in range(layers))], bottom=0.4
    )
    add_title(
        figure,
        f"Vertical TokenMixup: what layer {observation.layer} also attends to",
        f"The {kappa} most salient tokens of each layer before it, in all {layers * kappa} further keys and values.",
        note,
    )
    for position, (row, image, caption) in enumerate(zip(grid, images, captions, strict=True)):
        _show_image(row[0], image, caption)
        for layer in range(layers):
            _plot_selected_tokens(row[1 + layer], image, observation.tokens[layer, position].tolist(), cells)
    ranks = ", 1 the most salient" if kappa <= MAX_RANKS else ""
    about = "" if cells.exact else " (place approximate)"
    label = f"token brought up to layer {observation.layer}{about}{ranks}"
    add_legend(figure, Patch(facecolor="none", edgecolor=ORANGE, linewidth=2, label=label), side="left")
    return figure


def short_name(name: str, longest: int = MAX_NAME_LENGTH) -> str:
    """A class name in few letters: the first of several synonyms, and not longer than this."""
    name = name.split(",")[0].strip()
    return name if len(name) <= longest else name[: longest - 1].rstrip() + "…"


def _show_image(axes: Axes, image: torch.Tensor, caption: str, frame: str | None = None) -> None:
    axes.imshow(image.clamp(0, 1).permute(1, 2, 0).cpu().numpy())
    axes.set_xlabel(caption, fontsize=10)
    if frame is not None:
        axes.spines[:].set(visible=True, color=frame, linewidth=3)


def _plot_heatmap(axes: Axes, saliency: torch.Tensor, cells: TokenGrid, norm: Normalize) -> None:
    axes.imshow(saliency.cpu().numpy(), cmap=COLORMAP, norm=norm, extent=_extent(cells), interpolation="nearest")


def _plot_replacement_mask(axes: Axes, replaced: torch.Tensor, cells: TokenGrid) -> None:
    axes.imshow(
        replaced.float().cpu().numpy(),
        cmap=ListedColormap([BLUE, ORANGE]),
        norm=Normalize(0, 1),
        extent=_extent(cells),
        interpolation="nearest",
    )
    axes.set_xlabel(f"{int(replaced.sum())} of {replaced.numel()} replaced", fontsize=10)


def _plot_label_bar(axes: Axes, observation: HorizontalMixTrace, index: int, class_names: Sequence[str]) -> None:
    """The label as one bar of its classes: first those of the image itself, then those of its partner."""
    mixed, own = observation.mixed_targets[index], observation.targets[index]
    classes = sorted(mixed.nonzero().flatten().tolist(), key=lambda number: (own[number] == 0, -mixed[number]))
    start = 0.0
    for line, number in enumerate(classes):
        color, share = BLUE if own[number] > 0 else ORANGE, float(mixed[number])
        axes.barh(0, share, left=start, color=color, edgecolor="white", height=0.5)
        axes.text(
            0, -0.5 - 0.4 * line, f"{_percent(share)} {short_name(class_names[number])}", color=color, fontsize=11
        )
        start += share
    axes.set_xlim(0, 1)
    axes.set_ylim(-1.5, 0.8)


def _percent(share: float) -> str:
    """A share in whole percent, with a decimal where it would read as nothing or as all."""
    return f"{share:.1%}" if 0 < share < 0.01 or 0.99 < share < 1 else f"{share:.0%}"


def _plot_selected_tokens(axes: Axes, image: torch.Tensor, tokens: Sequence[int], cells: TokenGrid) -> None:
    """The image, pale but for the chosen tokens, which are framed and numbered."""
    columns = len(cells.columns) - 1
    boxes = []
    pale = 0.35 * image + 0.65
    for token in tokens:
        row, column = divmod(token, columns)
        top, bottom = cells.rows[row], cells.rows[row + 1]
        left, right = cells.columns[column], cells.columns[column + 1]
        pale[:, top:bottom, left:right] = image[:, top:bottom, left:right]
        boxes.append(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top))
    _show_image(axes, pale, "")
    axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=ORANGE, linewidth=1.5))
    if len(tokens) > MAX_RANKS:
        return
    for rank, box in enumerate(boxes, start=1):
        axes.annotate(
            str(rank),
            (box.get_x() + box.get_width(), box.get_y()),
            fontsize=8,
            fontweight="bold",
            color="white",
            ha="center",
            va="center",
            bbox={"boxstyle": "circle,pad=0.15", "facecolor": ORANGE, "edgecolor": "none"},
            annotation_clip=False,
        )


def _extent(cells: TokenGrid) -> tuple[float, float, float, float]:
    return cells.columns[0] - 0.5, cells.columns[-1] - 0.5, cells.rows[-1] - 0.5, cells.rows[0] - 0.5


def _class_name(target: torch.Tensor, class_names: Sequence[str]) -> str:
    return short_name(class_names[int(target.argmax())])


def _span(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first} to {last}"
