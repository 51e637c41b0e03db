"""Class names: whether there are any, and when two of them are the same."""

from collections.abc import Sequence


def has_class_names(names: Sequence[str]) -> bool:
    """Whether these are names, and not numbers in order or the `LABEL_0`, `LABEL_1`, ... of transformers."""
    return any(str(name) not in (str(number), f"LABEL_{number}") for number, name in enumerate(names))


def normalize_class_name(name: str) -> str:
    """The form in which class names are compared: case is ignored, and underscores count as spaces."""
    return " ".join(str(name).replace("_", " ").split()).casefold()
