"""Upload a model that lies in a folder to the Hub: weights, configuration, image processor and model card.

  python scripts/publish.py outputs/cifar100 user/vit-cifar100

Takes the output folder of finetune.py or convert_weights.py. Checkpoints, optimizer states and logs of the machine
stay where they are. It can be repeated: after an interruption, or when something has changed.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ..hub import upload_model_folder
from .program import run_command
from .recipes import check_unknown_options


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", help="Folder of the published model.")
    parser.add_argument("repo_id", help="Repository, user/name; it is created where there is none.")
    parser.add_argument("--private", action="store_true", default=None, help="Make a new repository private.")
    parser.add_argument("--revision", help="Branch to upload to (main).")
    parser.add_argument("--message", default="Upload model", help="Message of the commit.")
    parser.add_argument("--token", help="Token for the Hub, if not the one of `hf auth login`.")
    parser.add_argument("--license", help="License in the model card, as the Hub names it: apache-2.0, mit, ...")
    args, unknown = parser.parse_known_args(arguments)
    check_unknown_options(unknown, parser)
    if Path(args.repo_id).is_dir() and not Path(args.folder).exists():
        raise ValueError(f"There is no folder {args.folder}, and {args.repo_id} is one: name the folder first.")
    logging.basicConfig(format="%(message)s")

    commit = upload_model_folder(
        args.folder,
        args.repo_id,
        token=args.token,
        private=args.private,
        revision=args.revision,
        message=args.message,
        license=args.license,
    )
    print(commit.repo_url)


def entry_point() -> None:
    run_command(main)


if __name__ == "__main__":
    entry_point()
