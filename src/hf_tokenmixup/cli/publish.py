"""Upload a model folder to the Hub: weights, configuration, image processor and
model card.

  python scripts/publish.py outputs/cifar100 user/vit-cifar100
  # a private repository
  python scripts/publish.py outputs/cifar100 user/vit-cifar100 --private
  # a branch
  python scripts/publish.py outputs/cifar100 user/vit-cifar100 \\
      --revision longer-training --message "Train for 100 epochs"
  # an image in the model card, with the model's prediction
  python scripts/publish.py outputs/cifar100 user/vit-cifar100 \\
      --example_image cat.jpg
  # a license in the model card
  python scripts/publish.py outputs/cifar100 user/vit-cifar100 --license mit

The folder is the output of finetune.py or convert_weights.py. Uploaded are the
exported model, its image processor, the model card, and the results, log and
curves of the run; checkpoints, optimizer states and the files of trackers are
not. The command can be repeated after an interruption or a change.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from ..hub import upload_model_folder
from .parser import TOKEN_HELP, CliParser
from .program import run_command
from .recipes import check_unknown_options


def build_parser() -> CliParser:
    parser = CliParser(description=__doc__)
    parser.add_argument("folder", help="Folder of the exported model.")
    parser.add_argument("repo_id", help="Repository, user/name; it is created if it does not exist.")
    parser.add_argument("--private", action="store_true", default=None, help="Create the repository as a private one.")
    parser.add_argument("--revision", help="Branch to upload to (main).")
    parser.add_argument("--message", default="Upload model", help="Commit message (%(default)s).")
    parser.add_argument("--token", help=TOKEN_HELP)
    parser.add_argument("--license", help="License in the model card, as the Hub names it: apache-2.0, mit, ...")
    parser.add_argument(
        "--example_image", metavar="FILE", help="Image to publish in the model card, with the model's prediction."
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = build_parser()
    args, unknown = parser.parse_known_args(arguments)
    check_unknown_options(unknown, parser)
    if Path(args.repo_id).is_dir() and not Path(args.folder).exists():
        raise ValueError(f"There is no folder {args.folder}, but {args.repo_id} is one. Pass the folder first.")
    logging.basicConfig(format="%(message)s")
    # huggingface_hub's own warning about an unchanged repository goes to its handler and to that of the root logger.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    before = find_head(args.repo_id, args.revision, args.token)
    commit = upload_model_folder(
        args.folder,
        args.repo_id,
        token=args.token,
        private=args.private,
        revision=args.revision,
        message=args.message,
        license=args.license,
        example_image=args.example_image,
    )
    print(f"{commit.repo_url}{' (nothing has changed since the last upload)' if commit.oid == before else ''}")


def find_head(repo_id: str, revision: str | None, token: str | None) -> str | None:
    """The latest commit of a branch. None if there is none or the Hub does not tell, which the upload reports."""
    try:
        return HfApi(token=token).model_info(repo_id, revision=revision).sha
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return None


def entry_point() -> None:
    run_command(main, build_parser=build_parser)


if __name__ == "__main__":
    entry_point()
