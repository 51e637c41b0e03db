"""The image processor of a model."""

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, BaseImageProcessor

from ..hub.upload import PROCESSOR_NAMES


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
