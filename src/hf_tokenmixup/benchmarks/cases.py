"""Benchmarked functions: saliency detection, the parts of a horizontal step, and training steps."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..functional import horizontal_mix, mix_targets, mix_tokens, optimal_assignment, replace_mask, saliency_gain
from ..models import TokenMixupModelMixin
from ..models.layer_inputs import layer_inputs
from ..saliency import attention_saliency, eval_mode, gradient_saliency, random_saliency
from .timing import Call

MAX_FORWARD_BATCH = 64  # limits the memory for hidden states of all layers


def clone_with_config(model: TokenMixupModelMixin, **settings: Any) -> TokenMixupModelMixin:
    """Copy a model with other TokenMixup settings. The copy shares the weights except those of its new ScoreNet."""
    config = type(model.config).from_dict(model.config.to_dict(), **settings)
    config._attn_implementation = model.config._attn_implementation
    clone = type(model)(config)
    weights = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if ".scorenet." not in name}
    clone.load_state_dict(weights, strict=False, assign=True)
    return clone.to(model.device).train(model.training)


def compute_layer_input(model: TokenMixupModelMixin, images: torch.Tensor, layer: int) -> torch.Tensor:
    """Compute the input of a layer of the base model.

    Args:
        model: ViT or CCT.
        images: (B, 3, H, W), normalized.
        layer: Index of the layer.

    Returns:
        (B, N, D) tokens.
    """
    return torch.cat([layer_inputs(model, chunk)[layer].hidden for chunk in images.split(MAX_FORWARD_BATCH)])


def layer_saliency(
    model: TokenMixupModelMixin, hidden: torch.Tensor, layer: int, steps: int = 0, route: str = "auto"
) -> torch.Tensor:
    """Detect saliency by attention.

    Args:
        model: ViT or CCT.
        hidden: (B, N, D) tokens, the input of the layer.
        layer: Index of the layer.
        steps: Number of additional layers in the attention rollout.
        route: See `saliency_route` in the configuration.

    Returns:
        (B, T) saliency of the patch tokens.
    """
    layers, config = list(model.get_transformer_layers())[layer : layer + steps + 1], model.config
    return attention_saliency(layers, hidden, config.num_prefix_tokens, config.effective_saliency_query, route)


def detection_cases(
    model: TokenMixupModelMixin, images: torch.Tensor, targets: torch.Tensor, layer: int
) -> dict[str, Call]:
    """Build one function per saliency detector for the input of a layer.

    Args:
        model: ViT or CCT.
        images: (B, 3, H, W), normalized.
        targets: (B, C) class probabilities for the gradient of the loss.
        layer: Index of the layer.

    Returns:
        Functions that return (B, T): `attention` of the layer; `full maps`, the same from the attention maps of
        `output_attentions`; `full rollout` through all later layers; `gradient` of the loss; and `random`.
    """
    config, base_model, hidden = model.config, model.to_plain_model(), compute_layer_input(model, images, layer)
    num_tokens = hidden.shape[1] - config.num_prefix_tokens

    def gradient() -> torch.Tensor:
        with eval_mode(base_model):
            return gradient_saliency(
                lambda pixels: base_model(pixel_values=pixels).logits,
                images,
                targets,
                config.token_grid(*images.shape[2:]),
            )

    return {
        "attention": lambda: layer_saliency(model, hidden, layer),
        "full maps": lambda: layer_saliency(model, hidden, layer, route="output_attentions"),
        "full rollout": lambda: layer_saliency(model, hidden, layer, steps=config.network.num_layers - 1 - layer),
        "gradient": gradient,
        "random": lambda: random_saliency(len(hidden), num_tokens, hidden.device),
    }


def step_cases(
    hidden: torch.Tensor,
    saliency: torch.Tensor,
    targets: torch.Tensor,
    rho: float,
    num_prefix_tokens: int,
    group_sizes: Iterable[int] = (),
) -> dict[str, Call]:
    """Build functions for the forward pass of a horizontal step after saliency detection. Every image is easy.

    Args:
        hidden: (B, N, D) tokens.
        saliency: (B, T).
        targets: (B, C) class probabilities.
        rho: Minimum difference in saliency of a replaced token.
        num_prefix_tokens: P.
        group_sizes: Group sizes for `functional.optimal_assignment`.

    Returns:
        `gain` on the device; `transfer` of gains to the CPU and of partners back, without cost if the device is a CPU;
        `assignment` on the CPU, also once per group size under the name `group_case`; `mixing` of tokens and targets;
        and `complete step`.
    """
    easy = torch.ones(len(saliency), dtype=torch.bool, device=saliency.device)
    gain = saliency_gain(saliency, rho)
    cpu_gain, cpu_easy = gain.cpu(), easy.cpu()
    cpu_partner = optimal_assignment(cpu_gain, cpu_easy)
    partner = cpu_partner.to(saliency.device)

    def mix() -> tuple[torch.Tensor, torch.Tensor]:
        replaced = replace_mask(saliency, partner, rho)
        tokens = mix_tokens(hidden, partner, replaced, num_prefix_tokens)
        return tokens, mix_targets(targets, saliency, partner, replaced)

    groups = {group_case(size): lambda size=size: optimal_assignment(cpu_gain, cpu_easy, size) for size in group_sizes}
    return {
        "gain": lambda: saliency_gain(saliency, rho),
        "transfer": lambda: (gain.cpu(), cpu_partner.to(saliency.device)),
        "assignment": lambda: optimal_assignment(cpu_gain, cpu_easy),
        **groups,
        "mixing": mix,
        "complete step": lambda: horizontal_mix(hidden, targets, saliency, easy, rho, num_prefix_tokens),
    }


def group_case(size: int) -> str:
    """Return the name of the assignment within groups of up to `size` images."""
    return f"assignment, groups of {size}"


def relative_gain(saliency: torch.Tensor, rho: float, group_sizes: Iterable[int]) -> dict[int, float]:
    """Compute the total gain, Eq. (7), of an assignment within groups relative to that of the full batch.

    Args:
        saliency: (B, T). Every image is easy.
        rho: Minimum difference in saliency of a replaced token.
        group_sizes: Maximum numbers of images per group.

    Returns:
        Fractions in [0, 1] by group size; 1 if the gain of the full batch is 0.
    """
    gain = saliency_gain(saliency, rho).cpu()
    easy = torch.ones(len(gain), dtype=torch.bool)

    def total(size: int | None) -> float:
        return gain.gather(1, optimal_assignment(gain, easy, size)[:, None]).sum().item()

    full_batch = total(None)
    return {size: total(size) / full_batch if full_batch else 1.0 for size in group_sizes}


def make_training_step(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    autocast: torch.dtype | None = None,
    compile_mode: str = "eager",
) -> Call:
    """Build a function that runs forward and backward and then deletes the gradients. It has no optimizer.

    Args:
        model: A model in training mode.
        images: (B, 3, H, W).
        labels: Labels for the model.
        autocast: dtype for autocast. None: no autocast.
        compile_mode: mode of `torch.compile`; `"eager"` does not compile.
    """
    forward = model if compile_mode == "eager" else torch.compile(model, mode=compile_mode)

    def step() -> None:
        if compile_mode != "eager":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(images.device.type, autocast) if autocast else nullcontext():
            loss = forward(pixel_values=images, labels=labels).loss
        loss.backward()
        model.zero_grad()

    return step


def copy_cases(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    device: torch.device | str,
    autocast: torch.dtype | None = None,
) -> dict[str, Call]:
    """Build training steps that start with the copy of their batch to the device.

    Args:
        model: A model in training mode, on the device.
        images: (B, 3, H, W) on the CPU, in pinned memory for a copy that the CPU does not wait for.
        labels: Labels for the model, on the CPU.
        device: The device.
        autocast: dtype for autocast. None: no autocast.

    Returns:
        Steps by name: with a `blocking copy`, for which the CPU waits, and with a `non-blocking copy`.
    """

    def step(non_blocking: bool) -> None:
        batch = [tensor.to(device, non_blocking=non_blocking) for tensor in (images, labels)]
        make_training_step(model, *batch, autocast)()

    return {"blocking copy": lambda: step(False), "non-blocking copy": lambda: step(True)}


def set_easy_fraction(
    model: TokenMixupModelMixin,
    images: torch.Tensor,
    labels: torch.Tensor,
    fraction: float,
    autocast: torch.dtype | None = None,
) -> None:
    """Set tau of a model so that about a fraction of the images are easy. Dropout makes the number vary.

    Args:
        model: A model in training mode with horizontal layers.
        images: (B, 3, H, W).
        labels: Labels for the model.
        fraction: Fraction in (0, 1) of easy images, over all horizontal layers.
        autocast: dtype for autocast. None: no autocast.
    """
    with torch.no_grad(), torch.autocast(images.device.type, autocast) if autocast else nullcontext():
        records = model(pixel_values=images, labels=labels).horizontal
    difficulty = torch.cat([record.difficulty for record in records])
    model.config.horizontal_tau = difficulty.quantile(fraction).item()


def training_models(
    model: TokenMixupModelMixin,
    settings_by_name: Mapping[str, dict[str, Any]],
    group_sizes: Iterable[int] = (),
    rhos: Iterable[float] = (),
    with_variants: bool = True,
) -> dict[str, nn.Module]:
    """Build the base model, the model with each setting, and variants of the first setting.

    The variants have the other saliency detectors, complete attention maps, random partners, other values of rho, and
    an assignment within groups.

    Args:
        model: Model whose weights are shared.
        settings_by_name: TokenMixup settings by name.
        group_sizes: Maximum numbers of images per group.
        rhos: Other values of `horizontal_rho`.
        with_variants: False builds the base model and the given settings only.

    Returns:
        Models by name, the base model as `plain`.
    """
    (first, settings), *_ = settings_by_name.items()
    config = clone_with_config(model, **settings).config
    variants = {"gradient": {"saliency_detector": "gradient"}, "random": {"saliency_detector": "random"}}
    if config.horizontal_layers:
        variants["random partners"] = {"assignment": "random"}
        variants["full rollout"] = {"rollout_steps": config.network.num_layers - 1 - max(config.horizontal_layers)}
        variants |= {f"rho {value:g}": {"horizontal_rho": value} for value in rhos}
        variants |= {f"groups of {size}": {"assignment_group_size": size} for size in group_sizes}
    variants["full maps"] = {"saliency_route": "output_attentions"}
    all_settings = dict(settings_by_name)
    if with_variants:
        all_settings |= {f"{first}, {name}": settings | changes for name, changes in variants.items()}
    clones = {name: clone_with_config(model, **values) for name, values in all_settings.items()}
    return {"plain": model.to_plain_model()} | clones
