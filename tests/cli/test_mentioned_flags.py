"""Flags in messages, help texts and the documentation exist in their commands."""

import ast
import re
from pathlib import Path

import pytest
from helpers.commands import command_parsers

from hf_tokenmixup.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "hf_tokenmixup"
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*[a-z0-9](?![\w-]*_\b)")
# Flags of accelerate launch and torchrun.
OF_LAUNCHERS = {
    "--num_processes",
    "--nproc_per_node",
    "--num_cpu_threads_per_process",
    "--multi_gpu",
    "--mixed_precision",
}
# Commands that take or build options of finetune too.
WITH_FINETUNE = ("calibrate", "study", "benchmark", "throughput", "model_cards", "convert")
# Modules with messages of a command, other than its own.
MODULES = {"finetune": ("validation", "optimizer_checks")}
# Which commands show the messages of a part of the library; the longest match counts.
SHOWN_BY = {
    "studies/definitions": ("study",),
    "studies/runner": ("study",),
    "hub/": ("finetune", "evaluate", "publish", "convert"),
    "conversion/": ("convert",),
    "training/": ("finetune",),
}
EXCEPTIONS = {
    ("hub/upload.py", "--revision"): "an option of publish, in the command that repeats an upload",
    ("cli/finetune.py", "--dtype"): "an option of evaluate, in the command that a model card shows",
}


def flags_of(command: str) -> frozenset[str]:
    """The options of a command and its subcommands, and those of finetune if the command accepts them."""
    flags = {
        flag for parser in command_parsers(command) for action in parser._actions for flag in action.option_strings
    }
    return frozenset(flags | (flags_of("finetune") if command in WITH_FINETUNE else set()))


def advised(path: Path) -> set[str]:
    """The flags in a module's texts and in its docstring, which is its help, without those of other docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    docstrings = {id(node.body[0].value) for node in documented if isinstance(node.body[0], ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
    return {flag for text in texts for flag in FLAG.findall(text)} - OF_LAUNCHERS


def missing(path: Path, commands) -> dict[str, list[str]]:
    name = path.relative_to(PACKAGE).as_posix()
    lacking = {
        flag: [command for command in commands if flag not in flags_of(command)]
        for flag in advised(path)
        if (name, flag) not in EXCEPTIONS
    }
    return {flag: commands for flag, commands in lacking.items() if commands}


@pytest.mark.parametrize("command", [*COMMANDS, "model_cards"])
def test_command_messages_name_existing_flags(command):
    modules = (command, *MODULES.get(command, ()))
    assert all(advised(PACKAGE / "cli" / f"{module}.py") for module in MODULES.get(command, ()))
    assert [missing(PACKAGE / "cli" / f"{module}.py", [command]) for module in modules] == [{}] * len(modules)


@pytest.mark.parametrize("part", sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()))
def test_library_messages_name_flags_of_each_command(part):
    wrong = {}
    for path in sorted((PACKAGE / part).rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if part == "cli" or not advised(path):
            continue
        matching = [start for start in SHOWN_BY if name.startswith(start)]
        assert matching, f"{name} advises {advised(path)}: say in SHOWN_BY which commands show it"
        if found := missing(path, SHOWN_BY[max(matching, key=len)]):
            wrong[name] = found
    assert wrong == {}


@pytest.mark.parametrize("part", ["data", "models"])
def test_data_and_model_messages_name_parameters_instead_of_flags(part):
    assert {path.name: advised(path) for path in (PACKAGE / part).rglob("*.py") if advised(path)} == {}


def test_flag_exceptions_are_used():
    assert [(name, flag) for name, flag in EXCEPTIONS if flag not in advised(PACKAGE / name)] == []


def test_flags_of_the_troubleshooting_page_exist():
    named = set(FLAG.findall((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")))
    known = set().union(*(flags_of(command) for command in COMMANDS))
    assert named and named <= known


def test_documentation_flags_exist_in_commands():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    called = re.compile(r"(?:scripts/(\w+)\.py|hf-tokenmixup (\w+)|hf_tokenmixup\.cli\.(\w+))([^\n`#]*)")
    wrong = []
    for found in called.finditer(text):
        command = next(filter(None, found.groups()[:3])).replace("convert_weights", "convert")
        if command in (*COMMANDS, "model_cards"):
            wrong += [(command, flag) for flag in FLAG.findall(found[4]) if flag not in flags_of(command)]
    assert wrong == []
