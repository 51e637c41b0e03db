"""The paper's studies as data: the rows of its Tables 3, 4 and 5, and sweeps over one setting.

A row is a recipe, and in a sweep one option more. `study_runs` trains rows, `study_results` sums them up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line of a study.

    `name` is what its table calls it, `recipe` a name or path, `paper` the top-1 that the paper reports, in percent;
    `options` are further command-line options, and `key` names its folder. Rows of one key are one training.
    """

    name: str
    recipe: str
    paper: float | None = None
    options: tuple[str, ...] = ()
    variant: str = ""

    @property
    def key(self) -> str:
        return Path(self.recipe).name.removesuffix(".yaml") + self.variant


@dataclass(frozen=True)
class Study:
    """Rows, and the number of the one that the others are compared with; `name` names the files of its results."""

    name: str
    title: str
    rows: tuple[Row, ...]
    reference: int = 0


@dataclass(frozen=True)
class Sweep:
    """A setting to vary, the setting `layers` without which it has no effect, and what is varied if not told."""

    setting: str
    layers: str
    recipe: str
    values: tuple[str, ...]


PAPER_MODEL_AND_DATASET = "CCT-7/3x1 on CIFAR-100"
_CCT = "cct-7-3x1-cifar100"
_HTM = Row("HTM", f"{_CCT}-htm", 83.56)
_MIXING = "input mixup & CutMix"

TABLES = {
    "3": Study(
        "table3",
        "Table 3: saliency detectors of HTM",
        (
            Row("attention", _HTM.recipe, _HTM.paper),
            Row("gradient", f"{_CCT}-htm-gradient-saliency", 83.28),
            Row("random", f"{_CCT}-htm-random-saliency", 83.05),
        ),
    ),
    "4": Study(
        "table4",
        "Table 4: ablation of HTM",
        (
            _HTM,
            Row("without difficulty assessment", f"{_CCT}-htm-all-easy", 82.85),
            Row("without optimal assignment", f"{_CCT}-htm-random-assignment", 82.61),
            Row("without token-level mixup", f"{_CCT}-htm-random-tokens", 83.05),
            Row("without saliency-based labels", f"{_CCT}-htm-count-labels", 82.62),
        ),
    ),
    "5": Study(
        "table5",
        "Table 5: combinations of mixups",
        (
            Row("CCT", f"{_CCT}-baseline-no-input-mixing", 76.80),
            Row("manifold mixup", f"{_CCT}-manifold-no-input-mixing", 76.72),
            Row("HTM", f"{_CCT}-htm-no-input-mixing", 77.34),
            Row("VTM", f"{_CCT}-vtm-no-input-mixing", 78.18),
            Row(_MIXING, f"{_CCT}-baseline", 82.87),
            Row(f"{_MIXING}, manifold mixup", f"{_CCT}-manifold", 80.08),
            Row(f"{_MIXING}, HTM", _HTM.recipe, _HTM.paper),
            Row(f"{_MIXING}, VTM", f"{_CCT}-vtm", 83.54),
            Row(f"{_MIXING}, HTM, VTM", f"{_CCT}-htm-vtm", 83.57),
        ),
    ),
}
_ROWS_BY_RECIPE = {row.recipe: row for study in TABLES.values() for row in study.rows}

SWEEPS = {
    "rho": Sweep("horizontal_rho", "horizontal_layers", f"{_CCT}-htm", ("0.001", "0.003", "0.005", "0.01")),
    "tau": Sweep("horizontal_tau", "horizontal_layers", f"{_CCT}-htm", ("0.5", "1.0", "2.0", "3.0", "none")),
    "kappa": Sweep("vertical_kappa", "vertical_layers", f"{_CCT}-vtm", ("3", "20", "80", "160")),
}


def sweep_study(name: str, recipe: str, values: Sequence[str], own: str | None = None) -> Study:
    """One row for each value of a setting.

    Args:
        name: `rho`, `tau` or `kappa`.
        recipe: name or path.
        values: as on a command line.
        own: the value that the recipe has. Its row is the recipe as it is, which shares its training with the tables,
            and what the others are compared with; without it that is the first row.

    Raises:
        ValueError: for a value that is given twice.
    """
    for number, value in enumerate(values):
        if any(_values_equal(value, other) for other in values[:number]):
            raise ValueError(f"The values of a sweep must differ, got {' '.join(values)}.")
    base = _ROWS_BY_RECIPE.get(recipe, Row("", recipe))
    setting = SWEEPS[name].setting
    rows = tuple(
        Row(f"{name} {value}", recipe, base.paper)
        if _values_equal(value, own)
        else Row(f"{name} {value}", recipe, options=(f"--{setting}", value), variant=f"-{name}-{value}")
        for value in values
    )
    reference = next((number for number, row in enumerate(rows) if not row.options), 0)
    return Study(f"{name}-{base.key}", f"Sweep of {name} ({setting}): {base.key}", rows, reference)


def _values_equal(value: str, other: str | None) -> bool:
    try:
        return other is not None and float(value) == float(other)
    except ValueError:
        return value.lower() == other.lower()
