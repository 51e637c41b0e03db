"""Recipes: YAML files of command-line options, which flags override.

A recipe may name another recipe as its `base` and then contains only what differs from it. A key overrides the base's
value, a JSON object is merged with the base's key by key, and null removes the base's value.
"""

import json
import re
from argparse import Action, ArgumentParser, ArgumentTypeError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..configuration import OTHER_THRESHOLD_FORM
from ..utils.text import did_you_mean
from .parser import CliParser
from .successors import REMOVED_VALUES, successor, successor_of_value

RECIPES = Path(__file__).parents[1] / "recipes"
BASE_KEY = "base"

# What the types of options expect, by the types' names.
TYPE_DESCRIPTIONS = {
    "float": "a number",
    "int": "an integer",
    "str": "text",
    "string_to_bool": "true or false",
    "true_or_false": "true or false",
    "optional_float": "a number or none",
    "optional_int": "an integer or none",
}
# Options that have a meaning for null. Of the others, null is the same as no value.
_NULLABLE_OPTIONS = ("horizontal_tau",)
# JSON objects that are replaced, since a single key has no meaning of its own.
_REPLACED_OBJECTS = ("deepspeed",)
# JSON objects whose keys depend on the value of another option.
_DEPENDS_ON = {"lr_scheduler_kwargs": "lr_scheduler_type"}
# Lists of words that contain no commas. Other texts may be paths or patterns.
_WORD_LISTS = ("include_for_metrics", "lora_target_modules", "report_to")
# Options of the command line that a recipe cannot set.
_COMMAND_LINE_ONLY = {"help", "help_all", "recipe", "print_recipe", "dry_run"}


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe, by its path or by its name in this package.

    Raises:
        ValueError: There is none. The message has the most similar name and all names.
    """
    if (path := Path(name_or_path)).is_file():
        return path
    if (path := RECIPES / f"{name_or_path}.yaml").is_file():
        return path
    names = list_recipes()
    if name_or_path and Path(name_or_path).is_dir():
        raise ValueError(
            f"--recipe must name a YAML file, and {name_or_path} is a folder. Recipes: {', '.join(names)}."
        )
    raise ValueError(
        f"There is no recipe {name_or_path!r}{did_you_mean(name_or_path, names)} Recipes: {', '.join(names)}."
    )


def list_recipes() -> list[str]:
    """The names of this package's recipes."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """The options of a recipe together with those of its bases.

    Options that are null are removed, except `horizontal_tau`, which is null for no threshold.

    Raises:
        ValueError: There is no such recipe or base, a file cannot be read, or a recipe is its own base.
    """
    return _merge_chain(_read_chain(find_recipe(str(name_or_path))))


def _read_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The files of a recipe and its bases with their own options, the last base first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    next_path: Path | None = path
    while next_path is not None:
        files = [file for file, _ in chain]
        if any(next_path.samefile(file) for file in files):
            names = " -> ".join(file.name for file in [*files, next_path])
            raise ValueError(f"Recipe {path} has itself among its bases: {names}. Remove one {BASE_KEY!r}.")
        options = _read_file(next_path)
        base = options.pop(BASE_KEY, None)
        chain.append((next_path, options))
        next_path = None if base is None else _find_base(base, next_path)
    return chain[::-1]


def _find_base(base: Any, path: Path) -> Path:
    """The file of the base that the recipe `path` names."""
    names = list_recipes()
    if not isinstance(base, str) or not base:
        raise ValueError(f"Recipe {path}: {BASE_KEY} must be a recipe's name or path, got {base!r}.")
    for file in (path.parent / base, RECIPES / f"{base}.yaml"):
        if file.is_file():
            return file
    raise ValueError(
        f"Recipe {path} has the {BASE_KEY} {base!r}, which does not exist{did_you_mean(base, names)} Pass a path "
        f"relative to {path.parent}, or one of {', '.join(names)}."
    )


def _merge_chain(chain: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for _, own in chain:
        options = merge_options(options, own)
    return options


def merge_options(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Options overridden by `changes`.

    A JSON object is merged with the previous one key by key; an empty one replaces it. `deepspeed`, a complete
    configuration, is always replaced, and so is `lr_scheduler_kwargs` if `changes` has another scheduler. A value of
    None removes an option, except `horizontal_tau`. One form of a threshold replaces the other form.

    Args:
        options: values by name. A JSON object is a dictionary, or a text.
        changes: as `options`.
    """
    merged = dict(options)
    for name, value in changes.items():
        if value is None and name not in _NULLABLE_OPTIONS:
            merged.pop(name, None)
            continue
        if (other := OTHER_THRESHOLD_FORM.get(name)) not in changes:
            merged.pop(other, None)
        together = _merge_objects(name, options, changes)
        merged[name] = _parse_object(value) if together is None else together
    return merged


def _merge_objects(name: str, options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON object of an option merged key by key; None if the option is no JSON object, or is replaced."""
    old, new = options.get(name), _parse_object(changes.get(name))
    if not isinstance(old, dict) or not isinstance(new, dict) or not new or name in _REPLACED_OBJECTS:
        return None
    owner = _DEPENDS_ON.get(name)
    if owner is not None and changes.get(owner) is not None and str(changes[owner]) != str(options.get(owner)):
        return None
    return old | new


def _parse_object(value: Any) -> Any:
    """A dictionary for the text of a JSON object; another value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value  # The option itself reports the error.


def expand_recipe(arguments: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Insert the options of `--recipe` before the other arguments, so that the command line overrides them.

    A JSON object on the command line is merged with the recipe's, see `merge_options`.

    Args:
        arguments: as typed, with or without `--recipe`.
        parser: has all options.

    Raises:
        ValueError: The recipe or a base of it does not exist, is not a mapping, or has a duplicate key, a key that is
            not an option, or a value that its option does not accept.
    """
    recipe, rest = take_option("recipe", arguments)
    rest = split_lists(rest, parser)
    if recipe is None:
        return rest
    options = load_valid_recipe(recipe, parser)
    actions = _actions_by_name(parser)
    expanded = ["--recipe", recipe]
    typed_names = {get_option_name(word) for word in rest if word.startswith("--")}
    for name, value in options.items():
        if OTHER_THRESHOLD_FORM.get(name) in typed_names:
            continue
        expanded += [f"--{name}", *_to_cli_args(_split_value(actions[name], value))]
    objects = [name for name, value in options.items() if isinstance(value, dict)]
    typed = {name: take_option(name, rest)[0] for name in (*objects, *_DEPENDS_ON.values())}
    for name in objects:
        if (merged := _merge_objects(name, options, typed)) is not None:
            rest += [f"--{name}", json.dumps(merged)]
    return expanded + rest


def load_valid_recipe(name_or_path: str, parser: ArgumentParser) -> dict[str, Any]:
    """The options of a recipe and its bases, after each file was compared with the options of `parser`."""
    chain = _read_chain(find_recipe(name_or_path))
    known, actions = option_names(parser), _actions_by_name(parser)
    for path, options in chain:
        for name, value in options.items():
            if name not in known:
                if (instead := successor(str(name), known, dashes="")) is not None:
                    raise ValueError(f"Recipe {path} has the key {name!r}, which {instead}.")
                raise ValueError(
                    f"Recipe {path} has the key {name!r}, which is not an option"
                    f"{did_you_mean(str(name), [*known, BASE_KEY])}"
                )
            if (instead := successor_of_value(name, value, actions[name].choices or ())) is not None:
                raise ValueError(f"Recipe {path} has {name}: {value}, which {instead}.")
            if value is not None or name in _NULLABLE_OPTIONS:
                _validate_value(path, actions[name], _split_value(actions[name], value))
    return _merge_chain(chain)


def recipe_hint(message: str, arguments: Sequence[str]) -> str:
    """A sentence that names the options in an error message that the recipe sets, and how to override them.

    Args:
        message: has options in backticks, as `name` or `name=value`.
        arguments: as typed.

    Returns:
        The sentence after a space; an empty text if no option of the message is from a recipe.
    """
    recipe, rest = take_option("recipe", arguments)
    if recipe is None:
        return ""
    options = load_recipe(recipe)
    typed = {get_option_name(word) for word in rest if word.startswith("--")}
    names = set(re.findall(r"`(\w+)(?:=[^`]*)?`", message)) & options.keys() - typed
    if not names:
        return ""
    keys = ", ".join(f"`{name}: {json.dumps(options[name])}`" for name in sorted(names))
    flags = " ".join(f"--{name} {'false' if options[name] is True else 'VALUE'}" for name in sorted(names))
    return f" The recipe {recipe} sets {keys}; `{flags}` on the command line overrides it."


def split_lists(arguments: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Arguments with one word for each item of a list: `1,2` and `[1, 2]` have the same meaning as `1 2`."""
    lists = {flag for action in parser._actions if _is_list(action) for flag in action.option_strings}
    words, in_list = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if argument.startswith("--"):
            in_list = flag in lists
            words += [flag, *_split_items(value)] if in_list and equals else [argument]
        else:
            words += _split_items(argument) if in_list else [argument]
    return words


def take_option(name: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The last value of an option, and the arguments without it; None if it is not given.

    Args:
        name: with underscores; hyphens are found too.
        arguments: as typed.

    Raises:
        ValueError: The option has no value.
    """
    parser = CliParser(add_help=False)
    flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*flags, dest="value")
    found, rest = parser.parse_known_args(arguments)
    return found.value, rest


def get_option_name(word: str) -> str:
    """The name of an option with underscores, from a word such as `--some-name=value`."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def option_names(parser: ArgumentParser) -> list[str]:
    """The names of the options that a recipe can set."""
    return sorted(_actions_by_name(parser).keys() - _COMMAND_LINE_ONLY)


def check_unknown_options(remaining: Sequence[str], parser: ArgumentParser) -> None:
    """Check that no arguments remain after parsing.

    Raises:
        ValueError: Some remain. The message has the most similar option, or what replaced a removed option.
    """
    for word in remaining:
        if word.startswith("--"):
            name, known = get_option_name(word), option_names(parser)
            if (instead := successor(name, known)) is not None:
                raise ValueError(f"--{name} {instead}.")
            raise ValueError(f"There is no option {word}{did_you_mean(name, known, '--{}'.format)}")
    if remaining:
        raise ValueError(f"Unknown arguments: {' '.join(remaining)}.")


def check_removed_values(arguments: Sequence[str], parser: ArgumentParser) -> None:
    """Check that no option has a value that transformers has removed.

    Raises:
        ValueError: One has. The message has the replacement.
    """
    actions = _actions_by_name(parser)
    for name in REMOVED_VALUES:
        value, _ = take_option(name, arguments)
        if (instead := successor_of_value(name, value, actions[name].choices or ())) is not None:
            raise ValueError(f"--{name} {value} {instead}.")


class _UniqueKeyLoader(yaml.SafeLoader):
    """A `yaml.SafeLoader` that rejects duplicate keys, of which YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        # Other keys, such as lists, are rejected by the base class.
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _RecipeDumper(yaml.SafeDumper):
    """A `yaml.SafeDumper` that quotes texts that `_UniqueKeyLoader` would read as numbers."""


# YAML 1.1 reads 1e-5 as text, and 1.0e-5 as a number.
_NUMBER_WITH_EXPONENT = re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
for _yaml_class in (_UniqueKeyLoader, _RecipeDumper):
    _yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER_WITH_EXPONENT, list("-+.0123456789"))


def dump_recipe(options: Mapping[str, Any]) -> str:
    """Options as the text of a recipe."""
    layout = {"sort_keys": False, "default_flow_style": None, "width": 120, "allow_unicode": True}
    return yaml.dump(dict(options), Dumper=_RecipeDumper, **layout)


def _read_file(path: Path) -> dict[str, Any]:
    """The options of a file as written, without those of its base.

    Raises:
        ValueError: It cannot be read, is not a YAML mapping, or has a duplicate key.
    """
    try:
        options = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)  # a SafeLoader
    except UnicodeDecodeError as error:
        raise ValueError(f"Recipe {path} must be a text file in UTF-8: {error}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"Recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        found = "nothing" if options is None else type(options).__name__
        raise ValueError(f"Recipe {path} must be a mapping of options to values, got {found}.")
    return options


def _validate_value(path: Path, action: Action, value: Any) -> None:
    """Check that an option accepts a recipe's value.

    Raises:
        ValueError: It does not. The message names the recipe.
    """
    takes_list = action.nargs in ("*", "+")
    expected = TYPE_DESCRIPTIONS.get(getattr(action.type, "__name__", ""), "a value")
    if action.choices is not None:
        expected = f"one of {', '.join(map(str, action.choices))}"
    if takes_list:
        expected = f"a list, each item {expected}"
    message = f"Recipe {path}: {action.dest} must be {expected}, got {value!r}."
    if isinstance(value, list) and not takes_list:
        raise ValueError(message)
    for item in value if isinstance(value, list) else [value]:
        words = [] if isinstance(item, list) else _to_cli_args(item)
        try:
            parsed = [action.type(word) if action.type else word for word in words]
        except (ValueError, TypeError, ArgumentTypeError) as error:
            raise ValueError(message) from error
        if len(parsed) != 1 or action.choices is not None and parsed[0] not in action.choices:
            raise ValueError(message)


def _actions_by_name(parser: ArgumentParser) -> dict[str, Action]:
    return {action.dest: action for action in parser._actions if action.option_strings}


def _is_list(action: Action) -> bool:
    return action.nargs in ("*", "+") and (action.type in (int, float) or action.dest in _WORD_LISTS)


def _split_value(action: Action, value: Any) -> Any:
    """The items of a list option that a recipe has as a text; another value as it is."""
    return _split_items(value) if isinstance(value, str) and _is_list(action) else value


def _split_items(text: str) -> list[str]:
    return text.strip("[]() ").replace(",", " ").split()


def _to_cli_args(value: Any) -> list[str]:
    """The words of a value on a command line."""
    if value is None:
        return ["none"]
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value)]
