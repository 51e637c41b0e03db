"""Training card data and an evaluation result, for the tests of model cards."""

import dataclasses

from helpers.tiny_training import VIT

from hf_tokenmixup.evaluation.evaluate import EvaluationResult
from hf_tokenmixup.hub import TrainingCardData
from hf_tokenmixup.models import TokenMixupViTConfig

EVALUATION = EvaluationResult(
    model="alice/vit",
    model_revision="0a1b2c",
    num_parameters=86_000_000,
    macs=16_900_000_000,
    dataset="uoft-cs/cifar10",
    dataset_config="plain_text",
    dataset_revision="3d4e5f",
    dataset_fingerprint="6a7b8c",
    split="test",
    num_images=10_000,
    top1=0.9757,
    top5=0.9991,
    loss=0.1234567,
    images_per_second=512.0,
    batch_size=64,
    num_processes=2,
    hardware="2 x NVIDIA H100 80GB HBM3",
    dtype="bf16",
    command="torchrun --nproc_per_node 2 scripts/evaluate.py alice/vit --dataset_name uoft-cs/cifar10",
    versions={"torch": "2.6.0", "timm": "1.0.20"},
)
CARD_DATA = TrainingCardData(
    base_model="google/vit-base-patch16-224",
    dataset="uoft-cs/cifar10",
    dataset_config="plain_text",
    train_split="train",
    recipe="my-recipe",
    command="accelerate launch scripts/finetune.py --recipe my-recipe",
    hyperparameters={"learning_rate": 5e-5, "optim_args": "momentum=0.9", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
    hardware="2 x NVIDIA H100 80GB HBM3",
    seconds=7384.4,
    epochs=29.5,
    versions={"torch": "2.6.0"},
    curves="training_curves.png",
)
MODEL_INDEX_RESULT = {
    "task": {"type": "image-classification", "name": "Image Classification"},
    "dataset": {
        "name": "uoft-cs/cifar10",
        "type": "uoft-cs/cifar10",
        "config": "plain_text",
        "split": "test",
        "revision": "3d4e5f",
    },
    "metrics": [
        {"type": "accuracy", "value": 0.9757, "name": "Top-1 accuracy"},
        {"type": "top_5_accuracy", "value": 0.9991, "name": "Top-5 accuracy"},
        {"type": "loss", "value": 0.1234567, "name": "Cross-entropy"},
    ],
}
MODEL_INDEX = [{"name": "vit", "results": [MODEL_INDEX_RESULT]}]


def tokenmixup_config(**settings):
    """Return a configuration with one horizontal and one vertical layer."""
    return TokenMixupViTConfig(**VIT | {"horizontal_layers": [1], "vertical_layers": [2]} | settings)


def evaluation_result(**changes):
    """Return `EVALUATION` with other values of some fields."""
    return dataclasses.replace(EVALUATION, **changes)
