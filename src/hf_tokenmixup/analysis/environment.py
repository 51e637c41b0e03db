"""What a result was measured with: hardware and library versions, without anything that names a particular machine."""

import platform
from importlib.metadata import version

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
