"""The commands as modules, for tests that call their functions, and the scripts that run them."""

import importlib
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[1] / "scripts"


def open_script(name: str) -> ModuleType:
    return importlib.import_module(f"hf_tokenmixup.cli.{name}")
