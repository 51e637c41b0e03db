"""Each command in a bash block of the documentation, or in a help text, is one that its program accepts.

Nothing is run.

Options of training runs are parsed as on a machine without a GPU.
"""

import re
import shlex
import textwrap
from argparse import Namespace

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers.commands import SCRIPTS, command_parsers, import_command
from helpers.documents import ROOT, fenced_blocks, page_texts, split_commands
from torch.distributed.run import get_args_parser

from hf_tokenmixup.cli.arguments import parse_options
from hf_tokenmixup.cli.main import COMMANDS
from hf_tokenmixup.cli.recipes import split_lists
from hf_tokenmixup.cli.validation import validate_options, validate_run

BLOCKS = fenced_blocks("bash", "sh", "shell", "console")
# Beginnings of commands of other programs, which no parser here can check.
OTHER_PROGRAMS = (
    "python -m venv ",
    "source .venv/bin/activate",
    "pre-commit install",
    "export MALLOC_",
    "hf auth login",
)
SCRIPT_NAMES = {"convert_weights": "convert"}


class ParsedError(Exception):
    """Raised in place of the work of a command that parses in `main`."""


def parse_finetune(arguments: list[str], *, is_run: bool = True) -> None:
    options = parse_options([*arguments, "--use_cpu"])
    if is_run:
        validate_options(options)
        # There is no run to resume.
        options.training.resume_from_checkpoint = None
        validate_run(options)


def parse_study(arguments: list[str]) -> None:
    study = import_command("study")
    args, overrides = study.parse_arguments(arguments)
    assert study.check_rows(study.build_study(args), args, [*overrides, "--use_cpu"]) == {}


def parse_with_finetune_options(command: str, parse: str, forced: str, arguments: list[str]) -> None:
    _, others = getattr(import_command(command), parse)(arguments)
    parse_options([*others, *shlex.split(forced)])


def parse_throughput(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def build_trainer(options: list[str]) -> None:
        parse_options([*options, "--use_cpu"])
        raise ParsedError

    throughput = import_command("throughput")
    monkeypatch.setattr(throughput, "build_trainer", build_trainer)
    with pytest.raises(ParsedError):
        throughput.main(arguments)


def parse_evaluate(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = import_command("evaluate")
    # It asks the Hub for write access.
    monkeypatch.setattr(evaluate, "validate_card_options", lambda data_args, args: None)
    evaluate.parse_options(arguments)


def parse_visualize(arguments: list[str]) -> None:
    visualize = import_command("visualize")
    args: Namespace = visualize.build_parser().parse_args(arguments)
    if args.command != "curves":
        visualize.validate_options(args)


def parse_convert(arguments: list[str]) -> None:
    parser = import_command("convert").build_parser()
    parser.parse_args(split_lists(arguments, parser))


def parse_command(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments of a command of this package; `...` stands for further options of a training run."""
    is_complete = "..." not in arguments
    arguments = [word for word in arguments if word != "..."]
    match command:
        case "finetune":
            parse_finetune(arguments, is_run=is_complete)
        case "study":
            parse_study(arguments)
        case "calibrate":
            parse_with_finetune_options("calibrate", "parse_own_options", "--do_train", arguments)
        case "benchmark":
            parse_with_finetune_options("benchmark", "parse_options", "", arguments)
        case "throughput":
            parse_throughput(arguments, monkeypatch)
        case "evaluate":
            parse_evaluate(arguments, monkeypatch)
        case "publish":
            import_command("publish").build_parser().parse_args(arguments)
        case "visualize":
            parse_visualize(arguments)
        case "demo":
            import_command("demo").build_parser().parse_args(arguments)
        case "convert":
            parse_convert(arguments)
        case "model_cards":
            command_parsers("model_cards")[0].parse_args(arguments)
        case _:
            raise AssertionError(f"There is no way to parse the command {command}.")


def parse_launched(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse what follows the interpreter: a script or a module of this package, and its arguments."""
    if words[0] == "-m":
        package, _, command = words[1].rpartition(".")
        assert package == "hf_tokenmixup.cli" and command in COMMANDS, words
        return parse_command(command, words[2:], monkeypatch)
    path = ROOT / words[0]
    assert path.is_file(), words
    if path.parent != SCRIPTS:
        assert words[1:] == [], "Only scripts/ has commands whose arguments are parsed."
        return None
    return parse_command(SCRIPT_NAMES.get(path.stem, path.stem), words[1:], monkeypatch)


def program_position(words: list[str]) -> int:
    """Position of the script, or of `-m`, in the words of a launcher."""
    return next(index for index, word in enumerate(words) if word == "-m" or word.startswith(("scripts/", "tests/")))


def check_pip(words: list[str]) -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for word in words[2:]:
        for extra in re.findall(r"\[([\w,]+)\]", word):
            assert all(f'"{name}": [' in setup for name in extra.split(",")), words
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file(), words


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(words)
    if words[:2] == ["accelerate", "launch"]:
        start = program_position(words)
        launch_command_parser().parse_args([*words[2:start], "script.py"])
        parse_launched(words[start:], monkeypatch)
    elif words[0] == "torchrun":
        start = program_position(words)
        get_args_parser().parse_args([*words[1:start], "script.py"])
        parse_launched(words[start:], monkeypatch)
    elif words[0] == "hf-tokenmixup":
        assert words[1] in COMMANDS, text
        parse_command(words[1], words[2:], monkeypatch)
    elif words[0] == "python" and words[1].endswith(".py"):
        parse_launched(words[1:], monkeypatch)
    elif words[:2] == ["pip", "install"]:
        check_pip(words)
    elif words[0] == "pytest":
        assert words in (["pytest", "-n", "auto", "--dist", "loadfile"], ["pytest"]), text
    else:
        assert f"{text} ".startswith(OTHER_PROGRAMS), f"No test checks this command: {text}"


COMMANDS_IN_BLOCKS = sorted(
    {(block.page, shlex.join(words)) for block in BLOCKS for words in split_commands(block.text)}
)


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS_IN_BLOCKS, ids=[f"{page}: {command[:60]}" for page, command in COMMANDS_IN_BLOCKS]
)
def test_documented_command_is_accepted_by_its_program(page, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_command(shlex.split(command), monkeypatch)


def help_examples(description: str) -> list[list[str]]:
    """Words of each command in the indented paragraphs of a help text."""
    paragraphs = [text for text in description.split("\n\n") if text.startswith("  ")]
    return [words for text in paragraphs for words in split_commands(textwrap.dedent(text))]


@pytest.mark.parametrize("command", [*COMMANDS, "model_cards"])
def test_help_example_is_accepted_by_its_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = {name: script for script, name in SCRIPT_NAMES.items()}.get(command, command)
    for parser in command_parsers(command):
        examples = help_examples(parser.description)
        assert examples, parser.prog
        for words in examples:
            # The prog of a subcommand is the script and its own name.
            assert {f"scripts/{script}.py", *parser.prog.split()[1:]} <= set(words), words
            check_command(words, monkeypatch)


def test_help_examples_are_the_commands_of_indented_paragraphs():
    text = "Title.\n\n  # task\n  python a.py \\\n      --b\n  python c.py\n\npart  words\n      more words\n"
    assert help_examples(text) == [["python", "a.py", "--b"], ["python", "c.py"]]


@pytest.mark.parametrize(
    "command",
    [
        "hf-tokenmixup finetune --recipe digits-quickstart --num_epochs 3",
        "accelerate launch --num_proceses 2 scripts/finetune.py --recipe digits-quickstart",
        "python scripts/finetune.py --recipe digits-quikstart",
        "python scripts/finetun.py --recipe digits-quickstart",
        "python scripts/study.py 4 --value 3",
        "python scripts/evaluate.py outputs/cifar100",
        'pip install -e ".[nothing]"',
        "make everything",
    ],
)
def test_misspelled_command_is_rejected(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, AssertionError, SystemExit)):
        check_command(shlex.split(command), monkeypatch)


def test_make_targets_in_documentation_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {target for text in page_texts().values() for target in re.findall(r"`make ([\w-]+)", text)}
    assert (
        named and [target for target in sorted(named) if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
    )
