"""Classifiers of the demo: a model with its image processor, and a small one for digits that needs no download."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import BaseImageProcessor, ViTImageProcessor

from ..data import load_digits_dataset
from ..data.transforms import ImageProcessorTransform, infer_image_processor_config
from ..models import TokenMixupModelMixin, class_names, load_classifier

DIGITS_NAME = "digits"
DIGIT_PIXELS = 64  # of the digits that are shown, which have 8 x 8 pixels
NUM_DIGITS = 6
DIGITS_CONFIG = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "initializer_range": 0.1,
}
BATCH_SIZE = 64
LEARNING_RATE = 5e-3
NO_TAU = 1e-9  # nats: no image is easy, but ScoreNet learns


@dataclass(frozen=True)
class DemoClassifier:
    """A classifier and what it needs to show images.

    Attributes:
        model: Model with TokenMixup layers.
        transform: Transform of images to pixel values for the model.
        mean: Mean of the normalization, per channel.
        std: Standard deviation of the normalization, per channel.
        class_names: Names of the classes, by index.
    """

    model: TokenMixupModelMixin
    transform: ImageProcessorTransform
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_names: Sequence[str]

    @classmethod
    def from_model(
        cls, model: TokenMixupModelMixin, image_processor: BaseImageProcessor, name: str = DIGITS_NAME
    ) -> "DemoClassifier":
        """Combine a model with its image processor.

        Args:
            model: The model.
            image_processor: Its image processor.
            name: Name of the model, for messages.

        Raises:
            ValueError: The image processor does not resize every image to the same size, or the classes of the model
                have no names.
        """
        _, mean, std = infer_image_processor_config(image_processor)
        names = class_names(model.config, name)
        return cls(model.eval(), ImageProcessorTransform(image_processor), mean, std, names)

    @property
    def num_layers(self) -> int:
        return self.model.config.network.num_layers

    def display_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Undo the normalization of pixel values (B, 3, H, W), for values in [0, 1]."""
        return pixel_values * torch.tensor(self.std).view(3, 1, 1) + torch.tensor(self.mean).view(3, 1, 1)


def digit_images(num_images: int = NUM_DIGITS) -> list[tuple[Image.Image, str]]:
    """Return the first test digits of different classes, enlarged, with their class names."""
    split = load_digits_dataset()["test"]
    names = split.features["label"].names
    # The first image of each class, then the second of each class, and so on.
    seen: dict[int, int] = {}
    order = []
    for index, label in enumerate(split["label"]):
        order.append((seen.setdefault(label, 0), index))
        seen[label] += 1
    chosen = [index for _, index in sorted(order)[:num_images]]
    return [(enlarge_digit(split[index]["image"]), names[split[index]["label"]]) for index in chosen]


def enlarge_digit(image: Image.Image) -> Image.Image:
    """Enlarge a digit of 8 x 8 pixels, in RGB."""
    return image.convert("RGB").resize((DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC)


def train_digits_classifier(epochs: int = 8, seed: int = 0) -> DemoClassifier:
    """Train a small ViT on the digits, with a ScoreNet before each layer. No image is mixed during training.

    The global random number generators are not changed.

    Args:
        epochs: Number of epochs.
        seed: Seed of the weights and the order of the images.
    """
    size = {"height": DIGITS_CONFIG["image_size"], "width": DIGITS_CONFIG["image_size"]}
    processor = ViTImageProcessor(size=size)
    split = load_digits_dataset()["train"]
    transform = ImageProcessorTransform(processor)
    pixel_values = transform.batch([enlarge_digit(image) for image in split["image"]])
    labels = torch.tensor(split["label"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_classifier(
            model_type="vit",
            from_scratch=True,
            label_names=split.features["label"].names,
            config_overrides=DIGITS_CONFIG,
            tokenmixup={
                "horizontal_layers": list(range(DIGITS_CONFIG["num_hidden_layers"])),
                "horizontal_tau": NO_TAU,
            },
        ).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
        steps = epochs * -(-len(labels) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
                optimizer.zero_grad()
                model(pixel_values=pixel_values[batch], labels=labels[batch]).loss.backward()
                optimizer.step()
                schedule.step()
    return DemoClassifier.from_model(model, processor)
