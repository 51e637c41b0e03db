"""`hf-tokenmixup`: its commands, and their names in messages and records."""

import re
import sys

import pytest

from hf_tokenmixup import __version__
from hf_tokenmixup.cli import main, program

COMMANDS = ["finetune", "calibrate", "evaluate", "publish", "visualize", "study", "benchmark", "throughput"]
COMMANDS += ["demo", "convert"]


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/hf-tokenmixup", *words])
    main.entry_point()


def test_main_without_command_lists_all_commands(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch)
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--help")
    assert ended.value.code == 0
    listed = re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert listed == COMMANDS * 2


@pytest.mark.parametrize("command", COMMANDS)
def test_main_with_command_shows_help_of_command(monkeypatch, capsys, command):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, command, "--help")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: hf-tokenmixup {command} ")


def test_main_with_unknown_command_suggests_similar_command(monkeypatch):
    with pytest.raises(SystemExit, match="^hf-tokenmixup: there is no command 'fine-tune': did you mean finetune\\? "):
        run(monkeypatch, "fine-tune")
    with pytest.raises(SystemExit, match="there is no command 'xyz'. Commands: finetune, calibrate, evaluate"):
        run(monkeypatch, "xyz")


def test_main_with_wrong_option_prints_one_line(monkeypatch):
    with pytest.raises(SystemExit, match="^hf-tokenmixup finetune: There is no recipe 'none-such'"):
        run(monkeypatch, "finetune", "--recipe", "none-such")


def test_main_with_version_prints_version(monkeypatch, capsys):
    run(monkeypatch, "--version")
    assert capsys.readouterr().out == f"hf_tokenmixup {__version__}\n"


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("scripts/finetune.py", "scripts/evaluate.py"),
        ("/somewhere/scripts/finetune.py", "scripts/evaluate.py"),
        ("hf-tokenmixup finetune", "-m hf_tokenmixup.cli.evaluate"),
        (program.__file__.replace("program", "finetune"), "-m hf_tokenmixup.cli.evaluate"),
    ],
)
def test_invocation_matches_running_program(monkeypatch, argument, expected):
    monkeypatch.setattr(sys, "argv", [argument])
    assert program.invocation("evaluate") == expected
