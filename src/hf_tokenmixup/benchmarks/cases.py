"""What the benchmark calls: saliency detection, the horizontal step in pieces, training steps; by the public path."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..functional import horizontal_mix, mix_targets, mix_tokens, optimal_assignment, replace_mask, saliency_gain
from ..models import TokenMixupModelMixin
from ..saliency import attention_saliency, eval_mode, gradient_saliency, random_saliency
from ..visualization.inspection import layer_inputs
from .timing import Call

CHUNK = 64  # images; the hidden states of all layers exist for so many at a time


def clone_with_config(model: TokenMixupModelMixin, **settings: Any) -> TokenMixupModelMixin:
    """The same network with other settings of TokenMixup. It shares the weights, and has a ScoreNet of its own."""
    config = type(model.config).from_dict(model.config.to_dict() | settings)
    config._attn_implementation = model.config._attn_implementation
    other = type(model)(config)
    weights = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if ".scorenet." not in name}
    other.load_state_dict(weights, strict=False, assign=True)
    return other.to(model.device).train(model.training)


def compute_layer_input(model: TokenMixupModelMixin, images: torch.Tensor, layer: int) -> torch.Tensor:
    """(B, N, D) tokens that enter a layer of the plain model, of images (B, 3, H, W)."""
    return torch.cat([layer_inputs(model, chunk)[layer] for chunk in images.split(CHUNK)])


def layer_saliency(
    model: TokenMixupModelMixin, hidden: torch.Tensor, layer: int, steps: int = 0, route: str = "auto"
) -> torch.Tensor:
    """(B, T) saliency by attention of the tokens (B, N, D) that enter a layer, with so many steps of rollout."""
    layers, config = list(model.get_transformer_layers())[layer : layer + steps + 1], model.config
    return attention_saliency(layers, hidden, config.num_prefix_tokens, config.saliency_query, route)


def detection_cases(
    model: TokenMixupModelMixin, images: torch.Tensor, targets: torch.Tensor, layer: int
) -> dict[str, Call]:
    """One saliency detection for the tokens that enter a layer, by each detector.

    Args:
        model: ViT or CCT.
        images: (B, 3, H, W), normalised.
        targets: (B, C) class distributions, which the gradient is taken for.
        layer: its number.

    Returns:
        Calls that return (B, T) by ``attention`` of the layer; the same by ``whole maps``, as ``output_attentions``
        returns them; by ``full rollout`` through all that follow; by the loss's ``gradient``; and at ``random``.
    """
    config, plain, hidden = model.config, model.published(), compute_layer_input(model, images, layer)
    num_tokens = hidden.shape[1] - config.num_prefix_tokens

    def gradient() -> torch.Tensor:
        with eval_mode(plain):
            return gradient_saliency(
                lambda pixels: plain(pixel_values=pixels).logits, images, targets, config.token_grid(*images.shape[2:])
            )

    return {
        "attention": lambda: layer_saliency(model, hidden, layer),
        "whole maps": lambda: layer_saliency(model, hidden, layer, route="output_attentions"),
        "full rollout": lambda: layer_saliency(model, hidden, layer, steps=config.num_hidden_layers - 1 - layer),
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
    """The horizontal step behind the detection, whole and in pieces, forward; every image is easy.

    Args:
        hidden: (B, N, D) tokens.
        saliency: (B, T).
        targets: (B, C) class distributions.
        rho: least gain in saliency of a replaced token.
        num_prefix_tokens: P.
        group_sizes: for matching inside groups, see :func:`~hf_tokenmixup.functional.optimal_assignment`.

    Returns:
        The calls ``gain`` on the device; ``transfer`` of gains to the host and of partners back, which is nothing on
        a CPU; ``assignment`` on the host, by :func:`group_case` for each group size too; ``mixing`` of tokens and
        targets; ``whole``.
    """
    easy = torch.ones(len(saliency), dtype=torch.bool, device=saliency.device)
    gain = saliency_gain(saliency, rho)
    host_gain, host_easy = gain.cpu(), easy.cpu()
    host_partner = optimal_assignment(host_gain, host_easy)
    partner = host_partner.to(saliency.device)

    def mix() -> tuple[torch.Tensor, torch.Tensor]:
        replaced = replace_mask(saliency, partner, rho)
        tokens = mix_tokens(hidden, partner, replaced, num_prefix_tokens)
        return tokens, mix_targets(targets, saliency, partner, replaced)

    groups = {
        group_case(size): lambda size=size: optimal_assignment(host_gain, host_easy, size) for size in group_sizes
    }
    return {
        "gain": lambda: saliency_gain(saliency, rho),
        "transfer": lambda: (gain.cpu(), host_partner.to(saliency.device)),
        "assignment": lambda: optimal_assignment(host_gain, host_easy),
        **groups,
        "mixing": mix,
        "whole": lambda: horizontal_mix(hidden, targets, saliency, easy, rho, num_prefix_tokens),
    }


def group_case(size: int) -> str:
    """The name of the assignment inside groups of at most so many images."""
    return f"assignment, groups of {size}"


def relative_gain(saliency: torch.Tensor, rho: float, group_sizes: Iterable[int]) -> dict[int, float]:
    """Share of the whole batch's largest gain, Eq. (7), that matching inside groups reaches; every image is easy.

    Args:
        saliency: (B, T).
        rho: least gain in saliency of a replaced token.
        group_sizes: images of a group, at most.

    Returns:
        The share in [0, 1] by group size; 1 where there is nothing to gain.
    """
    gain = saliency_gain(saliency, rho).cpu()
    easy = torch.ones(len(gain), dtype=torch.bool)

    def total(size: int | None) -> float:
        return gain.gather(1, optimal_assignment(gain, easy, size)[:, None]).sum().item()

    whole = total(None)
    return {size: total(size) / whole if whole else 1.0 for size in group_sizes}


def training_step(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, autocast: torch.dtype | None = None
) -> Call:
    """Forward and backward; the gradients are dropped, and no optimizer follows.

    Args:
        model: in training mode.
        images: (B, 3, H, W).
        labels: as the model takes them.
        autocast: dtype of the forward; None: that of the weights.
    """

    def step() -> None:
        with torch.autocast(images.device.type, autocast) if autocast else nullcontext():
            loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        model.zero_grad()

    return step


def training_models(
    model: TokenMixupModelMixin, systems: Mapping[str, dict[str, Any]], group_sizes: Iterable[int] = ()
) -> dict[str, nn.Module]:
    """The plain model, each system, and the first system by each detector and with matching inside groups.

    Args:
        model: whose weights all of them share.
        systems: settings of TokenMixup by name.
        group_sizes: images of a group, at most.
    """
    (first, settings), *_ = systems.items()
    config = clone_with_config(model, **settings).config
    variants = {"gradient": {"saliency_detector": "gradient"}, "random": {"saliency_detector": "random"}}
    if config.horizontal_layers:
        variants["full rollout"] = {"rollout_steps": config.num_hidden_layers - 1 - max(config.horizontal_layers)}
        variants |= {f"groups of {size}": {"assignment_group_size": size} for size in group_sizes}
    systems = dict(systems) | {f"{first}, {name}": settings | more for name, more in variants.items()}
    return {"plain": model.published()} | {name: clone_with_config(model, **more) for name, more in systems.items()}
