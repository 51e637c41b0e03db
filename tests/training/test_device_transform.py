"""Normalization and random erasing on the device."""

import pytest
import torch
from helpers.tiny_training import Images, tokenmixup_vit
from PIL import Image
from transformers import ViTImageProcessor

from hf_tokenmixup.data import DeviceTransform, build_transforms
from hf_tokenmixup.training import TokenMixupTrainer

PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.25, 0.3))


class Photos(torch.utils.data.Dataset):
    """Noise images, transformed."""

    def __init__(self, transform):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (12, 8, 8, 3), generator=generator, dtype=torch.uint8)
        self.images = [Image.fromarray(image.numpy()) for image in pixels]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.transform(self.images[index]), "labels": index % 4}


def train(arguments, **settings):
    transform, _ = build_transforms(PROCESSOR, crop_scale=(1, 1), hflip=0.0, **settings)
    model = tokenmixup_vit()
    args = arguments(mixup_alpha=0.5, max_steps=3, logging_steps=1)
    data = Photos(transform)
    trainer = TokenMixupTrainer(
        model, args, train_dataset=data, eval_dataset=data, device_transform=transform.device_transform
    )
    trainer.train()
    trainer.evaluate()
    return trainer, model.state_dict()


def test_trainer_with_8_bit_images_matches_normalized_images(arguments):
    (first, weights), (second, others) = train(arguments), train(arguments, normalize_on_device=True)
    assert first.train_dataset[0]["pixel_values"].dtype == torch.float32
    assert second.train_dataset[0]["pixel_values"].dtype == torch.uint8
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert first.state.log_history[-1]["eval_loss"] == second.state.log_history[-1]["eval_loss"]


def test_trainer_erases_mixed_training_images_only(arguments):
    seen = []

    class Erase(DeviceTransform):
        def erase(self, pixel_values):
            seen.append(pixel_values)
            return torch.zeros_like(pixel_values)

    entered = []
    model = tokenmixup_vit()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append((module.training, kwargs.get("pixel_values", *args))),
        with_kwargs=True,
    )
    images = Images(8)
    args = arguments(mixup_alpha=5.0, max_steps=1, per_device_train_batch_size=8, per_device_eval_batch_size=8)
    trainer = TokenMixupTrainer(
        model, args, train_dataset=images, eval_dataset=images, device_transform=Erase((0.5,) * 3, (0.5,) * 3)
    )
    trainer.train()
    trainer.evaluate()
    (mixed,) = seen
    order = (mixed[:, None] - images.pixels[None]).abs().sum(dim=(2, 3, 4)).amin(dim=1)
    assert (order > 0.1).all(), "mixup comes first"
    assert all(not pixels.any() for training, pixels in entered if training)
    training, evaluated = entered[-1]
    assert not training and torch.equal(evaluated, images.pixels)


def test_trainer_8_bit_images_without_device_transform_raise(arguments):
    transform, _ = build_transforms(PROCESSOR, normalize_on_device=True)
    trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(max_steps=1), train_dataset=Photos(transform))
    with pytest.raises(ValueError, match="`pixel_values` have 8 bits .* Pass `device_transform`"):
        trainer.train()
