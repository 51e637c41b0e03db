"""The groups of options in the help, by topic, and its width."""

import re
from argparse import ArgumentParser

import pytest
from helpers.commands import command_parsers

from hf_tokenmixup.cli.arguments import build_parser
from hf_tokenmixup.cli.main import COMMANDS
from hf_tokenmixup.cli.option_groups import LAST_GROUP, OPTION_GROUPS, OptionGroup, group_options
from hf_tokenmixup.cli.parser import TRANSFORMERS_OPTIONS, FullHelpFormatter

# Options of transformers that some of the supported versions lack.
NOT_IN_ALL_VERSIONS = {"dataloader_in_order", "dataloader_multiprocessing_context", "activation_checkpointing_kwargs"}


def listed_options(text: str) -> dict[str, list[str]]:
    """The options in each group of a help text, by its heading."""
    groups: dict[str, list[str]] = {}
    for line in text.splitlines():
        if heading := re.fullmatch(r"(\S.*):", line):
            groups[heading[1]] = group = []
        elif option := re.match(r"  (?:-h, )?--(\w+)", line):
            group.append(option[1])
    return {heading: options for heading, options in groups.items() if options}


def option_names(parser: ArgumentParser) -> list[str]:
    """The name of each option, by which it is listed, without those that turn a switch off."""
    flags = [action.option_strings for action in parser._actions if action.option_strings]
    names = [next(flag for flag in names if flag.startswith("--")).removeprefix("--") for names in flags]
    return [name for name in names if not name.startswith("no_")]


def test_finetune_help_lists_each_shown_option_in_the_group_of_its_topic():
    expected = {group.title: list(group.options) for group in OPTION_GROUPS if group.options}
    assert listed_options(build_parser().format_help()) == {"options": ["help", "help_all"], **expected}


def test_finetune_options_of_this_package_are_shown():
    shown = {name for group in OPTION_GROUPS for name in group.options}
    own = set(option_names(build_parser())) - TRANSFORMERS_OPTIONS - {"help", "help_all"}
    assert own - shown == set()


def test_finetune_full_help_lists_each_option_once_and_unnamed_ones_last():
    parser = build_parser()
    parser.formatter_class = FullHelpFormatter
    groups = listed_options(parser.format_help())
    names = option_names(parser)
    assert sorted(name for options in groups.values() for name in options) == sorted(names)
    for group in OPTION_GROUPS:
        assert groups[group.title] == [name for name in (*group.options, *group.more) if name in names]
    assert list(groups)[-1] == LAST_GROUP and "use_liger_kernel" in groups[LAST_GROUP]


def test_option_groups_name_each_existing_option_once():
    named = [name for group in OPTION_GROUPS for name in (*group.options, *group.more)]
    assert sorted(set(named)) == sorted(named)
    assert set(named) - set(option_names(build_parser())) <= NOT_IN_ALL_VERSIONS


def test_group_options_puts_an_unknown_option_into_the_last_group():
    parser = ArgumentParser(add_help=False)
    parser.add_argument_group("all").add_argument("--of_a_newer_version", default=1, type=int)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--no_flag", "--flag", dest="flag", action="store_true")
    group_options(parser, [OptionGroup("rate", ("learning_rate",), ("removed",)), OptionGroup("flags", ("flag",))])
    assert listed_options(parser.format_help()) == {
        "rate": ["learning_rate"], "flags": ["no_flag"], LAST_GROUP: ["of_a_newer_version"],
    }  # fmt: skip
    parsed = parser.parse_args(["--of_a_newer_version", "2", "--flag"])
    assert vars(parsed) == {"of_a_newer_version": 2, "learning_rate": None, "flag": True}


@pytest.mark.parametrize("command", [name for name in [*COMMANDS, "model_cards"] if name != "finetune"])
def test_help_of_command_lists_each_option_once(command):
    for parser in command_parsers(command):
        listed = [name for options in listed_options(parser.format_help()).values() for name in options]
        assert sorted(listed) == sorted(option_names(parser)), parser.prog


@pytest.mark.parametrize("command", [*COMMANDS, "model_cards"])
def test_help_of_command_fits_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for parser in command_parsers(command):
        assert [line for line in parser.format_help().splitlines() if len(line) > 80] == [], parser.prog
