"""Training runs of a study: each has a folder with its settings and its result, or a checkpoint to resume from.

A run is finished once its evaluation results are written. A folder with a run of other settings is neither resumed nor
counted. Linux and macOS only, as folders are locked with `fcntl`.
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
from statistics import mean
from typing import BinaryIO

from ..training.checkpointing.integrity import find_checkpoint_error, list_checkpoints
from .definitions import CORRUPTION_METRIC, MIXING_RESULTS, Study, StudyRow
from .results import atomic_write_text

RUN_SPEC_FILE, RESULTS_FILE, LOG_FILE = "study.json", "all_results.json", "finetune.log"
# Result of evaluate.py on corrupted images.
CORRUPTIONS_FILE = "corruptions.json"
# These options do not change the trained model: output, credentials, resuming and data loading.
IGNORED_OPTIONS = (
    "recipe",
    "output_dir",
    "resume_from_checkpoint",
    "max_time",
    "token",
    "hub_token",
    "license",
    "cache_dir",
    "report_to",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
)
TERMINATE_TIMEOUT_S = 60.0
ERROR_PREFIXES = ("finetune.py: ", "evaluate.py: ")
MAX_DIFFERENCES = 3


@dataclass(frozen=True)
class RunSpec:
    """Settings of a training run, saved in its folder.

    Attributes:
        launcher: Words of the launcher's command line.
        options: All options that change the trained model, by name.
        overrides: The options among them that replace those of the recipe.
    """

    launcher: list[str]
    options: dict[str, list[str]]
    overrides: dict[str, list[str]]


@dataclass(frozen=True)
class Unfinished:
    """Outcome of a run that did not finish.

    Attributes:
        reason: One sentence for the report.
        error: Message of finetune.py if it failed before its first checkpoint.
        timed_out: Whether it stopped at its `max_time`, with a checkpoint to resume from.
    """

    reason: str
    error: str | None = None
    timed_out: bool = False


def parse_option_words(words: Sequence[str], ignored: Sequence[str] = IGNORED_OPTIONS) -> dict[str, list[str]]:
    """Parse the words of a command line into values by option name; the last of repeated options is used.

    Args:
        words: Words of the command line.
        ignored: Options to omit; by default tokens and others that do not change the trained model.
    """
    options: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            current = options[name.replace("-", "_")] = [value] if equals else []
        else:
            current.append(word)
    return {name: values for name, values in options.items() if name not in ignored}


def run_dir(output_dir: Path, row: StudyRow, seed: int) -> Path:
    """Return the output folder for a row and seed. Its name is also the title of the model card."""
    return output_dir / f"{row.key}-seed-{seed}"


def find_seeds(output_dir: Path, study: Study) -> list[int]:
    """List the seeds that have an output folder, in ascending order."""
    prefixes = [f"{row.key}-seed-" for row in study.rows]
    names = {path.name.removeprefix(prefix) for prefix in prefixes for path in output_dir.glob(f"{prefix}*")}
    return sorted(int(name) for name in names if name.isdigit())


def collect_top1(output_dir: Path, study: Study, seeds: Sequence[int]) -> dict[str, dict[int, float]]:
    """Read the top-1 accuracy of finished runs in percent, by the keys of the rows and by seed."""
    found = {row.key: {seed: load_top1(run_dir(output_dir, row, seed)) for seed in seeds} for row in study.rows}
    return {key: {seed: 100 * top1 for seed, top1 in row.items() if top1 is not None} for key, row in found.items()}


def collect_mixing(output_dir: Path, study: Study, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Read what HTM did in finished runs: means over the seeds of `MIXING_RESULTS`, by the keys of the rows.

    A row without HTM has no values. A value that some runs do not have, such as the replaced tokens where nothing was
    mixed, is the mean over the others.
    """
    found = {}
    for row in study.rows:
        folders = [run_dir(output_dir, row, seed) for seed in seeds]
        results = [_read_json(folder / RESULTS_FILE) for folder in folders if load_top1(folder) is not None]
        values = {
            name: [result[f"train_{name}"] for result in results if f"train_{name}" in result]
            for name in MIXING_RESULTS
        }
        found[row.key] = {name: mean(numbers) for name, numbers in values.items() if numbers}
    return found


def collect_metrics(output_dir: Path, study: Study, seeds: Sequence[int]) -> dict[str, dict[str, dict[int, float]]]:
    """Read the study's further metrics of finished runs by seed, by the keys of the rows and the names of the metrics.

    Runs of earlier versions do not have all of them.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in study.rows:
        folders = {seed: run_dir(output_dir, row, seed) for seed in seeds}
        results = {seed: _read_json(path / RESULTS_FILE) for seed, path in folders.items()}
        results = {seed: result for seed, result in results.items() if "eval_top1" in result}
        for seed, result in results.items():
            if (top1 := load_corruption_top1(folders[seed])) is not None:
                result[f"eval_{CORRUPTION_METRIC}"] = 100 * top1
        found[row.key] = {
            name: {seed: result[f"eval_{name}"] for seed, result in results.items() if f"eval_{name}" in result}
            for name in study.metrics
        }
    return found


def load_top1(folder: Path) -> float | None:
    """Read the top-1 accuracy of a run, in [0, 1]. None if the run is not finished."""
    return _read_json(folder / RESULTS_FILE).get("eval_top1")


def load_corruption_top1(folder: Path) -> float | None:
    """Read the mean top-1 accuracy of a run on corrupted images, in [0, 1]. None if it is not evaluated on them."""
    return (_read_json(folder / CORRUPTIONS_FILE).get("corruption_mean") or {}).get("top1")


def find_last_checkpoint(folder: Path) -> Path | None:
    """Return the latest complete checkpoint, without warning about incomplete ones, as finetune.py does on resume."""
    return next(
        (checkpoint for checkpoint in list_checkpoints(folder) if find_checkpoint_error(checkpoint) is None), None
    )


def load_run_spec(folder: Path) -> RunSpec | None:
    """Read the settings of the run in a folder. None if no study has written any."""
    content = _read_json(folder / RUN_SPEC_FILE)
    return RunSpec(**content) if content.keys() == {item.name for item in fields(RunSpec)} else None


def validate_run_spec(folder: Path, spec: RunSpec) -> None:
    """Check that a folder is unused or contains a run with these settings.

    Raises:
        ValueError: The folder contains another run; the message lists the differences.
    """
    if load_top1(folder) is None and find_last_checkpoint(folder) is None:
        return
    existing = load_run_spec(folder)
    hint = "Choose another `output_dir` or delete this folder."
    if existing is None:
        raise ValueError(f"{folder} contains a run that was not created by study.py. {hint}")
    differences = _list_differences(_flatten(existing), _flatten(spec))
    if differences:
        raise ValueError(
            f"{folder} contains a run with other options: {'; '.join(differences)}. Repeat the options of that run. "
            f"{hint}"
        )


def run_if_needed(
    folder: Path, spec: RunSpec, command: Sequence[str], log: Callable[[str], None]
) -> Unfinished | None:
    """Train in a folder unless the run is finished. Resumes from the latest complete checkpoint.

    Args:
        folder: Output folder of the run, created if missing.
        spec: Settings that `command` has.
        command: Command line of finetune.py without a checkpoint to resume from.
        log: Is called with one line at the start and one at the end.

    Returns:
        None if the run is finished, otherwise the reason why not.

    Raises:
        ValueError: The folder contains a run with other settings.
    """
    with _lock_run_dir(folder) as log_file:
        if log_file is None:
            log("skipped: locked by another process")
            return Unfinished(f"locked by another process, whose command line contains {folder}")
        validate_run_spec(folder, spec)
        if (top1 := load_top1(folder)) is not None:
            log(f"top-1 {top1:.2%}, already finished")
            return None
        atomic_write_text(folder / RUN_SPEC_FILE, json.dumps(asdict(spec), indent=2) + "\n")
        checkpoint = find_last_checkpoint(folder)
        # A run that was stopped between its model and its results starts again, over that model.
        resume = ["--resume_from_checkpoint", str(checkpoint) if checkpoint else "auto"]
        log(f"{f'resumes from {checkpoint.name}' if checkpoint else 'starts'}; log: {folder / LOG_FILE}")
        start, log_start = time.monotonic(), log_file.tell()
        status = run_process([*command, *resume], log_file)
    if (top1 := load_top1(folder)) is not None:
        log(f"top-1 {top1:.2%}, after {time.monotonic() - start:.0f} s")
        return None
    checkpoint = find_last_checkpoint(folder)
    if status == 0 and checkpoint:
        log(f"stopped at {checkpoint.name}, after {time.monotonic() - start:.0f} s")
        return Unfinished(f"stopped at {checkpoint.name}", timed_out=True)
    reason = find_failure_reason((folder / LOG_FILE).read_bytes()[log_start:].decode(errors="replace"))
    log(f"failed with status {status}: {reason}")
    error = None
    if reason.startswith(ERROR_PREFIXES) and checkpoint is None:
        error = reason.partition(": ")[2].replace(str(folder), "FOLDER")
    return Unfinished(f"status {status}, see {folder / LOG_FILE}", error)


def evaluate_corruptions_if_needed(
    folder: Path, command: Sequence[str], log: Callable[[str], None]
) -> Unfinished | None:
    """Evaluate a finished run on corrupted images unless this is done.

    Args:
        folder: Output folder of the run.
        command: Command line of evaluate.py that writes `CORRUPTIONS_FILE`.
        log: Is called with one line at the end.

    Returns:
        None if the run is evaluated, otherwise the reason why not.
    """
    with _lock_run_dir(folder) as log_file:
        if log_file is None:
            log("skipped: locked by another process")
            return Unfinished(f"locked by another process, whose command line contains {folder}")
        if load_corruption_top1(folder) is not None:
            return None
        log_start = log_file.tell()
        status = run_process(command, log_file)
    if (top1 := load_corruption_top1(folder)) is not None:
        log(f"top-1 {top1:.2%} on corrupted images")
        return None
    reason = find_failure_reason((folder / LOG_FILE).read_bytes()[log_start:].decode(errors="replace"))
    log(f"the evaluation on corrupted images failed with status {status}: {reason}")
    return Unfinished(f"not evaluated on corrupted images, see {folder / LOG_FILE}")


def run_process(command: Sequence[str], log_file: BinaryIO) -> int:
    """Run a command with its output in a log file, and return its exit status.

    The command has a process group of its own, which is terminated if this process is interrupted.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait()
    except BaseException:
        _terminate_process_group(process)
        raise


def find_failure_reason(log: str) -> str:
    """Find the line of a log that explains a failure: a message of the command, an exception, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    messages = [line for line in lines if line.startswith(ERROR_PREFIXES)]
    # The launcher's own exception comes last and only repeats the command.
    exceptions = [
        line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line) and "CalledProcess" not in line
    ]
    return (messages or exceptions or lines or ["no output"])[-1]


@contextmanager
def _lock_run_dir(folder: Path) -> Iterator[BinaryIO | None]:
    """Lock a folder and yield its open log file. Yields None if another process has the lock.

    The training process inherits the file and with it the lock, so the folder stays locked if this process is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("ab") as log_file:
        try:
            fcntl.flock(log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield log_file


def _terminate_process_group(process: subprocess.Popen) -> None:
    """Terminate a process and its children. Children may still write a checkpoint after the process has exited."""
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
    """Read a JSON object. Empty if the file is missing, or incomplete because its writer was killed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _flatten(spec: RunSpec) -> dict[str, list[str]]:
    return spec.options | {"launcher": spec.launcher}


def _list_differences(existing: Mapping[str, list[str]], requested: Mapping[str, list[str]]) -> list[str]:
    """Describe up to `MAX_DIFFERENCES` differences, and count the others."""
    names = sorted(name for name in existing.keys() | requested.keys() if existing.get(name) != requested.get(name))
    differences = [
        f"{name} was {_format_value(existing.get(name))} and is now {_format_value(requested.get(name))}"
        for name in names
    ]
    if len(differences) <= MAX_DIFFERENCES:
        return differences
    return [*differences[:MAX_DIFFERENCES], f"and {len(differences) - MAX_DIFFERENCES} more"]


def _format_value(words: list[str] | None) -> str:
    return "not set" if words is None else repr(" ".join(words))
