"""Import the commands as modules, for tests that call their functions, and find their parsers and scripts."""

import importlib
from argparse import ArgumentParser, _SubParsersAction
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

# Seconds after which a process that a test starts counts as hanging. A slow machine needs far fewer.
HANG_S = 1800
SCRIPTS = Path(__file__).parents[2] / "scripts"


def import_command(name: str) -> ModuleType:
    """Import the module of a command, such as "finetune"."""
    return importlib.import_module(f"hf_tokenmixup.cli.{name}")


class _ParserFound(Exception):
    pass


@cache
def command_parsers(name: str) -> tuple[ArgumentParser, ...]:
    """Return the parser of a command as its `main` builds it, and those of its subcommands."""

    def found(parser, *args, **kwargs):
        # Parsers with one option search for a recipe.
        if len(parser._actions) > 1:
            raise _ParserFound(parser)
        return parse_known_args(parser, *args, **kwargs)

    parse_known_args = ArgumentParser.parse_known_args
    main = import_command(name).main
    with pytest.MonkeyPatch.context() as patch, pytest.raises(_ParserFound) as caught:
        patch.setattr(ArgumentParser, "parse_known_args", found)
        main([])
    (parser,) = caught.value.args
    subparsers = [action.choices.values() for action in parser._actions if isinstance(action, _SubParsersAction)]
    return (parser, *(command for commands in subparsers for command in commands))
