"""Name of the running program, and errors as one line, for all commands."""

import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ..utils.text import replace_parameters_by_flags
from .parser import flags_by_parameter

CONSOLE_COMMAND = "hf-tokenmixup"
# The system kills a worker of a data loader usually because memory is exhausted.
OUT_OF_MEMORY = re.compile(
    "out of memory|allocate memory|insufficient shared memory|DataLoader worker .*(killed by|exited unexpected)"
)


def program_name() -> str:
    """Return the name of the running program: `finetune.py`, or `hf-tokenmixup finetune`."""
    return Path(sys.argv[0]).name


def invocation(name: str) -> str:
    """Return the argument of `python` or `accelerate launch` that runs a command.

    Args:
        name: Name of the command, such as `finetune`.

    Returns:
        `scripts/finetune.py` in a clone of the repository, otherwise `-m hf_tokenmixup.cli.finetune`.
    """
    program = Path(sys.argv[0])
    is_installed = program.name.startswith(CONSOLE_COMMAND) or program.resolve().parent == Path(__file__).parent
    return f"-m hf_tokenmixup.cli.{name}" if is_installed else f"scripts/{name}.py"


def worker_error(error: BaseException) -> tuple[Path, str] | None:
    """Return file and message of an error that a data loader worker raised.

    torch raises the error of a worker again in the main process, with the traceback of the worker as its message.

    Returns:
        Path of the file that raised the error, and its message; None if no worker raised the error.
    """
    text = str(error)
    files = re.findall(r'^  File "(.+)", line \d+, in ', text, re.MULTILINE)
    if not (text.startswith("Caught ") and " in DataLoader worker process " in text.partition("\n")[0] and files):
        return None
    # A traceback contains the module of the type, `type(error).__name__` does not.
    last = re.search(rf"^([\w.]+\.)?{type(error).__name__}: ", text[text.rindex('  File "') :], re.MULTILINE)
    return last and (Path(files[-1]), last.string[last.end() :])


def out_of_memory_message(error: BaseException) -> str | None:
    """Return the first line of an out-of-memory error of a device, the CPU or a data loader; None for other errors."""
    if not isinstance(error, MemoryError | RuntimeError):
        return None
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return text.rstrip(".") or type(error).__name__
    return None


def exit_with(error: object, flags: Mapping[str, str] | None = None) -> NoReturn:
    """End the process with status 1 and one line on stderr.

    Args:
        error: Error or its message.
        flags: Flags of the command by parameter name. They replace parameter names in messages of the library.
    """
    in_worker = worker_error(error) if isinstance(error, BaseException) else None
    message = replace_parameters_by_flags(str(in_worker[1] if in_worker else error), flags or {})
    line = f"{program_name()}: {' '.join(message.split())}"
    # `hf_tokenmixup.training.peers` sets this hook if there are several processes. It ends the others too.
    report = getattr(sys.excepthook, "report", None)
    if report is not None:
        report(line, show=True)
        sys.exit(1)
    sys.exit(line)


def check_output_file(option: str, path: Path) -> None:
    """Create the folder of an output file, and check that the file can be written.

    A command calls this before its work, so that no result is lost.

    Args:
        option: Flag of the output file.
        path: Path of the output file.

    Raises:
        ValueError: The file cannot be written.
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
        main: Main function of the command.
        errors: Types of expected errors. Out-of-memory errors are expected too.
        build_parser: Function that builds the parser of the command. Its flags replace parameter names in messages of
            the library.
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
