"""Detection and comparison of class names."""

from collections.abc import Sequence


def has_class_names(names: Sequence[str]) -> bool:
    """Whether these are names, not numbers in order or the defaults `LABEL_0`, `LABEL_1`, ... of transformers."""
    return any(str(name) not in (str(index), f"LABEL_{index}") for index, name in enumerate(names))


def normalize_class_name(name: str) -> str:
    """Normalize a class name for comparison: lower case, and spaces instead of underscores."""
    return " ".join(str(name).replace("_", " ").split()).casefold()
