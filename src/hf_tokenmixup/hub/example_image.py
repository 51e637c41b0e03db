"""An example image with the model's prediction in a model card."""

import re
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoImageProcessor, pipeline

from ..models import load_classifier
from .card_metadata import read_card

EXAMPLE_NAME = "example.jpg"
# Longer side in pixels. Smaller images are enlarged to the minimum, without interpolation.
MAX_SIZE, MIN_SIZE = 512, 128
NUM_CLASSES = 3
_SECTION = re.compile(rf"!\[[^\]\n]*\]\({re.escape(EXAMPLE_NAME)}\)\n\nPrediction for this image: [^\n]*\n\n")
_FIRST_HEADING = re.compile(r"^## ", re.MULTILINE)


def open_example_image(path: str | Path) -> Image.Image:
    """Open an image for a model card, upright and in RGB.

    Raises:
        ValueError: The file does not exist or is no image that Pillow can read.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"The example image {path} cannot be read: {error}. Pass a JPEG or PNG file.") from error


def add_example_image(folder: str | Path, image: Image.Image) -> None:
    """Add an image to a model folder, and show it in the card with the model's prediction. Replaces an earlier one.

    The image is stored as `EXAMPLE_NAME`, up to 512 pixels large, without the metadata of its file, such as the place
    where a photograph was taken. The model classifies the complete image.

    Args:
        folder: Folder with an exported model, its image processor and a card.
        image: RGB image.

    Raises:
        ValueError: The model or its image processor cannot be loaded.
    """
    folder = Path(folder)
    model = load_classifier(str(folder), plain=True)
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"The image processor in {folder} cannot be loaded: {error}") from error
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    predictions = classify(image, top_k=min(NUM_CLASSES, model.config.num_labels))
    text = ", ".join(f"{_escape(item['label'])} {item['score']:.0%}" for item in predictions)
    section = f"![Example image]({EXAMPLE_NAME})\n\nPrediction for this image: {text}.\n\n"
    _resize(image).save(folder / EXAMPLE_NAME, quality=90)
    path = folder / "README.md"
    card = _SECTION.sub("", read_card(path))
    heading = _FIRST_HEADING.search(card)
    position = heading.start() if heading else len(card)
    path.write_bytes((card[:position] + section + card[position:]).encode())


def _resize(image: Image.Image) -> Image.Image:
    longer = max(image.size)
    if longer < MIN_SIZE:
        return ImageOps.scale(image, MIN_SIZE // longer + 1, resample=Image.Resampling.NEAREST)
    return ImageOps.contain(image, (MAX_SIZE, MAX_SIZE)) if longer > MAX_SIZE else image


def _escape(name: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(name.split()))
