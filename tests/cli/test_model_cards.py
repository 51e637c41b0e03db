"""The cards in model_cards/ agree with template, recipes and paper, and their snippets run."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub.cards import read_card, validate_card
from helpers.commands import import_command
from huggingface_hub import ModelCard
from PIL import Image
from transformers import ViTImageProcessor

from hf_tokenmixup.cli.arguments import parse_options
from hf_tokenmixup.cli.recipes import RECIPES, load_recipe
from hf_tokenmixup.models import FAMILIES, TokenMixupModelMixin
from hf_tokenmixup.paper_results import PAPER_RESULTS

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "model_cards").glob("*.md"), key=lambda path: path.name)
SYSTEMS = [f"{start}-{ending}" for start in PAPER_RESULTS for ending in ("baseline", "htm", "vtm", "htm-vtm")]
SMALL = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 16}
SMALL |= {"image_size": 16, "num_labels": 3, "id2label": {0: "cat", 1: "dog", 2: "owl"}}
# Runs snippets with transformers only, and checks that they do not import this package.
ALONE = """
import sys
for name in sys.argv[1:]:
    exec(open(name).read(), {})
assert "hf_tokenmixup" not in sys.modules
"""


def blocks(name: str, language: str) -> list[str]:
    text = ModelCard.load(ROOT / "model_cards" / f"{name}.md").text
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def script():
    return import_command("model_cards")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an image and `outputs/NAME` for every card, with a small untrained model."""
    folder = tmp_path_factory.mktemp("trained")
    Image.effect_noise((20, 20), 50).convert("RGB").save(folder / "image.png")
    for name in SYSTEMS:
        recipe = load_recipe(name)
        config_class, model_class = FAMILIES[recipe.get("model_type", "vit")]
        settings = {key: value for key, value in recipe.items() if hasattr(config_class(), key)}
        patch = {"patch_size": 4} if config_class.model_type == "vit" else {}
        torch.manual_seed(0)
        model = model_class(config_class(**SMALL, **patch, **{**settings, "vertical_kappa": 2}))
        model.to_plain_model().save_pretrained(folder / recipe["output_dir"])
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / recipe["output_dir"])
    return folder


def test_model_cards_in_repository_are_up_to_date(script):
    assert script.find_outdated_cards(script.build_cards(), ROOT / "model_cards") == [], (
        "run python scripts/model_cards.py"
    )
    assert sorted(path.stem for path in CARDS) == sorted(SYSTEMS)


def test_model_cards_check_names_outdated_files(script, tmp_path):
    folder = tmp_path / "cards"
    script.main(["--folder", str(folder)])
    script.main(["--folder", str(folder), "--check"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {p.name: p.read_bytes() for p in CARDS}
    changed, missing = folder / f"{SYSTEMS[0]}.md", folder / f"{SYSTEMS[1]}.md"
    changed.write_text(changed.read_text() + "More.\n")
    missing.unlink()
    (folder / "unknown.md").write_text("")
    before = changed.read_text()
    with pytest.raises(SystemExit) as caught:
        script.main(["--folder", str(folder), "--check"])
    assert f"{changed.name!r}, {missing.name!r}, 'unknown.md'; run python" in str(caught.value.code)
    assert changed.read_text() == before and not missing.exists()
    with pytest.raises(SystemExit, match="'unknown.md'; remove it"):
        script.main(["--folder", str(folder)])


@pytest.mark.parametrize("name", SYSTEMS)
def test_model_card_has_no_results(name):
    recipe, card = load_recipe(name), ModelCard.load(ROOT / "model_cards" / f"{name}.md")
    metadata = read_card(str(card))
    assert validate_card(str(card)) == ([], []) and {"model-index", "metrics"}.isdisjoint(metadata)
    assert metadata["datasets"] == [recipe["dataset_name"]]
    assert metadata.get("base_model") == recipe.get("model_name_or_path")
    assert ("tokenmixup" in metadata["tags"]) == ("baseline" not in name)
    assert "## No weights yet" in card.text and "Not evaluated:" in card.text and "## Results\n" not in card.text
    # The paper's figures are in their own section only.
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", card.text, re.DOTALL | re.MULTILINE))
    (figures,) = (sections.pop(title) for title in list(sections) if title == "Results in the paper")
    assert "Not measured here." in figures and "Choi, Choi and Kim, NeurIPS 2022" in figures
    for row in PAPER_RESULTS[name.removesuffix(f"-{ending(name)}")].rows.values():
        assert row.top1 in figures and not any(row.top1 in section for section in sections.values())


def ending(name: str) -> str:
    return next(end for end in ("htm-vtm", "htm", "vtm", "baseline") if name.endswith(f"-{end}"))


@pytest.mark.parametrize("name", SYSTEMS)
def test_paper_results_equal_results_in_recipe(name):
    row = PAPER_RESULTS[name.removesuffix(f"-{ending(name)}")].rows[ending(name)]
    first_line = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
    match = re.search(r"\(paper: Table (\d), ([\d.]+) top-1(?:, ([\d.]+) top-5)?\)", first_line)
    if match is None:
        assert name == "vit-b16-imagenet1k-baseline" and (row.top1, row.top5) == ("81.2", "-")
        return
    assert match.groups(default="") == (
        str(PAPER_RESULTS[name.removesuffix(f"-{ending(name)}")].table),
        row.top1,
        row.top5,
    )


def test_paper_parameters_equal_reference_parameters():
    counted = json.loads((ROOT / "tests" / "golden" / "param_counts.json").read_text())
    models = {"cct-7-3x1-cifar10": "cct_7_3x1_32/100cls", "cct-7-3x1-cifar100": "cct_7_3x1_32/100cls"}
    models["vit-b16-imagenet1k"] = "ViT-B_16/224/1000cls"
    for start, benchmark in PAPER_RESULTS.items():
        for end, row in benchmark.rows.items():
            count = counted[f"{models[start]}/{end.replace('-', '_')}"]["total"]
            digits = len(row.parameters.split()[0].split(".")[1])
            assert row.parameters == f"{count / 1e6:.{digits}f} M"


def test_model_card_counts_parameters_without_scorenet():
    counted = json.loads((ROOT / "tests" / "golden" / "param_counts.json").read_text())
    for name in SYSTEMS:
        model = "ViT-B_16/224" if name.startswith("vit") else "cct_7_3x1_32"
        classes = PAPER_RESULTS[name.removesuffix(f"-{ending(name)}")].num_labels
        count = counted[f"{model}/{classes}cls/baseline"]["total"]
        assert f"| parameters | {count:,} |" in ModelCard.load(ROOT / "model_cards" / f"{name}.md").text


@pytest.mark.parametrize("name", SYSTEMS)
def test_model_card_command_has_values_of_card(name):
    (command,) = blocks(name, "bash")
    words = shlex.split(command)
    launcher, arguments = words[: words.index("scripts/finetune.py")], words[words.index("scripts/finetune.py") + 1 :]
    assert launcher[:2] == ["accelerate", "launch"]
    # The precision may be unsupported here.
    options = parse_options([*arguments, "--bf16", "false", "--use_cpu"])
    training, tokenmixup = options.training, options.tokenmixup
    assert training.push_to_hub and training.hub_model_id.endswith(f"/{name}")
    text = ModelCard.load(ROOT / "model_cards" / f"{name}.md").text
    for key, value in tokenmixup.items():
        assert f"| `{key}` | {value if isinstance(value, str) else json.dumps(value)} |" in text
    for key in ("num_train_epochs", "learning_rate", "weight_decay", "seed", "per_device_train_batch_size"):
        shown = float(re.search(rf"^\| `{key}` \| (.*?) \|$", text, re.MULTILINE)[1])
        assert shown == getattr(training, key)
    assert training.output_dir in text


def test_model_card_transformers_snippet_runs_without_hf_tokenmixup(trained, tmp_path):
    files = []
    for name in SYSTEMS:
        files.append(tmp_path / f"{name}.py")
        files[-1].write_text(blocks(name, "python")[0])
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    environment["PYTHONPATH"] = ":".join(path for path in sys.path if path.endswith("-packages"))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, files)], cwd=trained, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\[\{.*'label': '(?:cat|dog|owl)'", done.stdout, re.MULTILINE)) == len(SYSTEMS)


@pytest.mark.parametrize("name", SYSTEMS)
def test_model_card_package_snippet_loads_trainable_model(name, trained, monkeypatch):
    monkeypatch.chdir(trained)
    (snippet,) = blocks(name, "python")[1:]
    namespace = {}
    exec(snippet, namespace)
    model, recipe = namespace["model"], load_recipe(name)
    assert isinstance(model, TokenMixupModelMixin)
    for key in ("horizontal_layers", "vertical_layers"):
        assert getattr(model.config, key) == recipe.get(key, [])
    if ending(name) == "baseline":
        # The additional argument that the text mentions.
        (further,) = re.findall(r"argument `(.*?)`", (ROOT / "model_cards" / f"{name}.md").read_text())
        exec(snippet.rstrip().removesuffix(")") + f", {further})", namespace)
        assert namespace["model"].config.horizontal_layers == [1]
