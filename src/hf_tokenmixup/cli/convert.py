"""Convert released weights into a folder that from_pretrained opens.

  # Compact-Transformers
  python scripts/convert_weights.py cct_7_3x1_32_c100.pth outputs/cct \\
      --image_mean 0.5071 0.4867 0.4408 --image_std 0.2675 0.2565 0.2761
  # the authors' weights, with the settings and the normalization of a recipe
  python scripts/convert_weights.py checkpoint.pth.tar outputs/cct-htm \\
      --recipe cct-7-3x1-cifar100-htm
  # the authors' weights, with settings one by one
  python scripts/convert_weights.py model_best.pth.tar outputs/cct-htm \\
      --authors_tau 0.1 --horizontal_rho 0.01
  # the original ViT
  python scripts/convert_weights.py ViT-B_16.npz outputs/vit --image_size 384
  # names of the classes
  python scripts/convert_weights.py ViT-B_16.npz outputs/vit \\
      --label_names imagenet_classes.txt

The formats are the authors' CCT and ViT, Compact-Transformers and the original
ViT (.npz); the names of the weights identify them. Weight files contain no
settings of TokenMixup: with --recipe or a flag for a setting, the folder has
the TokenMixup model, otherwise the plain model.
"""

import logging
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..conversion.convert import convert_weights
from .arguments import parse_options
from .parser import CliParser, optional_float
from .program import run_command
from .recipes import split_lists

SETTINGS = ("horizontal_layers", "vertical_layers", "horizontal_rho", "vertical_kappa")


def build_parser() -> CliParser:
    parser = CliParser(usage="%(prog)s file output_dir [options]", description=__doc__)
    parser.add_argument("file", help="Weights: .pth, .pth.tar, .pt, .bin, .npz or .safetensors.")
    parser.add_argument("output_dir", help="New folder.")
    group = parser.add_argument_group("settings of TokenMixup")
    group.add_argument("--recipe", help="Recipe with settings of TokenMixup, image mean and standard deviation.")
    group.add_argument("--horizontal_layers", type=int, nargs="*", metavar="LAYER", help="Layers of HTM.")
    tau = group.add_mutually_exclusive_group()
    tau.add_argument("--horizontal_tau", type=optional_float, default=SUPPRESS, help="Tau in nats; none: all images.")
    tau.add_argument("--authors_tau", type=float, help="Tau as in the authors' code, which divides the loss by ten.")
    group.add_argument("--horizontal_rho", type=float, help="Minimum difference in saliency of a replaced token.")
    group.add_argument("--vertical_layers", type=int, nargs="*", metavar="LAYER", help="Layers of VTM.")
    group.add_argument("--vertical_kappa", type=int, help="Number of tokens from each earlier layer.")
    group = parser.add_argument_group("network, classes and image processor")
    group.add_argument("--num_attention_heads", type=int, help="Heads, if not the usual number for the hidden size.")
    group.add_argument("--label_names", metavar="FILE", help="Text file with the class names in order, one per line.")
    group.add_argument("--image_size", type=int, nargs="+", metavar="PIXELS", help="Side, or height and width.")
    group.add_argument("--image_mean", type=float, nargs="+", help="Normalization mean per channel.")
    group.add_argument("--image_std", type=float, nargs="+", help="Normalization standard deviation per channel.")
    return parser


def read_names(path: str) -> list[str]:
    """The lines of a text file.

    Raises:
        ValueError: It cannot be read, or is not a text in UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--label_names must be a text file in UTF-8 with a class name in each line; {path} is not "
            f"({getattr(error, 'strerror', None) or error})."
        ) from error


def conversion_kwargs(args: Namespace) -> dict[str, Any]:
    """Keyword arguments of `convert_weights`; flags override the recipe."""
    settings: dict[str, Any] = {}
    mean, std = args.image_mean, args.image_std
    if args.recipe:
        # This machine need not support the precision of the training.
        recipe = ["--recipe", args.recipe, "--bf16", "false", "--fp16", "false", "--use_cpu"]
        parsed = parse_options(recipe)
        settings = dict(parsed.tokenmixup)
        mean, std = mean or parsed.model.image_mean, std or parsed.model.image_std
    settings |= {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    # None means that all images are mixed.
    if hasattr(args, "horizontal_tau"):
        settings["horizontal_tau"] = args.horizontal_tau
    if args.authors_tau is not None:
        settings["horizontal_tau"] = args.authors_tau * 10
    size = args.image_size
    return {
        "settings": settings or None,
        "image_size": size[0] if size and len(size) == 1 else size,
        "num_attention_heads": args.num_attention_heads,
        "label_names": read_names(args.label_names) if args.label_names else None,
        "image_mean": mean,
        "image_std": std,
    }


def main(arguments: Sequence[str]) -> None:
    parser = build_parser()
    args = parser.parse_args(split_lists(arguments, parser))
    logger = logging.getLogger("hf_tokenmixup.conversion")
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler(sys.stdout)]
    print(f"model    {convert_weights(args.file, args.output_dir, **conversion_kwargs(args))}")


def entry_point() -> None:
    run_command(main, build_parser=build_parser)


if __name__ == "__main__":
    entry_point()
