"""Models that Tables 1 and 2 of the paper compare TokenMixup with, rebuilt to count parameters and MACs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from ..evaluation.flops import count_macs, count_parameters
from ..models import CctConfig, CctForImageClassification
from ..paper_results import BASELINE_COSTS

# Image size and numbers of classes by table: CIFAR-100 and CIFAR-10, ImageNet-1k. The paper states that the parameters
# in Table 1 are those of CIFAR-100 models, but the counts of the compared models match CIFAR-10.
IMAGE_SIZES = {1: 32, 2: 224}
NUM_LABELS = {1: (100, 10), 2: (1000,)}


@dataclass(frozen=True)
class PaperModel:
    """A row of Table 1 or 2.

    Attributes:
        table: 1 or 2.
        name: Name as printed.
        parameters: Number of parameters as printed.
        macs: Multiply-accumulate operations as printed.
        build: Builds the model for a number of classes. None if neither transformers nor this package implements it.
    """

    table: int
    name: str
    parameters: str
    macs: str
    build: Callable[[int], PreTrainedModel] | None = None


@dataclass(frozen=True)
class ModelCosts:
    """Counted parameters and multiply-accumulate operations.

    Attributes:
        parameters: Number of parameters by number of classes.
        macs: MACs per image, with the first number of classes.
        macs_weights_only: The same without the products of attention.
    """

    parameters: dict[int, int]
    macs: int
    macs_weights_only: int


def count_costs(paper_model: PaperModel) -> ModelCosts | None:
    """Count the parameters and MACs of a model on the meta device. None if it cannot be built."""
    if paper_model.build is None:
        return None
    with torch.device("meta"):
        models = {num_labels: paper_model.build(num_labels) for num_labels in NUM_LABELS[paper_model.table]}
    model, image_size = next(iter(models.values())), IMAGE_SIZES[paper_model.table]
    return ModelCosts(
        parameters={num_labels: count_parameters(built) for num_labels, built in models.items()},
        macs=count_macs(model, (3, image_size, image_size)),
        macs_weights_only=count_macs(model, (3, image_size, image_size), exclude_attention_products=True),
    )


def _resnet(depths: list[int], num_labels: int, basic: bool = False) -> PreTrainedModel:
    widths = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]} if basic else {}
    return ResNetForImageClassification(ResNetConfig(depths=depths, num_labels=num_labels, **widths))


def _mobilenet(num_labels: int) -> PreTrainedModel:
    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=2.0, num_labels=num_labels))


def _regnet_y_4g(num_labels: int) -> PreTrainedModel:
    widths = {"depths": [2, 6, 12, 2], "hidden_sizes": [128, 192, 512, 1088], "groups_width": 64}
    return RegNetForImageClassification(RegNetConfig(layer_type="y", num_labels=num_labels, **widths))


def _timm(architecture: str, num_labels: int, **arguments) -> PreTrainedModel:
    config = TimmWrapperConfig(architecture=architecture, num_labels=num_labels, model_args=arguments)
    return TimmWrapperForImageClassification(config)


def _compact_transformer(name: str, num_labels: int) -> PreTrainedModel:
    return CctForImageClassification(getattr(CctConfig, name)(num_labels=num_labels))


# Models that neither transformers nor this package implements are missing.
_BUILDERS: dict[tuple[int, str], Callable[[int], PreTrainedModel]] = {
    (1, "ResNet18"): partial(_resnet, [2, 2, 2, 2], basic=True),
    (1, "ResNet50"): partial(_resnet, [3, 4, 6, 3]),
    (1, "MobileNetV2/2.0"): _mobilenet,
    (1, "ViT-Lite-6/4"): partial(_compact_transformer, "vit_lite_6_4"),
    (1, "ViT-Lite-7/4"): partial(_compact_transformer, "vit_lite_7_4"),
    (1, "CVT-6/4"): partial(_compact_transformer, "cvt_6_4"),
    (1, "CCT-7/3x1 (as published)"): partial(_compact_transformer, "cct_7_3x1"),
    (2, "ResNet50"): partial(_resnet, [3, 4, 6, 3]),
    (2, "ResNet152"): partial(_resnet, [3, 8, 36, 3]),
    (2, "DenseNet-264"): partial(_timm, "densenet121", block_config=(6, 12, 64, 48)),
    (2, "WRN-50-2-bottleneck"): partial(_timm, "wide_resnet50_2"),
    (2, "ReGNetY-4G"): _regnet_y_4g,
    (2, "ResNeXt-50-2x40d"): partial(_timm, "resnext50_32x4d", cardinality=2, base_width=40),
    (2, "ResNeXt-101-64x4d"): partial(_timm, "resnext101_64x4d"),
}
PAPER_BASELINES = tuple(
    PaperModel(costs.table, costs.model, costs.parameters, costs.macs, _BUILDERS.get((costs.table, costs.model)))
    for costs in BASELINE_COSTS
)
