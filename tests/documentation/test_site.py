"""The reference and the diagram of the site agree with the package."""

import importlib
import re

import pytest
from helpers.documents import DOCS, ROOT

import hf_tokenmixup

PACKAGE = ROOT / "src" / "hf_tokenmixup"
REFERENCE = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
# Modules that the diagram has in one node.
METHOD = ("functional", "saliency", "horizontal", "vertical", "configuration", "metrics")


def resolve(path: str) -> object:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", REFERENCE)
def test_reference_entry_exists_with_docstring(path):
    assert resolve(path).__doc__


def test_reference_has_each_public_name():
    assert set(hf_tokenmixup.__all__) <= {path.rpartition(".")[2] for path in REFERENCE}


def imported_parts(folder: str) -> set[str]:
    """Parts of the package that the modules of a folder import at their beginning or in a function."""
    found = set()
    for path in (PACKAGE / folder).rglob("*.py"):
        dots = r"\." * len(path.relative_to(PACKAGE).parts)
        found |= set(re.findall(rf"^ *from {dots}(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    return {"method" if name in METHOD else name for name in found}


def test_diagram_of_the_package_has_the_imports_of_each_part():
    diagram = (DOCS / "inside.md").read_text(encoding="utf-8").split("flowchart")[1].split("```")[0]
    nodes = set(re.findall(r"^  (\w+)\[", diagram, re.MULTILINE))
    edges = {
        source: set(re.split(r" & ", targets))
        for source, targets in re.findall(r"^  (\w+) --> (.+)$", diagram, re.MULTILINE)
    }
    folders = nodes - {"cli", "method"}
    assert folders == {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"cli", "utils"}
    drawn = nodes - {"method"}
    assert {folder: edges.get(folder, set()) for folder in folders} == {
        folder: (imported_parts(folder) & (nodes if folder == "models" else drawn)) - {folder} for folder in folders
    }
