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
    """A command line as others may read and repeat it: without tokens, and with the last part alone of local paths."""
    told, secret = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if secret or option.endswith("token"):
            # `--token VALUE` and `--token=VALUE`; the next option ends it.
            secret = not equals and option.endswith("token")
            continue
        told.append(option + equals + public_name(value) if value else option)
    return shlex.join([*program.split(), *told])


def public_name(name: str) -> str:
    """The last part of a path that leads out of the working directory; any other name as it is."""
    path = PureWindowsPath(name) if "\\" in name else PurePosixPath(name)
    leads_out = path.is_absolute() or path.parts[:1] in (("..",), ("~",))
    return path.name if leads_out else name
