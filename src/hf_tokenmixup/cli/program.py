"""The name of the running program, and errors as one line, for all commands."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

CONSOLE_COMMAND = "hf-tokenmixup"


def program_name() -> str:
    """The running program: `finetune.py`, or `hf-tokenmixup finetune`."""
    return Path(sys.argv[0]).name


def invocation(name: str) -> str:
    """What runs a command after `python` or `accelerate launch`: its script, or its module outside a clone."""
    program = Path(sys.argv[0])
    installed = program.name.startswith(CONSOLE_COMMAND) or program.resolve().parent == Path(__file__).parent
    return f"-m hf_tokenmixup.cli.{name}" if installed else f"scripts/{name}.py"


def exit_with(error: object) -> NoReturn:
    """End the process with status 1 and one line on stderr."""
    line = f"{program_name()}: {' '.join(str(error).split())}"
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
    main: Callable[[Sequence[str]], None], errors: tuple[type[BaseException], ...] = (ValueError, OSError)
) -> None:
    """Run `main` with the command line's arguments; exceptions of the types `errors` end the process with one line."""
    try:
        main(sys.argv[1:])
    except errors as error:
        exit_with(error)
