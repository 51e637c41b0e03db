"""The studies: the rows of the paper's Tables 1, 3, 4 and 5, small studies for a CPU, and sweeps over one setting.

A row is a recipe; a row of a sweep adds one option. `runner` trains rows, `results` aggregates their accuracies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..paper_results import PAPER_RESULTS, get_paper_top1

# Mean top-1 accuracy on corrupted images, in percent. It needs an evaluation of its own after the training.
CORRUPTION_METRIC = "corruption_top1"
# What HTM did in a run, by the names in its results without the prefix `train_`.
MIXING_RESULTS = ("mixed_fraction", "replaced_fraction", "label_mass_moved")


@dataclass(frozen=True)
class Metric:
    """A metric of a study besides top-1.

    Attributes:
        title: Heading of its column.
        digits: Decimals in a table.
        sign: 1 if higher values are better, -1 if lower ones are.
    """

    title: str
    digits: int = 4
    sign: int = -1


# By the names in a run's results without the prefix `eval_`.
METRICS = {
    "loss": Metric("loss"),
    "calibration_error": Metric("ECE"),
    CORRUPTION_METRIC: Metric("corrupted", digits=2, sign=1),
}


@dataclass(frozen=True)
class StudyRow:
    """One row of a study.

    Attributes:
        name: Label in the study's table.
        recipe: Name or path of a recipe.
        paper: Top-1 accuracy in percent that the paper reports; None if it reports none.
        options: Further command-line options.
        variant: Suffix of `key` that distinguishes rows of one recipe.
    """

    name: str
    recipe: str
    paper: float | None = None
    options: tuple[str, ...] = ()
    variant: str = ""

    @property
    def key(self) -> str:
        """Prefix of the row's output folders. Rows with the same key are the same training run."""
        return Path(self.recipe).name.removesuffix(".yaml") + self.variant


@dataclass(frozen=True)
class Study:
    """Rows to compare.

    Attributes:
        name: File name of the results, without its suffix.
        title: Heading of the table.
        rows: The rows in order.
        reference: Index of the row that the others are compared with.
        metrics: Metrics of `METRICS` besides top-1.
        base: Row that is trained first, once, and whose model all rows start from. None: they start from their
            recipes' models.
    """

    name: str
    title: str
    rows: tuple[StudyRow, ...]
    reference: int = 0
    metrics: tuple[str, ...] = ()
    base: StudyRow | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep over one setting.

    Attributes:
        setting: Name of the setting.
        layers: Name of the setting that must not be empty, as the sweep has no effect otherwise.
        recipe: Default recipe.
        values: Default values.
    """

    setting: str
    layers: str
    recipe: str
    values: tuple[str, ...]


PAPER_MODEL_AND_DATASET = "CCT-7/3x1 on CIFAR-100"
_CCT = "cct-7-3x1-cifar100"
_MIXING = "input mixup & CutMix"


def _paper_row(name: str, recipe_suffix: str) -> StudyRow:
    recipe = f"{_CCT}-{recipe_suffix}"
    return StudyRow(name, recipe, get_paper_top1(recipe))


def _table_1(part: str, title: str, recipes: str, suffix: str = "") -> Study:
    names = {"plain": "baseline", "HTM": "htm", "VTM": "vtm", "HTM, VTM": "htm-vtm"}
    rows = tuple(
        StudyRow(
            name,
            f"{recipes}-{system}{suffix}",
            # The paper has no runs of 300 epochs.
            None if suffix else float(PAPER_RESULTS[recipes].rows[system].top1),
        )
        for name, system in names.items()
    )
    return Study(f"table1-{part}", f"Table 1: {title}", rows)


# Table 1 by dataset and length.
TABLE_1_PARTS = {
    "cifar100": _table_1("cifar100", "CCT-7/3x1 on CIFAR-100, 300 epochs instead of 1,500", _CCT, "-300"),
    "cifar100-1500": _table_1("cifar100-1500", "CCT-7/3x1 on CIFAR-100", _CCT),
    "cifar10-1500": _table_1("cifar10-1500", "CCT-7/3x1 on CIFAR-10", "cct-7-3x1-cifar10"),
}
TABLES = {
    "3": Study(
        "table3",
        "Table 3: saliency detectors of HTM",
        (
            _paper_row("attention", "htm"),
            _paper_row("gradient", "htm-gradient-saliency"),
            _paper_row("random", "htm-random-saliency"),
        ),
    ),
    "4": Study(
        "table4",
        "Table 4: ablation of HTM",
        (
            _paper_row("HTM", "htm"),
            _paper_row("without difficulty assessment", "htm-all-easy"),
            _paper_row("without optimal assignment", "htm-random-assignment"),
            _paper_row("without token-level mixup", "htm-random-tokens"),
            _paper_row("without saliency-based labels", "htm-count-labels"),
        ),
    ),
    "5": Study(
        "table5",
        "Table 5: combinations of mixups",
        (
            _paper_row("CCT", "baseline-no-input-mixing"),
            _paper_row("manifold mixup", "manifold-no-input-mixing"),
            _paper_row("HTM", "htm-no-input-mixing"),
            _paper_row("VTM", "vtm-no-input-mixing"),
            _paper_row(_MIXING, "baseline"),
            _paper_row(f"{_MIXING}, manifold mixup", "manifold"),
            _paper_row(f"{_MIXING}, HTM", "htm"),
            _paper_row(f"{_MIXING}, VTM", "vtm"),
            _paper_row(f"{_MIXING}, HTM, VTM", "htm-vtm"),
        ),
    ),
}


def _small_row(name: str, variant: str, *options: str) -> StudyRow:
    options = ("--num_train_epochs", "50", "--max_train_samples", "10000", "--max_eval_samples", "5000", *options)
    return StudyRow(name, "cct-2-3x2-cifar10-cpu", options=options, variant=f"-small-{variant}")


def _transfer_row(name: str, variant: str, *options: str) -> StudyRow:
    return StudyRow(name, "vit-cifar100-fine-tuning-cpu", options=options, variant=f"-{variant}")


_INPUT_MIXING_OPTIONS = ("--mixup_alpha", "0.8", "--cutmix_alpha", "1.0")
# Not in the paper.
SMALL_STUDIES = {
    "small": Study(
        "small",
        "CCT-2/3x2 on CIFAR-10: 10,000 training images, 5,000 test images, 50 epochs",
        (
            _small_row("plain", "plain", "--horizontal_layers", "--vertical_layers"),
            _small_row("HTM", "htm", "--vertical_layers"),
            _small_row("VTM", "vtm", "--horizontal_layers"),
            _small_row("HTM, VTM", "htm-vtm"),
            _small_row(_MIXING, "mixing", "--horizontal_layers", "--vertical_layers", *_INPUT_MIXING_OPTIONS),
            _small_row(f"{_MIXING}, HTM", "mixing-htm", "--vertical_layers", *_INPUT_MIXING_OPTIONS),
            _small_row(f"{_MIXING}, VTM", "mixing-vtm", "--horizontal_layers", *_INPUT_MIXING_OPTIONS),
        ),
        metrics=("loss", "calibration_error", CORRUPTION_METRIC),
    ),
    "transfer": Study(
        "transfer",
        "Small ViT on CIFAR-100: pretrained on 50 classes, fine-tuned on the other 50 with 2,500 images, 20 epochs",
        (
            _transfer_row("plain", "plain", "--horizontal_layers", "--vertical_layers"),
            _transfer_row("HTM", "htm", "--vertical_layers"),
            _transfer_row("VTM", "vtm", "--horizontal_layers"),
            _transfer_row("HTM, VTM", "htm-vtm"),
        ),
        metrics=("loss", "calibration_error", CORRUPTION_METRIC),
        base=StudyRow("pretraining", "vit-cifar100-pretraining-cpu"),
    ),
}
STUDIES = TABLES | SMALL_STUDIES
_ROWS_BY_RECIPE = {row.recipe: row for study in TABLES.values() for row in study.rows}

SWEEPS = {
    "rho": Sweep("horizontal_rho", "horizontal_layers", f"{_CCT}-htm", ("0.001", "0.003", "0.005", "0.01")),
    "tau": Sweep("horizontal_tau", "horizontal_layers", f"{_CCT}-htm", ("0.5", "1.0", "2.0", "3.0", "none")),
    "kappa": Sweep("vertical_kappa", "vertical_layers", f"{_CCT}-vtm", ("3", "20", "80", "160")),
}


def sweep_study(name: str, recipe: str, values: Sequence[str], recipe_value: str | None = None) -> Study:
    """Build a study with one row for each value of a setting.

    Args:
        name: `rho`, `tau` or `kappa`.
        recipe: Name or path of a recipe.
        values: Values as on a command line.
        recipe_value: Value of the setting in the recipe. Its row is the unchanged recipe, so its training run is
            shared with the tables, and it is the reference. If no row has this value, the first row is the reference.

    Raises:
        ValueError: Two values are equal.
    """
    for index, value in enumerate(values):
        if any(_values_equal(value, other) for other in values[:index]):
            raise ValueError(f"The values of a sweep must differ, got {' '.join(values)}.")
    base = _ROWS_BY_RECIPE.get(recipe, StudyRow("", recipe))
    setting = SWEEPS[name].setting
    rows = tuple(
        StudyRow(f"{name} {value}", recipe, base.paper)
        if _values_equal(value, recipe_value)
        else StudyRow(f"{name} {value}", recipe, options=(f"--{setting}", value), variant=f"-{name}-{value}")
        for value in values
    )
    reference = next((index for index, row in enumerate(rows) if not row.options), 0)
    return Study(f"{name}-{base.key}", f"Sweep of {name} ({setting}): {base.key}", rows, reference)


def _values_equal(value: str, other: str | None) -> bool:
    try:
        return other is not None and float(value) == float(other)
    except ValueError:
        return value.lower() == other.lower()
