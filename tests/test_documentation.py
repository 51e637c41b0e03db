"""README and docs agree with the files, settings and recipes that they name."""

import dataclasses
import re

import pytest
from helpers.documents import PAGES, ROOT
from helpers.tiny_training import Images, tokenmixup_vit

from hf_tokenmixup.configuration import TokenMixupConfigMixin
from hf_tokenmixup.models import FAMILIES, summarize_mixing_metrics


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documentation_relative_link_exists(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_documentation_page_is_in_the_navigation_of_the_site():
    navigation = re.findall(r": (\S+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    assert sorted(navigation) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in pages)


def test_readme_links_the_documentation():
    assert "(docs/index.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_settings_page_lists_each_logged_metric():
    model = tokenmixup_vit().train()
    batch = {"pixel_values": Images(4).pixels, "labels": Images(4).labels}
    logged = summarize_mixing_metrics(model(**batch).mixing_metrics, num_images=4, num_steps=1)
    section = (
        (ROOT / "docs" / "settings.md").read_text(encoding="utf-8").split("## Logged metrics")[1].split("\n## ")[0]
    )
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted([*logged, "vertical_attention"])


def test_families_page_lists_each_model_type():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "families.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(FAMILIES)
