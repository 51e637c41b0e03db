"""The recipes of the paper against the settings of the released configurations."""

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform
from transformers import ViTImageProcessor

from hf_tokenmixup.cli.processors import open_image_processor, override_attributes
from hf_tokenmixup.cli.recipes import list_recipes, load_recipe

CIFAR_STEPS = 390  # 50,000 images in batches of 128, without the last one
CCT = {
    "model_type": "cct",
    "from_scratch": True,
    "per_device_train_batch_size": 128,
    "dataloader_drop_last": True,
    "optim": "adamw_torch",
    "max_grad_norm": 0.0,
    "warmup_steps": 10 * CIFAR_STEPS,
    "lr_scheduler_type": "cosine_warmup_with_min_lr",
    "label_smoothing_factor": 0.1,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "crop_scale": [0.8, 1.0],
    "train_interpolation": "random",
    "hflip": 0.5,
    "random_erasing": 0.25,
    "erasing_mode": "pixel",
    "erase_after_mixing": True,
    "num_train_epochs": 1510,
    "seed": 42,
}
CIFAR10 = CCT | {
    "dataset_name": "uoft-cs/cifar10",
    "image_mean": [0.4914, 0.4822, 0.4465],
    "image_std": [0.247, 0.2435, 0.2616],
    "learning_rate": 5e-4,
    "weight_decay": 0.05,
}
CIFAR100 = CCT | {
    "dataset_name": "uoft-cs/cifar100",
    "image_mean": [0.5071, 0.4867, 0.4408],
    "image_std": [0.2675, 0.2565, 0.2761],
    "learning_rate": 6e-4,
    "weight_decay": 0.06,
}
IMAGENET = {
    "model_name_or_path": "google/vit-base-patch16-224",
    "dataset_name": "ILSVRC/imagenet-1k",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "num_train_epochs": 30,
    "dataloader_drop_last": True,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.015,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "crop_scale": [0.08, 1.0],
    "train_interpolation": "random",
    "hflip": 0.5,
    "color_jitter": 0.4,
    "config_overrides": {"hidden_dropout_prob": 0.1, "layer_norm_eps": 1e-6},
    "image_processor_overrides": {
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
    },
    "seed": 42,
}
SCORENET_CCT = {"scorenet_pooling": "attention", "scorenet_loss_weight": 0.001, "scorenet_detach": False}
SCORENET_VIT = {"scorenet_pooling": "cls", "scorenet_loss_weight": 1.0, "scorenet_detach": True}


def htm(layer, tau, rho, scorenet):
    return scorenet | {"horizontal_layers": [layer], "horizontal_tau": tau, "horizontal_rho": rho}


def vtm(layer, kappa):
    return {"vertical_layers": [layer], "vertical_kappa": kappa}


RELEASED = {
    "cct-7-3x1-cifar10-baseline": CIFAR10,
    "cct-7-3x1-cifar10-htm": CIFAR10 | htm(2, 1.0, 0.003, SCORENET_CCT),
    "cct-7-3x1-cifar10-vtm": CIFAR10 | vtm(1, 5),
    "cct-7-3x1-cifar10-htm-vtm": CIFAR10 | htm(2, 1.0, 0.004, SCORENET_CCT) | vtm(3, 3),
    "cct-7-3x1-cifar100-baseline": CIFAR100,
    "cct-7-3x1-cifar100-htm": CIFAR100 | htm(2, 2.0, 0.005, SCORENET_CCT),
    "cct-7-3x1-cifar100-vtm": CIFAR100 | vtm(2, 80),
    "cct-7-3x1-cifar100-htm-vtm": CIFAR100 | htm(3, 2.0, 0.005, SCORENET_CCT) | vtm(2, 3),
    "vit-b16-imagenet1k-baseline": IMAGENET | {"per_device_train_batch_size": 504},
    "vit-b16-imagenet1k-htm": IMAGENET | htm(3, 1.0, 0.01, SCORENET_VIT) | {"per_device_train_batch_size": 504},
    "vit-b16-imagenet1k-vtm": IMAGENET | vtm(3, 3) | {"per_device_train_batch_size": 126},
    "vit-b16-imagenet1k-htm-vtm": IMAGENET
    | htm(3, 1.0, 0.01, SCORENET_VIT)
    | vtm(4, 3)
    | {"per_device_train_batch_size": 126},
}
# The remaining recipes of the paper are ablations of these: other mixing, length or input mixing, nothing else.
MIXING = (
    "horizontal_",
    "vertical_",
    "scorenet_",
    "saliency_",
    "token_selection",
    "relabel",
    "assignment",
    "manifold_",
)
ABLATED = (*MIXING, "mixup_", "cutmix_", "num_train_epochs", "output_dir")


@pytest.mark.parametrize("name", RELEASED)
def test_paper_recipe_matches_released_settings(name):
    recipe = load_recipe(name)
    assert {key: recipe.get(key) for key in RELEASED[name]} == RELEASED[name]
    mixing = {key for key in recipe if key.startswith(MIXING)} - {"saliency_query"}
    # ScoreNet's settings are the defaults where a recipe does not have them.
    assert mixing <= RELEASED[name].keys()


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("cct-7-3x1-cifar100")])
def test_paper_ablation_changes_only_mixing_and_length(name):
    recipe, baseline = load_recipe(name), load_recipe("cct-7-3x1-cifar100-baseline")
    differing = {key for key in recipe.keys() | baseline.keys() if recipe.get(key) != baseline.get(key)}
    assert not [key for key in differing if not key.startswith(ABLATED)]


@pytest.mark.parametrize("size", [(500, 375), (240, 400), (224, 224)])
def test_vit_recipe_evaluates_like_timm(size, tmp_path):
    ViTImageProcessor().save_pretrained(tmp_path)
    overrides = load_recipe("vit-b16-imagenet1k-htm")["image_processor_overrides"]
    processor = override_attributes(open_image_processor(str(tmp_path)), overrides)
    processor.image_mean, processor.image_std = IMAGENET["image_mean"], IMAGENET["image_std"]
    # A crop_pct of 0, as in the release, selects timm's default of 0.875.
    expected = create_transform(224, is_training=False, interpolation="bicubic", crop_pct=0.875)
    noise = np.random.default_rng(0).integers(256, size=(12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    difference = (processor(image, return_tensors="pt")["pixel_values"][0] - expected(image)).abs()
    # Pillow and torchvision round the pixels after a bicubic filter differently, here and there by two levels.
    one_level = 1 / 255 / 0.224
    assert difference.max() <= 2.01 * one_level and difference.mean() < 0.01 * one_level
    # It is saved with the model.
    processor.save_pretrained(tmp_path)
    assert dict(open_image_processor(str(tmp_path)).crop_size) == {"height": 224, "width": 224}


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"resampling": 3}, "has no attribute 'resampling'. It has .*resample"),
        ({"size": "large"}, "cannot be used"),
    ],
)
def test_override_attributes_invalid_raises(overrides, message):
    with pytest.raises(ValueError, match=message):
        override_attributes(ViTImageProcessor(), overrides)
