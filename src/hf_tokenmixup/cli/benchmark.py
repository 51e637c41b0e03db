"""Benchmark the overhead of TokenMixup, as tables and as JSON. The cases of a part
are measured in turn.

  # ViT-S/16, batches of 16 images, all parts
  python scripts/benchmark.py
  # training in bfloat16, with a JSON file
  python scripts/benchmark.py --model vit-base --batch_size 128 --dtype bf16 \\
      --part training --json costs.json
  # training with a tenth of the images easy, not compiled and compiled
  python scripts/benchmark.py --model cct-7-3x1 --part training \\
      --easy_fraction 0.1 --compile_mode eager default
  # assignment within groups of a large batch
  python scripts/benchmark.py --model cct-7-3x1 --part step --batch_size 1024 \\
      --group_size 512 256 128
  # some optimizations of memory and time
  python scripts/benchmark.py --part optimizations \\
      --optimization bf16 gradient_checkpointing
  # the model and the images of a training run
  python scripts/benchmark.py --recipe cct-7-3x1-cifar100-htm \\
      --dataset_name data/cifar100 --part detection training
  # parameters and MACs, in seconds
  python scripts/benchmark.py --part parameters

detection      saliency by attention, by complete attention maps, by full
               rollout, by gradient, and at random
step           the horizontal step after detection: gain, transfer to the CPU
               and back, assignment, mixing; with --group_size also assignment
               within groups, and the fraction of the batch's gain that it
               reaches
training       forward and backward of the plain model, HTM, VTM, both, and HTM
               by each detector and with random partners; peak memory, number
               of operators (kernels), floating-point operations, and bytes read
               and written of each; on a GPU also the time without a kernel
copies         training steps with blocking and non-blocking copies of their
               batch to a GPU
optimizations  a training step of HTM + VTM, plain and with each optimization of
               memory or time (bf16, gradient checkpointing, torch.compile,
               ...); peak memory of each: weights, moments, gradients and
               activations
parameters     parameters and MACs of the models of the paper's Tables 1 and 2

--model is a network with initialized weights on random images. --recipe is the
model and the images of a training run, and takes all options of finetune.py.
Every image is easy: the worst case, unless training has an --easy_fraction. The
step is measured for each --rho, training with the first, and HTM also with the
others.
"""

import dataclasses
import json
import os
import re
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..benchmarks.cases import (
    clone_with_config,
    compute_layer_input,
    copy_cases,
    detection_cases,
    group_case,
    layer_saliency,
    make_training_step,
    relative_gain,
    set_easy_fraction,
    step_cases,
    training_models,
)
from ..benchmarks.compared_models import PAPER_BASELINES, PaperModel, count_costs
from ..benchmarks.device_time import device_idle_fraction
from ..benchmarks.model_presets import MODEL_PRESETS
from ..benchmarks.operators import count_work
from ..benchmarks.optimizations import OPTIMIZATIONS, benchmark_optimizations
from ..benchmarks.tables import parameter_table, timing_table
from ..benchmarks.timing import peak_memory, time_interleaved
from ..data import collate
from ..models import TokenMixupModelMixin
from ..models.labels import to_soft_targets
from ..paper_results import PAPER_RESULTS
from ..utils.environment import describe_hardware, library_versions, redact_command
from .arguments import build_parser as build_finetune_parser
from .finetune import build_trainer
from .parser import CliParser
from .program import check_output_file, invocation, run_command
from .recipes import split_lists

PARTS = ("detection", "step", "training", "copies", "optimizations", "parameters")
COMPILE_MODES = ("eager", "default", "reduce-overhead")
DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_RUN_TIME = 0.02  # seconds; shorter calls are repeated
# Nothing is evaluated or written, and the benchmark sets the precision.
FORCED_OPTIONS = (
    *("--do_train", "--do_eval", "false"),
    *("--eval_strategy", "no", "--save_strategy", "no"),
    *("--load_best_model_at_end", "false", "--push_to_hub", "false", "--report_to", "none"),
    *("--bf16", "false", "--fp16", "false"),
)


def parse_options(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The options of the benchmark, and those of finetune.py for --recipe.

    Raises:
        ValueError: An option does not exist, has a wrong value, or cannot be used with another one.
    """
    parser = CliParser(usage="%(prog)s [options] [--recipe RECIPE] [options of finetune.py]", description=__doc__)
    group = parser.add_argument_group("network and images")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--model", choices=MODEL_PRESETS, default="vit-small", help="Network (vit-small).")
    source.add_argument("--recipe", help="Recipe of a training run, by name (see hf_tokenmixup/recipes) or path.")
    group.add_argument("--batch_size", type=int, help="Images (16 for ViT, 64 for CCT; the recipe's batch size).")
    group = parser.add_argument_group("cases")
    group.add_argument(
        "--part",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"What to measure (default: all; copies on a GPU only): {', '.join(PARTS)}.",
    )
    group.add_argument(
        "--rho",
        type=float,
        nargs="+",
        default=[0.0, 0.01],
        help="Values of rho, the minimum difference in saliency of a replaced token (0 0.01).",
    )
    group.add_argument("--group_size", type=int, nargs="+", default=[], help="Also assign within groups of N images.")
    group.add_argument(
        "--systems_only",
        action="store_true",
        help="Train only the plain model, HTM, VTM and both, without variants of HTM.",
    )
    group.add_argument(
        "--easy_fraction",
        type=float,
        default=1.0,
        help="Fraction of easy images in training, about (1: all, the worst case).",
    )
    group.add_argument(
        "--compile_mode",
        nargs="+",
        choices=COMPILE_MODES,
        default=["eager"],
        metavar="MODE",
        help="Modes of torch.compile in training: eager (not compiled), default, reduce-overhead (GPU only).",
    )
    group.add_argument(
        "--optimization",
        nargs="+",
        choices=OPTIMIZATIONS,
        default=list(OPTIMIZATIONS),
        metavar="NAME",
        help=f"Which optimizations (default: all): {', '.join(OPTIMIZATIONS)}.",
    )
    group = parser.add_argument_group("device, precision and measurements")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1.")
    group.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 and fp16 use autocast; tf32 needs a GPU.")
    group.add_argument("--threads", type=int, help="CPU threads (torch's choice).")
    group.add_argument("--rounds", type=int, default=20, help="Measurements of each case (20).")
    group.add_argument("--warmup", type=int, default=2, help="Calls of each case before the measurements (2).")
    group.add_argument("--json", metavar="FILE", type=Path, help="Write the results to this file.")
    args, others = parser.parse_known_args(split_lists(arguments, parser))
    if others and args.recipe is None:
        raise ValueError(f"Unknown arguments: {' '.join(others)}. Options of finetune.py need --recipe.")
    if args.recipe is not None and args.part is not None and set(args.part) == {"parameters"}:
        raise ValueError("--part parameters counts those of the paper's systems and reads no --recipe. Omit it.")
    if not all(0 <= rho < 1 for rho in args.rho):
        raise ValueError(f"--rho must be at least 0 and below 1, got {' '.join(f'{rho:g}' for rho in args.rho)}.")
    for name, minimum in {"batch_size": 2, "rounds": 2, "warmup": 1, "threads": 1}.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"--{name} must be at least {minimum}, got {value}.")
    if min(args.group_size, default=2) < 2:
        raise ValueError(f"--group_size must be at least 2, got {min(args.group_size)}.")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device must be cpu, cuda or cuda:NUMBER, got {args.device}.")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"There is no CUDA device for --device {args.device}. Pass --device cpu.")
    if not 0 < args.easy_fraction <= 1:
        raise ValueError(f"--easy_fraction must be above 0 and at most 1, got {args.easy_fraction:g}.")
    if args.device == "cpu" and args.dtype == "tf32":
        raise ValueError("--dtype tf32 needs a CUDA device. Use fp32 or bf16.")
    if args.device == "cpu" and "copies" in (args.part or ()):
        raise ValueError("--part copies measures copies to a CUDA device. Omit it.")
    if args.device == "cpu" and "reduce-overhead" in args.compile_mode:
        raise ValueError("--compile_mode reduce-overhead records CUDA graphs. On a CPU, pass --compile_mode default.")
    for name in ("easy_fraction", "compile_mode"):
        if args.part is not None and "training" not in args.part and getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name} changes --part training, which is not measured. Add it to --part.")
    if args.part is None:
        args.part = [part for part in PARTS if part != "copies" or args.device != "cpu"]
    if args.json is not None:
        check_output_file("--json", args.json)
    return args, others


@dataclass(frozen=True)
class BenchmarkSetup:
    """What is measured.

    Attributes:
        name: of the network or the recipe.
        model: the network.
        systems: changes of the model's settings by the name of the system.
        images: (B, 3, H, W).
        labels: (B,) class indices.
    """

    name: str
    model: TokenMixupModelMixin
    systems: dict[str, dict[str, Any]]
    images: torch.Tensor
    labels: torch.Tensor

    @property
    def mixed_layer(self) -> int:
        """Index of the layer whose input HTM mixes; with VTM alone, of the first layer that provides tokens."""
        settings = next(iter(self.systems.values()))
        return min(settings.get("horizontal_layers", self.model.config.horizontal_layers), default=0)

    @property
    def targets(self) -> torch.Tensor:
        """(B, C) class distributions."""
        return to_soft_targets(self.labels, self.model.config.num_labels)


def network_setup(args: Namespace) -> BenchmarkSetup:
    """A network with random images."""
    preset = MODEL_PRESETS[args.model]
    model = preset.build()
    batch_size, (height, width) = args.batch_size or preset.batch_size, model.config.network.image_size
    labels = torch.randint(model.config.num_labels, (batch_size,))
    return BenchmarkSetup(
        preset.name, model, preset.tokenmixup_configs, torch.randn(batch_size, 3, height, width), labels
    )


def recipe_setup(args: Namespace, others: Sequence[str]) -> BenchmarkSetup:
    """The model and the images of a training run.

    Raises:
        ValueError: The run has no TokenMixup, or fewer images than a batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        forced = [*FORCED_OPTIONS, "--use_cpu", str(args.device == "cpu"), "--output_dir", folder]
        trainer = build_trainer(["--recipe", args.recipe, *others, *forced])
    model, data = trainer.model, trainer.train_dataset
    horizontal, vertical = (getattr(model.config, f"{kind}_layers", []) for kind in ("horizontal", "vertical"))
    if not (horizontal or vertical):
        raise ValueError(f"{args.recipe} mixes no tokens. Pass --horizontal_layers, --vertical_layers or both.")
    systems = {"HTM": {"vertical_layers": []}} if horizontal else {}
    systems |= {"VTM": {"horizontal_layers": []}} if vertical else {}
    systems |= {"HTM + VTM": {}} if horizontal and vertical else {}
    batch_size = args.batch_size or trainer.args.per_device_train_batch_size
    if len(data) < batch_size:
        raise ValueError(
            f"The batch size is {batch_size}, but there are {len(data)} images to train on. Pass a smaller "
            "--batch_size."
        )
    batch = collate([data[index] for index in torch.randperm(len(data))[:batch_size].tolist()])
    images = trainer.device_transform.normalize(batch["pixel_values"])
    return BenchmarkSetup(Path(args.recipe).stem, model, systems, images, batch["labels"])


def build_setup(args: Namespace, others: Sequence[str]) -> BenchmarkSetup:
    """What is measured, on its device, with every image easy."""
    torch.manual_seed(0)
    setup = network_setup(args) if args.recipe is None else recipe_setup(args, others)
    worst_case = {"horizontal_tau": None, "horizontal_rho": args.rho[0], "saliency_detector": "attention"}
    return BenchmarkSetup(
        setup.name,
        setup.model.to(args.device).train(),
        {name: settings | worst_case for name, settings in setup.systems.items()},
        setup.images.to(args.device),
        setup.labels.to(args.device),
    )


def measure_detection(setup: BenchmarkSetup, args: Namespace, timing: dict[str, Any]) -> dict[str, Any]:
    cases = detection_cases(setup.model, setup.images, setup.targets, setup.mixed_layer)
    difference = (cases["attention"]() - cases["full maps"]()).abs().max().item()
    timings = time_interleaved(cases, reference="attention", **timing)
    print(f"\nsaliency detection\n{timing_table(timings, 'attention')}")
    print(f"largest difference between attention and full maps: {difference:.1g}", flush=True)
    return {"reference": "attention", "timings": timings, "difference_to_full_maps": difference}


def measure_step(setup: BenchmarkSetup, args: Namespace, timing: dict[str, Any]) -> dict[str, Any]:
    hidden = compute_layer_input(setup.model, setup.images, setup.mixed_layer)
    saliency = layer_saliency(setup.model, hidden, setup.mixed_layer)
    prefix, sizes = setup.model.config.num_prefix_tokens, valid_group_sizes(setup, args)
    results = {}
    for rho in args.rho:
        timings = time_interleaved(step_cases(hidden, saliency, setup.targets, rho, prefix, sizes), **timing)
        gains = {group_case(size): gain for size, gain in relative_gain(saliency, rho, sizes).items()}
        print(f"\nhorizontal step, rho {rho:g}\n{timing_table(timings, relative_gain=gains)}", flush=True)
        results[f"{rho:g}"] = {"timings": timings, "relative_gain": gains}
    return results


def measure_training(setup: BenchmarkSetup, args: Namespace, timing: dict[str, Any]) -> dict[str, Any]:
    group_sizes, with_variants = valid_group_sizes(setup, args), not args.systems_only
    models = training_models(setup.model, setup.systems, group_sizes, args.rho[1:], with_variants=with_variants)
    if args.easy_fraction < 1:
        for model in models.values():
            if getattr(model.config, "horizontal_layers", None):
                set_easy_fraction(model, setup.images, setup.labels, args.easy_fraction, DTYPES[args.dtype])
    results = {mode: measure_training_mode(setup, args, timing, models, mode) for mode in args.compile_mode}
    compiled = {"compiled": results} if args.compile_mode != ["eager"] else {}
    return results.pop("eager", {"reference": "plain"}) | compiled


def measure_training_mode(
    setup: BenchmarkSetup, args: Namespace, timing: dict[str, Any], models: dict[str, torch.nn.Module], mode: str
) -> dict[str, Any]:
    """Measure training steps with one mode of `torch.compile`. What they compute is counted without compiler."""
    torch.compiler.reset()
    make_step = partial(make_training_step, autocast=DTYPES[args.dtype], compile_mode=mode)
    steps = {name: make_step(model, setup.images, setup.labels) for name, model in models.items()}
    timings = time_interleaved(steps, reference="plain", **timing)
    weights = {name: sum(tensor.nbytes for tensor in model.parameters()) for name, model in models.items()}
    results: dict[str, Any] = {"reference": "plain", "timings": timings}
    if mode != "reduce-overhead":  # the memory of recorded CUDA graphs is allocated before the measured call
        results["peak_memory"] = {name: weights[name] + peak_memory(step, args.device) for name, step in steps.items()}
    if args.device != "cpu":
        results["device_idle"] = {name: device_idle_fraction(step, args.device) for name, step in steps.items()}
    if mode == "eager":
        small_steps = {
            name: make_step(model, setup.images[:2], setup.labels[:2])
            for name, model in models.items()
            if args.device == "cpu"
        }
        results["work"] = {name: count_work(step, small_steps.get(name), args.device) for name, step in steps.items()}
    columns = {name: results.get(name) for name in ("peak_memory", "work", "device_idle")}
    table = timing_table(timings, "plain", **columns)
    title = "training step" if mode == "eager" else f"training step, compiled, mode {mode}"
    print(f"\n{title}\n{table}", flush=True)
    return results


def measure_copies(setup: BenchmarkSetup, args: Namespace, timing: dict[str, Any]) -> dict[str, Any]:
    name, settings = list(setup.systems.items())[-1]
    model = clone_with_config(setup.model, **settings)
    images, labels = setup.images.cpu().pin_memory(), setup.labels.cpu().pin_memory()
    cases = copy_cases(model, images, labels, args.device, DTYPES[args.dtype])
    timings = time_interleaved(cases, reference="blocking copy", **timing)
    print(f"\ncopies of the batch, {name}\n{timing_table(timings, 'blocking copy')}", flush=True)
    return {"reference": "blocking copy", "system": name, "timings": timings}


def measure_optimizations(setup: BenchmarkSetup, args: Namespace, timing: dict[str, Any]) -> dict[str, Any]:
    name, settings = list(setup.systems.items())[-1]
    model = clone_with_config(setup.model, **settings)
    timings, memory, skipped = benchmark_optimizations(model, setup.images, setup.labels, args.optimization, **timing)
    print(f"\noptimizations of {name}\n{timing_table(timings, 'plain', peak_memory=memory)}")
    for optimization, reason in skipped.items():
        print(f"{optimization} was skipped: {reason}")
    sys.stdout.flush()
    return {"reference": "plain", "system": name, "timings": timings, "peak_memory": memory, "left_out": skipped}


def valid_group_sizes(setup: BenchmarkSetup, args: Namespace) -> list[int]:
    return [size for size in args.group_size if size < len(setup.images)]


def paper_systems() -> list[PaperModel]:
    """All rows of Tables 1 and 2, with those of the recipes at the end."""
    systems = list(PAPER_BASELINES)
    for benchmark, size in (("cct-7-3x1-cifar100", "cct-7-3x1"), ("vit-b16-imagenet1k", "vit-base")):
        paper, preset = PAPER_RESULTS[benchmark], MODEL_PRESETS[size]
        for row in paper.rows.values():
            build = partial(build_network, size, preset.tokenmixup_configs.get(row.method, {}))
            name = preset.name if row.method == "baseline" else f"{preset.name} + {row.method}"
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


def main(arguments: Sequence[str]) -> None:
    args, others = parse_options(arguments)
    # The profiler, which measures memory on a CPU, would warn about missing drivers.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    if torch.device(args.device).index is not None:
        torch.cuda.set_device(args.device)
    results: dict[str, Any] = {}
    measures = {"detection": measure_detection, "step": measure_step, "training": measure_training}
    measures |= {"copies": measure_copies, "optimizations": measure_optimizations}
    if any(part in measures for part in args.part):
        setup = build_setup(args, others)
        results["setting"] = {
            "model": setup.name,
            "batch_size": len(setup.images),
            "dtype": args.dtype,
            "hardware": describe_hardware(device=args.device),
            "rho": args.rho,
            "easy_fraction": args.easy_fraction,
            "rounds": args.rounds,
        }
        rhos = " and ".join(f"{rho:g}" for rho in args.rho)
        easy = f", about {args.easy_fraction:.0%} easy images" if args.easy_fraction < 1 else ""
        title = "{model}, batch {batch_size}, {dtype}, {hardware}, rho ".format(**results["setting"])
        print(title + rhos + easy, flush=True)
        timing = {"rounds": args.rounds, "warmup": args.warmup, "device": args.device, "min_run_time": MIN_RUN_TIME}
        results |= {part: measures[part](setup, args, timing) for part in measures if part in args.part}
    if "parameters" in args.part:
        results["parameters"] = measure_parameters()
    if args.json is not None:
        results["command"] = redact_command(f"python {invocation('benchmark')}", arguments)
        results["versions"] = library_versions()
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, default=dataclasses.asdict, indent=2) + "\n", encoding="utf-8")
        print(f"\njson {args.json}")


def entry_point() -> None:
    run_command(main, build_parser=build_finetune_parser)


if __name__ == "__main__":
    entry_point()
