"""README and docs agree with the files, settings and recipes that they name."""

import dataclasses
import re
from pathlib import Path

import pytest

from hf_tokenmixup.configuration import TokenMixupConfigMixin

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documentation_relative_link_exists(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_documentation_page_is_linked_from_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[2:] if f"(docs/{page.name})" not in readme] == []


def test_settings_page_lists_each_setting_with_default():
    rows = re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE)
    fields = {field.name: field for field in dataclasses.fields(TokenMixupConfigMixin) if "help" in field.metadata}
    defaults = {
        name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for name, field in fields.items()
    }
    words = {True: "true", False: "false"}
    expected = {name: words[value] if isinstance(value, bool) else str(value) for name, value in defaults.items()}
    assert {name: value for name, value in rows if name in expected} == expected


def test_training_page_names_existing_recipes():
    table = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)
    folder = ROOT / "src" / "hf_tokenmixup" / "recipes"
    assert names and [name for name in names if not (folder / f"{name}.yaml").is_file()] == []
