"""Small checkpoints of each family, as people download them to fine-tune them."""

from pathlib import Path

from helpers.families import TESTED, build_tiny
from transformers import ViTImageProcessor

# Model type and settings by name. A plain model type is the tiny model of the family.
CHECKPOINTS = {model_type: (model_type, {}) for model_type in TESTED}
if "timm_wrapper" in TESTED:
    CHECKPOINTS["timm_dinov3"] = (
        "timm_wrapper",
        {"architecture": "vit_small_patch16_dinov3", "model_args": {"dynamic_img_size": False}},
    )
IMAGE_SIZE = 20
# Options of finetune.py for a checkpoint of five classes and the ten digits.
MIXING = "--horizontal_layers 1 --horizontal_tau none --horizontal_rho 0.002 --vertical_layers 2".split()
DIGITS = "--dataset_name digits --eval_split test --hflip 0".split()


def write_checkpoint(folder: Path, name: str, **settings) -> list[str]:
    """Write the plain model of a checkpoint, with random weights and an image processor.

    Args:
        folder: where to write.
        name: one of `CHECKPOINTS`.
        settings: further attributes with names of `ViTConfig`.

    Returns:
        The options of finetune.py that fine-tune it on ten classes.
    """
    model_type, own = CHECKPOINTS[name]
    build_tiny(model_type, **own | settings).to_plain_model().save_pretrained(folder)
    ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return ["--model_name_or_path", str(folder), "--ignore_mismatched_sizes"]
