"""What a result was measured with: hardware, library versions, command; nothing that names a particular machine."""

import os
import platform
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

import torch

from .redaction import MASK, is_secret_name, remove_secrets

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
LIBRARIES = ("hf_tokenmixup", "torch", "transformers", "datasets", "accelerate", "timm")
# Within a text, a path ends at punctuation, but for the colons of a drive and of a URL and for escaped spaces.
_WORD = re.compile(r"(?:(?<![A-Za-z0-9])[A-Za-z]:(?=[\\/])|:(?=//)|\\ |[^\s\"'`=,:;\[\](){}<>|&])+")
_QUOTED_PATH = re.compile(r"""(["'])((?:~|/|\.\./|[A-Za-z]:[\\/]|\\\\)[^"'\n]*)\1""")

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
# Names of folders that say nothing of the images in them.
_PLACES = {"", "..", "~", "home", "users"}
_UNTELLING_NAMES = _SPLIT_NAMES | _PLACES | {"data", "dataset", "datasets", "image", "images", "img", "imgs"}


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide on a result, by name."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def describe_hardware(num_devices: int = 1, device: torch.device | str | None = None) -> str:
    """The accelerator, or the number of threads where there is none: `2 x NVIDIA H100 80GB HBM3`, `CPU, 2 threads`.

    Args:
        num_devices: how many there are of it.
        device: one of them; None: the accelerator if there is one.
    """
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        name = f"CPU, {torch.get_num_threads()} threads"
    elif device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = device.type
    return name if num_devices == 1 else f"{num_devices} x {name}"


def describe_precision(autocast: str, weights: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> str:
    """The precision of a forward: `fp32`, `bf16` (by autocast), `bf16 weights` (without it), `fp16, bf16 weights`.

    Args:
        autocast: what autocast computes in; `no` or `fp32` where it is off.
        weights: dtype of the model's weights.
        device: of the model; float32 on a CUDA device may be `tf32` in matrix products.
    """
    name = DTYPE_NAMES.get(weights, str(weights).removeprefix("torch."))
    if autocast not in ("no", "fp32"):
        return autocast if weights == torch.float32 else f"{autocast}, {name} weights"
    if weights != torch.float32:
        return f"{name} weights"
    return "tf32" if torch.device(device).type == "cuda" and _uses_tf32() else "fp32"


def _uses_tf32() -> bool:
    """Whether matrix products of float32 on CUDA devices may be in TF32."""
    matmul = torch.backends.cuda.matmul
    own = getattr(matmul, "fp32_precision", None)
    # Before torch 2.9 there is the other setting alone.
    if own is None:
        return matmul.allow_tf32
    return (torch.backends.fp32_precision if own == "none" else own) == "tf32"


def redact_command(program: str, arguments: Sequence[str]) -> str:
    """A command line as others may read and repeat it.

    Without secrets, without what says where to upload to, and with the last part alone of local paths.
    """
    public, value_follows = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if is_secret_name(option) or option.replace("-", "_").startswith(("__hub_", "__push_to_hub")):
            value_follows = not equals
        elif option or not value_follows:
            value_follows = False
            shown = public_paths(strip_local_path(remove_secrets(value)))
            if not shown and value and (equals or public and public[-1].startswith("--")):
                # Without a value, an option would take the next word.
                shown = MASK
            if option or shown or not argument:
                public.append(option + equals + shown)
        else:
            value_follows = False
    return " ".join([program, *map(shlex.quote, public)])


def public_paths(text: str) -> str:
    """A text with the last part alone of each path that leads out of the working directory."""
    text = _QUOTED_PATH.sub(lambda found: found[1] + (strip_local_path(found[2]) or found[2]) + found[1], text)
    return _WORD.sub(lambda word: strip_local_path(word[0]) or word[0], text)


def strip_local_path(name: str) -> str:
    """The last part of a path that leads out of the working directory; any other name as it is, without secrets."""
    path = _path(name)
    return path.name if _leads_out(path) else remove_secrets(name)


def public_dataset(name: str, kind: str = "folder") -> str:
    """What to call a dataset: its name on the Hub, or what a local folder is, in words that are no name on the Hub.

    Args:
        name: Name on the Hub, a folder, or a result of this function, which stays as it is.
        kind: What a folder of this name is: `image folder`, `folder`.

    Returns:
        `cats (local image folder)` for `/data/cats` and for `/data/cats/train`. A folder whose name says nothing is `a
        local image folder`.
    """
    if name == "digits" or is_local_dataset(name):
        return name
    path = _path(name)
    if not _leads_out(path) and not Path(name).exists():
        return remove_secrets(name)
    if Path(name).exists():
        # The folder that the working directory is in has a name too; a link is called what the user calls it.
        path = Path(os.path.abspath(name))
    untelling = _PLACES
    if path.name.lower() in _SPLIT_NAMES:
        path, untelling = path.parent, _UNTELLING_NAMES
    of_user = path == Path.home() or path.parent.name.lower() in ("home", "users")
    if of_user or path.name.lower() in untelling:
        return f"a local {kind}"
    return f"{path.name} (local {kind})"


def is_local_dataset(name: str) -> bool:
    """Whether a name is one that `public_dataset` gives to a local folder."""
    return name.startswith("a local ") or " (local " in name


def _path(name: str) -> PurePath:
    name = name.removeprefix("file://")
    return PureWindowsPath(name) if "\\" in name or PureWindowsPath(name).drive else PurePosixPath(name)


def _leads_out(path: PurePath) -> bool:
    return bool(path.root) or ".." in path.parts or path.parts[:1] != () and path.parts[0].startswith("~")
