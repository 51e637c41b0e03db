"""The scripts as modules, for tests that call their functions."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@functools.cache
def open_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # Some import finetune.py, as their neighbour.
        patch.syspath_prepend(SCRIPTS)
        spec.loader.exec_module(module)
    sys.modules.pop("finetune", None)
    return module
