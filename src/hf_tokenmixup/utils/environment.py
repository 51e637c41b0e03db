"""Hardware, library versions and commands of a run, without names of machines, users or local folders."""

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
# A path in a text ends at punctuation, except for colons of drives and URLs, and escaped spaces.
_WORD = re.compile(r"(?:(?<![A-Za-z0-9])[A-Za-z]:(?=[\\/])|:(?=//)|\\ |[^\s\"'`=,:;\[\](){}<>|&])+")
_QUOTED_PATH = re.compile(r"""(["'])((?:~|/|\.\./|[A-Za-z]:[\\/]|\\\\)[^"'\n]*)\1""")

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
# Names of folders that do not describe their images.
_PLACES = {"", "..", "~", "home", "users"}
_GENERIC_NAMES = _SPLIT_NAMES | _PLACES | {"data", "dataset", "datasets", "image", "images", "img", "imgs"}


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect results."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def describe_hardware(num_devices: int = 1, device: torch.device | str | None = None) -> str:
    """Describe the accelerator or the CPU: `2 x NVIDIA H100 80GB HBM3`, `CPU, 2 threads`.

    Args:
        num_devices: number of devices.
        device: one of the devices; None: the accelerator if there is one, otherwise the CPU.
    """
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        num_threads = torch.get_num_threads()
        name = f"CPU, {num_threads} thread{'s' if num_threads > 1 else ''}"
    elif device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = device.type
    return name if num_devices == 1 else f"{num_devices} x {name}"


def describe_precision(autocast: str, weights: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> str:
    """Describe the precision of a forward pass: `fp32`, `bf16` (autocast), `bf16 weights`, `fp16, bf16 weights`.

    Args:
        autocast: dtype of autocast; `no` or `fp32` if it is off.
        weights: dtype of the model's weights.
        device: device of the model. On CUDA devices, float32 may be `tf32` in matrix products.
    """
    name = DTYPE_NAMES.get(weights, str(weights).removeprefix("torch."))
    if autocast not in ("no", "fp32"):
        return autocast if weights == torch.float32 else f"{autocast}, {name} weights"
    if weights != torch.float32:
        return f"{name} weights"
    return "tf32" if torch.device(device).type == "cuda" and _uses_tf32() else "fp32"


def _uses_tf32() -> bool:
    """Whether float32 matrix products on CUDA devices use TF32."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    # Versions before torch 2.9 have only the other setting.
    if precision is None:
        return matmul.allow_tf32
    return (torch.backends.fp32_precision if precision == "none" else precision) == "tf32"


def redact_command(program: str, arguments: Sequence[str]) -> str:
    """Format a command line for publication.

    Secrets and options of the upload are removed, and local paths are reduced to their last part.

    Args:
        program: name of the program.
        arguments: its arguments.
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
                # An option without a value would use the next argument as its value.
                shown = MASK
            if option or shown or not argument:
                public.append(option + equals + shown)
        else:
            value_follows = False
    return " ".join([program, *map(shlex.quote, public)])


def public_paths(text: str) -> str:
    """Reduce paths outside of the working directory in a text to their last part."""
    text = _QUOTED_PATH.sub(lambda found: found[1] + (strip_local_path(found[2]) or found[2]) + found[1], text)
    return _WORD.sub(lambda word: strip_local_path(word[0]) or word[0], text)


def strip_local_path(name: str) -> str:
    """Reduce a path outside of the working directory to its last part. Secrets are removed from other names."""
    path = _path(name)
    return path.name if _is_outside(path) else remove_secrets(name)


def public_dataset(name: str, kind: str = "folder") -> str:
    """Return the public name of a dataset: its name on the Hub, or a description of a local folder.

    Args:
        name: name on the Hub, path of a folder, or a result of this function, which is returned unchanged.
        kind: kind of the folder: `image folder`, `folder`.

    Returns:
        `cats (local image folder)` for `/data/cats` and for `/data/cats/train`, or `a local image folder` for a folder
        with a generic name.
    """
    if name == "digits" or is_local_dataset(name):
        return name
    path = _path(name)
    if not _is_outside(path) and not Path(name).exists():
        return remove_secrets(name)
    if Path(name).exists():
        # An absolute path gives the working directory a name. Links keep their own names.
        path = Path(os.path.abspath(name))
    generic_names = _PLACES
    if path.name.lower() in _SPLIT_NAMES:
        path, generic_names = path.parent, _GENERIC_NAMES
    of_user = path == Path.home() or path.parent.name.lower() in ("home", "users")
    if of_user or path.name.lower() in generic_names:
        return f"a local {kind}"
    return f"{path.name} (local {kind})"


def is_local_dataset(name: str) -> bool:
    """Whether a name is the description of a local folder by `public_dataset`."""
    return name.startswith("a local ") or " (local " in name


def _path(name: str) -> PurePath:
    name = name.removeprefix("file://")
    return PureWindowsPath(name) if "\\" in name or PureWindowsPath(name).drive else PurePosixPath(name)


def _is_outside(path: PurePath) -> bool:
    return bool(path.root) or ".." in path.parts or path.parts[:1] != () and path.parts[0].startswith("~")
