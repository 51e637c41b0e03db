"""Recipes: YAML files of command-line options, which later flags override."""

import difflib
import json
import re
from argparse import Action, ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .successors import VALUES, successor, successor_of_value

RECIPES = Path(__file__).parents[1] / "recipes"

# What the functions that read an option's text expect, by their names.
KINDS = {"float": "a number", "int": "a whole number", "str": "text", "string_to_bool": "true or false"}
KINDS |= {"truth": "true or false", "optional_float": "a number or none", "optional_int": "a whole number or none"}

# JSON objects of which one key alone means nothing.
_REPLACED = ("deepspeed",)
# JSON objects whose keys are those of what another option names.
_BELONGS_TO = {"lr_scheduler_kwargs": "lr_scheduler_type"}
# Lists of words that have no comma in them. Other texts may be paths or patterns.
_LISTS_OF_WORDS = ("include_for_metrics", "lora_target_modules", "report_to")


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
    if name_or_path and Path(name_or_path).is_dir():
        raise ValueError(
            f"--recipe must name a YAML file, and {name_or_path} is a folder. Recipes: {', '.join(names)}."
        )
    raise ValueError(
        f"There is no recipe {name_or_path!r}{_suggest(name_or_path, names)} Recipes: {', '.join(names)}."
    )


def expand_recipe(arguments: Sequence[str], parser: ArgumentParser, folder: Path) -> list[str]:
    """Put the options of ``--recipe NAME_OR_PATH`` in front of the other arguments, so that these have the last word.

    A JSON object on the command line is merged with that of the recipe key by key, so that one attribute of
    ``config_overrides`` can be changed; ``{}`` drops the recipe's. The exceptions are ``deepspeed``, which is a
    configuration of its own, and ``lr_scheduler_kwargs`` where the command line names another scheduler.

    Args:
        arguments: as typed, with or without ``--recipe``.
        parser: knows the options.
        folder: where recipes given by name lie.

    Raises:
        ValueError: for a recipe that is not there, is not a mapping, or has a key twice, a key that is no option or a
            value that is none for its option.
    """
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    found, rest = finder.parse_known_args(arguments)
    if found.recipe is None:
        return split_lists(arguments, parser)
    path = find_recipe(found.recipe, folder)
    options = read_recipe(path)
    known = option_names(parser)
    rest = split_lists(rest, parser)
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    expanded = ["--recipe", found.recipe]
    for name, value in options.items():
        if name not in known:
            if (instead := successor(str(name), known, dashes="")) is not None:
                raise ValueError(f"Recipe {path} has the key {name!r}, which {instead}.")
            raise ValueError(f"Recipe {path} has the key {name!r}, which is no option{_suggest(str(name), known)}")
        if value is None and name != "horizontal_tau":
            continue  # as if it were not there; tau alone has a meaning for none
        if isinstance(value, str) and _is_list(actions[name]):
            value = _items(value)
        if (instead := successor_of_value(name, value, actions[name].choices or ())) is not None:
            raise ValueError(f"Recipe {path} has {name}: {value}, which {instead}.")
        _check_value(path, actions[name], value)
        expanded += [f"--{name}", *_words(value)]
    for name, merged in _merged_objects(options, rest).items():
        rest += [f"--{name}", json.dumps(merged)]
    return expanded + rest


def split_lists(arguments: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Arguments with the values of a list option as words of their own: `1,2` and `[1, 2]` mean the same as `1 2`."""
    lists = {flag for action in parser._actions if _is_list(action) for flag in action.option_strings}
    words, inside = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if argument.startswith("--"):
            inside = flag in lists
            words += [flag, *_items(value)] if inside and equals else [argument]
        else:
            words += _items(argument) if inside else [argument]
    return words


def _is_list(action: Action) -> bool:
    return action.nargs in ("*", "+") and (action.type in (int, float) or action.dest in _LISTS_OF_WORDS)


def _items(text: str) -> list[str]:
    return text.strip("[]() ").replace(",", " ").split()


def _merged_objects(recipe: dict[str, Any], arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The JSON objects of the command line together with those of the recipe, by the names of their options."""
    given = {name: _last_value(name, arguments) for name in recipe}
    merged = {}
    for name, value in recipe.items():
        try:
            changes = json.loads(given[name] or "null")
        except json.JSONDecodeError:
            continue  # a path, or a mistake that the option itself reports
        if not isinstance(value, dict) or not isinstance(changes, dict) or name in _REPLACED:
            continue
        owner = _BELONGS_TO.get(name)
        other_owner = owner is not None and _last_value(owner, arguments) not in (None, str(recipe.get(owner)))
        if changes and not other_owner:
            merged[name] = value | changes
    return merged


def _last_value(name: str, arguments: Sequence[str]) -> str | None:
    """What the command line gives for an option; None without the option."""
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(f"--{name}", f"--{str(name).replace('_', '-')}", nargs="?", dest="value")
    return finder.parse_known_args(arguments)[0].value


def keys_of_recipe(message: str, arguments: Sequence[str], folder: Path) -> str:
    """A sentence that says which of the options in an error's message come from the recipe, and how to override them.

    Args:
        message: of the error, with names of options in backticks.
        arguments: as typed.
        folder: where recipes given by name are.

    Returns:
        The sentence with a space before it; nothing where no option comes from a recipe.
    """
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    found, rest = finder.parse_known_args(arguments)
    if found.recipe is None:
        return ""
    options = read_recipe(find_recipe(found.recipe, folder))
    typed = {word[2:].partition("=")[0].replace("-", "_") for word in rest if word.startswith("--")}
    # An error names an option as `name` or as `name=value`.
    named = {name for name in re.findall(r"`(\w+)(?:=[^`]*)?`", message) if name in options and name not in typed}
    if not named:
        return ""
    keys = ", ".join(f"`{name}: {json.dumps(options[name])}`" for name in sorted(named))
    instead = " ".join(f"--{name} {'false' if options[name] is True else 'VALUE'}" for name in sorted(named))
    return f" The recipe {found.recipe} sets {keys}; `{instead}` on the command line overrides it."


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-5 as text, and wants 1.0e-5.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_recipe(path: Path) -> dict[str, Any]:
    """The options of a recipe, as written.

    Raises:
        ValueError: if it is no YAML mapping, or has a key twice.
    """
    try:
        options = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)  # a SafeLoader
    except UnicodeDecodeError as error:
        raise ValueError(f"Recipe {path} must be a text file in UTF-8: {error}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"Recipe {path} is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        what = "nothing" if options is None else type(options).__name__
        raise ValueError(f"Recipe {path} must be a mapping of options to values, got {what}.")
    return options


def _check_value(path: Path, action: Action, value: Any) -> None:
    """Raise a ``ValueError`` that names the recipe unless an option can take a value as it stands there."""
    several, expected = action.nargs in ("*", "+"), KINDS.get(getattr(action.type, "__name__", ""), "a value")
    if action.choices is not None:
        expected = f"one of {', '.join(map(str, action.choices))}"
    if several:
        expected = f"a list, each of it {expected}"
    wrong = ValueError(f"Recipe {path}: {action.dest} must be {expected}; got {value!r}.")
    if isinstance(value, list) and not several:
        raise wrong
    for item in value if isinstance(value, list) else [value]:
        words = [] if isinstance(item, list) else _words(item)
        try:
            parsed = [action.type(word) if action.type else word for word in words]
        except (ValueError, TypeError, ArgumentTypeError) as error:
            raise wrong from error
        if len(parsed) != 1 or action.choices is not None and parsed[0] not in action.choices:
            raise wrong


def option_names(parser: ArgumentParser) -> list[str]:
    """Names of a parser's options, without dashes."""
    return sorted({action.dest for action in parser._actions if action.option_strings} - {"help", "recipe"})


def check_unknown_options(remaining: Sequence[str], parser: ArgumentParser) -> None:
    """Raise a ``ValueError`` with a suggestion if arguments were left over from parsing."""
    for word in remaining:
        if word.startswith("--"):
            name = word[2:].split("=")[0].replace("-", "_")
            if (instead := successor(name, option_names(parser))) is not None:
                raise ValueError(f"--{name} {instead}.")
            raise ValueError(f"There is no option {word}{_suggest(name, option_names(parser), '--')}")
    if remaining:
        raise ValueError(f"Not understood on the command line: {' '.join(remaining)}.")


def refuse_removed_values(arguments: Sequence[str], parser: ArgumentParser) -> None:
    """
    Raises:
        ValueError: a value of an option was removed from transformers, with what takes its place.
    """
    actions = {action.dest: action for action in parser._actions}
    for name in VALUES:
        value = _last_value(name, arguments)
        if (instead := successor_of_value(name, value, actions[name].choices or ())) is not None:
            raise ValueError(f"--{name} {value} {instead}.")


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
