"""Draw what TokenMixup attends to and does, and the curves of runs, as PNG or PDF.

  python scripts/visualize.py saliency outputs/cifar100 \\
      --dataset_name uoft-cs/cifar100 --output saliency.png
  python scripts/visualize.py horizontal outputs/cifar100 --images photos \\
      --output horizontal.pdf
  python scripts/visualize.py vertical google/vit-base-patch16-224 \\
      --images dog.jpg --output vertical.png
  python scripts/visualize.py curves outputs/baseline outputs/htm \\
      --output curves.png

saliency    images next to their saliency by gradient, by attention of one layer
            and by full rollout
horizontal  the pairs of a batch: replaced tokens, the resulting mixed image,
            the new label
vertical    the tokens of each earlier layer that a vertical layer also attends
            to
curves      accuracy, loss, mixed images and replaced tokens of several runs

COMMAND --help lists the options of a command, and more examples. The model is
one of a type that supports TokenMixup, by its name on the Hub or its folder,
trained with TokenMixup or not. It runs in evaluation mode on the CPU.
"""

import logging
import random
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError
from matplotlib.figure import Figure
from PIL import Image

from ..data import (
    LABEL_MAPPINGS,
    ImageClassificationData,
    build_label_mapping,
    collate,
    has_class_names,
    load_image_dataset,
)
from ..data.image_cache import read_rgb
from ..data.transforms import ImageProcessorTransform, infer_image_processor_config
from ..models import FAMILIES, TokenMixupModelMixin, describe_unsupported, load_classifier, load_config_dict
from ..training import JsonlLoggerCallback
from ..visualization.figure_utils import save_figure, validate_figure_path
from ..visualization.inspection import predicted_classes, saliency_maps, trace_horizontal_mixup, trace_vertical_memory
from ..visualization.plots import plot_horizontal_mixup, plot_saliency, plot_vertical_memory, short_name
from ..visualization.token_grid import compute_token_grid
from ..visualization.training_curves import plot_runs, read_training_log
from .parser import CliParser, add_hub_options, hub_kwargs, optional_float
from .processors import open_image_processor
from .program import check_output_file, run_command

DEFAULT_LAYER = 3  # the paper's, for ViT-B/16
DATA_OPTIONS = (
    "dataset_name",
    "dataset_config_name",
    "image_column_name",
    "label_column_name",
    "eval_split",
    "seed",
    "cache_dir",
    "token",
)
DESCRIPTIONS = {
    "saliency": """Draw images next to their saliency by gradient, by attention of one layer and by
full rollout.

  # images of a dataset
  python scripts/visualize.py saliency outputs/cifar100 \\
      --dataset_name uoft-cs/cifar100 --max_samples 8 --output saliency.png
  # own photographs, at another layer
  python scripts/visualize.py saliency google/vit-base-patch16-224 \\
      --images photos --layer 6 --output saliency.png
""",
    "horizontal": """Draw the pairs of a batch: replaced tokens, the resulting mixed image, the new
label.

  # images of a dataset
  python scripts/visualize.py horizontal outputs/cifar100 \\
      --dataset_name uoft-cs/cifar100 --output horizontal.png
  # own photographs, with another rho
  python scripts/visualize.py horizontal outputs/cifar100 --images photos \\
      --rho 0.005 --output horizontal.pdf
  # only easy images, by the trained ScoreNet of a checkpoint
  python scripts/visualize.py horizontal outputs/cifar100/checkpoint-500 \\
      --dataset_name uoft-cs/cifar100 --tau 2 --output horizontal.png
  # a dataset whose classes are not those of the model
  python scripts/visualize.py horizontal google/vit-base-patch16-224 \\
      --dataset_name uoft-cs/cifar100 --predicted_labels --output horizontal.png
""",
    "vertical": """Draw the tokens of each earlier layer that a vertical layer also attends to.

  # images of a dataset
  python scripts/visualize.py vertical outputs/cifar100 \\
      --dataset_name uoft-cs/cifar100 --output vertical.png
  # a photograph, with another layer and number of tokens
  python scripts/visualize.py vertical google/vit-base-patch16-224 \\
      --images dog.jpg --layer 4 --kappa 10 --output vertical.png
""",
    "curves": """Draw accuracy, loss, mixed images and replaced tokens of several runs.

  python scripts/visualize.py curves outputs/baseline outputs/htm outputs/vtm \\
      --output curves.png
""",
}
DEFAULT_NUM_IMAGES = {"saliency": 5, "horizontal": 6, "vertical": 5}


@dataclass(frozen=True)
class Batch:
    """Images with their labels.

    Attributes:
        pixel_values: (B, 3, H, W), normalized for the model.
        images: (B, 3, H, W), in [0, 1] for display.
        labels: (B,) class indices.
        predicted: whether the labels are the model's predictions.
        class_names: of all classes of the model, by index.
    """

    pixel_values: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    predicted: bool
    class_names: list[str]


def build_parser() -> CliParser:
    parser = CliParser(description=__doc__, usage="%(prog)s COMMAND ...")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, prog="visualize.py")
    output = CliParser(add_help=False)
    output.add_argument("--output", metavar="FILE", type=Path, required=True, help="The figure, .png or .pdf.")
    shared = CliParser(add_help=False, parents=[output])
    shared.add_argument("model", help=f"Model on the Hub or folder, of type {', '.join(FAMILIES)}.")
    group = shared.add_argument_group("images", "Either --images or --dataset_name.")
    group.add_argument("--images", nargs="+", metavar="PATH", help="Image files, or folders of them.")
    group.add_argument("--dataset_name", help="Dataset on the Hub, folder of parquet files, or digits (included).")
    group.add_argument("--dataset_config_name", help="Configuration of the dataset.")
    group.add_argument("--eval_split", help="Split to draw images from (validation, else test).")
    group.add_argument("--image_column_name", help="Column of the images (detected).")
    group.add_argument("--label_column_name", help="Column of the labels (detected).")
    group.add_argument(
        "--label_mapping",
        choices=LABEL_MAPPINGS,
        default="strict",
        help="Match the dataset's classes with the model's in order (strict), by name or by number.",
    )
    group.add_argument(
        "--predicted_labels",
        action="store_true",
        help="Label the images by the model's predictions, as --images does.",
    )
    group.add_argument(
        "--max_samples",
        type=int,
        metavar="N",
        help="Draw N images with --seed (5; horizontal: 6; named files: all).",
    )
    group.add_argument("--seed", type=int, default=42, help="Draws images, and the random choices of the settings.")
    add_hub_options(shared)

    usage = "%(prog)s MODEL --output FILE [options]"
    default = f"the model's own, else {DEFAULT_LAYER} or the last"
    command = commands.add_parser("saliency", parents=[shared], usage=usage, description=DESCRIPTIONS["saliency"])
    command.add_argument("--layer", type=int, help=f"The layer whose input is shown ({default}).")
    command = commands.add_parser("horizontal", parents=[shared], usage=usage, description=DESCRIPTIONS["horizontal"])
    command.add_argument("--layer", type=int, help=f"The layer whose input is mixed ({default}).")
    command.add_argument(
        "--tau",
        type=optional_float,
        help="Mix only images with a ScoreNet loss below this, in nats (none: all; exported models have no trained "
        "ScoreNet, checkpoints have).",
    )
    command.add_argument("--rho", type=float, help="Minimum difference in saliency of a replaced token (the model's).")
    command = commands.add_parser("vertical", parents=[shared], usage=usage, description=DESCRIPTIONS["vertical"])
    command.add_argument("--layer", type=int, help=f"The layer that attends to earlier tokens ({default}).")
    command.add_argument("--kappa", type=int, help="Number of tokens from each earlier layer (the model's).")
    command = commands.add_parser("curves", parents=[output], description=DESCRIPTIONS["curves"])
    command.add_argument("runs", nargs="+", metavar="RUN", help="Output folder of a run.")
    return parser


def validate_options(args: Namespace) -> None:
    """Check the options before model and data are loaded.

    Raises:
        ValueError: An option has a wrong value, or cannot be used with another one.
    """
    validate_figure_path(args.output)
    check_output_file("--output", args.output)
    if args.command == "curves":
        return
    if (args.images is None) == (args.dataset_name is None):
        raise ValueError(
            f"Expected either --images or --dataset_name, got {'both' if args.images else 'neither'}. "
            "'--dataset_name digits' needs no download."
        )
    if args.max_samples is not None and args.max_samples < 1:
        raise ValueError(f"--max_samples must be at least 1, got {args.max_samples}.")
    tau = getattr(args, "tau", None)
    if tau is not None and not tau >= 0:
        raise ValueError(f"--tau must be at least 0, or none for all images, got {tau}.")


def load_model_and_layer(args: Namespace) -> tuple[TokenMixupModelMixin, int]:
    """The model, and the index of the layer to show.

    Raises:
        ValueError: The model is of another family.
    """
    hub = hub_kwargs(args)
    stored = load_config_dict(args.model, **hub)
    if reason := describe_unsupported(stored):
        raise ValueError(f"{args.model} cannot be visualized: {reason}. Choose a model that supports TokenMixup.")
    # Without a threshold ScoreNet is not needed, and exported models have no trained one.
    tau = getattr(args, "tau", None)
    model = load_classifier(args.model, tokenmixup={} if tau is not None else {"horizontal_layers": []}, **hub)
    if args.layer is not None:
        return model, args.layer
    settings = ("vertical_layers",) if args.command == "vertical" else ("horizontal_layers", "vertical_layers")
    own = next((stored[name] for name in settings if stored.get(name)), None)
    return model, own[0] if own else min(DEFAULT_LAYER, model.config.network.num_layers - 1)


def find_images(paths: Sequence[str], max_images: int | None, default: int, seed: int) -> list[Path]:
    """Image files by their paths and in folders.

    Args:
        paths: of files and folders.
        max_images: more files are sampled; None: all for files, `default` if there is a folder.
        default: number of images from folders.
        seed: of the sample.

    Raises:
        ValueError: A path does not exist, or there is no image.
    """
    extensions = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"--images: there is no file or folder {path}.")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [file for file in inside if file == path or file.suffix.lower() in extensions]
    if not found:
        raise ValueError(f"--images: no image found in {', '.join(paths)}.")
    if max_images is None:
        max_images = default if any(Path(path).is_dir() for path in paths) else len(found)
    if max_images >= len(found):
        return found
    return [found[index] for index in sorted(random.Random(seed).sample(range(len(found)), max_images))]


def open_image(path: Path) -> Image.Image:
    try:
        return read_rgb({"bytes": None, "path": str(path)})
    # Pillow's decoders raise OSError, SyntaxError, struct.error and more.
    except Exception as error:
        raise ValueError(f"--images: {path} cannot be decoded ({type(error).__name__}: {error}).") from error


def read_files(args: Namespace, transform: ImageProcessorTransform) -> torch.Tensor:
    files = find_images(args.images, args.max_samples, DEFAULT_NUM_IMAGES[args.command], args.seed)
    return transform.batch([open_image(file) for file in files])


def read_dataset(
    args: Namespace, transform: ImageProcessorTransform, names: list[str]
) -> tuple[torch.Tensor, torch.Tensor | None, list[str]]:
    """Images of a dataset.

    Returns:
        Pixel values (B, 3, H, W); class indices (B,), None if they are to be predicted; names of the model's classes.

    Raises:
        ValueError: There is no such dataset, or its classes are not the model's.
    """
    kwargs = {name: getattr(args, name) for name in DATA_OPTIONS}
    num_images = args.max_samples or DEFAULT_NUM_IMAGES[args.command]
    data = load_image_dataset(**kwargs, max_eval_samples=num_images, do_train=False)
    columns = {"image_column": data.image_column, "label_column": data.label_column}
    examples = ImageClassificationData(data.evaluation, transform, **columns, split=data.eval_split)
    batch = collate(examples.__getitems__(range(len(examples))))
    if args.predicted_labels:
        return batch["pixel_values"], None, names
    try:
        label_map = build_label_mapping(names, data.label_names, args.label_mapping)
    except ValueError as error:
        raise ValueError(f"{error} --predicted_labels needs no classes of the dataset.") from error
    if not has_class_names(names):
        dataset_names = dict(zip(label_map, data.label_names, strict=True))
        names = [dataset_names.get(index, name) for index, name in enumerate(names)]
    return batch["pixel_values"], torch.tensor(label_map)[batch["labels"]], names


def read_batch(args: Namespace, model: TokenMixupModelMixin) -> Batch:
    """The images to show, transformed by the model's image processor."""
    processor = open_image_processor(args.model, **hub_kwargs(args))
    _, mean, std = infer_image_processor_config(processor)
    transform, labels = ImageProcessorTransform(processor), None
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if args.images:
        pixel_values = read_files(args, transform)
    else:
        pixel_values, labels, names = read_dataset(args, transform, names)
    predicted = labels is None
    if predicted:
        labels = predicted_classes(model, pixel_values)
    images = pixel_values * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return Batch(pixel_values, images, labels, predicted, names)


def plot(args: Namespace) -> Figure:
    """The figure of a command that needs a model and images."""
    model, layer = load_model_and_layer(args)
    batch = read_batch(args, model)
    names = batch.class_names
    captions = [short_name(names[label]) for label in batch.labels.tolist()]
    grid = compute_token_grid(model, *batch.images.shape[2:])
    note = "Classes are the model's predictions." if batch.predicted else ""
    inputs = (model, batch.pixel_values, batch.labels, layer)
    generator = torch.Generator().manual_seed(args.seed)
    if args.command == "horizontal":
        trace = trace_horizontal_mixup(*inputs, tau=args.tau, rho=args.rho, generator=generator)
        return plot_horizontal_mixup(batch.images, trace, names, grid, note=note)
    if args.command == "vertical":
        trace = trace_vertical_memory(*inputs, kappa=args.kappa, generator=generator)
        return plot_vertical_memory(batch.images, trace, captions, grid, note=note)
    depth = model.config.network.num_layers
    maps = saliency_maps(*inputs)
    return plot_saliency(batch.images, maps, captions, grid, layer=layer, num_layers=depth, note=note)


def plot_curves(runs: Sequence[str]) -> Figure:
    """The curves of several runs, named after their folders."""
    # The path of a log means its folder.
    runs = [str(Path(run).parent) if Path(run).name == JsonlLoggerCallback.file_name else run for run in runs]
    names = [Path(run).resolve().name for run in runs]
    # Folders of the same name are shown with their paths.
    names = [run if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"Each RUN must be named once, got {' '.join(runs)}.")
    logs = {
        name: read_training_log(Path(run) / JsonlLoggerCallback.file_name)
        for name, run in zip(names, runs, strict=True)
    }
    return plot_runs(logs)


def main(arguments: Sequence[str]) -> None:
    args = build_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    validate_options(args)
    figure = plot_curves(args.runs) if args.command == "curves" else plot(args)
    print(save_figure(figure, args.output))


def entry_point() -> None:
    # The bases include the error of the HTTP client, of which there are several.
    run_command(main, (ImportError, ValueError, *HfHubHTTPError.__bases__), build_parser)


if __name__ == "__main__":
    entry_point()
