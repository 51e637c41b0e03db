"""What a result was measured with: hardware, library versions, command; nothing that names a particular machine."""

import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import PurePosixPath, PureWindowsPath

import torch

LIBRARIES = ("hf_tokenmixup", "torch", "transformers", "datasets", "accelerate", "timm")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide on a result, by name."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def describe_hardware(num_processes: int = 1, use_cpu: bool = False) -> str:
    """The accelerator, or the number of cores where there is none: `2 x NVIDIA H100 80GB HBM3`, `CPU, 2 threads`."""
    if use_cpu or not torch.accelerator.is_available():
        name = f"CPU, {torch.get_num_threads()} threads"
    elif torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = torch.accelerator.current_accelerator().type
    return name if num_processes == 1 else f"{num_processes} x {name}"


def public_command(program: str, arguments: Sequence[str]) -> str:
    """A command line as others may read and repeat it.

    Without tokens, without what says where to upload to, and with the last part alone of local paths.
    """
    told, value_follows = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if option.endswith("token") or option.startswith(("--hub_", "--push_to_hub")):
            value_follows = not equals
        elif option or not value_follows:
            value_follows = False
            told.append(option + equals + public_name(value) if value else option)
        else:
            value_follows = False
    return " ".join([program, *map(shlex.quote, told)])


def public_name(name: str) -> str:
    """The last part of a path that leads out of the working directory; any other name as it is."""
    path = PureWindowsPath(name) if "\\" in name or PureWindowsPath(name).drive else PurePosixPath(name)
    leads_out = path.is_absolute() or ".." in path.parts or name.startswith("~")
    return path.name if leads_out else name
