"""Forecast what rho, tau and kappa do in a model and on a dataset, and suggest
values, before training.

  # the model and the data of a recipe
  python scripts/calibrate.py --recipe digits-quickstart
  # a model and a dataset of the Hub, with a JSON file and a figure
  python scripts/calibrate.py --dataset_name uoft-cs/cifar100 \\
      --model_name_or_path google/vit-base-patch16-224 \\
      --per_device_train_batch_size 64 --output_dir outputs/calibration
  # own photographs, one subfolder per class
  python scripts/calibrate.py --train_dir photos/train \\
      --model_name_or_path google/vit-base-patch16-224
  # a checkpoint of a run, some layers, more images
  python scripts/calibrate.py --dataset_name uoft-cs/cifar100 \\
      --model_name_or_path outputs/cifar100/checkpoint-500 \\
      --layers 3 4 --num_images 1024
  # new weights
  python scripts/calibrate.py --from_scratch --model_type cct \\
      --image_size 32 --dataset_name uoft-cs/cifar10

Takes all options of finetune.py: model, training images and their augmentation,
batch size, and those settings of TokenMixup that are not calibrated. Nothing is
trained, except a linear classifier for each layer whose ScoreNet is not in the
checkpoint.
"""

import json
import re
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..evaluation.calibration import CalibrationResult, calibrate
from ..models import TokenMixupModelMixin
from ..visualization.calibration import plot_calibration
from ..visualization.figure_utils import save_figure
from .arguments import parse_options
from .finetune import build_trainer
from .forecast_text import DEFAULT_NUM_IMAGES, first_batches, format_calibration
from .parser import CliParser
from .program import check_output_file, run_command
from .recipes import split_lists

JSON_NAME, FIGURE_NAME = "calibration.json", "calibration.png"
# Nothing is trained, evaluated or cached, and the classifier is not used.
FORCED_OPTIONS = (
    *("--do_train", "--do_eval", "false", "--ignore_mismatched_sizes", "--image_cache_gib", "0"),
    *("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"),
    *("--push_to_hub", "false", "--report_to", "none"),
)


def parse_own_options(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The options of this command, and those of finetune.py.

    Raises:
        ValueError: An option has a wrong value.
    """
    parser = CliParser(usage="%(prog)s [options] [options of finetune.py]", description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help="Layers to measure (all).")
    parser.add_argument(
        "--num_images", type=int, metavar="N", help=f"Measure N images, in full batches ({DEFAULT_NUM_IMAGES})."
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="FOLDER",
        help=f"Also write {JSON_NAME} and {FIGURE_NAME} to this folder. That of a recipe is not used.",
    )
    args, others = parser.parse_known_args(split_lists(arguments, parser))
    if args.num_images is not None and args.num_images < 2:
        raise ValueError(f"--num_images must be at least 2, got {args.num_images}.")
    if args.output_dir is not None:
        for name in (JSON_NAME, FIGURE_NAME):
            check_output_file("--output_dir", args.output_dir / name)
    return args, others


def read_scorenet_classifiers(name_or_path: str | None, **hub_options: Any) -> dict[int, torch.Tensor]:
    """The weights (C, D) of ScoreNet's classifier in the safetensors files of a checkpoint, by layer.

    Args:
        name_or_path: name of a model on the Hub, or a folder; None for a new model.
        hub_options: `revision`, `token`, `cache_dir`.
    """
    if name_or_path is None:
        return {}

    def find(file: str) -> str | None:
        return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub_options)

    files, index_file = {SAFE_WEIGHTS_NAME}, find(SAFE_WEIGHTS_INDEX_NAME)
    if index_file is not None:
        files = set(json.loads(Path(index_file).read_text(encoding="utf-8"))["weight_map"].values())
    weights = {}
    for path in filter(None, map(find, sorted(files))):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                if found := re.search(r"\.(\d+)\.scorenet\.classifier\.weight$", name):
                    weights[int(found[1])] = tensors.get_tensor(name)
    return dict(sorted(weights.items()))


def has_weights(model: TokenMixupModelMixin, classifiers: dict[int, torch.Tensor]) -> bool:
    """Whether the model has these classifiers of ScoreNet, up to the order of the classes."""
    layers = model.get_transformer_layers()
    for index, stored in classifiers.items():
        loaded = layers[index].scorenet.classifier.weight.detach().cpu()
        # Sorted columns are the same for each order of the rows.
        if loaded.shape != stored.shape or not torch.equal(loaded.sort(dim=0)[0], stored.float().sort(dim=0)[0]):
            return False
    return True


def run_calibration(args: Namespace, options: Sequence[str]) -> CalibrationResult | None:
    """Load model and data, and measure; None in other processes than the main process."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*options, *FORCED_OPTIONS, "--output_dir", folder]
        model_args = parse_options(options).model
        name = None if model_args.from_scratch else model_args.model_name_or_path
        classifiers = read_scorenet_classifiers(name, **model_args.hub_kwargs())
        if classifiers:
            # The settings of the run may name other layers, whose ScoreNet would be new.
            options = [*options, "--horizontal_layers", *map(str, classifiers)]
        trainer = build_trainer(options)
        model = trainer.classifier_model
        trained = isinstance(model, TokenMixupModelMixin) and classifiers and has_weights(model, classifiers)
        result = calibrate(
            model,
            first_batches(trainer, args.num_images),
            args.layers,
            fit_scorenet=not trained,
            seed=trainer.args.seed,
        )
    return result if trainer.is_world_process_zero() else None


def main(arguments: Sequence[str]) -> None:
    args, options = parse_own_options(arguments)
    result = run_calibration(args, options)
    if result is None:
        return
    print(format_calibration(result))
    if args.output_dir is not None:
        file = args.output_dir / JSON_NAME
        file.write_text(json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        print(f"\n{file}\n{save_figure(plot_calibration(result), args.output_dir / FIGURE_NAME)}")


def entry_point() -> None:
    # The bases include the error of the HTTP client, of which there are several.
    run_command(main, (ImportError, ValueError, *HfHubHTTPError.__bases__))


if __name__ == "__main__":
    entry_point()
