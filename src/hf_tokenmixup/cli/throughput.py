"""Images per second of a training run: the input pipeline alone, the model alone,
and both together.

  # a recipe
  python scripts/throughput.py --recipe cct-2-3x2-cifar10-cpu
  # with other options of finetune.py
  python scripts/throughput.py --recipe cct-7-3x1-cifar100-htm \\
      --dataloader_num_workers 16 --torch_compile
  # the input pipeline and timm's
  python scripts/throughput.py --recipe cct-2-3x2-cifar10-cpu --compare_timm

Takes all options of finetune.py, and those below. Nothing is saved.
"""

import dataclasses
import tempfile
from collections.abc import Sequence

from transformers import PrinterCallback, ProgressCallback

from ..benchmarks.input_pipeline import compare_with_timm
from ..benchmarks.throughput import measure_throughput
from ..training import TokenMixupTrainer
from .arguments import build_parser as build_finetune_parser
from .arguments import parse_options
from .finetune import build_trainer
from .parser import CliParser
from .program import run_command

# Only training steps are timed, and nothing is written.
FORCED_OPTIONS = (
    *("--do_train", "--do_eval", "false"),
    *("--eval_strategy", "no", "--save_strategy", "no", "--logging_strategy", "no"),
    *("--load_best_model_at_end", "false", "--push_to_hub", "false", "--report_to", "none"),
    *("--dataloader_drop_last", "true"),
)


def main(arguments: Sequence[str]) -> None:
    parser = CliParser(usage="%(prog)s [options] [options of finetune.py]", description=__doc__)
    parser.add_argument("--warmup", type=int, default=10, help="Untimed steps at the start of a measurement.")
    parser.add_argument("--steps", type=int, default=30, help="Timed steps of a measurement.")
    parser.add_argument("--rounds", type=int, default=3, help="Measurements of each kind, in turn.")
    parser.add_argument(
        "--compare_timm",
        action="store_true",
        help="Compare one core that reads and augments images with timm's loader instead.",
    )
    args, options = parser.parse_known_args(arguments)
    for name in ("warmup", "steps", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")

    with tempfile.TemporaryDirectory() as folder:
        forced = [*FORCED_OPTIONS, "--max_steps", str(args.warmup + args.steps), "--output_dir", folder]
        trainer = build_trainer([*options, *forced])
        if args.compare_timm:
            print(_describe_comparison(trainer, options, args.rounds))
            return
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        results = measure_throughput(trainer, warmup=args.warmup, steps=args.steps, repeats=args.rounds)

    print(
        f"batch {trainer.args.train_batch_size}, {trainer.args.dataloader_num_workers} workers, {trainer.args.device}"
    )
    for name, (low, middle, high) in results.items():
        print(f"{name:10} {middle:8.0f} images/s  ({low:.0f} to {high:.0f})")
    slower = min(results["loader"][1], results["model"][1])
    print(f"Both together reach {results['end_to_end'][1] / slower:.0%} of the slower one.")


def _describe_comparison(trainer: TokenMixupTrainer, options: Sequence[str], rounds: int) -> str:
    augmentation = dataclasses.asdict(parse_options(options).augmentation)
    batch_size = trainer.args.train_batch_size
    timings = compare_with_timm(trainer.train_dataset, augmentation, batch_size, rounds=max(2, rounds))
    lines = []
    for name, timing in timings.items():
        ratio = "" if timing.ratio is None else f", {timing.ratio.median:.2f} of the time of timm"
        lines.append(f"{name:5} {batch_size / timing.seconds.median:6.0f} images/s on one core{ratio}")
    return "\n".join(lines)


def entry_point() -> None:
    run_command(main, build_parser=build_finetune_parser)


if __name__ == "__main__":
    entry_point()
