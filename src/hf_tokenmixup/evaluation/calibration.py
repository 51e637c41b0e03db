"""Forecast of what rho, tau and kappa do in a model, on images, before it is trained.

The model is in evaluation mode and does not change. Shapes: B images of a batch, T patch tokens, N tokens with the
prefix tokens, D hidden size, C classes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..configuration import TokenMixupConfigMixin
from ..functional import difficulty, select_salient_tokens
from ..models import TokenMixupModelMixin
from ..models.layer_inputs import (
    LayerInput,
    gradient_saliency_fn,
    layer_inputs,
    layer_saliency,
    soft_targets,
    validate_layer,
    validate_tokenmixup_model,
)
from ..models.layers import TokenMixupLayerMixin
from ..saliency import MAX_ATTENTION_MAP_ELEMENTS, eval_mode
from .forecasts import (
    EasyForecast,
    HorizontalForecast,
    LayerCalibration,
    VerticalForecast,
    collected_attention,
    forecast_horizontal,
)
from .scorenet_fit import fit_scorenet_difficulty
from .suggestions import SuggestedSettings, suggest_settings

RHO_LADDER = (0.25, 0.5, 0.77, 1.0, 1.3, 2.0, 3.0, 5.0)  # multiples of 1 / T
TAU_LADDER = (0.1, 0.15, 0.2, 0.3, 0.43, 0.6, 0.8, 1.0)  # fractions of ln C
KAPPA_LADDER = (1, 3, 5, 10, 20, 50, 100)

MAX_FORWARD_IMAGES = 64  # limits the memory for hidden states of all layers
MAX_MEMORY_IMAGES = 16  # the attention mass is a mean over thousands of queries per image, and costs the most time


@dataclass(frozen=True)
class CalibrationResult:
    """Result of `calibrate`.

    Attributes:
        num_images: Number of images.
        batch_size: Number of images of the first batch.
        num_patch_tokens: T.
        num_labels: C.
        saliency_detector: Detector of the model's settings.
        layers: Measured layers in order.
        suggestion: Suggested settings.
    """

    num_images: int
    batch_size: int
    num_patch_tokens: int
    num_labels: int
    saliency_detector: str
    layers: tuple[LayerCalibration, ...]
    suggestion: SuggestedSettings

    def to_dict(self) -> dict[str, Any]:
        """Return the result as dictionaries, lists, numbers and strings, for JSON."""
        result = _without_tuples(asdict(self))
        result["suggestion"] = self.suggestion.to_settings()
        return result


@dataclass(frozen=True)
class SettingsForecast:
    """Result of `forecast_settings`.

    Attributes:
        num_images: Number of images.
        batch_size: Number of images of the first batch.
        num_patch_tokens: T.
        horizontal: Forecast for each horizontal layer.
        vertical: Forecast for each vertical layer.
    """

    num_images: int
    batch_size: int
    num_patch_tokens: int
    horizontal: dict[int, HorizontalForecast]
    vertical: dict[int, VerticalForecast]


@dataclass
class _Measurements:
    """Tensors that are collected from all batches, on the CPU.

    Attributes:
        num_patch_tokens: T.
        kappas: Values of kappa.
        targets: (B, C) of each batch.
        saliency: (B, T) of each batch, by layer.
        pooled: (B, D) pooled tokens of chunks of images, by layer whose ScoreNet is fitted.
        difficulty: (B,) of chunks of images, by layer whose ScoreNet is trained.
        attention_mass: Sum over images for each kappa, by layer.
        num_memory_images: Number of images in `attention_mass`.
    """

    num_patch_tokens: int
    kappas: Sequence[int]
    targets: list[torch.Tensor] = field(default_factory=list)
    saliency: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    pooled: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    difficulty: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    attention_mass: dict[int, torch.Tensor] = field(default_factory=dict)
    num_memory_images: int = 0

    @property
    def num_images(self) -> int:
        return sum(map(len, self.targets))


def calibrate(
    model: TokenMixupModelMixin,
    batches: Iterable[Mapping[str, torch.Tensor]],
    layers: Sequence[int] | None = None,
    *,
    fit_scorenet: bool = False,
    rho_ladder: Sequence[float] = RHO_LADDER,
    tau_ladder: Sequence[float] = TAU_LADDER,
    kappa_ladder: Sequence[int] | None = None,
    seed: int = 0,
) -> CalibrationResult:
    """Forecast the effect of rho, tau and kappa before the layers of a model.

    Each layer is measured as if it were the only one that mixes. One forward pass of a batch serves all layers.
    Saliency, assignment, selection of tokens and relabeling follow the settings of the model.

    Args:
        model: ViT or CCT, loaded with `load_classifier`.
        batches: Batches of the training batch size, such as a data loader: `pixel_values` (B, 3, H, W), normalized and
            of one size, and `labels`, class indices (B,) or class distributions (B, C).
        layers: Indices of the layers. None: all.
        fit_scorenet: Fit a ScoreNet for each layer. Otherwise the ScoreNet of a layer is used as it is, which must be
            trained, and one is fitted for layers without a ScoreNet. A fitted ScoreNet pools as the model's settings
            require; attention pooling is approximated by the mean over the patch tokens, where it starts.
        rho_ladder: Values of rho as multiples of 1 / T.
        tau_ladder: Values of tau as fractions of ln C.
        kappa_ladder: Values of kappa up to T. None: `KAPPA_LADDER` up to T, and T.
        seed: Seed of all random choices.

    Returns:
        The measurements of each layer, and the suggested settings. The attention mass is that of the first
        `MAX_MEMORY_IMAGES` images.

    Raises:
        ValueError: The model has no TokenMixup layers, a layer does not exist, labels are invalid, a value of a ladder
            is out of range, there are fewer than two images, or saliency is not finite.
    """
    validate_tokenmixup_model(model)
    indices = sorted(set(range(len(model.get_transformer_layers())) if layers is None else layers))
    if not indices:
        raise ValueError("layers must name at least one layer, or be None for all layers, got none.")
    for index in indices:
        validate_layer(model, index)
    for name, ladder in (("rho_ladder", rho_ladder), ("tau_ladder", tau_ladder)):
        if not ladder or not all(value >= 0 for value in ladder):
            raise ValueError(f"{name} must have one or more values of at least 0, got {list(ladder)}.")
    measured = _measure(
        model,
        batches,
        saliency_layers=indices,
        memory_layers=[index for index in indices if index > 0],
        kappas=kappa_ladder,
        fitted_layers=[index for index in indices if fit_scorenet or _trained_scorenet(model, index) is None],
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    results = tuple(
        _calibrate_layer(model.config, measured, index, sorted(rho_ladder), sorted(tau_ladder), generator)
        for index in indices
    )
    return CalibrationResult(
        num_images=measured.num_images,
        batch_size=len(measured.targets[0]),
        num_patch_tokens=measured.num_patch_tokens,
        num_labels=model.config.num_labels,
        saliency_detector=model.config.saliency_detector,
        layers=results,
        suggestion=suggest_settings(results, len(model.get_transformer_layers())),
    )


def forecast_settings(
    model: TokenMixupModelMixin, batches: Iterable[Mapping[str, torch.Tensor]], *, seed: int = 0
) -> SettingsForecast:
    """Forecast the effect of a model's own settings, with every image easy.

    Each layer is measured as if it were the only one that mixes.

    Args:
        model: ViT or CCT, loaded with `load_classifier`.
        batches: As in `calibrate`.
        seed: Seed of all random choices.

    Raises:
        ValueError: The model has no TokenMixup layers, labels are invalid, there are fewer than two images, or
            saliency is not finite.
    """
    validate_tokenmixup_model(model)
    config = model.config
    measured = _measure(
        model,
        batches,
        saliency_layers=config.horizontal_layers,
        memory_layers=config.vertical_layers,
        kappas=[config.vertical_kappa],
        fitted_layers=[],
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    rho = config.effective_rho(measured.num_patch_tokens)
    return SettingsForecast(
        num_images=measured.num_images,
        batch_size=len(measured.targets[0]),
        num_patch_tokens=measured.num_patch_tokens,
        horizontal={
            index: forecast_horizontal(measured.saliency[index], rho, config, generator)
            for index in config.horizontal_layers
        },
        vertical={index: _vertical_forecasts(measured, index)[0] for index in config.vertical_layers},
    )


def _measure(
    model: TokenMixupModelMixin,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    saliency_layers: Sequence[int],
    memory_layers: Sequence[int],
    kappas: Sequence[int] | None,
    fitted_layers: Sequence[int],
    seed: int,
) -> _Measurements:
    measured = None
    generator = torch.Generator(device=model.device).manual_seed(seed)
    with eval_mode(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        for batch in batches:
            pixel_values = batch["pixel_values"].to(model.device, model.dtype)
            targets = soft_targets(model, batch["labels"].to(model.device), len(pixel_values))
            if measured is None:
                measured = _start_measurements(model, pixel_values, kappas)
            measured.targets.append(targets.cpu())
            chunks = [
                _measure_chunk(
                    model, images, labels, measured, saliency_layers, memory_layers, fitted_layers, generator
                )
                for images, labels in zip(
                    pixel_values.split(MAX_FORWARD_IMAGES), targets.split(MAX_FORWARD_IMAGES), strict=True
                )
            ]
            for index in saliency_layers:
                measured.saliency.setdefault(index, []).append(torch.cat([chunk[index] for chunk in chunks]).cpu())
    if measured is None or measured.num_images < 2:
        raise ValueError(
            f"A forecast needs at least 2 images, since an image is mixed with another one, got "
            f"{0 if measured is None else measured.num_images}."
        )
    for index in saliency_layers:
        if not all(saliency.isfinite().all() for saliency in measured.saliency[index]):
            raise ValueError(f"The saliency of layer {index} is not finite. Check the model's weights and the images.")
    return measured


def _start_measurements(
    model: TokenMixupModelMixin, pixel_values: torch.Tensor, kappas: Sequence[int] | None
) -> _Measurements:
    rows, columns = model.token_grid(*pixel_values.shape[2:])
    num_patch_tokens = rows * columns
    if kappas is None:
        kappas = [*(kappa for kappa in KAPPA_LADDER if kappa < num_patch_tokens), num_patch_tokens]
    if not all(1 <= kappa <= num_patch_tokens for kappa in kappas):
        raise ValueError(
            f"kappa must be between 1 and the number of patch tokens, {num_patch_tokens}, got {list(kappas)}."
        )
    return _Measurements(num_patch_tokens, sorted(kappas))


def _measure_chunk(
    model: TokenMixupModelMixin,
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    measured: _Measurements,
    saliency_layers: Sequence[int],
    memory_layers: Sequence[int],
    fitted_layers: Sequence[int],
    generator: torch.Generator,
) -> dict[int, torch.Tensor]:
    """Add the measurements of some images of a batch, and return their saliency (b, T) by layer."""
    config, inputs = model.config, layer_inputs(model, pixel_values)
    hidden = [layer_input.hidden for layer_input in inputs]
    gradient_fn = gradient_saliency_fn(model, pixel_values, targets)

    def detect(index: int, rollout_steps: int = 0) -> torch.Tensor:
        return layer_saliency(
            model,
            inputs[index],
            index,
            gradient_fn=gradient_fn,
            rollout_steps=rollout_steps,
            generator=generator,
        )

    saliency = {index: detect(index, config.rollout_steps) for index in saliency_layers}
    for index in saliency_layers:
        if index in fitted_layers:
            pooled = _pool(hidden[index], config).float().cpu()
            measured.pooled.setdefault(index, []).append(pooled)
        elif (scorenet := _trained_scorenet(model, index)) is not None:
            measured.difficulty.setdefault(index, []).append(difficulty(scorenet(hidden[index]), targets).cpu())

    num_images = min(len(pixel_values), MAX_MEMORY_IMAGES - measured.num_memory_images)
    if memory_layers and num_images > 0:
        measured.num_memory_images += num_images
        # Tokens are collected by the attention of a single layer, also with a rollout.
        ranking = saliency if config.rollout_steps == 0 else {}
        kappa, collected, positions = measured.kappas[-1], [], []
        for index in range(max(memory_layers)):
            ranked = (ranking[index] if index in ranking else detect(index))[:num_images]
            collected.append(
                select_salient_tokens(hidden[index][:num_images], ranked, kappa, config.num_prefix_tokens)
            )
            positions.append(ranked.topk(kappa, dim=1).indices)
        for index in memory_layers:
            mass = _attention_mass(
                model.get_transformer_layers()[index],
                LayerInput(hidden[index][:num_images], inputs[index].kwargs),
                torch.stack(collected[:index], dim=1),
                torch.stack(positions[:index], dim=1),
                measured.kappas,
                config.network.num_heads,
            )
            measured.attention_mass[index] = measured.attention_mass.get(index, 0) + mass
    return saliency


def _attention_mass(
    layer: TokenMixupLayerMixin,
    inputs: LayerInput,
    collected: torch.Tensor,
    positions: torch.Tensor,
    kappas: Sequence[int],
    num_heads: int,
) -> torch.Tensor:
    """(len(kappas),) attention to collected tokens, summed over images, with a limited number of map elements."""
    num_tokens = inputs.hidden.shape[1]
    elements = num_heads * num_tokens * (num_tokens + collected.shape[1] * collected.shape[2])
    chunk = max(1, MAX_ATTENTION_MAP_ELEMENTS // elements)
    masses = [
        collected_attention(layer, own, memory, slots, kappas, inputs.kwargs).cpu().double().sum(dim=0)
        for own, memory, slots in zip(
            inputs.hidden.split(chunk), collected.split(chunk), positions.split(chunk), strict=True
        )
    ]
    return torch.stack(masses).sum(dim=0)


def _calibrate_layer(
    config: TokenMixupConfigMixin,
    measured: _Measurements,
    index: int,
    rho_ladder: Sequence[float],
    tau_ladder: Sequence[float],
    generator: torch.Generator,
) -> LayerCalibration:
    num_patch_tokens = measured.num_patch_tokens
    saliency = torch.cat(measured.saliency[index]).double()
    fitted = index in measured.pooled
    if fitted:
        pooled, targets = torch.cat(measured.pooled[index]), torch.cat(measured.targets)
        image_difficulty = fit_scorenet_difficulty(pooled, targets, generator)
    else:
        image_difficulty = torch.cat(measured.difficulty[index])
    taus = [(relative, relative * math.log(config.num_labels)) for relative in tau_ladder]
    mean, std = saliency.mean().item(), saliency.std(correction=0).item()
    return LayerCalibration(
        layer=index,
        saliency_mean=mean,
        saliency_std=std,
        saliency_mean_relative=mean * num_patch_tokens,
        saliency_std_relative=std * num_patch_tokens,
        patch_attention=saliency.sum(dim=1).mean().item(),
        scorenet="fitted" if fitted else "trained",
        difficulty=image_difficulty.double().mean().item(),
        rho=tuple(
            replace(
                forecast_horizontal(measured.saliency[index], relative / num_patch_tokens, config, generator),
                horizontal_rho_relative=relative,  # without rounding
            )
            for relative in rho_ladder
        ),
        tau=tuple(
            EasyForecast(relative, tau, (image_difficulty < tau).double().mean().item()) for relative, tau in taus
        ),
        kappa=_vertical_forecasts(measured, index) if index > 0 else (),
    )


def _vertical_forecasts(measured: _Measurements, index: int) -> tuple[VerticalForecast, ...]:
    masses = (measured.attention_mass[index] / measured.num_memory_images).tolist()
    return tuple(
        VerticalForecast(kappa, index * kappa, mass) for kappa, mass in zip(measured.kappas, masses, strict=True)
    )


def _trained_scorenet(model: TokenMixupModelMixin, index: int) -> torch.nn.Module | None:
    return getattr(model.get_transformer_layers()[index], "scorenet", None)


def _pool(hidden: torch.Tensor, config: TokenMixupConfigMixin) -> torch.Tensor:
    """Pool tokens (B, N, D) for a new ScoreNet to (B, D). Attention pooling is approximated by the mean."""
    if config.effective_scorenet_pooling == "cls":
        return hidden[:, 0]
    return hidden[:, config.num_prefix_tokens :].mean(dim=1)


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_tuples(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tuples(item) for item in value]
    return value
