"""Which class of a trained model each class of a dataset is.

Two lists of the same classes may stand in different order (ImageNet sorted by name, say, instead of by WordNet number)
and every accuracy is then wrong without a word. So names are compared before anything is counted.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence

from ..utils.class_names import has_class_names
from ..utils.class_names import normalize_class_name as _plain

logger = logging.getLogger(__name__)

LABEL_MAPPINGS = ("strict", "name", "number")
SHOWN = 3


def build_label_mapping(model_names: Sequence[str], dataset_names: Sequence[str], how: str = "strict") -> list[int]:
    """The model's class number of each class of the dataset.

    Names are compared without regard to case, and underscores count as spaces.

    Args:
        model_names, dataset_names: class names in order. Numbers (`0`, `1`, ...) and what transformers invents
            (`LABEL_0`, `LABEL_1`, ...) are no names.
        how: `strict`: both have the same classes in the same order; where one of them has no names, as many classes,
            and a warning is logged. `name`: each class of the dataset is the model's class of that name; the model
            may have more. `number`: class i of the dataset is class i of the model, whatever their names; the model
            may have more.

    Returns:
        As many numbers as `dataset_names` has, all different.

    Raises:
        ValueError: the classes do not agree in that way.
    """
    if how not in LABEL_MAPPINGS:
        raise ValueError(f"label_mapping must be one of {', '.join(LABEL_MAPPINGS)}, got {how!r}.")
    match = {"strict": _match_strictly, "name": _match_by_name, "number": _match_by_number}[how]
    return match(model_names, dataset_names)


def _match_strictly(model_names: Sequence[str], dataset_names: Sequence[str]) -> list[int]:
    pairs = list(zip(model_names, dataset_names, strict=False))
    differing = [number for number, (one, other) in enumerate(pairs) if _plain(one) != _plain(other)]
    problems = [] if len(model_names) == len(dataset_names) else [_counts(model_names, dataset_names)]
    named = {"model": has_class_names(model_names), "dataset": has_class_names(dataset_names)}
    # Numbers on both sides are names after all: folders sort as 0, 1, 10, 11, ..., 2.
    shared = set(map(_plain, model_names)) & set(map(_plain, dataset_names))
    if differing and (shared or all(named.values())):
        shown = ", ".join("{} ({!r} and {!r})".format(number, *pairs[number]) for number in differing[:SHOWN])
        more = " and so on" if len(differing) > SHOWN else ""
        problems.append(f"{len(differing)} of {len(pairs)} classes have other names in the two: {shown}{more}")
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}. --label_mapping name looks the dataset's classes up among the model's by name, "
            "--label_mapping number takes class i of one for class i of the other. If neither is right, name another "
            "model or --label_column_name."
        )
    if differing:
        nameless = " and the ".join(what for what, has_names in named.items() if not has_names)
        logger.warning("There are no class names in the %s: classes are compared by number.", nameless)
    return list(range(len(dataset_names)))


def _match_by_number(model_names: Sequence[str], dataset_names: Sequence[str]) -> list[int]:
    if len(dataset_names) > len(model_names):
        raise ValueError(
            f"{_counts(model_names, dataset_names)}: by number, the dataset must not have more than the model."
        )
    return list(range(len(dataset_names)))


def _counts(model_names: Sequence[str], dataset_names: Sequence[str]) -> str:
    return f"The model knows {len(model_names)} classes and the dataset has {len(dataset_names)}"


def _match_by_name(model_names: Sequence[str], dataset_names: Sequence[str]) -> list[int]:
    known, wanted = (_numbers_by_name(names) for names in (model_names, dataset_names))
    problems = {
        "are none of the model's": [name for name in dataset_names if _plain(name) not in known],
        "are there more than once in the model": [name for name in dataset_names if len(known[_plain(name)]) > 1],
        "are there more than once in the dataset": [name for name in dataset_names if len(wanted[_plain(name)]) > 1],
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(
                f"By name, {len(names)} of the dataset's {len(dataset_names)} classes {problem}: {_first(names)}. The "
                f"model's {len(model_names)} are {_first(model_names)}. If the order is the same, give "
                "--label_mapping number."
            )
    return [known[_plain(name)][0] for name in dataset_names]


def _numbers_by_name(names: Sequence[str]) -> defaultdict[str, list[int]]:
    numbers = defaultdict(list)
    for number, name in enumerate(names):
        numbers[_plain(name)].append(number)
    return numbers


def _first(items: Sequence[str]) -> str:
    return ", ".join(map(repr, items[:SHOWN])) + (" and so on" if len(items) > SHOWN else "")
