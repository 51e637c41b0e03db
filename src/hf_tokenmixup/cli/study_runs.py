"""Start the runs of a study: the command lines of training and evaluation, and the time that is left for them."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import string_to_bool

from ..studies.definitions import StudyRow
from ..studies.runner import (
    CORRUPTIONS_FILE,
    RunSpec,
    Unfinished,
    evaluate_corruptions_if_needed,
    load_corruption_top1,
    load_top1,
    parse_option_words,
    run_dir,
    run_if_needed,
)
from .arguments import DataArguments, EvalDataArguments

FINETUNE, EVALUATE = ("-m", "hf_tokenmixup.cli.finetune"), ("-m", "hf_tokenmixup.cli.evaluate")
# Options of finetune.py that evaluate.py has too.
EVALUATION_OPTIONS = tuple(field.name for field in dataclasses.fields(EvalDataArguments))
HUB_OPTIONS = ("cache_dir", "token")
# A shorter rest of the time starts no run.
MIN_TIME_S = 30.0


@dataclass(frozen=True)
class RunStarter:
    """What the runs of one command have in common.

    Attributes:
        launcher: Words of the launcher's command line, with the path of its program.
        overrides: Options of finetune.py for every run.
        output_dir: Folder of all studies.
        deadline: Time of `time.monotonic` at which runs stop, in seconds. None: they are not stopped.
        with_corruptions: Whether finished runs are evaluated on corrupted images too.
    """

    launcher: Sequence[str]
    overrides: Sequence[str]
    output_dir: Path
    deadline: float | None = None
    with_corruptions: bool = False

    @property
    def time_is_over(self) -> bool:
        """Whether too little time is left to start a run."""
        return self.deadline is not None and self.deadline - time.monotonic() < MIN_TIME_S

    def is_finished(self, folder: Path) -> bool:
        """Whether the run in a folder is trained, and evaluated on all images that the study needs."""
        evaluated = not self.with_corruptions or load_corruption_top1(folder) is not None
        return load_top1(folder) is not None and evaluated

    def start(self, row: StudyRow, seed: int, run_spec: RunSpec, base: Path | None = None) -> Unfinished | None:
        """Train a row with a seed unless this run is finished. Prints a line at its start and one at its end.

        Args:
            row: The row.
            seed: The seed.
            run_spec: Settings of the run.
            base: Folder of the model that it starts from, if not that of its recipe.

        Returns:
            None if the run is finished, otherwise the reason why not.

        Raises:
            ValueError: The run's folder contains a run with other settings.
        """
        folder = run_dir(self.output_dir, row, seed)
        model = ["--model_name_or_path", str(base)] if base else []
        command = [*self.launcher, *FINETUNE, "--recipe", row.recipe, *row.options, *model, *self.overrides]
        command += ["--seed", str(seed), "--output_dir", str(folder)]
        if self.deadline is not None:
            command += ["--max_time", f"{(self.deadline - time.monotonic()) / 60:.3f}"]
        return run_if_needed(folder, run_spec, command, log=lambda line: print(f"  {line}", flush=True))

    def evaluate_corruptions(self, row: StudyRow, seed: int, run_spec: RunSpec) -> Unfinished | None:
        """Evaluate a trained row with a seed on corrupted images unless this is done.

        Args:
            row: The row.
            seed: The seed.
            run_spec: Settings of the run.

        Returns:
            None if the run is evaluated, otherwise the reason why not.
        """
        folder = run_dir(self.output_dir, row, seed)
        if not self.is_finished(folder) and self.time_is_over:
            return Unfinished("not evaluated on corrupted images", timed_out=True)
        options = {name: run_spec.options[name] for name in EVALUATION_OPTIONS if name in run_spec.options}
        if "validation_dir" not in options:
            options.setdefault("train_val_split", [str(DataArguments.train_val_split)])
        options |= {"seed": [str(seed)], "corruptions": [], "json": [str(folder / CORRUPTIONS_FILE)]}
        for dtype in ("bf16", "fp16"):
            if is_on(run_spec, dtype):
                options["dtype"] = [dtype]
        if is_on(run_spec, "use_cpu"):
            options["use_cpu"] = []
        given = parse_option_words(self.overrides, ignored=())
        options |= {name: given[name] for name in HUB_OPTIONS if name in given}
        command = [*self.launcher, *EVALUATE, str(folder)]
        for name, values in options.items():
            command += [f"--{name}", *values]
        return evaluate_corruptions_if_needed(folder, command, log=lambda line: print(f"  {line}", flush=True))


def is_on(run_spec: RunSpec, name: str) -> bool:
    """Whether a run has a switch of finetune.py on, which may be given without a value."""
    return name in run_spec.options and string_to_bool(" ".join(run_spec.options[name]) or "true")
