"""The help of the commands: defaults, and how a switch is turned off."""

import argparse
import enum
from dataclasses import dataclass

import pytest
from transformers.hf_argparser import HfArg

from hf_tokenmixup.cli.arguments import build_parser
from hf_tokenmixup.cli.parser import CliParser


class Kind(enum.Enum):
    SMALL = "small"


@dataclass
class Options:
    size: int = HfArg(default=100, help="Percent 5 %% of a size.")
    sides: list[float] = HfArg(default_factory=lambda: [0.5, 4 / 3], help="Two sides.")
    name: str | None = HfArg(default=None, help="A name.")
    stated: int = HfArg(default=7, help="A stated number (7).")
    other: int = HfArg(default=7, help="By default a week.")
    fast: bool = HfArg(default=True, help="Be fast.")
    slow: bool = HfArg(default=False, help="Be slow.")
    kind: Kind = HfArg(default=Kind.SMALL, help="A kind.")
    share: str = HfArg(default="50%", help="A share.")


@pytest.mark.parametrize(
    "line",
    [
        "Percent 5 % of a size. (default: 100)",
        "Two sides. (default: 0.5 1.333)",
        "A name.",
        "A stated number (7).",
        "By default a week.",
        "Be fast. (default: on; --no_fast turns it off)",
        "Be slow.",
        "A kind. (default: small)",
        "A share. (default: 50%)",
    ],
)
def test_help_states_each_default_once(line):
    text = " ".join(CliParser(Options).format_help().split())
    start = text.index(line) + len(line)
    assert not text[start:].startswith(" (default"), text[start : start + 40]


def test_switch_in_help_is_turned_off_as_it_says():
    parsed = CliParser(Options).parse_args(["--no_fast"])
    assert not parsed.fast and CliParser(Options).parse_args([]).fast


def test_finetune_help_states_defaults_and_how_to_turn_off_a_setting():
    parser = build_parser()
    text = " ".join(parser.format_help().split())
    assert "(new models: on; --scorenet_detach false turns it off)" in text
    assert "Probability of a horizontal flip. (default: 0.5)" in text
    assert parser.parse_args(["--output_dir", "x", "--scorenet_detach", "false"]).scorenet_detach is False


def test_help_of_arguments_without_text_has_no_default():
    parser = CliParser(add_help=False)
    parser.add_argument("--number", default=3, help=argparse.SUPPRESS)
    parser.add_argument("--bare", default=3)
    assert "3" not in parser.format_help()
