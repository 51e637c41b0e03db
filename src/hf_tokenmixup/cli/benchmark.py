"""What TokenMixup costs, measured in turn in one run, as tables and as JSON.

  python scripts/benchmark.py                                            # ViT-S/16, batch 16, all parts
  python scripts/benchmark.py --model vit-base --batch_size 128 --dtype bf16 --part training --json costs.json
  python scripts/benchmark.py --model cct-7-3x1 --part step --batch_size 1024 --group_size 512 256 128
  python scripts/benchmark.py --recipe cct-7-3x1-cifar100-htm --dataset_name data/cifar100 --part detection training

detection   finding salient tokens: by attention, by whole attention maps, full rollout, gradient, chance
step        the horizontal step behind that: gain, transfer to the host and back, assignment, mixing; with --group_size
            also assignment inside groups, and the share of the whole batch's gain that it keeps
training    forward and backward of the plain model, HTM, VTM, both, and HTM by each detector; peak memory of each
savers      a step of HTM + VTM with its optimizer, plain and by each saver of memory or time (bf16, gradient
            checkpointing, torch.compile, ...); peak memory of each: weights, moments, gradients and activations
parameters  parameters and MACs of the systems of the paper's Tables 1 and 2

--model is a network with fresh weights, on noise. --recipe is what that training starts with, its images too, and
takes all options of finetune.py. Every image is easy, and with a rho of 0 every gain counts: the dearest case.
"""

import dataclasses
import json
import os
import re
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..benchmarks.cases import (
    clone_with_config,
    compute_layer_input,
    detection_cases,
    group_case,
    layer_saliency,
    relative_gain,
    step_cases,
    training_models,
    training_step,
)
from ..benchmarks.compared_models import PAPER_BASELINES, PaperModel, count_costs
from ..benchmarks.model_presets import MODEL_PRESETS
from ..benchmarks.optimizations import OPTIMIZATIONS, benchmark_optimizations
from ..benchmarks.tables import parameter_table, timing_table
from ..benchmarks.timing import interleave, peak_memory
from ..data import collate
from ..hub.paper_results import PAPER_RESULTS
from ..models import TokenMixupModelMixin
from ..models.labels import to_soft_targets
from ..utils.environment import describe_hardware, library_versions, redact_command
from .finetune import prepare
from .program import check_output_file, invocation, run_command
from .recipes import split_lists

PARTS = ("detection", "step", "training", "savers", "parameters")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_RUN_TIME = 0.02  # what is shorter is repeated
DISABLE_TRAINING_EXTRAS = (
    "--eval_strategy no --save_strategy no --load_best_model_at_end false --do_eval false --push_to_hub false"
)
FIXED = f"{DISABLE_TRAINING_EXTRAS} --do_train --bf16 false --fp16 false --report_to none".split()


class Parser(ArgumentParser):
    """Raises its errors, so that they are told like all others."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def parse_options(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """The options, and those of finetune.py that go with --recipe.

    Raises:
        ValueError: for options that do not exist, do not parse or do not go together.
    """
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="What to measure (all of it).")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", choices=MODEL_PRESETS, default="vit-small", help="A network by size (vit-small).")
    what.add_argument("--recipe", help="What a training starts with, by name (see hf_tokenmixup/recipes) or path.")
    parser.add_argument("--batch_size", type=int, help="Images (16 for ViT, 64 for CCT; the recipe's own).")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 and fp16: autocast.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1.")
    parser.add_argument("--rho", type=float, default=0.0, help="Least gain in saliency of a replaced token (0).")
    parser.add_argument("--group_size", type=int, nargs="+", default=[], help="Also match inside groups of so many.")
    parser.add_argument(
        "--saver", nargs="+", choices=OPTIMIZATIONS, default=list(OPTIMIZATIONS), help="Which savers (all)."
    )
    parser.add_argument("--rounds", type=int, default=20, help="Measurements of each (20).")
    parser.add_argument("--warmup", type=int, default=2, help="Calls of each before that (2).")
    parser.add_argument("--threads", type=int, help="Threads on the CPU (torch's choice).")
    parser.add_argument("--json", metavar="FILE", type=Path, help="Write the results to this file.")
    args, others = parser.parse_known_args(split_lists(arguments, parser))
    if others and args.recipe is None:
        raise ValueError(f"Not understood on the command line: {' '.join(others)} (--recipe takes finetune.py's).")
    if args.recipe is not None and set(args.part) == {"parameters"}:
        raise ValueError("--part parameters counts those of the paper's systems and reads no --recipe: omit it.")
    for name, least in {"batch_size": 2, "rounds": 2, "warmup": 1, "threads": 1, "rho": 0}.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name} must be at least {least}, got {value}.")
    if min(args.group_size, default=2) < 2:
        raise ValueError(f"--group_size must be at least 2, got {min(args.group_size)}.")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device must be cpu, cuda or cuda:NUMBER, got {args.device}.")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"There is no CUDA device for --device {args.device}: give --device cpu.")
    if args.json is not None:
        check_output_file("--json", args.json)
    return args, others


@dataclass(frozen=True)
class BenchmarkSetup:
    """What is measured: a network, the changes of its settings that make each system, and a batch."""

    name: str
    model: TokenMixupModelMixin
    systems: dict[str, dict[str, Any]]
    images: torch.Tensor
    labels: torch.Tensor

    @property
    def mixed_layer(self) -> int:
        """The layer that HTM mixes in front of; for VTM alone the first that tokens are collected from."""
        settings = next(iter(self.systems.values()))
        return min(settings.get("horizontal_layers", self.model.config.horizontal_layers), default=0)

    @property
    def targets(self) -> torch.Tensor:
        """(B, C) class distributions."""
        return to_soft_targets(self.labels, self.model.config.num_labels)


def network_subject(args: Namespace) -> BenchmarkSetup:
    """A network by size, on noise."""
    network = MODEL_PRESETS[args.model]
    model = network.build()
    batch_size, size = args.batch_size or network.batch_size, model.config.image_size
    labels = torch.randint(model.config.num_labels, (batch_size,))
    return BenchmarkSetup(network.name, model, network.systems, torch.randn(batch_size, 3, size, size), labels)


def recipe_subject(args: Namespace, others: list[str]) -> BenchmarkSetup:
    """What a training starts with.

    Raises:
        ValueError: for a training without TokenMixup, or with fewer images than the batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        fixed = [*FIXED, "--use_cpu", str(args.device == "cpu"), "--output_dir", folder]
        trainer = prepare(["--recipe", args.recipe, *others, *fixed])
    model, data = trainer.model, trainer.train_dataset
    horizontal, vertical = (getattr(model.config, f"{kind}_layers", []) for kind in ("horizontal", "vertical"))
    if not (horizontal or vertical):
        raise ValueError(f"{args.recipe} mixes no tokens: give --horizontal_layers, --vertical_layers or both.")
    systems = {"HTM": {"vertical_layers": []}} if horizontal else {}
    systems |= {"VTM": {"horizontal_layers": []}} if vertical else {}
    systems |= {"HTM + VTM": {}} if horizontal and vertical else {}
    batch_size = args.batch_size or trainer.args.per_device_train_batch_size
    if len(data) < batch_size:
        raise ValueError(f"A batch of {batch_size} images was asked for, and there are {len(data)} to train on.")
    batch = collate([data[index] for index in torch.randperm(len(data))[:batch_size].tolist()])
    return BenchmarkSetup(Path(args.recipe).stem, model, systems, batch["pixel_values"], batch["labels"])


def prepare_subject(args: Namespace, others: list[str]) -> BenchmarkSetup:
    """What is measured, on its device, with every image easy."""
    torch.manual_seed(0)
    subject = network_subject(args) if args.recipe is None else recipe_subject(args, others)
    dearest = {"horizontal_tau": None, "horizontal_rho": args.rho, "saliency_detector": "attention"}
    return BenchmarkSetup(
        subject.name,
        subject.model.to(args.device).train(),
        {name: settings | dearest for name, settings in subject.systems.items()},
        subject.images.to(args.device),
        subject.labels.to(args.device),
    )


def measure_detection(subject: BenchmarkSetup, args: Namespace, timing: dict[str, Any]) -> dict[str, Any]:
    cases = detection_cases(subject.model, subject.images, subject.targets, subject.mixed_layer)
    difference = (cases["attention"]() - cases["whole maps"]()).abs().max().item()
    timings = interleave(cases, reference="attention", **timing)
    print(f"\nsaliency detection\n{timing_table(timings, 'attention')}")
    print(f"largest difference between attention and whole maps: {difference:.1g}", flush=True)
    return {"reference": "attention", "timings": timings, "difference_to_whole_maps": difference}


def measure_step(subject: BenchmarkSetup, args: Namespace, timing: dict[str, Any]) -> dict[str, Any]:
    hidden = compute_layer_input(subject.model, subject.images, subject.mixed_layer)
    saliency = layer_saliency(subject.model, hidden, subject.mixed_layer)
    prefix, sizes = subject.model.config.num_prefix_tokens, valid_group_sizes(subject, args)
    timings = interleave(step_cases(hidden, saliency, subject.targets, args.rho, prefix, sizes), **timing)
    kept = {group_case(size): share for size, share in relative_gain(saliency, args.rho, sizes).items()}
    print(f"\nhorizontal step\n{timing_table(timings, relative_gain=kept)}", flush=True)
    return {"timings": timings, "relative_gain": kept}


def measure_training(subject: BenchmarkSetup, args: Namespace, timing: dict[str, Any]) -> dict[str, Any]:
    models = training_models(subject.model, subject.systems, valid_group_sizes(subject, args))
    steps = {
        name: training_step(model, subject.images, subject.labels, DTYPES[args.dtype])
        for name, model in models.items()
    }
    timings = interleave(steps, reference="plain", **timing)
    weights = {name: sum(tensor.nbytes for tensor in model.parameters()) for name, model in models.items()}
    memory = {name: weights[name] + peak_memory(step, args.device) for name, step in steps.items()}
    print(f"\ntraining step\n{timing_table(timings, 'plain', peak_memory=memory)}", flush=True)
    return {"reference": "plain", "timings": timings, "peak_memory": memory}


def measure_savers(subject: BenchmarkSetup, args: Namespace, timing: dict[str, Any]) -> dict[str, Any]:
    name, settings = list(subject.systems.items())[-1]
    model = clone_with_config(subject.model, **settings)
    timings, memory, left_out = benchmark_optimizations(model, subject.images, subject.labels, args.saver, **timing)
    print(f"\nsavers of {name}\n{timing_table(timings, 'plain', peak_memory=memory)}")
    for saver, reason in left_out.items():
        print(f"{saver} was left out: {reason}")
    sys.stdout.flush()
    return {"reference": "plain", "system": name, "timings": timings, "peak_memory": memory, "left_out": left_out}


def valid_group_sizes(subject: BenchmarkSetup, args: Namespace) -> list[int]:
    return [size for size in args.group_size if size < len(subject.images)]


def paper_systems() -> list[PaperModel]:
    """All rows of Tables 1 and 2, those of the recipes last."""
    systems = list(PAPER_BASELINES)
    for benchmark, size in (("cct-7-3x1-cifar100", "cct-7-3x1"), ("vit-b16-imagenet1k", "vit-base")):
        paper, network = PAPER_RESULTS[benchmark], MODEL_PRESETS[size]
        for row in paper.rows.values():
            build = partial(build_network, size, network.systems.get(row.system, {}))
            name = network.name if row.system == "baseline" else f"{network.name} + {row.system}"
            systems.append(PaperModel(paper.table, name, row.parameters, paper.macs, build))
    return systems


def build_network(size: str, settings: dict[str, Any], num_labels: int) -> TokenMixupModelMixin:
    return MODEL_PRESETS[size].build(num_labels=num_labels, **settings)


def measure_parameters() -> list[dict[str, Any]]:
    counted = [(system, count_costs(system)) for system in paper_systems()]
    for table in (1, 2):
        print(f"\n{parameter_table(table, counted)}")
    return [
        {
            "table": system.table,
            "system": system.name,
            "paper": {"parameters": system.parameters, "macs": system.macs},
            "counted": costs,
        }
        for system, costs in counted
    ]


def main(arguments: list[str]) -> None:
    args, others = parse_options(arguments)
    # The profiler, which counts a CPU's memory, would tell about drivers that are not there.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if torch.device(args.device).index is not None:
        torch.cuda.set_device(args.device)
    results: dict[str, Any] = {}
    measures = {"detection": measure_detection, "step": measure_step, "training": measure_training}
    measures["savers"] = measure_savers
    if any(part in measures for part in args.part):
        subject = prepare_subject(args, others)
        results["setting"] = {
            "model": subject.name,
            "batch_size": len(subject.images),
            "dtype": args.dtype,
            "hardware": describe_hardware(device=args.device),
            "rho": args.rho,
            "rounds": args.rounds,
        }
        print("{model}, batch {batch_size}, {dtype}, {hardware}, rho {rho:g}".format(**results["setting"]), flush=True)
        timing = {"rounds": args.rounds, "warmup": args.warmup, "device": args.device, "min_run_time": MIN_RUN_TIME}
        results |= {part: measures[part](subject, args, timing) for part in measures if part in args.part}
    if "parameters" in args.part:
        results["parameters"] = measure_parameters()
    if args.json is not None:
        results["command"] = redact_command(f"python {invocation('benchmark')}", arguments)
        results["versions"] = library_versions()
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, default=dataclasses.asdict, indent=2) + "\n", encoding="utf-8")
        print(f"\njson {args.json}")


def entry_point() -> None:
    run_command(main)


if __name__ == "__main__":
    entry_point()
