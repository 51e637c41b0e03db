"""Show in a browser what TokenMixup does with images, and the curves of a run
while it trains.

  # a small model of digits, without a download
  python scripts/demo.py
  # a model of the Hub, at another port
  python scripts/demo.py --model google/vit-base-patch16-224 --port 8000
  # a run, while it trains or afterwards
  python scripts/demo.py --model outputs/cifar100 --run outputs/cifar100
  # visitors from other machines, by a link or in the local network
  python scripts/demo.py --share
  python scripts/demo.py --host 0.0.0.0
  # a Space
  python scripts/demo.py --space my-space --model user/vit-cifar100

Without --model, a small ViT for the included digits is trained in a few
seconds. --space writes a folder that is a Space of the Hub. Needs gradio:
pip install -e ".[demo]"
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from ..demo.classifier import DemoClassifier, train_digits_classifier
from ..demo.runs import LOG_NAME
from ..demo.space import write_space
from ..models import FAMILIES, describe_unsupported, load_classifier, load_config_dict
from .parser import CliParser, add_hub_options, hub_kwargs
from .processors import open_image_processor
from .program import run_command

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 7860
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
MAX_PORT = 65535
# Options that a Space does not have.
SERVER_OPTIONS = ("run", "host", "port", "share", "revision", "token", "cache_dir")


def build_parser() -> CliParser:
    parser = CliParser(description=__doc__, usage="%(prog)s [options]")
    parser.add_argument("--model", help=f"Model on the Hub or folder, of type {', '.join(FAMILIES)} (digits).")
    parser.add_argument("--run", metavar="FOLDER", help="Output folder of a run, for its curves.")
    parser.add_argument("--host", help=f"Address of the server ({DEFAULT_HOST}); 0.0.0.0 is open to the network.")
    parser.add_argument("--port", type=int, help=f"Port of the server ({DEFAULT_PORT}).")
    parser.add_argument("--share", action="store_true", help="Also create a public link, through gradio.live.")
    parser.add_argument("--space", metavar="FOLDER", type=Path, help="Write a Space to this new folder, and end.")
    add_hub_options(parser)
    return parser


def validate_options(args: Namespace) -> None:
    """Check the options before the model is loaded.

    Raises:
        ValueError: An option has a wrong value, cannot be used with another one, or gradio is not installed.
    """
    if args.port is not None and not 1 <= args.port <= MAX_PORT:
        raise ValueError(f"--port must be between 1 and {MAX_PORT}, got {args.port}.")
    if args.space is not None:
        if used := [f"--{name}" for name in SERVER_OPTIONS if getattr(args, name)]:
            raise ValueError(f"--space starts no server and loads no model. Remove {', '.join(used)}.")
        if args.model and Path(args.model).exists():
            raise ValueError(
                f"A Space loads its model from the Hub, but --model {args.model} is a folder. Upload it with publish, "
                "and name the repository."
            )
    if args.run is not None and not (Path(args.run) / LOG_NAME).is_file():
        raise ValueError(f"--run must be the output folder of a run, but {args.run} has no {LOG_NAME}.")
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            'The demo needs gradio, which is not installed: pip install -e ".[demo]", or pip install gradio.'
        ) from error


def load_demo_classifier(name: str, **hub_options: Any) -> DemoClassifier:
    """Load a model with its image processor; for an empty name, train the small classifier of digits.

    Raises:
        ValueError: The model does not exist or does not support TokenMixup, or has no image processor.
    """
    if not name:
        return train_digits_classifier()
    if reason := describe_unsupported(load_config_dict(name, **hub_options)):
        raise ValueError(f"{name} cannot be shown: {reason}. Choose a model that supports TokenMixup.")
    model = load_classifier(name, **hub_options)
    return DemoClassifier.from_model(model, open_image_processor(name, **hub_options), name)


def create_app(model: str = "", run: str = "", *, local_paths: bool = False, **hub_options: Any):
    """Create the Gradio app.

    Args:
        model: Model on the Hub or folder; empty: digits. The Hub options are for this model.
        run: Output folder of a run.
        local_paths: Whether visitors may name other folders of this machine.
        hub_options: `revision`, `token`, `cache_dir`.
    """
    from ..demo.app import build_app

    def load(name: str) -> DemoClassifier:
        return load_demo_classifier(name, **(hub_options if name == model else {}))

    return build_app(load, model, run, local_paths=local_paths)


def main(arguments: Sequence[str]) -> None:
    args = build_parser().parse_args(arguments)
    validate_options(args)
    if args.space is not None:
        print(write_space(args.space, args.model or ""))
        return
    from ..demo.app import launch_options

    host, port = args.host or DEFAULT_HOST, args.port or DEFAULT_PORT
    is_public = args.share or host not in LOCAL_HOSTS
    if args.model:
        # An error ends the command, and not the first request only.
        load_config_dict(args.model, **hub_kwargs(args))
    app = create_app(args.model or "", args.run or "", local_paths=not is_public, **hub_kwargs(args))
    try:
        app.launch(server_name=host, server_port=port, share=args.share, **launch_options())
    except OSError as error:
        raise ValueError(
            f"The server cannot start at {host}, port {port}: the port is in use, or the address is not one of this "
            "machine. Choose another --port or --host."
        ) from error


def entry_point() -> None:
    # The bases include the error of the HTTP client, of which there are several.
    run_command(main, (ImportError, ValueError, *HfHubHTTPError.__bases__), build_parser)


if __name__ == "__main__":
    entry_point()
