"""What a result was measured with: hardware, library versions, command; nothing that names a particular machine."""

import platform
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import PurePosixPath, PureWindowsPath

import torch

from .redaction import MASK, is_secret_name, without_secrets

LIBRARIES = ("hf_tokenmixup", "torch", "transformers", "datasets", "accelerate", "timm")
# Within a text, a path ends at punctuation, but for the colons of a drive and of a URL and for escaped spaces.
_WORD = re.compile(r"(?:(?<![A-Za-z0-9])[A-Za-z]:(?=[\\/])|:(?=//)|\\ |[^\s\"'`=,:;\[\](){}<>|&])+")
_QUOTED_PATH = re.compile(r"""(["'])((?:~|/|\.\./|[A-Za-z]:[\\/]|\\\\)[^"'\n]*)\1""")


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

    Without secrets, without what says where to upload to, and with the last part alone of local paths.
    """
    public, value_follows = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if is_secret_name(option) or option.replace("-", "_").startswith(("__hub_", "__push_to_hub")):
            value_follows = not equals
        elif option or not value_follows:
            value_follows = False
            shown = public_paths(public_name(without_secrets(value)))
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
    text = _QUOTED_PATH.sub(lambda found: found[1] + (public_name(found[2]) or found[2]) + found[1], text)
    return _WORD.sub(lambda word: public_name(word[0]) or word[0], text)


def public_name(name: str) -> str:
    """The last part of a path that leads out of the working directory; any other name as it is, without secrets."""
    name = name.removeprefix("file://")
    path = PureWindowsPath(name) if "\\" in name or PureWindowsPath(name).drive else PurePosixPath(name)
    leads_out = bool(path.root) or ".." in path.parts or name.startswith("~")
    return path.name if leads_out else without_secrets(name)
