"""Recipes: YAML files of command-line options, which later flags override."""

import difflib
import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def find_recipe(name_or_path: str, folder: Path) -> Path:
    """The file of a recipe, by its name in ``folder`` or by its path.

    Raises:
        ValueError: if there is none; names the nearest and all that exist.
    """
    if (path := Path(name_or_path)).is_file():
        return path
    if (path := folder / f"{name_or_path}.yaml").is_file():
        return path
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    raise ValueError(
        f"There is no recipe {name_or_path!r}{_suggest(name_or_path, names)} Recipes: {', '.join(names)}."
    )


def expand_recipe(arguments: Sequence[str], parser: ArgumentParser, folder: Path) -> list[str]:
    """Put the options of ``--recipe NAME_OR_PATH`` in front of the other arguments, so that these have the last word.

    Args:
        arguments: as typed, with or without ``--recipe``.
        parser: knows the options.
        folder: where recipes given by name lie.

    Raises:
        ValueError: for a recipe that is not there, is not a mapping, or has a key that is no option.
    """
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    found, rest = finder.parse_known_args(arguments)
    if found.recipe is None:
        return list(arguments)
    path = find_recipe(found.recipe, folder)
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"Recipe {path} is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"Recipe {path} must be a mapping of options to values, got {type(options).__name__}.")
    known = option_names(parser)
    expanded = ["--recipe", found.recipe]
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"Recipe {path} has the key {name!r}, which is no option{_suggest(str(name), known)}")
        if value is None and name != "horizontal_tau":
            continue  # as if it were not there; tau alone has a meaning for none
        expanded += [f"--{name}", *_words(value)]
    return expanded + rest


def option_names(parser: ArgumentParser) -> list[str]:
    """Names of a parser's options, without dashes."""
    return sorted({action.dest for action in parser._actions if action.option_strings} - {"help", "recipe"})


def refuse_unknown_options(remaining: Sequence[str], parser: ArgumentParser) -> None:
    """Raise a ``ValueError`` with a suggestion if arguments were left over from parsing."""
    for word in remaining:
        if word.startswith("--"):
            name = word[2:].split("=")[0].replace("-", "_")
            raise ValueError(f"There is no option {word}{_suggest(name, option_names(parser), '--')}")
    if remaining:
        raise ValueError(f"Not understood on the command line: {' '.join(remaining)}.")


def _words(value: Any) -> list[str]:
    if value is None:
        return ["none"]
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value)]


def _suggest(name: str, known: Sequence[str], dashes: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {dashes}{near[0]}?" if near else "."
