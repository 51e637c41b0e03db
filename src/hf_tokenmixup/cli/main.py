"""`hf-tokenmixup COMMAND ...` runs a command of this folder."""

import importlib
import sys

from ..utils.text import did_you_mean
from .program import CONSOLE_COMMAND, exit_with

COMMANDS = {
    "finetune": "train or fine-tune an image classifier with TokenMixup",
    "calibrate": "forecast what rho, tau and kappa do, and suggest values",
    "evaluate": "measure an image classifier: top-1, top-5, loss, images per second",
    "publish": "upload a model folder to the Hub",
    "visualize": "plot saliency, mixed images, collected tokens and training curves",
    "study": "train the rows of a table of the paper, or a sweep, and compare them",
    "benchmark": "measure the overhead of TokenMixup",
    "throughput": "measure images per second of a training run",
    "demo": "show mixing of images and curves of a run in a browser",
    "convert": "convert released weights into a folder that from_pretrained opens",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        f"usage: {CONSOLE_COMMAND} COMMAND [options]\n\n{commands}\n\n"
        f"{CONSOLE_COMMAND} COMMAND --help lists the options of a command. On several GPUs: "
        "accelerate launch -m hf_tokenmixup.cli.finetune [options]"
    )


def entry_point() -> None:
    """Run the command that the first argument names, or print the help or the version."""
    sys.argv[0] = CONSOLE_COMMAND
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    name = arguments[0]
    if name == "--version":
        from .. import __version__

        print(f"hf_tokenmixup {__version__}")
        return
    if name not in COMMANDS:
        exit_with(f"there is no command {name!r}{did_you_mean(name, COMMANDS)} Commands: {', '.join(COMMANDS)}.")
    sys.argv[:] = [f"{CONSOLE_COMMAND} {name}", *arguments[1:]]
    importlib.import_module(f"{__package__}.{name}").entry_point()


if __name__ == "__main__":
    entry_point()
