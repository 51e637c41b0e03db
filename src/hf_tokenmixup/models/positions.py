"""Interpolate the learned positions of a checkpoint to another image size, for any image classifier."""

import copy
import logging

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .cct.configuration_cct import height_and_width
from .cct.modeling_cct import interpolate_positions

logger = logging.getLogger(__name__)

MAX_SIZE = 2**14
# Attributes of modules that depend on the image size.
_GEOMETRY = ("image_size", "num_patches", "grid_size", "patch_shape", "input_resolution")


def token_grid(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return the rows and columns of patch tokens at the configured image size; None for models without a grid."""
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    height, width = height_and_width(size)
    if hasattr(config, "grid_size"):
        return config.grid_size(height, width)
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int | list | tuple):
        return None
    patch_height, patch_width = height_and_width(patch)
    if min(patch_height, patch_width) < 1:
        return None
    return height // patch_height, width // patch_width


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
    loaded.image_size = stored.image_size
    if token_grid(loaded) != grid:
        size = _find_image_size(grid, loaded)
        if size is None:
            return None
        loaded.image_size = size
    if getattr(loaded, "vertical_kappa", 0) > grid[0] * grid[1]:
        # The maximum is the number of patch tokens, which may be smaller here. `resize_positions` restores the value.
        loaded.vertical_kappa = grid[0] * grid[1]
    shapes, new_shapes = _get_parameter_shapes(model_class, loaded), _get_parameter_shapes(model_class, config)
    differing = [name for name in shapes if shapes[name] != new_shapes.get(name)]
    tokens, new_tokens = grid[0] * grid[1], new_grid[0] * new_grid[1]
    for name in differing:
        shape, new_shape = shapes[name], new_shapes.get(name, ())
        if len(shape) != 3 or len(new_shape) != 3 or shape[1] - tokens != new_shape[1] - new_tokens:
            return None
    return loaded if differing and shapes.keys() == new_shapes.keys() else None


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
            resized = interpolate_positions(parameter.detach(), grid, new_grid)
            parent, _, parameter_name = key.rpartition(".")
            setattr(model.get_submodule(parent), parameter_name, nn.Parameter(resized, parameter.requires_grad))
    for module, reference_module in zip(model.modules(), reference.modules(), strict=True):
        for attribute in _GEOMETRY:
            if attribute in vars(module):
                setattr(module, attribute, getattr(reference_module, attribute))
    for attribute in ("image_size", "vertical_kappa"):
        if hasattr(config, attribute):
            setattr(model.config, attribute, getattr(config, attribute))
    logger.warning(
        "%s was trained on a grid of %dx%d tokens. Its positions are interpolated to %dx%d tokens for images of %dx%d "
        "pixels.",
        name, *grid, *new_grid, *height_and_width(config.image_size),
    )  # fmt: skip


def border_hint(config: PreTrainedConfig, size: tuple[int, int] | None = None) -> str | None:
    """Return a warning if the tokens do not cover an image completely, with the nearest sizes that they cover.

    Args:
        config: configuration of a ViT or CCT.
        size: height and width of the images; None: the configured size.

    Returns:
        The warning, or None if the tokens cover the image.
    """
    size = height_and_width(config.image_size) if size is None else size
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
    unit = "patches of {}x{}".format(*height_and_width(config.patch_size))
    if hasattr(config, "uncovered_pixels") and config.tokenizer == "convolution":
        unit = "the strides of the tokenizer"
    return (
        f"Images of {size[0]}x{size[1]} pixels are not a multiple of {unit}: the last {uncovered[0]} rows and "
        f"{uncovered[1]} columns of pixels are ignored. Use image_size {' or '.join(choices)}."
    )


def _uncovered(config: PreTrainedConfig, side: int, axis: int) -> int:
    if hasattr(config, "uncovered_pixels"):
        return config.uncovered_pixels(side)
    return side % height_and_width(config.patch_size)[axis]


def _format_size(size: list[int]) -> str:
    return str(size[0]) if size[0] == size[1] else str(size)


def _find_image_size(grid: tuple[int, int], config: PreTrainedConfig) -> list[int] | None:
    """Find the smallest height and width with a grid of tokens."""
    found = []
    for axis in (0, 1):
        for side in range(1, MAX_SIZE):
            config.image_size = [side, side]
            tokens = token_grid(config)
            if tokens is not None and tokens[axis] >= grid[axis]:
                break
        found.append(side)
    config.image_size = found
    return found if token_grid(config) == grid else None


def _get_parameter_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    build = getattr(model_class, "from_config", None) or model_class
    with torch.device("meta"):
        model = build(copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
