"""Parts of messages that list or suggest names."""

import difflib
from collections.abc import Iterable


def format_list(items: Iterable[object], max_items: int = 5) -> str:
    """Join items by commas, and count those after the first `max_items`: `a, b and 3 more`.

    Args:
        items: are shown by `str`.
        max_items: at least 1.
    """
    items = [str(item) for item in items]
    shown = ", ".join(items[:max_items])
    return shown if len(items) <= max_items else f"{shown} and {len(items) - max_items} more"


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a sentence about an unknown name: `: did you mean X?`, or a full stop where no name is similar.

    Args:
        name: the unknown one.
        known: the names that exist.
        prefix: is put before the suggestion, such as `--`.
    """
    similar = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {prefix}{similar[0]}?" if similar else "."
