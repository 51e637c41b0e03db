"""Kill a training again and again, resume it each time by the same command, and compare it with one left in peace.

  python tests/kill_and_resume.py --kills 24 --seed 0
  python tests/kill_and_resume.py --kills 8 --dataloader_num_workers 2 --dataloader_persistent_workers True
  python tests/kill_and_resume.py --kills 8 --streamed --dataloader_num_workers 2
  python tests/kill_and_resume.py --kills 8 --adapted --bf16

The training is that of scripts/finetune.py, with everything on that draws or averages; what the script does not know
of its options goes on to it. SIGKILL goes to its whole
process group, at moments that are random within a phase; which phase begins, the files in the output folder tell, and
so do those that are left what was hit.
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
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from script_modules import SCRIPTS
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_tokenmixup.data.digits import load_digits_dataset
from hf_tokenmixup.training.resuming import OWN_STATE, checkpoints_in, fault_in

MODEL = {"image_size": 16, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MODEL |= {"intermediate_size": 128, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
EVAL_STEPS, LOG = 5, "training_log.jsonl"
# 15 steps an epoch: checkpoints fall into epochs, to their ends, and between two lines of the log.
OPTIONS = f"""--do_train --do_eval --eval_split test --use_cpu --report_to none --disable_tqdm true --seed 7
    --horizontal_layers 1 --horizontal_tau 2.3 --horizontal_rho 0 --vertical_layers 2
    --crop_scale 0.7 1.0 --hflip 0.5 --auto_augment rand-m5-mstd0.5-inc1-mmax9 --random_erasing 0.25
    --mixup_alpha 0.8 --cutmix_alpha 1.0 --mixup_mode elem --label_smoothing_factor 0.1
    --num_train_epochs 8 --per_device_train_batch_size 16 --per_device_eval_batch_size 64 --learning_rate 0.003
    --lr_scheduler_type cosine --warmup_steps 0.1 --weight_decay 0.05 --logging_steps 2
    --eval_strategy steps --eval_steps {EVAL_STEPS} --save_strategy steps --save_steps {EVAL_STEPS}
    --save_total_limit 2 --load_best_model_at_end --metric_for_best_model top1 --ema_decay 0.9""".split()
FROM_SCRATCH = ["--from_scratch", "--model_type", "vit", "--config_overrides", json.dumps(MODEL)]
TRAIN_IMAGES, EVAL_IMAGES, SHARDS = 240, 300, 4
DATA = f"--dataset_name digits --max_train_samples {TRAIN_IMAGES} --max_eval_samples {EVAL_IMAGES}".split()
WHILE_TRAINING = "start-up training checkpoint evaluation checkpoint training removal evaluation".split()
AT_THE_END = ["publishing", "final evaluation", "results"]
DEADLINE_S = 240


class Kill(NamedTuple):
    aim: str
    hit: str
    step: int


class Watched:
    """The output folder of a training, seen from when it was started on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start = time.time()
        self.complete = {path.name for path in checkpoints_in(folder) if fault_in(path) is None}
        self.faulty = {path.name for path in checkpoints_in(folder)} - self.complete
        self._seen: tuple[int, list[dict]] = (0, [])

    def is_new(self, name: str) -> bool:
        try:
            return (self.folder / name).stat().st_mtime > self.start
        except FileNotFoundError:
            return False

    def records(self) -> list[dict]:
        """The log, if this start has begun it."""
        if not self.is_new(LOG):
            return []
        text = (self.folder / LOG).read_text()
        if len(text) != self._seen[0]:
            self._seen = (len(text), list(_json_lines(text)))
        return self._seen[1]

    def new_checkpoints(self) -> list[Path]:
        return [path for path in checkpoints_in(self.folder) if path.name not in self.complete]

    def steps(self) -> int:
        """How many steps this start has taken, by its log."""
        steps = [record["step"] for record in self.records() if "step" in record]
        return max(steps, default=0) - max(map(_step, self.complete), default=0)

    def trained(self) -> bool:
        return any("train_runtime" in record for record in self.records())

    def reached(self, phase: str, lines: int) -> bool:
        """Whether a phase begins now, or is as good as over; `lines` of the log, for training."""
        records = self.records()
        if phase == "start-up":
            return True
        if phase in WHILE_TRAINING and self.steps() > 3 * EVAL_STEPS:
            # It was missed, and something must be left to train for those to come.
            return True
        if phase == "training":
            return sum("loss" in record for record in records) > lines
        if phase == "evaluation":
            return bool(records) and "loss" in records[-1] and records[-1]["step"] % EVAL_STEPS == 0
        if phase == "checkpoint":
            return any(self.is_new(path.name) for path in self.new_checkpoints())
        if phase == "removal":
            return self._removal_begins()
        if phase == "publishing":
            return self.trained() and self.is_new("config.json")
        if phase == "final evaluation":
            return self.trained() and self.is_new("train_results.json")
        return self.trained() and self.is_new("eval_results.json")

    def _removal_begins(self) -> bool:
        """Whether a new checkpoint has just got its last file where there are others; waits for it by looking."""
        new = [path for path in self.new_checkpoints() if self.is_new(path.name)]
        if not new or len(self.complete) + len(new) < 3:
            return False
        until = time.time() + 0.5
        while not (new[0] / "trainer_state.json").exists() and time.time() < until:
            pass
        return True

    def phase(self) -> str:
        """What was going on when the training was killed."""
        if not self.is_new(LOG):
            return "start-up"
        records = self.records()
        if not records:
            return "training"
        if self.trained():
            if not self.is_new("train_results.json"):
                return "publishing"
            return "results" if self.is_new("eval_results.json") else "final evaluation"
        faulty = {path.name for path in checkpoints_in(self.folder) if fault_in(path) is not None}
        if faulty & self.complete:
            return "removal"
        last = records[-1]
        if faulty - self.faulty or any(self.is_new(name) for name in faulty):
            return "checkpoint"
        if "loss" in last and last["step"] % EVAL_STEPS == 0:
            return "evaluation"
        if "eval_loss" in last and not (self.folder / f"checkpoint-{last['step']}").exists():
            return "checkpoint"
        return "training"


# Seconds that are waited at most behind the beginning of a phase.
PATIENCE = {"start-up": 8.0, "training": 0.3, "evaluation": 0.15, "checkpoint": 0.06, "removal": 0.001}
PATIENCE |= {"publishing": 0.01, "final evaluation": 0.1, "results": 0.004}


def start(folder: Path, options: list[str], output: Path) -> subprocess.Popen:
    command = [sys.executable, SCRIPTS / "finetune.py", *OPTIONS, *options, "--output_dir", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with output.open("ab") as file:
        return subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def finish(folder: Path, options: list[str], output: Path) -> None:
    process = start(folder, options, output)
    try:
        status = process.wait(DEADLINE_S)
    finally:
        _end(process)
    if status:
        raise RuntimeError(f"status {status}:\n{output.read_text()[-3000:]}")


def kill_in(phase: str, folder: Path, options: list[str], output: Path, chance: random.Random) -> Kill | None:
    """Start or resume the training and kill it in a phase; None if it came to its end before."""
    watched, lines, wait = Watched(folder), chance.randrange(6), chance.uniform(0, PATIENCE[phase])
    before = output.stat().st_size if output.exists() else 0
    process = start(folder, options, output)
    try:
        while not watched.reached(phase, lines) and process.poll() is None:
            if time.time() - watched.start > DEADLINE_S:
                raise RuntimeError(f"{phase} was not reached in {DEADLINE_S} s:\n{output.read_text()[-3000:]}")
            time.sleep(0.002)
        time.sleep(wait)
        ended = process.poll()
    finally:
        _end(process)
    told = output.read_bytes()[before:].decode(errors="replace")
    if ended:
        raise RuntimeError(f"status {ended}:\n{told[-3000:]}")
    hit = watched.phase()
    newest = max((_step(name) for name in watched.complete), default=0)
    for name in watched.faulty:
        if _step(name) > newest and hit != "start-up" and f"{name} is not complete" not in told:
            raise RuntimeError(f"{name} was passed over without a word:\n{told}")
    if newest > max((_step(path.name) for path in checkpoints_in(folder) if fault_in(path) is None), default=0):
        raise RuntimeError(f"the last complete checkpoint, of step {newest}, is gone")
    steps = [record["step"] for record in watched.records() if "step" in record]
    return None if ended == 0 else Kill(phase, hit, max(steps, default=0))


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stream_of_digits(folder: Path) -> list[str]:
    """Options for as many digits as a stream; its shards are written into a new folder."""
    folder.mkdir(parents=True)
    for split, images in (("train", TRAIN_IMAGES), ("test", EVAL_IMAGES)):
        digits = load_digits_dataset()[split].select(range(images))
        for number in range(SHARDS):
            digits.shard(SHARDS, number, contiguous=True).to_parquet(folder / f"{split}-{number}-of-{SHARDS}.parquet")
    return ["--streaming", "--shuffle_buffer", "50", "--dataset_name", str(folder)]


def adapters_of_a_model(folder: Path) -> list[str]:
    """Options for LoRA; the model that is adapted is written into a folder."""
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**MODEL, num_labels=10)).save_pretrained(folder)
    ViTImageProcessor(size={"height": MODEL["image_size"], "width": MODEL["image_size"]}).save_pretrained(folder)
    return ["--model_name_or_path", str(folder), "--lora_rank", "4"]


def kill_and_resume(
    folder: Path,
    kills: int,
    seed: int,
    options: list[str],
    streamed: bool = False,
    adapted: bool = False,
    tell: Callable = print,
) -> list[Kill]:
    """Train in `folder / "whole"` and, with so many kills, in `folder / "killed"`; return the kills."""
    chance = random.Random(seed)
    data = stream_of_digits(folder / "digits") if streamed else DATA
    options = [*data, *(adapters_of_a_model(folder / "model") if adapted else FROM_SCRATCH), *options]
    finish(folder / "whole", options, folder / "whole.txt")
    tell("trained without a kill")
    rounds = -(-kills // len(WHILE_TRAINING))
    aims = [aim for _ in range(rounds) for aim in chance.sample(WHILE_TRAINING, len(WHILE_TRAINING))]
    at_the_end = AT_THE_END if kills < 20 else AT_THE_END * 2
    aims = aims[: kills - len(at_the_end)] + at_the_end
    options = [*options, "--resume_from_checkpoint", "auto"]
    done: list[Kill] = []
    for aim in aims:
        kill = kill_in(aim, folder / "killed", options, folder / "killed.txt", chance)
        if kill:
            done.append(kill)
        there = ", ".join(
            f"{path.name}{'' if fault_in(path) is None else ' (incomplete)'}"
            for path in checkpoints_in(folder / "killed")
        )
        tell(f"{len(done)}: {kill or f'{aim} came too late'}; left: {there or 'no checkpoint'}")
    finish(folder / "killed", options, folder / "killed.txt")
    return done


def differences(whole: Path, other: Path) -> Iterator[str]:
    """In what two output folders differ: in any tensor, state, record of the log or result; times apart."""
    names = [sorted(_files(folder)) for folder in (whole, other)]
    if names[0] != names[1]:
        yield f"files: {sorted(set(names[0]) ^ set(names[1]))}"
    for name in sorted(set(names[0]) & set(names[1])):
        yield from _compare(name, _content(whole / name), _content(other / name))


def _files(folder: Path) -> list[str]:
    """Those that hold tensors or results; anywhere in the folder."""
    held = (".safetensors", ".pt", ".pth", ".json", ".jsonl")
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in held]


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
        if "files" in (own := value.get(OWN_STATE) or {}):
            # The arguments hold the name of the folder: their size differs.
            value[OWN_STATE] = own | {"files": sorted(own["files"])}
        if isinstance(value.get("target_modules"), list):
            # A set of peft's, whose order no seed repeats.
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
        # Compared as bits: two that are not a number are the same, and 0 and -0 are not.
        a, b = (np.ascontiguousarray(np.asarray(value)) for value in (one, two))
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            yield f"{where}: other values"
    elif one != two:
        yield f"{where}: {one} and {two}"


def _json_lines(text: str) -> Iterator[dict]:
    for line in text.splitlines(keepends=True):
        # The last line may be written just now.
        if line.endswith("\n"):
            yield json.loads(line)


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="Of the moments, not of the training.")
    parser.add_argument("--streamed", action="store_true", help="Read the images as a stream of four shards.")
    parser.add_argument("--adapted", action="store_true", help="Train LoRA adapters of rank 4, of another model.")
    parser.add_argument("--folder", type=Path, help="Where to train (a temporary folder).")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        kills = kill_and_resume(
            folder,
            args.kills,
            args.seed,
            options,
            streamed=args.streamed,
            adapted=args.adapted,
            tell=partial(print, flush=True),
        )
        found = list(differences(folder / "whole", folder / "killed"))
    hits = ", ".join(f"{phase} {count}" for phase, count in Counter(kill.hit for kill in kills).most_common())
    print(f"{len(kills)} kills: {hits}")
    print("\n".join(["It ended otherwise:", *found]) if found else "It ended as the one that was not killed.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
