"""What all commands share: the name of the running program, and errors as one line."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

# A worker of a data loader that the system kills has, as a rule, taken too much memory.
NO_MEMORY = (
    "out of memory|allocate memory|insufficient shared memory|DataLoader worker .*(killed by|exited unexpected)"
)
CONSOLE_COMMAND = "hf-tokenmixup"


def program_name() -> str:
    """The running program: `finetune.py`, or `hf-tokenmixup finetune`."""
    return Path(sys.argv[0]).name


def invocation(name: str) -> str:
    """What runs command `name` after `python` or `accelerate launch`: its script, or its module outside of a clone."""
    program = Path(sys.argv[0])
    installed = program.name.startswith(CONSOLE_COMMAND) or program.resolve().parent == Path(__file__).parent
    return f"-m hf_tokenmixup.cli.{name}" if installed else f"scripts/{name}.py"


def worker_error(error: BaseException) -> tuple[Path, str] | None:
    """The file and the message of an error that torch passes on from a worker of a data loader, else None.

    The message that torch gives it is the traceback in the worker.
    """
    text = str(error)
    files = re.findall(r'^  File "(.+)", line \d+, in ', text, re.MULTILINE)
    if not (text.startswith("Caught ") and " in DataLoader worker process " in text.partition("\n")[0] and files):
        return None
    # torch names the type alone, a traceback its module too.
    last = re.search(rf"^([\w.]+\.)?{type(error).__name__}: ", text[text.rindex('  File "') :], re.MULTILINE)
    return last and (Path(files[-1]), last.string[last.end() :])


def lack_of_memory(error: BaseException) -> str | None:
    """The first line of an error of too little memory, of a device, the CPU or a data loader; None for another one."""
    if not isinstance(error, MemoryError | RuntimeError):
        return None
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
        return text.rstrip(".") or type(error).__name__
    return None


def exit_with(error: object) -> NoReturn:
    """End the process with status 1 and one line on stderr."""
    in_worker = worker_error(error) if isinstance(error, BaseException) else None
    line = f"{program_name()}: {' '.join(str(in_worker[1] if in_worker else error).split())}"
    # `hf_tokenmixup.training.peers`, where this process is one of several: the others end with it.
    report = getattr(sys.excepthook, "report", None)
    if report is not None:
        report(line, show=True)
        sys.exit(1)
    sys.exit(line)


def check_output_file(option: str, path: Path) -> None:
    """Make the folder of a file that is written at the end of a command, and try to write the file.

    Raises:
        ValueError: It cannot be written.
    """
    file = next((place for place in (path, *path.parents) if place.is_file() and place != path), None)
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
    main: Callable[[Sequence[str]], None], errors: tuple[type[BaseException], ...] = (ValueError, OSError)
) -> None:
    """Run `main` with the command line's arguments; exceptions of the types `errors` end the process with one line."""
    try:
        main(sys.argv[1:])
    except errors as error:
        exit_with(error)
    except (MemoryError, RuntimeError) as error:
        found = lack_of_memory(error)
        if found is None:
            raise
        exit_with(f"not enough memory ({found}). Use smaller batches or images, or fewer workers.")
