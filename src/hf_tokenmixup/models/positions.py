"""Interpolate the learned positions of a checkpoint to another image size, for any image classifier."""

import copy
import logging
import math
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration import TokenMixupConfigMixin
from .cct.configuration_cct import height_and_width
from .cct.modeling_cct import interpolate_positions

logger = logging.getLogger(__name__)

MAX_SIZE = 2**14
# Attributes of modules that depend on the image size.
_GEOMETRY = (
    *("image_size", "num_patches", "grid_size", "patch_shape", "input_resolution"),
    *("num_positions", "num_embeddings", "window_size", "num_relative_distance"),
)
# Relative positions to and from a prefix token: the last rows of a table of relative positions.
_NUM_PREFIX_RELATIONS = 3
# Buffer with the indices of all positions, for an embedding of positions.
_POSITION_INDICES = ".position_ids"


def get_vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration with the sizes of the image encoder.

    It is `vision_config` for models of images and texts, such as CLIP, and `config` itself for others.
    """
    return getattr(config, "vision_config", None) or config


def get_image_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return the configured height and width in pixels of any image classifier; None if it has no image size."""
    if isinstance(config, TokenMixupConfigMixin):
        return config.network.image_size
    size = getattr(get_vision_config(config), "image_size", None)
    return None if size is None else height_and_width(size)


def token_grid(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return the rows and columns of patch tokens at the configured image size; None for models without a grid."""
    size = get_image_size(config)
    if size is None:
        return None
    if hasattr(config, "grid_size"):
        return config.grid_size(*size)
    patch = _get_patch_size(config)
    if patch is None or min(patch) < 1:
        return None
    return size[0] // patch[0], size[1] // patch[1]


def config_to_load_with(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, stored: PreTrainedConfig
) -> PreTrainedConfig | None:
    """Return a configuration that loads a checkpoint with learned positions of another grid.

    Args:
        model_class: class of the model, or an auto class with `from_config`.
        config: requested configuration.
        stored: configuration of the checkpoint.

    Returns:
        A copy of `config` with an image size for which the positions have the shape of the checkpoint; call
        `resize_positions` after loading. None if the grid is the same, or other parameters depend on it.
    """
    grid, new_grid = token_grid(stored), token_grid(config)
    if grid is None or new_grid is None or grid == new_grid or min(new_grid) < 1:
        return None
    loaded = copy.deepcopy(config)
    get_vision_config(loaded).image_size = get_vision_config(stored).image_size
    if token_grid(loaded) != grid and not _set_image_size_for_grid(grid, loaded):
        return None
    if getattr(loaded, "vertical_kappa", 0) > grid[0] * grid[1]:
        # The maximum is the number of patch tokens, which may be smaller here. `resize_positions` restores the value.
        loaded.vertical_kappa = grid[0] * grid[1]
    shapes, new_shapes = _get_shapes(model_class, loaded), _get_shapes(model_class, config)
    if shapes.keys() != new_shapes.keys():
        return None
    differing = [name for name in shapes if shapes[name] != new_shapes[name] and not name.endswith(_POSITION_INDICES)]
    tokens, new_tokens = grid[0] * grid[1], new_grid[0] * new_grid[1]
    if not all(
        _are_positions(shapes[name], new_shapes[name], tokens, new_tokens)
        or _are_relative_positions(shapes[name], new_shapes[name], grid, new_grid)
        for name in differing
    ):
        return None
    return loaded if differing else None


def resize_positions(model: PreTrainedModel, config: PreTrainedConfig, name: str = "the checkpoint") -> None:
    """Interpolate the learned positions of a model to the image size of `config`, in place.

    Args:
        model: model, loaded with the configuration of `config_to_load_with`.
        config: requested configuration.
        name: name of the checkpoint, for the warning.
    """
    grid, new_grid = token_grid(model.config), token_grid(config)
    if hasattr(model, "resize_positions"):
        model.resize_positions(config)
    with torch.device("meta"):
        reference = type(model)(copy.deepcopy(config))
    shapes = {key: tensor.shape for key, tensor in reference.state_dict().items()}
    for key, parameter in list(model.named_parameters()):
        if key in shapes and parameter.shape != shapes[key]:
            if _are_relative_positions(tuple(parameter.shape), tuple(shapes[key]), grid, new_grid):
                resized = _interpolate_relative_positions(parameter.detach(), grid, new_grid)
            else:
                # (1, P + T, D), or (P + T, D) in an embedding
                resized = interpolate_positions(parameter.detach().view(1, *parameter.shape[-2:]), grid, new_grid)
                resized = resized.view(shapes[key])
            parent, _, parameter_name = key.rpartition(".")
            setattr(model.get_submodule(parent), parameter_name, nn.Parameter(resized, parameter.requires_grad))
    _resize_buffers(model, reference)
    for module, reference_module in zip(model.modules(), reference.modules(), strict=True):
        for attribute in _GEOMETRY:
            if attribute in vars(module):
                setattr(module, attribute, getattr(reference_module, attribute))
    for part in _get_configs(model):
        vision = get_vision_config(part)
        if hasattr(vision, "image_size"):
            vision.image_size = get_vision_config(config).image_size
    if hasattr(config, "vertical_kappa"):
        model.config.vertical_kappa = config.vertical_kappa
    logger.warning(
        "%s was trained on a grid of %dx%d tokens. Its positions are interpolated to %dx%d tokens for images of %dx%d "
        "pixels.",
        name, *grid, *new_grid, *get_image_size(config),
    )  # fmt: skip


def border_hint(config: TokenMixupConfigMixin, size: tuple[int, int] | None = None) -> str | None:
    """Return a warning if the tokens do not cover an image completely, with the nearest sizes that they cover.

    Args:
        config: configuration of a model family.
        size: height and width of the images; None: the configured size.

    Returns:
        The warning, or None if the tokens cover the image.
    """
    size = config.network.image_size if size is None else size
    uncovered = [_uncovered(config, side, axis) for axis, side in enumerate(size)]
    if max(uncovered) == 0:
        return None
    choices = []
    for step in (-1, 1):
        sides = list(size)
        for axis in (0, 1):
            while 0 < sides[axis] < MAX_SIZE and _uncovered(config, sides[axis], axis):
                sides[axis] += step
        choices += [_format_size(sides)] if min(sides) > 0 else []
    unit = "the strides of the tokenizer"
    if config.network.patch_size is not None:
        unit = "patches of {}x{}".format(*config.network.patch_size)
    return (
        f"Images of {size[0]}x{size[1]} pixels are not a multiple of {unit}: the last {uncovered[0]} rows and "
        f"{uncovered[1]} columns of pixels are ignored. Use image_size {' or '.join(choices)}."
    )


def _uncovered(config: TokenMixupConfigMixin, side: int, axis: int) -> int:
    if hasattr(config, "uncovered_pixels"):
        return config.uncovered_pixels(side)
    return side % config.network.patch_size[axis]


def _format_size(size: list[int]) -> str:
    return str(size[0]) if size[0] == size[1] else str(size)


def _get_patch_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    if isinstance(config, TokenMixupConfigMixin):
        return config.network.patch_size
    patch = getattr(get_vision_config(config), "patch_size", None)
    return height_and_width(patch) if isinstance(patch, int | list | tuple) else None


def _set_image_size_for_grid(grid: tuple[int, int], config: PreTrainedConfig) -> bool:
    """Set the smallest height and width with a grid of tokens, in place. Return whether there are any."""
    vision, found = get_vision_config(config), []
    for axis in (0, 1):
        for side in range(1, MAX_SIZE):
            vision.image_size = side
            tokens = token_grid(config)
            if tokens is not None and tokens[axis] >= grid[axis]:
                break
        found.append(side)
    vision.image_size = found[0] if found[0] == found[1] else found
    return token_grid(config) == grid


def _are_positions(shape: tuple[int, ...], new_shape: tuple[int, ...], tokens: int, new_tokens: int) -> bool:
    """Whether shapes for two image sizes are those of learned positions, (1, P + T, D) or (P + T, D)."""
    if len(shape) != len(new_shape) or len(shape) not in (2, 3):
        return False
    *first, num_positions, size = shape
    *new_first, new_num_positions, new_size = new_shape
    return (first, size) == (new_first, new_size) and num_positions - tokens == new_num_positions - new_tokens


def _relative_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Return the number of vertical and horizontal distances between two tokens of a grid."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def _are_relative_positions(
    shape: tuple[int, ...], new_shape: tuple[int, ...], grid: tuple[int, int], new_grid: tuple[int, int]
) -> bool:
    """Whether shapes for two image sizes are those of a table of relative positions, one row for each distance."""
    expected = (math.prod(_relative_grid(part)) + _NUM_PREFIX_RELATIONS for part in (grid, new_grid))
    return len(shape) == 2 and all(
        part == (rows, shape[1]) for part, rows in zip((shape, new_shape), expected, strict=True)
    )


def _interpolate_relative_positions(
    table: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]
) -> torch.Tensor:
    """Interpolate a table of relative positions (distances, H) to another grid, bilinear as BEiT itself does."""
    image = table[:-_NUM_PREFIX_RELATIONS].unflatten(0, _relative_grid(grid)).permute(2, 0, 1)[None]
    image = nn.functional.interpolate(image.float(), size=_relative_grid(new_grid), mode="bilinear")
    return torch.cat([image[0].flatten(1).T.to(table.dtype), table[-_NUM_PREFIX_RELATIONS:]])


def _get_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters and buffers."""
    build = getattr(model_class, "from_config", None) or model_class
    with torch.device("meta"):
        model = build(copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _resize_buffers(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Recompute the position indices in buffers such as the `position_ids` of CLIP, in place."""
    shapes = {name: buffer.shape for name, buffer in reference.named_buffers()}
    for name, buffer in list(model.named_buffers()):
        if name.endswith(_POSITION_INDICES) and buffer.shape != shapes[name]:
            parent, _, buffer_name = name.rpartition(".")
            setattr(
                model.get_submodule(parent), buffer_name, torch.arange(shapes[name][-1], device=buffer.device)[None]
            )


def _get_configs(model: PreTrainedModel) -> Iterator[PreTrainedConfig]:
    """Yield the configurations of a model and of its parts."""
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            yield module.config
