"""scripts/benchmark.py as a user runs it: a network by size, a recipe, tables, JSON, mistakes."""

import importlib.util
import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from tiny_training import VIT

from hf_tokenmixup.analysis.networks import Network
from hf_tokenmixup.analysis.systems import COMPARED_SYSTEMS
from hf_tokenmixup.data import load_digits_dataset
from hf_tokenmixup.models import TokenMixupViTConfig, TokenMixupViTForImageClassification

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
BRIEF = ["--rounds", "2", "--warmup", "1", "--device", "cpu"]
DETECTORS = ["attention", "whole maps", "full rollout", "gradient", "random"]


def build(**settings):
    return TokenMixupViTForImageClassification(TokenMixupViTConfig(**VIT | settings))


SYSTEMS = {
    "HTM": {"horizontal_layers": [1]},
    "VTM": {"vertical_layers": [2], "vertical_kappa": 1},
    "HTM + VTM": {"horizontal_layers": [1], "vertical_layers": [2], "vertical_kappa": 1},
}


@pytest.fixture(scope="module")
def module():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
        spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(module, monkeypatch):
    """Without what only makes a measurement better."""
    monkeypatch.setitem(module.NETWORKS, "tiny", Network("tiny ViT", build, 8, SYSTEMS))
    monkeypatch.setattr(module, "LEAST_SECONDS", 0.0)
    return module


@pytest.fixture
def recipe(tmp_path):
    """The digits, and a network for them."""
    options = {
        "dataset_name": "digits", "eval_split": "test", "model_type": "vit", "from_scratch": True, "do_train": True,
        "config_overrides": {key: value for key, value in VIT.items() if key != "num_labels"}, "bf16": True,
        "horizontal_layers": [1], "horizontal_tau": 0.5, "horizontal_rho": 0.1, "per_device_train_batch_size": 12,
        "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "do_eval": True,
        "saliency_detector": "random", "hflip": 0.0, "crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0],
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def run(script, folder, *arguments):
    script.main([*map(str, arguments), *BRIEF, "--json", str(folder / "new" / "costs.json")])
    return json.loads((folder / "new" / "costs.json").read_text())


def table(text, title):
    """The rows below a title, by their first column."""
    rows = text.split(f"\n{title}\n")[1].split("\n\n")[0].splitlines()[1:]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in row.split("   ") if cell] for row in rows)}


def test_a_network_by_size(script, tmp_path, capsys):
    parts = ["--part", "training", "detection", "step"]
    result = run(script, tmp_path, "--model", "tiny", *parts, "--group_size", 4, 100, "--dtype", "bf16")
    text = capsys.readouterr().out
    assert text.startswith(f"tiny ViT, batch 8, bf16, CPU, {torch.get_num_threads()} threads, rho 0\n")
    assert {"setting", "detection", "step", "training", "command", "versions"} == set(result)

    detection, step, training = (result[part] for part in ("detection", "step", "training"))
    assert list(detection["timings"]) == DETECTORS and detection["difference_to_whole_maps"] < 1e-6
    pieces = ["gain", "transfer", "assignment", "assignment, groups of 4", "mixing", "whole"]
    assert list(step["timings"]) == pieces and list(step["gain_kept"]) == ["assignment, groups of 4"]
    assert 0 < step["gain_kept"]["assignment, groups of 4"] <= 1
    variants = [f"HTM, {name}" for name in ("gradient", "random", "full rollout", "groups of 4")]
    assert list(training["timings"]) == ["plain", *SYSTEMS, *variants] == list(training["peak_memory"])
    assert training["peak_memory"]["HTM"] > training["peak_memory"]["plain"] > 4 * build().num_parameters()

    for part, title in ((detection, "saliency detection"), (step, "horizontal step"), (training, "training step")):
        shown = table(text, title)
        for name, timing in part["timings"].items():
            assert float(shown[name][0]) == pytest.approx(1000 * timing["seconds"]["median"], rel=0.02, abs=1e-4)
            assert (timing["ratio"] is None) == (part.get("reference") in (name, None))
            if timing["ratio"]:
                assert float(shown[name][2]) == pytest.approx(timing["ratio"]["median"], rel=0.02, abs=1e-4)
    assert table(text, "horizontal step")["assignment, groups of 4"][-1].endswith("%")
    plain, htm = (training["peak_memory"][name] for name in ("plain", "HTM"))
    assert table(text, "training step")["HTM"][-1] == f"{htm / plain:.3f}"


def test_the_command_names_no_path(script, tmp_path):
    result = run(script, tmp_path, "--model", "tiny", "--part", "step", "--rho", 0.01, "--batch_size", 5)
    assert result["command"].startswith("python scripts/benchmark.py --model tiny --part step --rho 0.01")
    assert str(tmp_path) not in json.dumps(result) and "torch" in result["versions"]
    assert (result["setting"]["rho"], result["setting"]["batch_size"]) == (0.01, 5)


def test_a_recipe_is_measured_on_its_images(script, recipe, tmp_path, capsys):
    args, others = script.parse_options(
        ["--recipe", str(recipe), *BRIEF, "--rho", "0.02", "--hidden_dropout_prob", "0"][:-2]
    )
    subject = script.prepare_subject(args, others)
    assert subject.name == "mine" and list(subject.systems) == ["HTM"] and subject.mixed_layer == 1
    assert subject.model.training and subject.model.num_labels == 10
    digits = load_digits_dataset()["train"]
    assert len(subject.images) == 12 and len(set(subject.labels.tolist())) > 2
    counts = [digits["label"].count(label) for label in subject.labels.tolist()]
    assert min(counts) > 0 and subject.images.std() > 0.3
    models = script.training_models(subject.model, subject.systems)
    output = models["HTM"](subject.images, labels=subject.labels)
    assert output.counts["easy_samples"] == 12 and output.horizontal[0].replaced.any()
    config = models["HTM"].config
    assert (config.horizontal_tau, config.horizontal_rho, config.saliency_detector) == (None, 0.02, "attention")
