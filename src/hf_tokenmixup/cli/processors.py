"""The image processor of a model."""

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, BaseImageProcessor

from ..hub.upload import PROCESSOR_NAMES
from ..utils.text import format_list


def open_image_processor(name: str, **hub_options: Any) -> BaseImageProcessor:
    """The image processor of a model, by its folder or its name on the Hub.

    Raises:
        ValueError: The model has none, or it cannot be read.
    """
    try:
        return AutoImageProcessor.from_pretrained(name, **hub_options)
    except (OSError, ValueError) as error:
        folder = Path(name)
        missing = folder.is_dir() and not any((folder / file).is_file() for file in PROCESSOR_NAMES)
        raise ValueError(
            f"{name} has no image processor: expected {PROCESSOR_NAMES[0]} next to config.json, as "
            f"image_processor.save_pretrained(...) writes it.{'' if missing else f' ({error})'}"
        ) from error


def override_attributes(processor: BaseImageProcessor, overrides: dict[str, Any]) -> BaseImageProcessor:
    """Return an image processor with other attributes.

    Raises:
        ValueError: An attribute does not exist, or a value cannot be used.
    """
    if not overrides:
        return processor
    known = {*processor.to_dict(), *getattr(type(processor).valid_kwargs, "__annotations__", {})}
    if unknown := sorted(overrides.keys() - known):
        raise ValueError(
            f"--image_processor_overrides: {type(processor).__name__} has no attribute {format_list(unknown)}. It has "
            f"{', '.join(sorted(name for name in known if not name.startswith('_')))}."
        )
    try:
        return type(processor).from_dict(processor.to_dict() | overrides)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"--image_processor_overrides {overrides} cannot be used: {error}") from error
