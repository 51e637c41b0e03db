"""Configuration of a released model, inferred from tensor shapes, and interpolation of its positions."""

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..models import FAMILIES, height_and_width
from ..models.cct.modeling_cct import build_sincos_position_embedding, interpolate_positions
from .released_weights import FORMATS, ConvertedStateDict, get_original_name

logger = logging.getLogger(__name__)

CCT_NUM_HEADS = {128: 2, 256: 4, 384: 6}  # by hidden size, from the Compact-Transformers project
MAX_LAYERS = 1000
_VIT_PATCHES = "vit.embeddings.patch_embeddings.projection.weight"


def infer_config_kwargs(
    weight_format: str,
    file: str,
    weights: dict[str, torch.Tensor],
    converted: ConvertedStateDict,
    image_size: int | Sequence[int] | None,
    num_attention_heads: int | None,
) -> dict[str, Any]:
    """Infer the attributes of the plain configuration from tensor shapes.

    Args:
        weight_format: A key of `FORMATS`.
        file: Name of the file for error messages.
        weights: Tensors by their names in the file.
        converted: The same tensors by their names in the model. Positions are interpolated in place for `image_size`.
        image_size: Pixels, or height and width. None: that of the stored positions.
        num_attention_heads: Number of attention heads. None: that of the file or the usual number for the hidden size.

    Returns:
        Keyword arguments of the configuration.

    Raises:
        ValueError: A tensor is missing or has a wrong rank, the number of heads is invalid or unknown, or the image
            size is invalid.
    """
    family = "cct" if weight_format == "cct" else "vit"
    convolutions = "cct.embeddings.tokenizer.layers.{}.weight" if family == "cct" else _VIT_PATCHES
    mlp = f"{family}.layers.0." + ("linear1.weight" if family == "cct" else "mlp.fc1.weight")
    positions = f"{family}.embeddings.position_embeddings"
    ranks = {convolutions.format(0): 4, mlp: 2, positions: 3, "classifier.weight": 2}
    problems = list(converted.problems)
    for name, rank in ranks.items():
        if name not in converted.tensors:
            problems.append(f"{get_original_name(weight_format, name)}: missing")
        elif converted.tensors[name].ndim != rank or not converted.tensors[name].numel():
            problems.append(
                f"{converted.original_names[name]}: {rank} dimensions expected, got the shape "
                f"{tuple(converted.tensors[name].shape)}"
            )
    if len(problems) > len(converted.problems):
        raise conversion_error(file, weight_format, problems)

    first, stored = converted.tensors[convolutions.format(0)], converted.tensors[positions]
    indices = {int(match[1]) for name in converted.tensors if (match := re.match(rf"{family}\.layers\.(\d+)\.", name))}
    if max(indices) >= MAX_LAYERS:
        raise ValueError(
            f"{file} has a layer with index {max(indices)}, but at most {MAX_LAYERS} layers are supported."
        )
    hidden_size = stored.shape[2]
    attributes = {
        "hidden_size": hidden_size,
        "num_hidden_layers": max(indices) + 1,
        "intermediate_size": converted.tensors[mlp].shape[0],
        "num_labels": converted.tensors["classifier.weight"].shape[0],
        "num_channels": first.shape[1],
        "num_attention_heads": _infer_num_heads(weight_format, weights, hidden_size, num_attention_heads),
    }
    kernel, num_prefix_tokens = first.shape[2], 1
    if family == "vit":
        attributes |= {"patch_size": kernel, "layer_norm_eps": 1e-6}
        stride = kernel
    else:
        num_prefix_tokens = int("cct.embeddings.cls_token" in converted.tensors)
        attributes["pooling"] = "cls" if num_prefix_tokens else "sequence"
        if "cct.embeddings.tokenizer.layers.0.bias" in converted.tensors:  # only patch embeddings have a bias
            attributes |= {"tokenizer": "patch", "patch_size": kernel}
            stride = kernel
        else:
            num_conv_layers = sum(convolutions.format(index) in converted.tensors for index in range(MAX_LAYERS))
            # The Compact-Transformers project derives stride and padding from the kernel.
            conv_stride = max(1, kernel // 2 - 1)
            attributes |= {
                "num_conv_layers": num_conv_layers,
                "conv_kernel_size": kernel,
                "conv_stride": conv_stride,
                "conv_padding": max(1, kernel // 2),
            }
            if num_conv_layers > 1:
                attributes["conv_channels"] = first.shape[0]
            stride = (conv_stride * 2) ** num_conv_layers
    grid = math.isqrt(max(stored.shape[1] - num_prefix_tokens, 0))
    if not grid or grid**2 != stored.shape[1] - num_prefix_tokens:
        problems.append(
            f"{converted.original_names[positions]}: a square number of tokens plus {num_prefix_tokens} expected, got "
            f"{stored.shape[1]}"
        )
        raise conversion_error(file, weight_format, problems)
    attributes["image_size"] = grid * stride if image_size is None else _validate_image_size(image_size)
    plain_config = FAMILIES[family][1].base_model_class.config_class(**attributes)
    height, width = height_and_width(attributes["image_size"])
    new_grid = plain_config.grid_size(height, width) if family == "cct" else (height // kernel, width // kernel)
    if min(new_grid) < 1:
        raise ValueError(f"image_size must be at least the patch size of {kernel} pixels, got {image_size!r}.")
    if family == "cct" and _is_sinusoidal(stored):
        attributes["position_embedding"] = "sinusoidal"
        del converted.tensors[positions]
    elif new_grid != (grid, grid):
        converted.tensors[positions] = interpolate_positions(stored, (grid, grid), new_grid)
        logger.info("Interpolated positions from %dx%d to %dx%d tokens.", grid, grid, *new_grid)
    return attributes


def _infer_num_heads(
    weight_format: str, weights: dict[str, torch.Tensor], hidden_size: int, num_heads: int | None
) -> int:
    query = weights.get("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel")
    if query is not None and query.ndim == 3:
        if num_heads not in (None, query.shape[1]):
            raise ValueError(f"The file has {query.shape[1]} attention heads, got num_attention_heads={num_heads}.")
        return query.shape[1]
    if num_heads is None:
        if weight_format == "cct":
            num_heads = CCT_NUM_HEADS.get(hidden_size)
        elif hidden_size % 64 == 0:
            num_heads = hidden_size // 64
    if num_heads is None:
        raise ValueError(
            "The file does not contain the number of attention heads, and there is no default for a hidden size of "
            f"{hidden_size}. Set num_attention_heads."
        )
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"num_attention_heads must divide the hidden size of {hidden_size}, got {num_heads!r}.")
    return num_heads


def _is_sinusoidal(positions: torch.Tensor) -> bool:
    expected = build_sincos_position_embedding(positions.shape[1], positions.shape[2], positions.device)
    return positions.shape == expected.shape and torch.allclose(positions, expected, atol=1e-4)


def _validate_image_size(size: int | Sequence[int]) -> int | list[int]:
    sides = [size] if isinstance(size, int) else list(size)
    is_positive = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    if not is_positive or (len(sides) != 2 and not isinstance(size, int)):
        raise ValueError(f"image_size must be a positive number of pixels, or height and width, got {size!r}.")
    return size if isinstance(size, int) else sides


def conversion_error(file: str, weight_format: str, problems: list[str]) -> ValueError:
    """Build the error that lists all problems of a file."""
    return ValueError(
        f"{file} (detected format: {FORMATS[weight_format]}) could not be converted; nothing was written. Shapes are "
        "in PyTorch's order.\n  " + "\n  ".join(sorted(problems))
    )
