"""Results reported by the TokenMixup paper. None of them was measured with this package.

Source: Choi, Choi and Kim, NeurIPS 2022, https://arxiv.org/abs/2210.07562, Tables 1 to 5. Model cards, studies and
benchmarks read them from here. Accuracies are in percent; figures of Tables 1 and 2 are strings, as printed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """One method in Table 1 or 2.

    Attributes:
        method: `baseline`, `HTM`, `VTM` or `HTM + VTM`.
        parameters: Number of parameters during training, ScoreNet included.
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent; `-` where the table has none, empty where the table has no such column.
        num_devices: Number of GPUs that the authors trained on.
    """

    method: str
    parameters: str
    top1: str
    top5: str = ""
    num_devices: int = 1


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """The rows of Table 1 or 2 for one model and dataset.

    Attributes:
        table: Number of the table.
        model: Name of the model and its setting.
        dataset: Name of the dataset.
        num_labels: Number of classes.
        macs: Multiply-accumulate operations per image.
        rows: Methods by the suffix of their recipe's name.
        note: Hardware, and what the baseline is.
    """

    table: int
    model: str
    dataset: str
    num_labels: int
    macs: str
    rows: dict[str, PaperRow]
    note: str


@dataclass(frozen=True)
class PaperCosts:
    """Parameters and multiply-accumulate operations of a model in Table 1 or 2 that TokenMixup is compared with."""

    table: int
    model: str
    parameters: str
    macs: str


_CIFAR_NOTE = (
    "Trained on one RTX A6000. The baseline is the model as trained by the authors. The parameters are those of the "
    "CIFAR-100 models."
)
# By the prefix of the recipes' names.
PAPER_RESULTS = {
    "cct-7-3x1-cifar10": PaperTable(
        table=1,
        model="CCT-7/3x1, 1500 epochs",
        dataset="CIFAR-10",
        num_labels=10,
        macs="0.95 G",
        rows={
            "baseline": PaperRow("baseline", "3.78 M", "97.48"),
            "htm": PaperRow("HTM", "3.81 M", "97.57"),
            "vtm": PaperRow("VTM", "3.78 M", "97.78"),
            "htm-vtm": PaperRow("HTM + VTM", "3.81 M", "97.75"),
        },
        note=_CIFAR_NOTE,
    ),
    "cct-7-3x1-cifar100": PaperTable(
        table=1,
        model="CCT-7/3x1, 1500 epochs",
        dataset="CIFAR-100",
        num_labels=100,
        macs="0.95 G",
        rows={
            "baseline": PaperRow("baseline", "3.78 M", "82.87"),
            "htm": PaperRow("HTM", "3.81 M", "83.56"),
            "vtm": PaperRow("VTM", "3.78 M", "83.54"),
            "htm-vtm": PaperRow("HTM + VTM", "3.81 M", "83.57"),
        },
        note=_CIFAR_NOTE,
    ),
    "vit-b16-imagenet1k": PaperTable(
        table=2,
        model="ViT-B/16, 224x224",
        dataset="ImageNet-1k",
        num_labels=1000,
        macs="16.9 G",
        rows={
            "baseline": PaperRow("baseline", "86.6 M", "81.2", "-"),
            "htm": PaperRow("HTM", "87.3 M", "82.37", "96.29"),
            "vtm": PaperRow("VTM", "86.6 M", "82.30", "96.33", num_devices=4),
            "htm-vtm": PaperRow("HTM + VTM", "87.3 M", "82.32", "96.27", num_devices=4),
        },
        note=(
            "HTM on one NVIDIA A100, VTM and both on four RTX 3090. The baseline is the result reported by the "
            "authors of ViT for the weights that fine-tuning starts from. The paper does not report the same "
            "fine-tuning without TokenMixup."
        ),
    ),
}

# Top-1 accuracy in percent by recipe, from Tables 3 to 5. These tables repeat some figures of Table 1.
ABLATION_TOP1 = {
    "cct-7-3x1-cifar100-htm-gradient-saliency": 83.28,
    "cct-7-3x1-cifar100-htm-random-saliency": 83.05,
    "cct-7-3x1-cifar100-htm-all-easy": 82.85,
    "cct-7-3x1-cifar100-htm-random-assignment": 82.61,
    "cct-7-3x1-cifar100-htm-random-tokens": 83.05,
    "cct-7-3x1-cifar100-htm-count-labels": 82.62,
    "cct-7-3x1-cifar100-baseline-no-input-mixing": 76.80,
    "cct-7-3x1-cifar100-manifold-no-input-mixing": 76.72,
    "cct-7-3x1-cifar100-htm-no-input-mixing": 77.34,
    "cct-7-3x1-cifar100-vtm-no-input-mixing": 78.18,
    "cct-7-3x1-cifar100-manifold": 80.08,
}

BASELINE_COSTS = (
    PaperCosts(1, "ResNet18", "11.18 M", "0.04 G"),
    PaperCosts(1, "ResNet50", "23.53 M", "0.08 G"),
    PaperCosts(1, "ResNet1001-v2", "10.33 M", "1.55 G"),
    PaperCosts(1, "MobileNetV2/2.0", "8.72 M", "0.02 G"),
    PaperCosts(1, "WRN-28-10", "36.5 M", "-"),
    PaperCosts(1, "WRN-40-4", "8.9 M", "-"),
    PaperCosts(1, "ResNeXt-29-8x64d", "34.4 M", "-"),
    PaperCosts(1, "ResNeXt-29-16x64d", "68.1 M", "-"),
    PaperCosts(1, "ViT-Lite-6/4", "3.19 M", "0.22 G"),
    PaperCosts(1, "ViT-Lite-7/4", "3.72 M", "0.26 G"),
    PaperCosts(1, "NesT-T", "17.0 M", "-"),
    PaperCosts(1, "NesT-B", "68.0 M", "-"),
    PaperCosts(1, "CVT-6/4", "3.19 M", "0.22 G"),
    PaperCosts(1, "CCT-7/3x1 (as published)", "3.76 M", "0.95 G"),
    PaperCosts(2, "ResNet50", "25.5 M", "4.3 G"),
    PaperCosts(2, "ResNet152", "60.19 M", "11.58 G"),
    PaperCosts(2, "DenseNet-264", "-", "-"),
    PaperCosts(2, "WRN-50-2-bottleneck", "68.9 M", "-"),
    PaperCosts(2, "ReGNetY-4G", "21 M", "2.0 G"),
    PaperCosts(2, "ResNeXt-50-2x40d", "-", "-"),
    PaperCosts(2, "ResNeXt-101-64x4d", "-", "-"),
)


def find_paper_results(recipe: str | None) -> PaperTable | None:
    """Find the rows of Table 1 or 2 that a recipe belongs to.

    Args:
        recipe: Name of a recipe, such as `cct-7-3x1-cifar10-htm`.

    Returns:
        The rows, or None for any other name.
    """
    for prefix, table in PAPER_RESULTS.items():
        if recipe is not None and recipe.startswith(f"{prefix}-"):
            return table
    return None


def get_paper_top1(recipe: str) -> float:
    """Return the top-1 accuracy in percent that the paper reports for a recipe, from Tables 1 to 5.

    Raises:
        KeyError: The paper has no figure for this recipe.
    """
    for prefix, table in PAPER_RESULTS.items():
        if row := table.rows.get(recipe.removeprefix(f"{prefix}-")):
            return float(row.top1)
    return ABLATION_TOP1[recipe]
