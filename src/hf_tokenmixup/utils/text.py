"""Formatting of messages."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def format_list(items: Iterable[Any], max_items: int = 5, formatter: Callable[[Any], str] = repr) -> str:
    """Format the first items of a list for a message.

    Args:
        items: the items.
        max_items: maximum number of items to show.
        formatter: formats an item that is shown.

    Returns:
        The formatted items, separated by commas: `'a', 'b'`, or `'a', 'b' and 7 more` for a longer list.
    """
    items = list(items)
    more = f" and {len(items) - max_items} more" if len(items) > max_items else ""
    return ", ".join(map(formatter, items[:max_items])) + more


def did_you_mean(name: str, known: Iterable[str], formatter: Callable[[str], str] = str, otherwise: str = ".") -> str:
    """Format the end of a sentence about an unknown name.

    Args:
        name: the unknown name.
        known: the existing names.
        formatter: formats the suggestion, such as `repr` or `"--{}".format`.
        otherwise: the end of the sentence if no name is similar.

    Returns:
        `: did you mean X?` with the most similar name, or `otherwise`.
    """
    similar = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {formatter(similar[0])}?" if similar else otherwise


def replace_parameters_by_flags(text: str, flags: Mapping[str, str]) -> str:
    """Replace parameter names in a message of the library by the flags of a command.

    Args:
        text: message with parameter names in backticks, such as `eval_split` or `bf16=True`.
        flags: flag of each parameter, such as `{"eval_split": "--eval_split", "bf16": "--bf16"}`.

    Returns:
        The message with `--eval_split` or `--bf16 True` for each parameter with a flag; other names are unchanged.
    """

    def replace(match: re.Match) -> str:
        name, value = match["name"], match["value"]
        if name not in flags:
            return match[0]
        return f"`{flags[name]} {value}`" if value else f"`{flags[name]}`"

    return re.sub(r"`(?P<name>[a-z][a-z0-9_]*)(?:=(?P<value>[^`\s]+))?`", replace, text)
