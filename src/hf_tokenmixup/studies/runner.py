"""One training of a study: a folder that holds its result, or a checkpoint to go on from, and what it was asked for.

A training counts as finished once its evaluation is written. A folder whose training was given other options is never
gone on with and never counted. For Linux and macOS: folders are held by file locks.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

from ..training.checkpointing.integrity import find_checkpoint_error, list_checkpoints
from .definitions import Row, Study
from .results import atomic_write_text

RUN_SPEC_FILE, RESULTS_FILE, LOG_FILE = "study.json", "all_results.json", "finetune.log"
# Where it writes, how it starts and how it reads: none of this changes what is trained.
IGNORED_OPTIONS = """recipe output_dir resume_from_checkpoint token hub_token license cache_dir report_to disable_tqdm
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory""".split()
TERMINATE_TIMEOUT_S = 60.0
OWN_ERROR = "finetune.py: "


@dataclass(frozen=True)
class Request:
    """What a training is asked for, by option: all `options`, and which of them were given beside the recipe."""

    launcher: list[str]
    options: dict[str, list[str]]
    overrides: dict[str, list[str]]


@dataclass(frozen=True)
class Unfinished:
    """Why a training is not finished, and the error, if any, that finetune.py ended with before a checkpoint."""

    reason: str
    error: str | None = None


def parse_option_words(words: Sequence[str]) -> dict[str, list[str]]:
    """The options of a command line by name, each with its words; of one that is repeated the last.

    Without those that have no effect on what is trained, the tokens among them.
    """
    options: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            current = options[name.replace("-", "_")] = [value] if equals else []
        else:
            current.append(word)
    return {name: values for name, values in options.items() if name not in IGNORED_OPTIONS}


def run_dir(output_dir: Path, row: Row, seed: int) -> Path:
    """Where a row is trained with a seed; model cards take the folder's name for a title."""
    return output_dir / f"{row.key}-seed-{seed}"


def find_seeds(output_dir: Path, study: Study) -> list[int]:
    """The seeds that there are folders of."""
    starts = [f"{row.key}-seed-" for row in study.rows]
    names = {path.name.removeprefix(start) for start in starts for path in output_dir.glob(f"{start}*")}
    return sorted(int(name) for name in names if name.isdigit())


def collect_top1(output_dir: Path, study: Study, seeds: Sequence[int]) -> dict[str, dict[int, float]]:
    """Top-1 in percent of what is finished, by the rows' keys and by seed."""
    found = {row.key: {seed: load_top1(run_dir(output_dir, row, seed)) for seed in seeds} for row in study.rows}
    return {key: {seed: 100 * top1 for seed, top1 in row.items() if top1 is not None} for key, row in found.items()}


def load_top1(folder: Path) -> float | None:
    """Top-1 in [0, 1] of a finished training; None for one that is not."""
    return _read_json(folder / RESULTS_FILE).get("eval_top1")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; one in whose writing a training was killed is passed over."""
    return next(
        (checkpoint for checkpoint in list_checkpoints(folder) if find_checkpoint_error(checkpoint) is None), None
    )


def load_run_spec(folder: Path) -> Request | None:
    """What the training in a folder was asked for; None where no study has written it."""
    content = _read_json(folder / RUN_SPEC_FILE)
    return Request(**content) if content.keys() == {item.name for item in fields(Request)} else None


def check_run_spec(folder: Path, request: Request) -> None:
    """See to it that a folder holds nothing, or a training of this request.

    Raises:
        ValueError: names what differs, and the ways out.
    """
    if load_top1(folder) is None and last_checkpoint(folder) is None:
        return
    held = load_run_spec(folder)
    remedy = "Give another --output_dir, or remove that folder to train anew."
    if held is None:
        raise ValueError(f"{folder} holds a training that was not started by this script. {remedy}")
    differences = _differences(_flatten(held), _flatten(request))
    if differences:
        raise ValueError(
            f"{folder} holds a training with other options: {'; '.join(differences)}. Repeat the options it was "
            f"trained with. {remedy}"
        )


def train(folder: Path, request: Request, command: Sequence[str], tell: Callable[[str], None]) -> Unfinished | None:
    """Train in a folder, unless that is done; go on from the checkpoint there is.

    Args:
        folder: made if it is not there.
        request: what `command` says.
        command: of finetune.py, without the checkpoint to go on from.
        tell: is called with a line when it starts and when it ends.

    Returns:
        None if it is finished, else why not.

    Raises:
        ValueError: for a folder that holds a training of another request.
    """
    with _lock_run_dir(folder) as log:
        if log is None:
            tell("another process trains it, and it is passed over")
            return Unfinished(f"trained by another process, which has {folder} on its command line")
        check_run_spec(folder, request)
        if (top1 := load_top1(folder)) is not None:
            tell(f"top-1 {top1:.2%}, finished before")
            return None
        atomic_write_text(folder / RUN_SPEC_FILE, json.dumps(asdict(request), indent=2) + "\n")
        checkpoint = last_checkpoint(folder)
        # A row that was stopped between its model and its results starts again, over that model.
        resume = ["--resume_from_checkpoint", str(checkpoint) if checkpoint else "auto"]
        tell(f"{f'goes on from {checkpoint.name}' if checkpoint else 'starts'}; log: {folder / LOG_FILE}")
        start, begin = time.monotonic(), log.tell()
        status = run_training([*command, *resume], log)
    if (top1 := load_top1(folder)) is not None:
        tell(f"top-1 {top1:.2%}, after {time.monotonic() - start:.0f} s")
        return None
    reason = failure_reason((folder / LOG_FILE).read_bytes()[begin:].decode(errors="replace"))
    tell(f"failed with status {status}: {reason}")
    own = reason.startswith(OWN_ERROR) and last_checkpoint(folder) is None
    error = reason.removeprefix(OWN_ERROR).replace(str(folder), "FOLDER") if own else None
    return Unfinished(f"status {status}, see {folder / LOG_FILE}", error)


def run_training(command: Sequence[str], log: BinaryIO) -> int:
    """Run a training to its end and return its exit status; all that it prints goes into the log.

    It gets a process group of its own, which is ended if this process is interrupted meanwhile.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait()
    except BaseException:
        _terminate_process_group(process)
        raise


def failure_reason(log: str) -> str:
    """The line of a log that tells why finetune.py failed: its own message, else the exception, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith(OWN_ERROR)]
    # The launcher's own exception comes last, and tells nothing.
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line) and "CalledProcess" not in line]
    return (own or raised or lines or ["it printed nothing"])[-1]


@contextmanager
def _lock_run_dir(folder: Path) -> Iterator[BinaryIO | None]:
    """Hold a folder, as the open log of its training; None while another process trains in it.

    Whoever inherits the log, as the training does, goes on holding the folder, also if this process is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield log


def _terminate_process_group(process: subprocess.Popen) -> None:
    """End a process and those that it started, which may still be writing a checkpoint when it is gone itself."""
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + TERMINATE_TIMEOUT_S
        while time.monotonic() < deadline:
            process.poll()
            # Raises once the group is empty.
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_json(path: Path) -> dict:
    """The content of a file; empty where there is none, or where a process was killed while it wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _flatten(request: Request) -> dict[str, list[str]]:
    return request.options | {"launcher": request.launcher}


def _differences(held: Mapping[str, list[str]], asked: Mapping[str, list[str]]) -> list[str]:
    """Up to three differences in words, and how many more there are."""
    names = sorted(name for name in held.keys() | asked.keys() if held.get(name) != asked.get(name))
    told = [f"{name} is {_value(held.get(name))} there and {_value(asked.get(name))} now" for name in names]
    return told if len(told) <= 3 else [*told[:3], f"and {len(told) - 3} more"]


def _value(words: list[str] | None) -> str:
    return "not given" if words is None else repr(" ".join(words))
