"""Map the classes of a dataset to the classes of a trained model.

The same classes may be in a different order (such as ImageNet sorted by name instead of WordNet ID), and accuracy
would be silently wrong. Therefore the names are compared before an evaluation.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence

from ..utils.class_names import has_class_names, normalize_class_name
from ..utils.text import format_list

logger = logging.getLogger(__name__)

LABEL_MAPPINGS = ("strict", "name", "number")
MAX_SHOWN = 3


def build_label_mapping(model_names: Sequence[str], dataset_names: Sequence[str], mode: str = "strict") -> list[int]:
    """Find the model's class index of each class of a dataset.

    Names are compared without case, and underscores equal spaces.

    Args:
        model_names: class names of the model in order. Numbers (`0`, `1`, ...) and the defaults of transformers
            (`LABEL_0`, `LABEL_1`, ...) do not count as names.
        dataset_names: class names of the dataset in order.
        mode: `strict` requires the same classes in the same order. If one side has no names, it requires the same
            number of classes and logs a warning. `name` looks up classes by name; the model may have more classes.
            `number` maps class i to class i, whatever the names; the model may have more classes.

    Returns:
        One class index of the model per class of the dataset, all different.

    Raises:
        ValueError: if the classes do not match.
    """
    if mode not in LABEL_MAPPINGS:
        raise ValueError(f"label_mapping must be one of {', '.join(LABEL_MAPPINGS)}, got {mode!r}.")
    match = {"strict": _match_strictly, "name": _match_by_name, "number": _match_by_number}[mode]
    return match(model_names, dataset_names)


def _match_strictly(model_names: Sequence[str], dataset_names: Sequence[str]) -> list[int]:
    pairs = list(zip(model_names, dataset_names, strict=False))
    differing = [
        index for index, names in enumerate(pairs) if normalize_class_name(names[0]) != normalize_class_name(names[1])
    ]
    problems = []
    if len(model_names) != len(dataset_names):
        problems.append(_format_class_counts(model_names, dataset_names))
    named = {"model": has_class_names(model_names), "dataset": has_class_names(dataset_names)}
    # Numbers on both sides are compared like names, since folders are sorted as 0, 1, 10, 11, ..., 2.
    shared = set(map(normalize_class_name, model_names)) & set(map(normalize_class_name, dataset_names))
    if differing and (shared or all(named.values())):
        shown = format_list(differing, MAX_SHOWN, lambda index: "{} ({!r} and {!r})".format(index, *pairs[index]))
        problems.append(f"{len(differing)} of {len(pairs)} classes have different names: {shown}")
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}. `label_mapping=name` looks up classes by name, `label_mapping=number` maps class "
            "i to class i. If neither is correct, choose another model, or another column with `label_column_name`."
        )
    if differing:
        nameless = " and the ".join(side for side, has_names in named.items() if not has_names)
        logger.warning("There are no class names in the %s. Classes are matched by index.", nameless)
    return list(range(len(dataset_names)))


def _match_by_number(model_names: Sequence[str], dataset_names: Sequence[str]) -> list[int]:
    if len(dataset_names) > len(model_names):
        raise ValueError(
            f"{_format_class_counts(model_names, dataset_names)}. With `label_mapping=number`, the dataset must not "
            "have more classes than the model."
        )
    return list(range(len(dataset_names)))


def _format_class_counts(model_names: Sequence[str], dataset_names: Sequence[str]) -> str:
    return f"The model has {len(model_names)} classes and the dataset has {len(dataset_names)}"


def _match_by_name(model_names: Sequence[str], dataset_names: Sequence[str]) -> list[int]:
    known, wanted = (_indices_by_name(names) for names in (model_names, dataset_names))
    problems = {
        "are not in the model": [name for name in dataset_names if normalize_class_name(name) not in known],
        "occur more than once in the model": [
            name for name in dataset_names if len(known[normalize_class_name(name)]) > 1
        ],
        "occur more than once in the dataset": [
            name for name in dataset_names if len(wanted[normalize_class_name(name)]) > 1
        ],
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(
                f"{len(names)} of the {len(dataset_names)} classes of the dataset {problem}: "
                f"{format_list(names, MAX_SHOWN)}. The {len(model_names)} classes of the model are "
                f"{format_list(model_names, MAX_SHOWN)}. If the order is the same, use `label_mapping=number`."
            )
    return [known[normalize_class_name(name)][0] for name in dataset_names]


def _indices_by_name(names: Sequence[str]) -> defaultdict[str, list[int]]:
    indices = defaultdict(list)
    for index, name in enumerate(names):
        indices[normalize_class_name(name)].append(index)
    return indices
