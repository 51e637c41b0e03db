"""The systems that the paper compares itself with in its Tables 1 and 2: its figures, and the same networks built."""

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

# Side of the images and numbers of classes by table: CIFAR-100 and CIFAR-10, ImageNet-1k. The paper says that its
# parameters are those for CIFAR-100; for the systems that it compares itself with they are those for CIFAR-10.
IMAGE_SIZES = {1: 32, 2: 224}
NUM_LABELS = {1: (100, 10), 2: (1000,)}


@dataclass(frozen=True)
class PaperModel:
    """A row of Table 1 or 2.

    Attributes:
        table: 1 or 2.
        name: as printed.
        parameters, macs: as printed.
        build: the number of classes to the network; None where neither transformers nor this package has it.
    """

    table: int
    name: str
    parameters: str
    macs: str
    build: Callable[[int], PreTrainedModel] | None = None


@dataclass(frozen=True)
class ModelCosts:
    """Parameters by number of classes, and multiply-accumulate operations of an image with the first of these numbers:
    all of them, and those with weights alone."""

    parameters: dict[int, int]
    macs: int
    macs_weights_only: int


def count_costs(system: PaperModel) -> ModelCosts | None:
    """What a system costs; None if it cannot be built. It takes no memory for the weights."""
    if system.build is None:
        return None
    with torch.device("meta"):
        models = {count: system.build(count) for count in NUM_LABELS[system.table]}
    model, shape = next(iter(models.values())), (3, IMAGE_SIZES[system.table], IMAGE_SIZES[system.table])
    return ModelCosts(
        parameters={count: count_parameters(built) for count, built in models.items()},
        macs=count_macs(model, shape),
        macs_weights_only=count_macs(model, shape, weights_only=True),
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


PAPER_BASELINES = (
    PaperModel(1, "ResNet18", "11.18 M", "0.04 G", partial(_resnet, [2, 2, 2, 2], basic=True)),
    PaperModel(1, "ResNet50", "23.53 M", "0.08 G", partial(_resnet, [3, 4, 6, 3])),
    PaperModel(1, "ResNet1001-v2", "10.33 M", "1.55 G"),
    PaperModel(1, "MobileNetV2/2.0", "8.72 M", "0.02 G", _mobilenet),
    PaperModel(1, "WRN-28-10", "36.5 M", "-"),
    PaperModel(1, "WRN-40-4", "8.9 M", "-"),
    PaperModel(1, "ResNeXt-29-8x64d", "34.4 M", "-"),
    PaperModel(1, "ResNeXt-29-16x64d", "68.1 M", "-"),
    PaperModel(1, "ViT-Lite-6/4", "3.19 M", "0.22 G", partial(_compact_transformer, "vit_lite_6_4")),
    PaperModel(1, "ViT-Lite-7/4", "3.72 M", "0.26 G", partial(_compact_transformer, "vit_lite_7_4")),
    PaperModel(1, "NesT-T", "17.0 M", "-"),
    PaperModel(1, "NesT-B", "68.0 M", "-"),
    PaperModel(1, "CVT-6/4", "3.19 M", "0.22 G", partial(_compact_transformer, "cvt_6_4")),
    PaperModel(1, "CCT-7/3x1 (as published)", "3.76 M", "0.95 G", partial(_compact_transformer, "cct_7_3x1")),
    PaperModel(2, "ResNet50", "25.5 M", "4.3 G", partial(_resnet, [3, 4, 6, 3])),
    PaperModel(2, "ResNet152", "60.19 M", "11.58 G", partial(_resnet, [3, 8, 36, 3])),
    PaperModel(2, "DenseNet-264", "-", "-", partial(_timm, "densenet121", block_config=(6, 12, 64, 48))),
    PaperModel(2, "WRN-50-2-bottleneck", "68.9 M", "-", partial(_timm, "wide_resnet50_2")),
    PaperModel(2, "ReGNetY-4G", "21 M", "2.0 G", _regnet_y_4g),
    PaperModel(2, "ResNeXt-50-2x40d", "-", "-", partial(_timm, "resnext50_32x4d", cardinality=2, base_width=40)),
    PaperModel(2, "ResNeXt-101-64x4d", "-", "-", partial(_timm, "resnext101_64x4d")),
)
