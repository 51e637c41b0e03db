"""What a released weight file was made for, read off its tensors' shapes; positions for other image sizes."""

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..models import FAMILIES, height_and_width
from ..models.cct.modeling_cct import build_sincos_position_embedding, interpolate_positions
from .released_weights import FORMATS, ConvertedStateDict, source_name

logger = logging.getLogger(__name__)

CCT_NUM_HEADS = {128: 2, 256: 4, 384: 6}  # by hidden size, as the Compact-Transformers project has them
MAX_LAYERS = 1000
_VIT_PATCHES = "vit.embeddings.patch_embeddings.projection.weight"


def infer_config_kwargs(
    kind: str,
    file: str,
    weights: dict[str, torch.Tensor],
    renamed: ConvertedStateDict,
    image_size: int | Sequence[int] | None,
    heads: int | None,
) -> dict[str, Any]:
    """Attributes of the plain configuration, from the shapes; ``renamed`` gets positions for ``image_size``.

    Args:
        kind: the format.
        file: the file's name, for errors.
        weights: as the file has them.
        renamed: the same under our names.
        image_size: pixels, or height and width; None: those that the positions were made for.
        heads: H, None for the usual number.

    Raises:
        ValueError: for what is missing or of a wrong rank, for a number of heads that does not fit or is not known,
            and for an impossible image size.
    """
    family = "cct" if kind == "cct" else "vit"
    convolutions = "cct.embeddings.tokenizer.layers.{}.weight" if family == "cct" else _VIT_PATCHES
    mlp = f"{family}.layers.0." + ("linear1.weight" if family == "cct" else "mlp.fc1.weight")
    positions = f"{family}.embeddings.position_embeddings"
    ranks = {convolutions.format(0): 4, mlp: 2, positions: 3, "classifier.weight": 2}
    problems = list(renamed.problems)
    for name, rank in ranks.items():
        if name not in renamed.tensors:
            problems.append(f"{source_name(kind, name)}: missing")
        elif renamed.tensors[name].ndim != rank or not renamed.tensors[name].numel():
            problems.append(
                f"{renamed.sources[name]}: {rank} dimensions expected, got the shape "
                f"{tuple(renamed.tensors[name].shape)}"
            )
    if len(problems) > len(renamed.problems):
        raise refusal(file, kind, problems)

    first, stored = renamed.tensors[convolutions.format(0)], renamed.tensors[positions]
    numbers = {int(match[1]) for name in renamed.tensors if (match := re.match(rf"{family}\.layers\.(\d+)\.", name))}
    if max(numbers) >= MAX_LAYERS:
        raise ValueError(f"{file} has a layer of number {max(numbers)}; fewer than {MAX_LAYERS} layers are expected.")
    hidden = stored.shape[2]
    attributes = {
        "hidden_size": hidden,
        "num_hidden_layers": max(numbers) + 1,
        "intermediate_size": renamed.tensors[mlp].shape[0],
        "num_labels": renamed.tensors["classifier.weight"].shape[0],
        "num_channels": first.shape[1],
        "num_attention_heads": _infer_num_heads(kind, weights, hidden, heads),
    }
    kernel, prefix = first.shape[2], 1
    if family == "vit":
        attributes |= {"patch_size": kernel, "layer_norm_eps": 1e-6}
        stride = kernel
    else:
        prefix = int("cct.embeddings.cls_token" in renamed.tensors)
        attributes["pooling"] = "cls" if prefix else "sequence"
        if "cct.embeddings.tokenizer.layers.0.bias" in renamed.tensors:  # patches alone have a bias
            attributes |= {"tokenizer": "patch", "patch_size": kernel}
            stride = kernel
        else:
            count = sum(convolutions.format(index) in renamed.tensors for index in range(MAX_LAYERS))
            # The Compact-Transformers project derives stride and padding from the kernel.
            step = max(1, kernel // 2 - 1)
            attributes |= {
                "num_conv_layers": count,
                "conv_kernel_size": kernel,
                "conv_stride": step,
                "conv_padding": max(1, kernel // 2),
            }
            if count > 1:
                attributes["conv_channels"] = first.shape[0]
            stride = (step * 2) ** count
    grid = math.isqrt(max(stored.shape[1] - prefix, 0))
    if not grid or grid**2 != stored.shape[1] - prefix:
        raise refusal(
            file,
            kind,
            [
                *problems,
                f"{renamed.sources[positions]}: a square of tokens and {prefix} expected, got {stored.shape[1]}",
            ],
        )
    trained = grid * stride
    attributes["image_size"] = trained if image_size is None else _checked_size(image_size)
    plain_config = FAMILIES[family][1].base_model_class.config_class(**attributes)
    height, width = height_and_width(attributes["image_size"])
    new_grid = plain_config.grid_size(height, width) if family == "cct" else (height // kernel, width // kernel)
    if min(new_grid) < 1:
        raise ValueError(f"image_size must be at least one patch of {kernel} pixels, got {image_size!r}.")
    if family == "cct" and _is_sinusoid(stored):
        attributes["position_embedding"] = "sinusoidal"
        del renamed.tensors[positions]
    elif new_grid != (grid, grid):
        renamed.tensors[positions] = interpolate_positions(stored, (grid, grid), new_grid)
        logger.info("positions interpolated from %dx%d tokens to %dx%d", grid, grid, *new_grid)
    return attributes


def _infer_num_heads(kind: str, weights: dict[str, torch.Tensor], hidden: int, given: int | None) -> int:
    query = weights.get("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel")
    if query is not None and query.ndim == 3:
        if given not in (None, query.shape[1]):
            raise ValueError(f"The file has {query.shape[1]} attention heads, got num_attention_heads={given}.")
        return query.shape[1]
    usual = CCT_NUM_HEADS.get(hidden) if kind == "cct" else None if hidden % 64 else hidden // 64
    heads = usual if given is None else given
    if heads is None:
        raise ValueError(
            f"The number of attention heads cannot be seen in the file, and none is usual for a hidden size of "
            f"{hidden}: give num_attention_heads."
        )
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise ValueError(f"num_attention_heads must divide the hidden size of {hidden}, got {heads!r}.")
    return heads


def _is_sinusoid(positions: torch.Tensor) -> bool:
    expected = build_sincos_position_embedding(positions.shape[1], positions.shape[2], positions.device)
    return positions.shape == expected.shape and torch.allclose(positions, expected, atol=1e-4)


def _checked_size(size: int | Sequence[int]) -> int | list[int]:
    pair = [size] if isinstance(size, int) else list(size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in pair)
    if not whole or (len(pair) != 2 and not isinstance(size, int)):
        raise ValueError(f"image_size must be a positive number of pixels, or height and width, got {size!r}.")
    return size if isinstance(size, int) else pair


def refusal(file: str, kind: str, problems: list[str]) -> ValueError:
    """The one error that lists all that stands against a file."""
    return ValueError(
        f"{file} was taken for the format {FORMATS[kind]!r} and does not fit it; nothing was written. Shapes are "
        "in PyTorch's order.\n  " + "\n  ".join(sorted(problems))
    )
