"""Import the commands as modules, for tests that call their functions, and find the scripts that run them."""

import importlib
from pathlib import Path
from types import ModuleType

# Seconds after which a process that a test starts counts as hanging. A slow machine needs far fewer.
HANG_S = 1800
SCRIPTS = Path(__file__).parents[2] / "scripts"


def import_command(name: str) -> ModuleType:
    """Import the module of a command, such as "finetune"."""
    return importlib.import_module(f"hf_tokenmixup.cli.{name}")
