"""The commands as modules, for tests that call their functions, and the scripts that run them."""

import importlib
from pathlib import Path
from types import ModuleType

# Seconds after which a process that a test starts is taken to hang: far more than a slow machine needs.
HANG_S = 1800
SCRIPTS = Path(__file__).parents[2] / "scripts"


def open_script(name: str) -> ModuleType:
    return importlib.import_module(f"hf_tokenmixup.cli.{name}")
