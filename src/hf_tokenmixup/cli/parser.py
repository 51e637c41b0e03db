"""The argument parser of all commands, its help, and the options that several commands have."""

import argparse
import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from .option_groups import SHOWN_OPTIONS

TRANSFORMERS_OPTIONS = {item.name for item in dataclasses.fields(TrainingArguments)}
# Versions of transformers before the renaming have this name from this package.
TRANSFORMERS_OPTIONS |= {"activation_checkpointing_kwargs"}
# Longer lists of choices are shown as NAME.
MAX_CHOICES_SHOWN = 6

REVISION_HELP = "Branch, tag or commit of the model on the Hub."
TOKEN_HELP = "Token for the Hub (default: the one of `hf auth login`)."
CACHE_DIR_HELP = "Folder of downloaded files."


class CliParser(HfArgumentParser):
    """Argument parser of all commands.

    Raises a `ValueError` for an error, where argparse ends the process. Options cannot be abbreviated, and the help
    shows a description with the line breaks that it has.
    """

    def __init__(self, dataclass_types: Sequence[type] | type | None = None, **kwargs):
        kwargs.setdefault("formatter_class", DefaultsHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(dataclass_types, **kwargs)

    def error(self, message: str) -> None:
        raise ValueError(message)


class DefaultsHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that ends with the default of an option, unless its text has one or the default is empty or off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if text is None or default is argparse.SUPPRESS or default in (None, False, "", []) or _states(text, default):
            return text
        if default is True and action.nargs == "?":
            return f"{text} (default: on; --no_{action.dest} turns it off)"
        return f"{text} (default: {_format_default(default).replace('%', '%%')})"


class ShortHelpFormatter(DefaultsHelpFormatter):
    """Help without the less common options of transformers, usually with one line for each option."""

    show_all = False

    def add_argument(self, action: argparse.Action) -> None:
        common = action.dest in SHOWN_OPTIONS or action.dest not in TRANSFORMERS_OPTIONS
        if (common or self.show_all) and not any(name.startswith("--no_") for name in action.option_strings):
            super().add_argument(action)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        if action.choices is not None and len(action.choices) > MAX_CHOICES_SHOWN:
            return lambda size: ("NAME",) * size
        return super()._metavar_formatter(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(name for name in action.option_strings if "-" not in name[2:])
        if action.nargs in (0, "?"):
            return names
        metavar = action.type.__name__.upper() if isinstance(action.type, type) else "VALUE"
        return f"{names} {self._format_args(action, metavar)}"


class FullHelpFormatter(ShortHelpFormatter):
    """Help with all options."""

    show_all = True


class FullHelpAction(argparse.Action):
    """Prints the help with all options, and ends the process."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.formatter_class = FullHelpFormatter
        parser.print_help()
        parser.exit()


def _states(text: str, default: Any) -> bool:
    return "default" in text.lower() or text.rstrip(".").endswith(f"({_format_default(default)})")


def _format_default(default: Any) -> str:
    if isinstance(default, enum.Enum):
        default = default.value
    if isinstance(default, list | tuple):
        return " ".join(map(_format_default, default))
    return f"{default:.4g}" if isinstance(default, float) else str(default)


def add_hub_options(parser: argparse.ArgumentParser, *, remote_code: bool = False) -> None:
    """Add the options for a model on the Hub, which `hub_kwargs` reads.

    Args:
        parser: of the command.
        remote_code: whether the command can run code that comes with a model.
    """
    group = parser.add_argument_group("Hub")
    group.add_argument("--revision", help=REVISION_HELP)
    group.add_argument("--token", help=TOKEN_HELP)
    group.add_argument("--cache_dir", help=CACHE_DIR_HELP)
    if remote_code:
        group.add_argument("--trust_remote_code", action="store_true", help="Run the code that comes with the model.")


def flags_by_parameter(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The flag of each option by the name of its parameter in the library, for messages of the library."""
    actions = list(parser._actions)
    for action in parser._actions:
        # The parsers of subcommands.
        if isinstance(action.choices, Mapping):
            actions += [option for command in action.choices.values() for option in command._actions]
    names = {action.dest for action in actions if action.option_strings}
    flags = {name: f"--{name}" for name in names}
    # The parameter of the data loading functions has another name.
    return flags | ({"validation_fraction": "--train_val_split"} if "train_val_split" in names else {})


def hub_kwargs(args: argparse.Namespace) -> dict[str, str]:
    """Keyword arguments for `from_pretrained`, from the options of `add_hub_options` that were given."""
    return drop_none(revision=args.revision, token=args.token, cache_dir=args.cache_dir)


def drop_none(**kwargs: Any) -> dict[str, Any]:
    """The keyword arguments that are not None."""
    return {name: value for name, value in kwargs.items() if value is not None}


def optional_float(text: str) -> float | None:
    """The type of an option that takes a number or `none`."""
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or none, got {text!r}") from None


def optional_int(text: str) -> int | None:
    """The type of an option that takes an integer or `none`."""
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer or none, got {text!r}") from None


def true_or_false(text: str) -> bool:
    """The type of an option that takes `true` or `false`, and no number as `string_to_bool` of transformers does."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"
