"""Draw what TokenMixup looks at and does, and how trainings went, as PNG or PDF.

  python scripts/visualize.py saliency outputs/cifar100 --dataset_name uoft-cs/cifar100 --output saliency.png
  python scripts/visualize.py horizontal outputs/cifar100 --images photos --rho 0.005 --output horizontal.pdf
  python scripts/visualize.py vertical google/vit-base-patch16-224 --images dog.jpg --layer 4 --output vertical.png
  python scripts/visualize.py curves outputs/baseline outputs/htm outputs/vtm --output curves.png

saliency    images beside their saliency by gradient, by attention of one layer and by full rollout
horizontal  the pairs of a batch: replaced tokens, the mixed image as they imply it, the new label
vertical    the tokens of each earlier layer that a vertical layer also attends to
curves      accuracy, loss, mixed images and replaced tokens of several trainings

COMMAND --help lists the options. The model is any ViT or CCT, by its name on the Hub or its folder, trained with
TokenMixup or not; it looks at the images in evaluation mode, on the CPU.
"""

import argparse
import logging
import random
from argparse import ArgumentParser, Namespace
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
from ..models import FAMILIES, TokenMixupModelMixin, load_classifier, load_config_dict
from ..training import JsonlLoggerCallback
from ..visualization.figure_utils import save_figure, validate_figure_path
from ..visualization.inspection import predicted_classes, saliency_maps, trace_horizontal_mixup, trace_vertical_memory
from ..visualization.plots import plot_horizontal_mixup, plot_saliency, plot_vertical_memory, short_name
from ..visualization.token_grid import compute_token_grid
from ..visualization.training_curves import plot_runs, read_training_log
from .parser import optional_float
from .processors import open_image_processor
from .program import check_output_file, run_command

DEFAULT_LAYER = 3  # the paper's, for ViT-B/16
DATA_OPTIONS = """
    dataset_name dataset_config_name image_column_name label_column_name eval_split seed cache_dir token
""".split()
IMAGES = {"saliency": 5, "horizontal": 6, "vertical": 5}


class Parser(ArgumentParser):
    """Raises its errors, so that they are told like all others."""

    def error(self, message: str) -> None:
        raise ValueError(message)


@dataclass(frozen=True)
class Batch:
    """Images as the model reads them and as people do, both (B, 3, H, W), their class numbers (B,), all classes."""

    pixel_values: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    predicted: bool
    class_names: list[str]


def build_parser() -> Parser:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s COMMAND ...",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, prog="visualize.py")
    output = Parser(add_help=False)
    output.add_argument("--output", metavar="FILE", type=Path, required=True, help="The picture, .png or .pdf.")
    shared = Parser(add_help=False, parents=[output])
    shared.add_argument("model", help="Model on the Hub or folder: ViT or CCT.")
    group = shared.add_argument_group("images", "Either --images or --dataset_name.")
    group.add_argument("--images", nargs="+", metavar="PATH", help="Image files, or folders of them.")
    group.add_argument("--dataset_name", help="Dataset on the Hub, folder of parquet files, or digits (embedded).")
    group.add_argument("--dataset_config_name", help="Configuration of the dataset.")
    group.add_argument("--eval_split", help="Split to draw from (validation, else test).")
    group.add_argument("--image_column_name", help="Column of the images (found if not given).")
    group.add_argument("--label_column_name", help="Column of the labels (found if not given).")
    group.add_argument(
        "--label_mapping",
        choices=LABEL_MAPPINGS,
        default="strict",
        help="The dataset's classes are the model's in order (strict), by name or by number.",
    )
    group.add_argument(
        "--predicted_labels",
        action="store_true",
        help="Label the images by the model's predictions, as those of --images always are.",
    )
    group.add_argument(
        "--max_samples",
        type=int,
        metavar="N",
        help="Draw so many images with --seed (5; horizontal: 6; files that are named: all).",
    )
    group.add_argument("--seed", type=int, default=42, help="Draws images, and what the settings leave to chance.")
    group = shared.add_argument_group("Hub")
    group.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
    group.add_argument("--token", help="Token for the Hub, if not the one of `hf auth login`.")
    group.add_argument("--cache_dir", help="Where downloads are kept.")

    usage = "%(prog)s MODEL --output FILE [options]"
    usual = f"model's own, else {DEFAULT_LAYER} or the last"
    command = commands.add_parser("saliency", parents=[shared], allow_abbrev=False, usage=usage)
    command.add_argument("--layer", type=int, help=f"The layer whose input is looked at (the {usual}).")
    command = commands.add_parser("horizontal", parents=[shared], allow_abbrev=False, usage=usage)
    command.add_argument("--layer", type=int, help=f"The layer whose input is mixed (the {usual}).")
    command.add_argument(
        "--tau",
        type=optional_float,
        help="Mix only images with a ScoreNet loss below it, in nats (none: all of them, as a published model has no "
        "trained ScoreNet; training checkpoints have).",
    )
    command.add_argument("--rho", type=float, help="Least gain in saliency of a replaced token (the model's).")
    command = commands.add_parser("vertical", parents=[shared], allow_abbrev=False, usage=usage)
    command.add_argument("--layer", type=int, help=f"The layer that attends to earlier tokens (the {usual}).")
    command.add_argument("--kappa", type=int, help="Tokens of each earlier layer (the model's).")
    command = commands.add_parser("curves", parents=[output], allow_abbrev=False)
    command.add_argument("runs", nargs="+", metavar="RUN", help="Output folder of a training.")
    return parser


def check_options(args: Namespace) -> None:
    """Raise a ``ValueError`` for what does not go together, before anything is opened."""
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
    """The model, and the layer to look at.

    Raises:
        ValueError: for a model whose tokens TokenMixup does not know.
    """
    hub = hub_options(args)
    stored = load_config_dict(args.model, **hub)
    if stored.get("model_type") not in FAMILIES:
        raise ValueError(
            f"Tokens are looked at in models of the types {', '.join(sorted(FAMILIES))}, and {args.model} is of type "
            f"{stored.get('model_type')!r}."
        )
    # ScoreNet is built only if it is asked, as no published model has a trained one.
    tau = getattr(args, "tau", None)
    model = load_classifier(args.model, tokenmixup={} if tau is not None else {"horizontal_layers": []}, **hub)
    if args.layer is not None:
        return model, args.layer
    settings = ("vertical_layers",) if args.command == "vertical" else ("horizontal_layers", "vertical_layers")
    own = next((stored[name] for name in settings if stored.get(name)), None)
    return model, own[0] if own else min(DEFAULT_LAYER, model.config.num_hidden_layers - 1)


def hub_options(args: Namespace) -> dict[str, str]:
    options = {"revision": args.revision, "token": args.token, "cache_dir": args.cache_dir}
    return {name: value for name, value in options.items() if value is not None}


def find_images(paths: Sequence[str], most: int | None, usual: int, seed: int) -> list[Path]:
    """The files that are named, and those in the folders that are named; drawn if there are more than are shown.

    Raises:
        ValueError: for a path that is not there, or without any image.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"--images: there is no file or folder {path}.")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [file for file in inside if file == path or file.suffix.lower() in endings]
    if not found:
        raise ValueError(f"--images: no image found in {', '.join(paths)}.")
    if most is None:
        most = usual if any(Path(path).is_dir() for path in paths) else len(found)
    if most >= len(found):
        return found
    return [found[index] for index in sorted(random.Random(seed).sample(range(len(found)), most))]


def open_image(path: Path) -> Image.Image:
    try:
        return read_rgb({"bytes": None, "path": str(path)})
    # Pillow's decoders raise OSError, SyntaxError, struct.error and more.
    except Exception as error:
        raise ValueError(f"--images: {path} cannot be decoded ({type(error).__name__}: {error}).") from error


def read_files(args: Namespace, transform: ImageProcessorTransform) -> torch.Tensor:
    files = find_images(args.images, args.max_samples, IMAGES[args.command], args.seed)
    return transform.batch([open_image(file) for file in files])


def read_dataset(
    args: Namespace, transform: ImageProcessorTransform, names: list[str]
) -> tuple[torch.Tensor, torch.Tensor | None, list[str]]:
    """Pixel values (B, 3, H, W), class numbers (B,) unless they are to be predicted, and names of the model's classes.

    Raises:
        ValueError: for no such dataset, and for classes that are not the model's.
    """
    source = {name: getattr(args, name) for name in DATA_OPTIONS}
    data = load_image_dataset(**source, max_eval_samples=args.max_samples or IMAGES[args.command], do_train=False)
    columns = {"image_column": data.image_column, "label_column": data.label_column}
    examples = ImageClassificationData(data.evaluation, transform, **columns, split=data.eval_split)
    batch = collate(examples.__getitems__(range(len(examples))))
    if args.predicted_labels:
        return batch["pixel_values"], None, names
    try:
        numbers = build_label_mapping(names, data.label_names, args.label_mapping)
    except ValueError as error:
        raise ValueError(f"{error} --predicted_labels needs no classes of the dataset.") from error
    if not has_class_names(names):
        told = dict(zip(numbers, data.label_names, strict=True))
        names = [told.get(number, name) for number, name in enumerate(names)]
    return batch["pixel_values"], torch.tensor(numbers)[batch["labels"]], names


def read_batch(args: Namespace, model: TokenMixupModelMixin) -> Batch:
    """The images to show, as the model's image processor makes them."""
    processor = open_image_processor(args.model, **hub_options(args))
    _, mean, deviation = infer_image_processor_config(processor)
    transform, labels = ImageProcessorTransform(processor), None
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    if args.images:
        pixel_values = read_files(args, transform)
    else:
        pixel_values, labels, names = read_dataset(args, transform, names)
    predicted = labels is None
    if predicted:
        labels = predicted_classes(model, pixel_values)
    images = pixel_values * torch.tensor(deviation).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return Batch(pixel_values, images, labels, predicted, names)


def draw(args: Namespace) -> Figure:
    """The picture of a model and images that was asked for."""
    model, layer = load_model_and_layer(args)
    batch = read_batch(args, model)
    names = batch.class_names
    captions = [short_name(names[label]) for label in batch.labels.tolist()]
    cells = compute_token_grid(model, *batch.images.shape[2:])
    note = "Classes are the model's predictions." if batch.predicted else ""
    look = (model, batch.pixel_values, batch.labels, layer)
    generator = torch.Generator().manual_seed(args.seed)
    if args.command == "horizontal":
        seen = trace_horizontal_mixup(*look, tau=args.tau, rho=args.rho, generator=generator)
        return plot_horizontal_mixup(batch.images, seen, names, cells, note=note)
    if args.command == "vertical":
        seen = trace_vertical_memory(*look, kappa=args.kappa, generator=generator)
        return plot_vertical_memory(batch.images, seen, captions, cells, note=note)
    depth = model.config.num_hidden_layers
    maps = saliency_maps(*look)
    return plot_saliency(batch.images, maps, captions, cells, layer=layer, num_layers=depth, note=note)


def draw_curves(runs: Sequence[str]) -> Figure:
    """The curves of several trainings, named after their folders."""
    # The log itself stands for its folder.
    runs = [str(Path(run).parent) if Path(run).name == JsonlLoggerCallback.file_name else run for run in runs]
    names = [Path(run).resolve().name for run in runs]
    # Folders of one name are told apart by their paths.
    names = [run if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"Each RUN must be named once, got {' '.join(runs)}.")
    logs = {
        name: read_training_log(Path(run) / JsonlLoggerCallback.file_name)
        for name, run in zip(names, runs, strict=True)
    }
    return plot_runs(logs)


def main(arguments: list[str]) -> None:
    args = build_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    check_options(args)
    figure = draw_curves(args.runs) if args.command == "curves" else draw(args)
    print(save_figure(figure, args.output))


def entry_point() -> None:
    # The bases include the HTTP client's own error, whichever client is installed.
    run_command(main, (ImportError, ValueError, *HfHubHTTPError.__bases__))


if __name__ == "__main__":
    entry_point()
