"""What a model's TokenMixup looks at and does, as numbers for pictures: saliency, mixed batches, tokens brought up.

All of it in evaluation mode: no dropout, and no parameter receives a gradient. Shapes: B images, R x K the grid of
their T patch tokens, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..functional import difficulty, select_salient_tokens
from ..horizontal import horizontal_mix_from_config
from ..models import TokenMixupModelMixin, height_and_width
from ..models.labels import to_soft_targets, validate_label_shape
from ..models.layers import detect_saliency
from ..saliency import attention_saliency, eval_mode


@dataclass(frozen=True)
class HorizontalMixTrace:
    """What a horizontal step in front of `layer` does to a batch.

    Attributes:
        layer: its number.
        rho, detector, token_selection, relabel: the settings that the step followed, see
            :class:`~hf_tokenmixup.configuration.TokenMixupConfigMixin`.
        easy: (B,) bool, the images that were to be mixed.
        saliency: (B, R, K) of the tokens that entered.
        partner: (B,) int64, itself where nothing was to be mixed.
        replaced: (B, R, K) bool.
        targets, mixed_targets: (B, C) class distributions before and after.
    """

    layer: int
    rho: float
    detector: str
    token_selection: str
    relabel: str
    easy: torch.Tensor
    saliency: torch.Tensor
    partner: torch.Tensor
    replaced: torch.Tensor
    targets: torch.Tensor
    mixed_targets: torch.Tensor

    @property
    def mixed(self) -> list[int]:
        """The images with a replaced token."""
        return self.replaced.flatten(1).any(dim=1).nonzero().flatten().tolist()


@dataclass(frozen=True)
class VerticalMemoryTrace:
    """Which tokens vertical layer `layer` attends to besides its own.

    Attributes:
        layer: its number, L.
        grid: R and K.
        tokens: (L, B, kappa) int64, for each earlier layer and image the salient patch tokens, the most salient first,
            counted row by row through the grid.
    """

    layer: int
    grid: tuple[int, int]
    tokens: torch.Tensor


def layer_inputs(model: TokenMixupModelMixin, pixel_values: torch.Tensor) -> Sequence[torch.Tensor]:
    """The tokens (B, N, D) that enter each layer of the plain model, for images (B, 3, H, W) of any size.

    Raises:
        ValueError: for a model without TokenMixup's layers.
    """
    _check_model(model)
    with eval_mode(model), torch.no_grad():
        return model(pixel_values, output_hidden_states=True, **_sizes(model, pixel_values)).hidden_states


def predicted_classes(model: TokenMixupModelMixin, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B,) int64 class of the highest logit, for images (B, 3, H, W) of any size."""
    with eval_mode(model), torch.no_grad():
        return model(pixel_values, **_sizes(model, pixel_values)).logits.argmax(dim=1)


def saliency_maps(
    model: TokenMixupModelMixin, pixel_values: torch.Tensor, targets: torch.Tensor, layer: int
) -> dict[str, torch.Tensor]:
    """Saliency of the tokens that enter a layer, by three detectors (the paper's Figure 3).

    Args:
        model: ViT or CCT as :func:`~hf_tokenmixup.models.load_classifier` opens it.
        pixel_values: (B, 3, H, W), normalised, of any size.
        targets: class indices (B,) or distributions (B, C), which the gradient is taken for.
        layer: its number.

    Returns:
        (B, R, K) as detected, not scaled, under ``gradient`` (of the loss with respect to the pixels, the same for
        every layer), ``1-step`` (attention of this layer) and ``full rollout`` (attention through this layer and all
        that follow).

    Raises:
        ValueError: for a layer that does not exist, or targets that do not fit.
    """
    _check_layer(model, layer)
    targets = _to_soft_targets(model, targets, len(pixel_values))
    config, layers = model.config, list(model.get_transformer_layers())[layer:]
    hidden = layer_inputs(model, pixel_values)[layer]
    sizes = _sizes(model, pixel_values)
    with eval_mode(model):
        maps = {"gradient": model.compute_gradient_saliency(pixel_values, targets, **sizes)} | {
            name: attention_saliency(through, hidden, config.num_prefix_tokens, config.saliency_query)
            for name, through in (("1-step", layers[:1]), ("full rollout", layers))
        }
    return {name: _reshape_to_grid(model, saliency, pixel_values) for name, saliency in maps.items()}


def min_max(maps: torch.Tensor) -> torch.Tensor:
    """Each map (B, R, K) scaled to [0, 1]; a constant one becomes 0."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.0)


def trace_horizontal_mixup(
    model: TokenMixupModelMixin,
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    layer: int,
    *,
    tau: float | None = None,
    rho: float | None = None,
    generator: torch.Generator | None = None,
) -> HorizontalMixTrace:
    """Do to a batch what the model's settings say of a horizontal step, in front of any layer (Figure 1).

    Args:
        model: ViT or CCT as :func:`~hf_tokenmixup.models.load_classifier` opens it.
        pixel_values: (B, 3, H, W), normalised, of any size.
        targets: class indices (B,) or distributions (B, C).
        layer: its number.
        tau: images with a ScoreNet loss below it, in nats, are easy and get mixed; None: all of them.
        rho: least gain in saliency of a replaced token; None: the model's.
        generator: source of randomness where the settings ask for random choices.

    Raises:
        ValueError: for a layer that does not exist, targets that do not fit, a negative rho, or a tau where the layer
            has no ScoreNet.
    """
    _check_layer(model, layer)
    config = model.config
    targets = _to_soft_targets(model, targets, len(pixel_values))
    rho = config.horizontal_rho if rho is None else rho
    hidden = layer_inputs(model, pixel_values)[layer]
    saliency = _detect_saliency(model, pixel_values, targets, hidden, layer, config.rollout_steps, generator)
    easy = _select_easy(model, hidden, targets, layer, tau)
    mix = horizontal_mix_from_config(hidden, targets, saliency, easy, config, rho=rho, generator=generator)
    return HorizontalMixTrace(
        layer=layer,
        rho=rho,
        detector=config.saliency_detector,
        token_selection=config.token_selection,
        relabel=config.relabel,
        easy=easy,
        saliency=_reshape_to_grid(model, saliency, pixel_values),
        partner=mix.partner,
        replaced=_reshape_to_grid(model, mix.replaced, pixel_values),
        targets=targets,
        mixed_targets=mix.targets,
    )


def trace_vertical_memory(
    model: TokenMixupModelMixin,
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    layer: int,
    *,
    kappa: int | None = None,
    generator: torch.Generator | None = None,
) -> VerticalMemoryTrace:
    """The tokens that a vertical layer would attend to besides its own, of images that are not mixed (Figure 2).

    Args:
        model: ViT or CCT as :func:`~hf_tokenmixup.models.load_classifier` opens it.
        pixel_values: (B, 3, H, W), normalised, of any size.
        targets: class indices (B,) or distributions (B, C); only the gradient, as a detector, depends on them.
        layer: its number, at least 1.
        kappa: how many tokens each earlier layer contributes; None: the model's.
        generator: source of randomness where saliency is random.

    Raises:
        ValueError: for layer 0 or one that does not exist, targets that do not fit, or a kappa out of range.
    """
    _check_layer(model, layer, first=1)
    config = model.config
    targets = _to_soft_targets(model, targets, len(pixel_values))
    kappa = config.vertical_kappa if kappa is None else kappa
    grid = model.token_grid(*pixel_values.shape[2:])
    if not 1 <= kappa <= grid[0] * grid[1]:
        raise ValueError(f"kappa must lie between 1 and the number of patch tokens, {grid[0] * grid[1]}, got {kappa}.")
    positions = torch.arange(grid[0] * grid[1], device=pixel_values.device).expand(len(pixel_values), -1)[..., None]
    chosen = []
    for index, hidden in enumerate(layer_inputs(model, pixel_values)[:layer]):
        saliency = _detect_saliency(model, pixel_values, targets, hidden, index, 0, generator)
        chosen.append(select_salient_tokens(positions, saliency, kappa, num_prefix_tokens=0)[..., 0])
    return VerticalMemoryTrace(layer=layer, grid=grid, tokens=torch.stack(chosen))


def _detect_saliency(model, pixel_values, targets, hidden, layer, rollout_steps, generator) -> torch.Tensor:
    """(B, T) saliency of the tokens (B, N, D) that enter a layer, by the detector of the model's settings."""
    layers = list(model.get_transformer_layers())[layer : layer + rollout_steps + 1]
    gradient_fn = partial(model.compute_gradient_saliency, pixel_values, targets, **_sizes(model, pixel_values))
    with eval_mode(model):
        return detect_saliency(model.config, layers, hidden, gradient_fn=gradient_fn, generator=generator)


def _select_easy(model, hidden, targets, layer, tau) -> torch.Tensor:
    if tau is None:
        return torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    scorenet = getattr(model.get_transformer_layers()[layer], "scorenet", None)
    if scorenet is None:
        raise ValueError(
            f"tau is compared with the loss of a ScoreNet, and layer {layer} has none (horizontal_layers is "
            f"{model.config.horizontal_layers}): leave tau out to mix every image."
        )
    with torch.no_grad():
        return difficulty(scorenet(hidden), targets) < tau


def _reshape_to_grid(model: TokenMixupModelMixin, tokens: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    return tokens.unflatten(1, model.token_grid(*pixel_values.shape[2:]))


def _to_soft_targets(model: TokenMixupModelMixin, targets: torch.Tensor, batch: int) -> torch.Tensor:
    validate_label_shape(targets, batch, model.config.num_labels)
    return to_soft_targets(targets, model.config.num_labels)


def _sizes(model: TokenMixupModelMixin, pixel_values: torch.Tensor) -> dict[str, bool]:
    """What the model must be told of images of another size than the one that its positions are made for."""
    usual = tuple(pixel_values.shape[2:]) == height_and_width(model.config.image_size)
    return {} if usual else {"interpolate_pos_encoding": True}


def _check_model(model: TokenMixupModelMixin) -> None:
    if not isinstance(model, TokenMixupModelMixin):
        raise ValueError(
            f"Tokens are looked at in a ViT or CCT that load_classifier opened, got {type(model).__name__}."
        )


def _check_layer(model: TokenMixupModelMixin, layer: int, first: int = 0) -> None:
    _check_model(model)
    last = len(model.get_transformer_layers()) - 1
    if not first <= layer <= last:
        reason = ", as nothing lies before layer 0" if first and layer == 0 else ""
        raise ValueError(f"layer must lie between {first} and {last}{reason}, got {layer}.")
