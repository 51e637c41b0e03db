"""Kill a run again and again, resume it each time with the same command, and compare it with an uninterrupted run.

  python tests/kill_and_resume.py
  python tests/kill_and_resume.py --kills 9 --dataloader_num_workers 2 --dataloader_persistent_workers True
  python tests/kill_and_resume.py --kills 9 --streamed --dataloader_num_workers 2
  python tests/kill_and_resume.py --kills 9 --adapted --bf16
  python tests/kill_and_resume.py --kills 9 --checkpoint dinov2
  python tests/kill_and_resume.py --kills 24 --random --seed 1

The run is one of scripts/finetune.py with every option that draws random numbers or averages. Unknown options are
passed on to the script. The run sends SIGKILL to its own process group at a given moment: after each file of a
checkpoint (of which only a part may be written), before the removal of each file of an old checkpoint, in a step, in
an evaluation and so on. An uninterrupted run lists these moments. With `--random`, this program sends the signal at a
random time after a moment instead, and what it interrupts depends on the machine.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from helpers.commands import HANG_S, SCRIPTS
from helpers.family_checkpoints import CHECKPOINTS, write_checkpoint
from observed_training import Moment, Order
from safetensors.torch import load_file

from hf_tokenmixup.data.digits import load_digits_dataset
from hf_tokenmixup.training.checkpointing.integrity import CALLBACK_STATE_KEY, find_checkpoint_error, list_checkpoints

OBSERVED = Path(__file__).with_name("observed_training.py")
MODEL = {"image_size": 16, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MODEL |= {"intermediate_size": 128, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
# 15 steps an epoch: checkpoints are saved within epochs, at epoch ends and between two log steps.
OPTIONS = """--do_train --do_eval --eval_split test --use_cpu --report_to none --disable_tqdm true --seed 7
    --horizontal_layers 1 --horizontal_tau 2.3 --horizontal_rho 0 --vertical_layers 2
    --crop_scale 0.7 1.0 --hflip 0.5 --auto_augment rand-m5-mstd0.5-inc1-mmax9 --random_erasing 0.25
    --mixup_alpha 0.8 --cutmix_alpha 1.0 --mixup_mode elem --label_smoothing_factor 0.1
    --num_train_epochs 6 --per_device_train_batch_size 16 --per_device_eval_batch_size 64 --learning_rate 0.003
    --lr_scheduler_type cosine --warmup_steps 0.1 --weight_decay 0.05 --logging_steps 2
    --eval_strategy steps --eval_steps 5 --save_strategy steps --save_steps 5
    --save_total_limit 2 --load_best_model_at_end --metric_for_best_model top1 --ema_decay 0.9""".split()
FROM_SCRATCH = ["--from_scratch", "--model_type", "vit", "--config_overrides", json.dumps(MODEL)]
TRAIN_IMAGES, EVAL_IMAGES, SHARDS = 240, 132, 4
DATA = f"--dataset_name digits --max_train_samples {TRAIN_IMAGES} --max_eval_samples {EVAL_IMAGES}".split()
WHILE_TRAINING = ["start-up", "log", "training", "evaluation", "checkpoint", "removal"]
AT_THE_END = ["publishing", "final evaluation", "results"]
# These moments occur only when a checkpoint is resumed.
RESUMING = [Moment("start-up", "weights"), Moment("start-up", "optimizer")]


class Kill(NamedTuple):
    """A kill at the `number`-th occurrence of a moment, with a fraction of the file that is written there."""

    moment: Moment
    number: int
    fraction: float
    left: str


class Kills:
    """A run in one folder that is killed and resumed, each time with the same command."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.folder, self.options = folder, options
        self.output, self.events = folder.with_suffix(".txt"), folder.with_suffix(".events")
        self._server: subprocess.Popen | None = None

    def __enter__(self) -> "Kills":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait()

    def run(self, **order: Any) -> int:
        """Start the run with an order and return its exit status."""
        if self._server is None:
            # The server imports everything once, since imports take most of the time of a start.
            self._server = _start([sys.executable, OBSERVED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        request = [self._order(**order)._asdict(), self._command()[1:], str(self.output)]
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def finish(self) -> list[Moment]:
        """Train to the end and return the observed moments."""
        if status := self.run():
            raise RuntimeError(f"status {status}:\n{self.printed()[-3000:]}")
        return self.moments()

    def kill_at(self, moment: Moment, number: int, fraction: float) -> Kill:
        """Kill the run at the `number`-th occurrence of a moment."""
        with self._checked():
            status = self.run(at=moment, number=number, fraction=fraction)
            if status != -signal.SIGKILL or self.moments()[-1] != moment:
                raise RuntimeError(f"{moment} did not come; status {status}:\n{self.printed()[-3000:]}")
        return Kill(moment, number, fraction, self._left())

    def kill_some_time_after(self, moment: Moment, number: int, seconds: float) -> Kill | None:
        """Kill the run from this process; return None if the run ended before."""
        with self._checked():
            order = self.folder.with_suffix(".json")
            order.write_text(json.dumps(self._order()._asdict()))
            with self.output.open("ab") as output:
                command = [sys.executable, OBSERVED, order, *self._command()[1:]]
                process = _start(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            deadline = time.monotonic() + HANG_S
            try:
                while process.poll() is None and self.moments().count(moment) < number:
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"{moment} did not come in {HANG_S} s:\n{self.printed()[-3000:]}")
                    time.sleep(0.002)
                time.sleep(seconds)
                ended = process.poll()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if ended:
                raise RuntimeError(f"status {ended}:\n{self.printed()[-3000:]}")
        return None if ended == 0 else Kill(self.moments()[-1], number, 1.0, self._left())

    def moments(self) -> list[Moment]:
        """Return the moments of the last start."""
        return [Moment(*words[:2]) for words in self.timed_moments()]

    def timed_moments(self) -> list[list]:
        try:
            return list(_json_lines(self.events.read_text()))
        except FileNotFoundError:
            return []

    def printed(self) -> str:
        """Return the output of the last start."""
        return self.output.read_bytes()[self._begin :].decode(errors="replace")

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Check that a killed start loses no complete checkpoint and warns about each incomplete one."""
        complete, incomplete = self._checkpoints()
        yield
        newest = max(complete, default=0)
        resumed = Moment("start-up", "trainer") in self.moments()
        for step in incomplete:
            if step > newest and resumed and f"checkpoint-{step}: " not in self.printed():
                raise RuntimeError(f"checkpoint-{step} was skipped without a warning:\n{self.printed()}")
        if newest > max(self._checkpoints()[0], default=0):
            raise RuntimeError(f"the last complete checkpoint, of step {newest}, is gone")

    def _checkpoints(self) -> tuple[list[int], list[int]]:
        """Return the steps of the complete and of the incomplete checkpoints."""
        found = [(_step(path.name), find_checkpoint_error(path)) for path in list_checkpoints(self.folder)]
        return [step for step, error in found if error is None], [step for step, error in found if error is not None]

    def complete_checkpoints(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        return self._checkpoints()[0]

    def _left(self) -> str:
        complete, incomplete = self._checkpoints()
        return f"checkpoints {complete}, incomplete {incomplete}"

    def _order(self, **order: Any) -> Order:
        self.events.unlink(missing_ok=True)
        self._begin = self.output.stat().st_size if self.output.exists() else 0
        return Order(str(self.folder), str(self.events), **order)

    def _command(self) -> list[str]:
        return list(map(str, [sys.executable, SCRIPTS / "finetune.py", *self.options, "--output_dir", self.folder]))

    def finish_unobserved(self) -> None:
        """Train to the end with the script in a separate process, without an observer."""
        with self.output.open("ab") as output:
            process = _start(self._command(), stdout=output, stderr=subprocess.STDOUT)
        if status := process.wait(HANG_S):
            raise RuntimeError(f"status {status}:\n{self.output.read_text()[-3000:]}")


def _start(command: list, **options: Any) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(list(map(str, command)), env=environment, **options)


def plan(moments: list[Moment], kills: int | None, chance: random.Random) -> list[Moment]:
    """Return the moments to kill at, in order: all of them, or `kills` of them from all phases.

    Each start trains only some steps, so that later starts have steps to train.
    """
    distinct = list(dict.fromkeys(moments)) + RESUMING
    if kills is not None:
        chance.shuffle(distinct)
        seen: Counter[str] = Counter()
        rank = {}
        for moment in distinct:
            rank[moment] = seen[moment.phase]
            seen[moment.phase] += 1
        distinct = sorted(distinct, key=rank.get)[:kills]
    chance.shuffle(distinct)
    early = [moment for moment in distinct if moment.phase in WHILE_TRAINING and moment not in RESUMING]
    # The first kills come before the first checkpoint exists. After a removal, at least one checkpoint exists.
    removal = next((moment for moment in early if moment.phase == "removal"), None)
    first = [*early[:3], *([] if removal is None or removal in early[:3] else [removal])]
    rest = [moment for moment in distinct if moment.phase in WHILE_TRAINING and moment not in first]
    last = [moment for phase in AT_THE_END for moment in distinct if moment.phase == phase]
    return [*first, *rest, *last]


def stream_of_digits(folder: Path) -> list[str]:
    """Write the digits as shards into a new folder and return the options that stream them."""
    folder.mkdir(parents=True)
    for split, images in (("train", TRAIN_IMAGES), ("test", EVAL_IMAGES)):
        digits = load_digits_dataset()[split].select(range(images))
        for number in range(SHARDS):
            digits.shard(SHARDS, number, contiguous=True).to_parquet(folder / f"{split}-{number}-of-{SHARDS}.parquet")
    return ["--streaming", "--shuffle_buffer", "50", "--dataset_name", str(folder)]


def pretrained_model(folder: Path, checkpoint: str, adapted: bool) -> list[str]:
    """Write a checkpoint into a folder and return the options that fine-tune it, completely or by LoRA adapters."""
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    options = write_checkpoint(folder, checkpoint, **dropout)
    return [*options, "--lora_rank", "4"] if adapted else options


def kill_and_resume(
    folder: Path,
    kills: int | None,
    seed: int,
    options: list[str],
    streamed: bool = False,
    adapted: bool = False,
    checkpoint: str | None = None,
    at_random: bool = False,
    log: Callable = print,
) -> tuple[list[Moment], list[Kill]]:
    """Train in `folder / "uninterrupted"` and, with kills, in `folder / "killed"`.

    Args:
        folder: parent of the output folders.
        kills: number of kills; None: one at each moment.
        seed: seed of the choice and order of the moments, not of the run.
        options: further options of finetune.py.
        streamed: read the images as a stream.
        adapted: train LoRA adapters.
        checkpoint: fine-tune this one of `CHECKPOINTS`; None: train from scratch, or adapters of a ViT.
        at_random: kill from outside, at random times.
        log: called with each line of the report.

    Returns:
        The moments of an uninterrupted run, and the kills.
    """
    chance = random.Random(seed)
    data = stream_of_digits(folder / "digits") if streamed else DATA
    model = FROM_SCRATCH
    if adapted or checkpoint:
        model = pretrained_model(folder / "model", checkpoint or "vit", adapted)
    options = [*OPTIONS, *data, *model, *options]
    Kills(folder / "uninterrupted", options).finish_unobserved()
    log("trained without a kill")
    done: list[Kill] = []
    resuming = [*options, "--resume_from_checkpoint", "auto"]
    with Kills(folder / "observed", options) as observed, Kills(folder / "killed", resuming) as killed:
        moments = observed.finish()
        log("trained without a kill, and observed")
        if found := list(differences(folder / "uninterrupted", folder / "observed")):
            raise RuntimeError("\n".join(["Observed, it ended otherwise:", *found]))
        gaps = [(Moment(*one[:2]), two[2] - one[2]) for one, two in pairwise(observed.timed_moments())]
        left = deque(plan(moments, kills, chance))
        while left:
            moment = left.popleft()
            if moment in RESUMING and left and not killed.complete_checkpoints():
                # A kill may leave no complete checkpoint. A removal may be that of an incomplete one.
                left.append(moment)
                continue
            number = chance.randint(1, 5 if moment.phase == "training" else 3 if moment.phase == "log" else 1)
            if at_random:
                seconds = chance.uniform(0, 1.5) * max((gap for other, gap in gaps if other == moment), default=0.1)
                kill = killed.kill_some_time_after(moment, number, seconds)
            else:
                kill = killed.kill_at(moment, number, chance.choice([0.0, chance.random(), 1.0]))
            if kill is not None:
                done.append(kill)
            log(f"{len(done)}: {kill or f'{moment} came too late'}")
        killed.finish()
    return moments, done


def differences(one: Path, other: Path) -> Iterator[str]:
    """Yield the differences of two output folders in tensors, states, log records and results, without times."""
    names = [sorted(_files(folder)) for folder in (one, other)]
    if names[0] != names[1]:
        yield f"files: {sorted(set(names[0]) ^ set(names[1]))}"
    for name in sorted(set(names[0]) & set(names[1])):
        yield from _compare(name, _content(one / name), _content(other / name))


def _files(folder: Path) -> list[str]:
    """Return the files with tensors or results, including subfolders."""
    suffixes = (".safetensors", ".pt", ".pth", ".json", ".jsonl")
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in suffixes]


def _content(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix in (".pt", ".pth"):
        return torch.load(file, weights_only=False)
    if file.suffix == ".jsonl":
        return _without_times([json.loads(line) for line in file.read_text().splitlines()])
    return _without_times(json.loads(file.read_text()))


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if not key.endswith(("_runtime", "_per_second"))}
        if isinstance(value.get("best_model_checkpoint"), str):
            value["best_model_checkpoint"] = Path(value["best_model_checkpoint"]).name
        if "files" in (state := value.get(CALLBACK_STATE_KEY) or {}):
            # The arguments contain the name of the folder, so their size differs.
            value[CALLBACK_STATE_KEY] = state | {"files": sorted(state["files"])}
        if isinstance(value.get("target_modules"), list):
            # peft has a set here, whose order does not depend on the seed.
            value |= {"target_modules": sorted(value["target_modules"])}
        return {key: _without_times(item) for key, item in value.items()}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _compare(where: str, one: Any, two: Any) -> Iterator[str]:
    if type(one) is not type(two):
        yield f"{where}: {type(one).__name__} and {type(two).__name__}"
    elif isinstance(one, dict):
        if one.keys() != two.keys():
            yield f"{where}: {sorted(map(str, one.keys() ^ two.keys()))}"
        for key in one.keys() & two.keys():
            yield from _compare(f"{where} {key}", one[key], two[key])
    elif isinstance(one, list | tuple):
        if len(one) != len(two):
            yield f"{where}: {len(one)} and {len(two)} items"
        for number, (a, b) in enumerate(zip(one, two, strict=False)):
            yield from _compare(f"{where} {number}", a, b)
    elif isinstance(one, torch.Tensor | np.ndarray):
        # Compare bits: two NaNs are equal, and 0 and -0 are not.
        a, b = (np.ascontiguousarray(np.asarray(value)) for value in (one, two))
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            yield f"{where}: other values"
    elif one != two:
        yield f"{where}: {one} and {two}"


def _json_lines(text: str) -> Iterator[dict]:
    for line in text.splitlines(keepends=True):
        # The last line may be incomplete.
        if line.endswith("\n"):
            yield json.loads(line)


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="How many (default: one at each moment).")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments, not of the run.")
    parser.add_argument("--random", action="store_true", help="Kill from outside, at random times.")
    parser.add_argument("--streamed", action="store_true", help="Read the images as a stream of four shards.")
    parser.add_argument("--adapted", action="store_true", help="Train LoRA adapters of rank 4, of another model.")
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, help="Fine-tune a model of this family.")
    parser.add_argument("--folder", type=Path, help="Where to train (a temporary folder).")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        how = {"streamed": args.streamed, "adapted": args.adapted, "checkpoint": args.checkpoint}
        how["at_random"] = args.random
        _, kills = kill_and_resume(folder, args.kills, args.seed, options, **how, log=partial(print, flush=True))
        found = list(differences(folder / "uninterrupted", folder / "killed"))
    hits = ", ".join(f"{phase} {count}" for phase, count in Counter(kill.moment.phase for kill in kills).most_common())
    print(f"{len(kills)} kills: {hits}")
    print("\n".join(["It ended otherwise:", *found]) if found else "It ended as the uninterrupted run.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
