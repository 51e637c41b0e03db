"""Files and metadata of the wheel."""

from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.command.build_py import build_py

import hf_tokenmixup

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def distribution():
    """What setup.py gives to setuptools."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", given.update)
        patch.chdir(ROOT)
        source = (ROOT / "setup.py").read_text(encoding="utf-8")
        exec(compile(source, "setup.py", "exec"), {"__name__": "__main__", "__file__": str(ROOT / "setup.py")})
        yield Distribution(given | {"script_name": "setup.py"})


def test_wheel_contains_all_package_files(distribution, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = build_py(distribution)
    command.ensure_finalized()
    held = {Path(file).resolve() for file in command.get_source_files()}
    for _, folder, _, names in command.data_files:
        held |= {(Path(folder) / name).resolve() for name in names}
    package = ROOT / "src" / "hf_tokenmixup"
    files = {file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert files - held == set()
    assert {package / "py.typed", package / "recipes" / "digits-quickstart.yaml"} <= held


def test_version_matches_installed_distribution(distribution):
    assert hf_tokenmixup.__version__ == distribution.get_version()


def test_metadata_has_author_license_and_python_versions(distribution):
    metadata = distribution.metadata
    assert metadata.author and metadata.url and metadata.keywords and metadata.license == "Apache-2.0"
    pythons = [name.rpartition(" ")[2] for name in metadata.classifiers if name.startswith("Programming Language")]
    assert pythons == ["3", "3.10", "3.11", "3.12", "3.13"]


def test_console_command_runs(distribution):
    (script,) = distribution.entry_points["console_scripts"]
    name, _, target = script.partition(" = ")
    module, _, function = target.partition(":")
    assert name == "hf-tokenmixup"
    assert callable(getattr(__import__(module, fromlist=[function]), function))
