"""The name of the running program, and errors as one line, for all commands."""

import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ..utils.text import replace_parameters_by_flags
from .parser import flags_by_parameter

CONSOLE_COMMAND = "hf-tokenmixup"
# The system usually kills a worker of a data loader for its memory.
OUT_OF_MEMORY = re.compile(
    "out of memory|allocate memory|insufficient shared memory|DataLoader worker .*(killed by|exited unexpected)"
)


def program_name() -> str:
    """The running program: `finetune.py`, or `hf-tokenmixup finetune`."""
    return Path(sys.argv[0]).name


def invocation(name: str) -> str:
    """What runs a command after `python` or `accelerate launch`: its script, or its module outside a clone."""
    program = Path(sys.argv[0])
    installed = program.name.startswith(CONSOLE_COMMAND) or program.resolve().parent == Path(__file__).parent
    return f"-m hf_tokenmixup.cli.{name}" if installed else f"scripts/{name}.py"


def worker_error(error: BaseException) -> tuple[Path, str] | None:
    """The file and the message of an error in a worker of a data loader; None for another error.

    torch raises such an error again with the worker's traceback as its message.
    """
    text = str(error)
    files = re.findall(r'^  File "(.+)", line \d+, in ', text, re.MULTILINE)
    if not (text.startswith("Caught ") and " in DataLoader worker process " in text.partition("\n")[0] and files):
        return None
    # torch writes only the name of the type, and a traceback also its module.
    last = re.search(rf"^([\w.]+\.)?{type(error).__name__}: ", text[text.rindex('  File "') :], re.MULTILINE)
    return last and (Path(files[-1]), last.string[last.end() :])


def out_of_memory_message(error: BaseException) -> str | None:
    """The first line of an out-of-memory error of a device, the CPU or a data loader; None for another error."""
    if not isinstance(error, MemoryError | RuntimeError):
        return None
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return text.rstrip(".") or type(error).__name__
    return None


def exit_with(error: object, flags: Mapping[str, str] | None = None) -> NoReturn:
    """End the process with status 1 and one line on stderr.

    Args:
        error: an error or its message.
        flags: the command's flags by the names of parameters, which messages of the library have.
    """
    in_worker = worker_error(error) if isinstance(error, BaseException) else None
    message = replace_parameters_by_flags(str(in_worker[1] if in_worker else error), flags or {})
    line = f"{program_name()}: {' '.join(message.split())}"
    # Set by `hf_tokenmixup.training.peers` in one of several processes; the other processes end too.
    report = getattr(sys.excepthook, "report", None)
    if report is not None:
        report(line, show=True)
        sys.exit(1)
    sys.exit(line)


def check_output_file(option: str, path: Path) -> None:
    """Create the folder of a file that a command writes at its end, and check that the file can be written.

    Args:
        option: the flag that names the file.
        path: of the file.

    Raises:
        ValueError: It cannot be written.
    """
    file = next((parent for parent in path.parents if parent.is_file()), None)
    try:
        if path.is_dir() or file is not None:
            raise OSError(f"{file} is a file, not a folder" if file else f"{path} is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(
            f"{option} must name a file that can be written, got {path}: {error.strerror or error}. Name another file."
        ) from error


def run_command(
    main: Callable[[Sequence[str]], None],
    errors: tuple[type[BaseException], ...] = (ValueError, OSError),
    build_parser: Callable[[], ArgumentParser] | None = None,
) -> None:
    """Run `main` with the command line's arguments, and end the process with one line for an expected error.

    Args:
        main: of a command.
        errors: types of expected errors. Errors of too little memory are expected too.
        build_parser: builds the command's parser, whose flags replace parameter names in messages of the library.
    """
    try:
        main(sys.argv[1:])
    except errors as error:
        exit_with(error, flags_by_parameter(build_parser()) if build_parser else None)
    except (MemoryError, RuntimeError) as error:
        message = out_of_memory_message(error)
        if message is None:
            raise
        exit_with(f"not enough memory ({message}). Use smaller batches or images, or fewer workers.")
