"""Convert released weights into a folder that from_pretrained opens.

  python scripts/convert_weights.py cct_7_3x1_32_c100.pth outputs/cct --image_mean 0.5071 0.4867 0.4408 \\
      --image_std 0.2675 0.2565 0.2761
  python scripts/convert_weights.py model_best.pth.tar outputs/cct-htm --authors_tau 0.1 --horizontal_rho 0.01
  python scripts/convert_weights.py ViT-B_16.npz outputs/vit --image_size 384

The authors' CCT and ViT, Compact-Transformers and the original ViT (.npz) are told apart by their names. Weights carry
no settings of TokenMixup: with --recipe or one of its flags the folder holds the TokenMixup model, else the plain one.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from ..conversion.convert import convert_weights
from .arguments import optional_float, parse_options
from .program import run_command
from .recipes import RECIPES, split_lists

SETTINGS = ("horizontal_layers", "vertical_layers", "horizontal_rho", "vertical_kappa")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", help="Weights: .pth, .pth.tar, .pt, .bin, .npz or .safetensors.")
    parser.add_argument("output_dir", help="Folder to make.")
    parser.add_argument("--recipe", help="Take settings of TokenMixup, image mean and deviation from this recipe.")
    parser.add_argument("--horizontal_layers", type=int, nargs="*", metavar="LAYER", help="Where ScoreNet must lie.")
    parser.add_argument("--vertical_layers", type=int, nargs="*", metavar="LAYER", help="Layers of VTM.")
    tau = parser.add_mutually_exclusive_group()
    tau.add_argument(
        "--horizontal_tau", type=optional_float, default=argparse.SUPPRESS, help="Tau in nats; none: all images."
    )
    tau.add_argument("--authors_tau", type=float, help="Tau of the authors' code, which divides the loss by ten.")
    parser.add_argument("--horizontal_rho", type=float)
    parser.add_argument("--vertical_kappa", type=int)
    parser.add_argument("--image_size", type=int, nargs="+", metavar="PIXELS", help="Side, or height and width.")
    parser.add_argument("--num_attention_heads", type=int, help="If it is not the usual one for the hidden size.")
    parser.add_argument("--label_names", metavar="FILE", help="Class names in order, one a line.")
    parser.add_argument("--image_mean", type=float, nargs="+", help="Per channel.")
    parser.add_argument("--image_std", type=float, nargs="+", help="Per channel.")
    return parser


def read_names(path: str) -> list[str]:
    """The lines of a text file.

    Raises:
        ValueError: It cannot be read, or is no text in UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--label_names must be a text file in UTF-8 with a class name in each line; {path} is not "
            f"({getattr(error, 'strerror', None) or error})."
        ) from error


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``convert_weights`` takes, flags before the recipe."""
    settings: dict[str, Any] = {}
    mean, std = args.image_mean, args.image_std
    if args.recipe:
        # Nothing is trained here: precision that this machine may lack must not stand in the way.
        recipe = ["--recipe", args.recipe, "--bf16", "false", "--fp16", "false", "--use_cpu"]
        model, *_, settings = parse_options(recipe, RECIPES)
        mean, std = mean or model.image_mean, std or model.image_std
    settings |= {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    # Here None is a value.
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


def main(arguments: list[str]) -> None:
    parser = build_parser()
    args = parser.parse_args(split_lists(arguments, parser))
    logger = logging.getLogger("hf_tokenmixup.conversion")
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler(sys.stdout)]
    print(f"model    {convert_weights(args.file, args.output_dir, **options(args))}")


def entry_point() -> None:
    run_command(main)


if __name__ == "__main__":
    entry_point()
