"""What TokenMixup does with some images: numbers and figures, without Gradio."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from ..configuration import TokenMixupConfigMixin
from ..evaluation.calibration import forecast_settings
from ..functional import label_weights
from ..visualization.inspection import (
    HorizontalMixTrace,
    predicted_classes,
    saliency_maps,
    trace_horizontal_mixup,
    trace_vertical_memory,
)
from ..visualization.plots import plot_horizontal_mixup, plot_saliency, plot_vertical_memory, short_name
from ..visualization.token_grid import compute_token_grid
from .classifier import DemoClassifier

MAX_IMAGES = 12
NOTE = "Classes are the model's predictions."


@dataclass(frozen=True)
class MixingSettings:
    """Settings of one layer.

    Attributes:
        layer: Index of the layer.
        rho_relative: rho as a multiple of 1 / T.
        tau_relative: tau as a fraction of ln C; None: all images are easy.
        kappa: Number of tokens from each earlier layer.
        detector: Saliency detector.
        seed: Seed of random choices.
    """

    layer: int
    rho_relative: float
    tau_relative: float | None
    kappa: int
    detector: str = "attention"
    seed: int = 0


@dataclass(frozen=True)
class MixingNumbers:
    """Effect of the settings on the images.

    Attributes:
        num_images: Number of images.
        images_easy: Number of easy images.
        images_mixed: Number of images with a replaced token.
        tokens_replaced: Fraction of patch tokens that are replaced, mean over the mixed images.
        label_mass: Weight of the partner's label, mean over the mixed images.
        attention_mass: Attention to collected tokens; None for layer 0, which has no earlier layers.
        rho: rho as a saliency value.
        tau: tau in nats; None: all images are easy.
        num_patch_tokens: T.
    """

    num_images: int
    images_easy: int
    images_mixed: int
    tokens_replaced: float
    label_mass: float
    attention_mass: float | None
    rho: float
    tau: float | None
    num_patch_tokens: int


@dataclass(frozen=True)
class MixingResult:
    """Numbers and figures.

    Attributes:
        numbers: Effect of the settings.
        saliency: Saliency over the images.
        horizontal: Pairs, mixed images and label bars; None if no image is mixed.
        vertical: Collected tokens; None for layer 0.
        message: Why no image is mixed; empty if one is.
    """

    numbers: MixingNumbers
    saliency: Figure
    horizontal: Figure | None
    vertical: Figure | None
    message: str


def mix_images(classifier: DemoClassifier, images: Sequence[Image.Image], settings: MixingSettings) -> MixingResult:
    """Mix images before one layer, and select the tokens that the layer would collect, in evaluation mode.

    The labels are the model's predictions. The settings of the model are the same afterwards.

    Args:
        classifier: Model and image processor.
        images: Images of any size.
        settings: Settings of the layer.

    Raises:
        ValueError: There are fewer than 2 or more than `MAX_IMAGES` images, or a setting is out of range for the
            model.
    """
    if not 2 <= len(images) <= MAX_IMAGES:
        raise ValueError(
            f"The demo mixes 2 to {MAX_IMAGES} images, got {len(images)}. {'Add' if len(images) < 2 else 'Remove'} "
            "images."
        )
    model, names, layer = classifier.model, classifier.class_names, settings.layer
    pixel_values = classifier.transform.batch([image.convert("RGB") for image in images])
    shown = classifier.display_images(pixel_values)
    labels = predicted_classes(model, pixel_values)
    captions = [short_name(names[label]) for label in labels.tolist()]
    grid = compute_token_grid(model, *shown.shape[2:])
    num_patch_tokens = (len(grid.rows) - 1) * (len(grid.columns) - 1)
    rho = settings.rho_relative / num_patch_tokens
    tau = None if settings.tau_relative is None else settings.tau_relative * math.log(model.config.num_labels)
    inputs = (model, pixel_values, labels, layer)

    with _changed(model.config, saliency_detector=settings.detector):
        trace = trace_horizontal_mixup(*inputs, tau=tau, rho=rho, generator=_generator(settings))
        vertical, attention_mass = None, None
        if layer > 0:
            memory = trace_vertical_memory(*inputs, kappa=settings.kappa, generator=_generator(settings))
            vertical = plot_vertical_memory(shown, memory, captions, grid, note=NOTE)
            attention_mass = _attention_mass(classifier, pixel_values, labels, settings)
        saliency = plot_saliency(
            shown, saliency_maps(*inputs), captions, grid, layer=layer, num_layers=classifier.num_layers, note=NOTE
        )
    horizontal, message = None, ""
    try:
        horizontal = plot_horizontal_mixup(shown, trace, names, grid, note=NOTE)
    except ValueError as error:
        message = str(error)
    return MixingResult(
        numbers=_summarize(trace, model.config, attention_mass, tau),
        saliency=saliency,
        horizontal=horizontal,
        vertical=vertical,
        message=message,
    )


def _summarize(
    trace: HorizontalMixTrace, config: TokenMixupConfigMixin, attention_mass: float | None, tau: float | None
) -> MixingNumbers:
    replaced, mixed = trace.replaced.flatten(1), trace.mixed
    saliency = trace.saliency.flatten(1)
    weight = saliency if config.relabel == "saliency" else torch.ones_like(saliency)
    _, received = label_weights(weight, trace.partner, replaced)
    return MixingNumbers(
        num_images=len(replaced),
        images_easy=int(trace.easy.sum()),
        images_mixed=len(mixed),
        tokens_replaced=replaced[mixed].double().mean().item() if mixed else 0.0,
        label_mass=received[mixed].double().mean().item() if mixed else 0.0,
        attention_mass=attention_mass,
        rho=trace.rho,
        tau=tau,
        num_patch_tokens=replaced.shape[1],
    )


def _attention_mass(
    classifier: DemoClassifier, pixel_values: torch.Tensor, labels: torch.Tensor, settings: MixingSettings
) -> float:
    """Attention of the layer to collected tokens, as `calibrate` measures it."""
    own = {"horizontal_layers": [], "vertical_layers": [settings.layer], "vertical_kappa": settings.kappa}
    with _changed(classifier.model.config, **own):
        batch = {"pixel_values": pixel_values, "labels": labels}
        return forecast_settings(classifier.model, [batch], seed=settings.seed).vertical[settings.layer].attention_mass


def _generator(settings: MixingSettings) -> torch.Generator:
    return torch.Generator().manual_seed(settings.seed)


@contextmanager
def _changed(config: TokenMixupConfigMixin, **settings: Any) -> Iterator[None]:
    """Change settings of a configuration, and restore them afterwards."""
    before = {name: getattr(config, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def format_numbers(numbers: MixingNumbers) -> list[tuple[str, str]]:
    """Format the numbers as pairs of a name and a value."""
    mixed = f"{numbers.images_mixed} of {numbers.num_images}"
    attention = "–" if numbers.attention_mass is None else f"{numbers.attention_mass:.1%}"
    relative = numbers.rho * numbers.num_patch_tokens
    tau = "" if numbers.tau is None else f" (tau = {numbers.tau:.3g} nats)"
    return [
        (
            f"Easy images{tau}",
            "not measured" if numbers.tau is None else f"{numbers.images_easy} of {numbers.num_images}",
        ),
        (f"Images mixed (rho = {relative:.3g} / {numbers.num_patch_tokens} = {numbers.rho:.3g})", mixed),
        (f"Tokens replaced in them (of {numbers.num_patch_tokens})", f"{numbers.tokens_replaced:.1%}"),
        ("Label mass moved", f"{numbers.label_mass:.1%}"),
        ("Attention to collected tokens", attention),
    ]
