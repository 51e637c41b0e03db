"""README and docs agree with the files, settings and recipes that they name."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from helpers.tiny_training import Images, plain_vit, tokenmixup_vit
from transformers import AutoModelForImageClassification, ViTForImageClassification

from hf_tokenmixup.configuration import TokenMixupConfigMixin
from hf_tokenmixup.models import FAMILIES, summarize_mixing_metrics

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def run_example_of_adding(example, names, monkeypatch):
    """Run the example with a small ViT instead of the model of the Hub, and check what it trained and saved."""
    model, steps = plain_vit(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForImageClassification, "from_pretrained", lambda name, num_labels: model)
        model.register_forward_hook(lambda module, args, output: steps.append(output.mixing_metrics))
        exec(example, names | {"torch": torch})
    assert len(steps) == 3 and all(metrics["vertical_tokens"] == 4 * 2 * 3 for metrics in steps)
    loaded, info = AutoModelForImageClassification.from_pretrained("outputs/added", output_loading_info=True)
    assert type(loaded) is type(model) is ViTForImageClassification
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights = loaded.state_dict()
    assert weights.keys() == before.keys()
    assert not any(torch.equal(weights[name], before[name]) for name in ("classifier.weight", "vit.layernorm.weight"))


def test_training_page_examples_of_other_trainers_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("## Other trainers and loops")[1]
    examples = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    images = Images(16)
    for example, folder in zip(examples, ("outputs/stock/plain", "outputs/added", "outputs/loop"), strict=True):
        model = tokenmixup_vit()
        loader = [{"pixel_values": images.pixels[i : i + 4], "labels": images.labels[i : i + 4]} for i in (0, 4, 8)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        names = {"model": model, "train_dataset": images, "train_dataloader": loader, "optimizer": optimizer}
        if folder == "outputs/added":
            run_example_of_adding(example, names, monkeypatch)
            continue
        exec(example, names)
        assert "'mixed_fraction': " in capsys.readouterr().out
        if "trainer" in names:
            assert names["trainer"].state.log_history[-2]["mixed_fraction"] == 1
        else:
            assert names["metrics"].compute()["mixed_samples"] == 4
        plain, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(plain.classifier.weight, model.classifier.weight)


def test_families_page_lists_each_model_type():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "families.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(FAMILIES)
