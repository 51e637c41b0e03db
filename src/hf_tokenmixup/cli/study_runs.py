"""Start the training runs of a study: their command lines, and the time that is left for them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..studies.definitions import StudyRow
from ..studies.runner import RunSpec, Unfinished, run_dir, run_if_needed

FINETUNE = ("-m", "hf_tokenmixup.cli.finetune")
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
    """

    launcher: Sequence[str]
    overrides: Sequence[str]
    output_dir: Path
    deadline: float | None = None

    @property
    def time_is_over(self) -> bool:
        """Whether too little time is left to start a run."""
        return self.deadline is not None and self.deadline - time.monotonic() < MIN_TIME_S

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
