"""scripts/evaluate.py: classifiers, processes, errors, and cards in folders and on the Hub."""

import importlib
import importlib.util
import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from fake_hub.server import Hub
from helpers.commands import HANG_S, SCRIPTS, import_command
from helpers.tiny_training import resnet, tokenmixup_vit
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from hf_tokenmixup.data import load_digits_dataset
from hf_tokenmixup.models import CctConfig, CctForImageClassification

SCRIPT = SCRIPTS / "evaluate.py"
DIGITS = [str(number) for number in range(10)]
SIZES = {"image_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32}


@pytest.fixture(scope="module")
def script():
    return import_command("evaluate")


def save(model, folder, names=DIGITS, size=16):
    """Save a model with class names and different outputs for the classes."""
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == len(names):
            nn.init.normal_(module.weight)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return str(folder)


def vit(**settings):
    torch.manual_seed(1)
    return ViTForImageClassification(ViTConfig(patch_size=4, **{"num_labels": 10} | SIZES | settings))


def run(script, folder, *arguments):
    result = folder / "result.json"
    script.main([*map(str, arguments), "--use_cpu", "--json", str(result)])
    return json.loads(result.read_text())


def test_evaluate_counts_equal_pipeline_counts(script, tmp_path, capsys):
    model = save(vit(), tmp_path / "model")
    result = run(script, tmp_path, model, "--dataset_name", "digits", "--batch_size", 50)
    split = load_digits_dataset()["test"]
    classify = pipeline("image-classification", model=model, device="cpu")
    predictions = classify(list(split["image"]), top_k=5)
    guesses = [[guess["label"] for guess in best] for best in predictions]
    labels = [str(label) for label in split["label"]]
    top1 = sum(label == best[0] for label, best in zip(labels, guesses, strict=True))
    top5 = sum(label in best for label, best in zip(labels, guesses, strict=True))
    assert (result["num_images"], result["top1"], result["top5"]) == (360, top1 / 360, top5 / 360)
    assert 0 < top1 < top5 < 360
    confidences = np.array([best[0]["score"] for best in predictions])
    correct = np.array([label == best[0] for label, best in zip(labels, guesses, strict=True)])
    bins = [(confidences >= low / 15) & (confidences < (low + 1) / 15) for low in range(15)]
    gaps = [inside.sum() * abs(confidences[inside].mean() - correct[inside].mean()) for inside in bins if inside.any()]
    assert result["calibration_error"] == pytest.approx(sum(gaps) / 360, rel=1e-5)
    assert (result["dataset"], result["split"]) == ("digits", "test")
    assert result["dataset_fingerprint"] == split._fingerprint
    assert (result["model"], result["batch_size"], result["num_processes"]) == ("model", 50, 1)
    assert result["model_revision"].startswith("sha256:") and result["dataset_revision"] is None
    assert result["num_parameters"] == sum(parameter.numel() for parameter in vit().parameters())
    # 16 patches and the CLS token, one layer of width 16.
    assert result["macs"] == 16 * 48 * 16 + 4 * 17 * 256 + 2 * 289 * 16 + 2 * 17 * 16 * 32 + 160
    assert result["images_per_second"] > 0 and result["versions"]["torch"]
    table = capsys.readouterr().out
    assert f"top-1       {top1 / 360:.2%}" in table and str(tmp_path / "result.json") in table


@pytest.mark.parametrize(
    "model, size",
    [
        (tokenmixup_vit(num_labels=10), 8),
        (CctForImageClassification(CctConfig(num_labels=10, **SIZES)), 16),
        (resnet(), 16),
    ],
)
def test_evaluate_accepts_any_classifier(script, tmp_path, model, size, caplog):
    if model.config.model_type == "resnet":
        model.classifier[1] = nn.Linear(16, 10)
    folder = save(model, tmp_path / "model", size=size)
    result = run(script, tmp_path, folder, "--dataset_name", "digits", "--max_eval_samples", 40)
    assert result["num_images"] == 40 and 0 <= result["top1"] <= result["top5"] <= 1 and result["macs"] > 0
    plain = sum(p.numel() for name, p in model.named_parameters() if "scorenet" not in name)
    assert result["num_parameters"] == plain and "ScoreNet" not in caplog.text


def test_evaluate_recorded_command_reproduces_result_without_secrets(script, tmp_path):
    model = save(vit(), tmp_path / "model")
    options = ["--dataset_name=digits", "--token", "hf_secret", "--dtype", "bf16", "--max_eval_samples", 50]
    first = run(script, tmp_path, model, *options, "--seed", 7, "--token=hf_other")
    text = json.dumps(first)
    assert "hf_" not in text.replace("hf_tokenmixup", "") and "token" not in first["command"]
    assert str(tmp_path) not in text
    expected = "python scripts/evaluate.py model --dataset_name=digits --dtype bf16 --max_eval_samples 50 --seed 7"
    assert first["command"] == f"{expected} --use_cpu --json result.json" and first["dtype"] == "bf16"
    second = run(script, tmp_path, model, *first["command"].split()[3:-2])
    fixed = ("top1", "top5", "loss", "dataset_fingerprint", "model_revision", "macs", "num_images")
    assert [first[name] for name in fixed] == [second[name] for name in fixed]
    other = run(script, tmp_path, model, "--dataset_name", "digits", "--max_eval_samples", 50, "--seed", 8)
    assert other["loss"] != first["loss"] and other["dataset_fingerprint"] == first["dataset_fingerprint"]


def test_evaluate_with_corruptions_prints_a_row_for_each_and_the_mean(script, tmp_path, capsys):
    model = save(vit(), tmp_path / "model")
    options = ["--dataset_name", "digits", "--max_eval_samples", 60, "--corruptions", "gaussian_noise", "contrast"]
    result = run(script, tmp_path, model, *options, "--corruption_severity", 5, "--batch_size", 60)
    rows = result["corruptions"]
    assert [(row["name"], row["severity"]) for row in rows] == [("gaussian_noise", 5), ("contrast", 5)]
    assert len({result["loss"], *(row["loss"] for row in rows)}) == 3
    for name in ("top1", "loss", "calibration_error"):
        assert result["corruption_mean"][name] == pytest.approx((rows[0][name] + rows[1][name]) / 2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["severity", "5", "top-1", "loss", "ECE"] in lines
    for row in (*rows, result["corruption_mean"]):
        values = [f"{row['top1']:.2%}", f"{row['loss']:.4f}", f"{row['calibration_error']:.4f}"]
        assert [row["name"], *values] in lines

    again = run(script, tmp_path, model, *options, "--corruption_severity", 5, "--batch_size", 7)["corruptions"]
    assert [row["top1"] for row in again] == [row["top1"] for row in rows]
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in rows], rel=1e-5)


def test_parse_options_of_corruptions_without_names_has_all(script):
    args = script.parse_options(["m", "--dataset_name", "digits", "--corruptions"])[1]
    assert len(args.corruptions) >= 5 and args.corruption_severity == 3
    assert script.parse_options(["m", "--dataset_name", "digits"])[1].corruptions is None


def test_reproduce_command_of_several_processes_uses_torchrun(script):
    command = script.reproduce_command(["m", "--update_card", "--batch_size", "8"], 4)
    assert command == "torchrun --nproc_per_node 4 scripts/evaluate.py m --batch_size 8"


def test_evaluate_with_classes_in_another_order_needs_label_mapping(script, tmp_path, caplog):
    model = vit()
    backwards = save(model, tmp_path / "backwards", names=[f"digit_{name}" for name in reversed(DIGITS)])
    images = tmp_path / "images"
    for index, row in enumerate(load_digits_dataset()["test"].select(range(60))):
        folder = images / f"Digit {row['label']}"
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{index}.png")
    options = ["--validation_dir", images, "--cache_dir", tmp_path / "cache"]
    with pytest.raises(ValueError, match=r"10 of 10 classes .* 0 \('digit_9' and 'Digit 0'\).*`label_mapping=name`"):
        run(script, tmp_path, backwards, *options)
    by_name = run(script, tmp_path, backwards, *options, "--label_mapping", "name")
    by_number = run(script, tmp_path, backwards, *options, "--label_mapping", "number")
    assert by_name["loss"] != by_number["loss"] and by_name["dataset_fingerprint"] == by_number["dataset_fingerprint"]
    assert by_name["dataset"] == "images (local image folder)"

    # The rows of the classifier in the class order of the dataset.
    for parameter in model.classifier.parameters():
        parameter.data = parameter.data.flip(0)
    model.config.id2label = {number: f"digit {number}" for number in range(10)}
    model.save_pretrained(tmp_path / "forwards")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "forwards")
    strict = run(script, tmp_path, tmp_path / "forwards", *options)
    assert [strict[name] for name in ("top1", "top5")] == [by_name[name] for name in ("top1", "top5")]
    assert strict["loss"] == pytest.approx(by_name["loss"], rel=1e-6)

    model.config.id2label = {number: f"LABEL_{number}" for number in range(10)}
    model.save_pretrained(tmp_path / "forwards")
    with caplog.at_level(logging.WARNING):
        assert run(script, tmp_path, tmp_path / "forwards", *options)["loss"] == strict["loss"]
    assert "no class names in the model. Classes are matched by index" in caplog.text


def write_split(folder, name, labels):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=DIGITS)})
    pictures = [Image.new("RGB", (8, 8), (20 * label, 0, 0)) for label in labels]
    folder.mkdir(exist_ok=True)
    Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(folder / f"{name}.parquet")


def test_evaluate_without_evaluation_split_needs_fraction(script, tmp_path):
    model = save(vit(), tmp_path / "model")
    write_split(tmp_path / "data", "train", list(range(10)) * 10)
    options = [model, "--dataset_name", tmp_path / "data", "--cache_dir", tmp_path / "cache"]
    with pytest.raises(
        ValueError, match=r"no evaluation split among \['train'\]. .*`eval_split`.*`validation_fraction`"
    ):
        run(script, tmp_path, *options)
    complete = run(script, tmp_path, *options, "--eval_split", "train")
    fraction = run(script, tmp_path, *options, "--train_val_split", 0.2, "--seed", 5)
    assert (complete["split"], complete["num_images"], complete["dataset"]) == ("train", 100, "data (local folder)")
    assert (fraction["split"], fraction["num_images"]) == ("train (held out: 0.2 of it, seed 5)", 20)
    assert complete["dataset_fingerprint"] == fraction["dataset_fingerprint"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: model"),
        (["model"], "either --dataset_name or --validation_dir, got neither"),
        (["model", "--dataset_name", "digits", "--validation_dir", "x"], "got both"),
        (["model", "--dataset_name", "digits", "--train_dir", "x"], "no option --train_dir"),
        (["model", "--dataset_name", "digits", "--batchsize", "3"], "did you mean --batch_size?"),
        (["model", "--dataset_name", "digits", "--batch_size", "many"], "invalid int value: 'many'"),
        (["model", "--dataset_name", "digits", "--batch_size", "0"], "--batch_size must be at least 1"),
        (["model", "--dataset_name", "digits", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["model", "--dataset_name", "digits", "--label_mapping", "some"], "invalid choice: 'some'"),
        (["model", "--dataset_name", "digits", "--json", "."], "--json must name a file"),
        (["model", "--dataset_name", "digits", "--corruptions", "fog"], "There is no corruption 'fog'. Corruptions:"),
        (["model", "--dataset_name", "digits", "--corruption_severity", "2"], "no effect without --corruptions"),
        (
            ["model", "--dataset_name", "digits", "--update_card", "--max_eval_samples", "9"],
            "that of a complete split",
        ),
        (["model", "--dataset_name", "digits", "--update_card", "--revision", "a" * 40], "--revision names a commit"),
        ([".", "--dataset_name", "digits", "--revision", "main"], "--revision is for models on the Hub, and . is a"),
    ],
)
def test_parse_options_with_wrong_value_raises(script, arguments, message):
    with pytest.raises(ValueError) as error:
        script.parse_options(arguments)
    assert message in str(error.value)


def test_init_distributed_with_unconnected_processes_raises(script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(script, "PartialState", lambda cpu: type("State", (), {"num_processes": 1}))
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but the processes are not connected. Add --use_cpu"):
        script.init_distributed(False)


def test_evaluate_with_update_card_writes_card_of_folder(script, tmp_path, capsys):
    model = save(vit(), tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    result = run(script, tmp_path, model, "--dataset_name", "digits", "--update_card")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "mit" and "# Mine" in card.content
    values = {item.metric_type: item.metric_value for item in card.data.eval_results}
    assert values["calibration_error"] == result["calibration_error"] > 0
    assert (values["accuracy"], values["top_5_accuracy"]) == (result["top1"], result["top5"])
    assert {item.dataset_split for item in card.data.eval_results} == {"test"}
    assert str(tmp_path / "model" / "README.md") in capsys.readouterr().out
    assert "--update_card" not in result["command"]


def launch(command, folder, *arguments, environment=os.environ, **options):
    program = [Path(sys.executable).with_name(command[0]), *command[1:]] if command else [sys.executable]
    words = list(map(str, [*program, SCRIPT, *arguments]))
    environment = dict(environment) | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        words, env=environment, cwd=folder, timeout=HANG_S, capture_output=True, text=True, **options
    )


def test_evaluate_error_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vits"}')
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path), "--dataset_name", "digits", "--use_cpu"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code.startswith("evaluate.py: There is no image classifier of type")
    assert "\n" not in ended.value.code


@pytest.mark.parametrize("name", ["evaluate.py", "finetune.py"])
def test_script_folder_does_not_shadow_evaluate_library(monkeypatch, name, capsys):
    """Python starts a script with its folder at the start of sys.path."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    for module in ("evaluate", "hf_tokenmixup.metrics"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    assert Path(importlib.util.find_spec("evaluate").origin) == SCRIPT
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPT.with_name(name)), run_name="__main__")
    assert "usage: " in capsys.readouterr().out
    assert issubclass(importlib.import_module("hf_tokenmixup.metrics").TopKAccuracy, evaluate.Metric)


def test_parse_options_with_read_only_card_raises(script, hub):
    hub.add_repo("alice/vit", {"config.json": "{}"})
    options = ["alice/vit", "--dataset_name", "digits", "--update_card"]
    for token in (["--token", "hf_reader"], ["--token", "hf_bob"], []):
        with pytest.raises(ValueError, match="--update_card needs a token that may write to alice/vit. Log in with"):
            script.parse_options([*options, *token])
    assert script.parse_options([*options, "--token", "hf_alice"])[1].update_card


def test_evaluate_on_hub_records_commits_and_updates_card(tmp_path):
    save(vit(), tmp_path / "model")
    write_split(tmp_path / "data", "test", list(range(10)) * 3)
    with Hub({"hf_alice": "alice"}) as hub:
        files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
        commit = hub.add_repo("alice/vit", files)
        rows = {"data/test-00000-of-00001.parquet": (tmp_path / "data" / "test.parquet").read_bytes()}
        data = hub.add_repo("alice/digits", rows, repo_type="dataset", private=True)
        options = ["alice/vit", "--dataset_name", "alice/digits", "--update_card", "--json", "result.json"]
        environment = hub.environment(cache=tmp_path / "cache")
        done = launch([], tmp_path, *options, "--token", "hf_alice", environment=environment)
        assert done.returncode == 0, done.stderr
        card = ModelCard(hub.files("alice/vit")["README.md"].decode())
        assert [request for request in hub.unknown_requests if request.path != "/api/agent-harnesses"] == []
        assert hub.requests_containing("hf_alice") == hub.requests_containing(str(tmp_path)) == []
    text = (tmp_path / "result.json").read_text()
    result = json.loads(text)
    assert (result["model"], result["model_revision"]) == ("alice/vit", commit)
    assert (result["dataset"], result["dataset_revision"], result["num_images"]) == ("alice/digits", data, 30)
    assert "hf_alice" not in text and str(tmp_path) not in text
    results = {item.metric_type: item for item in card.data.eval_results}
    assert results["accuracy"].metric_value == result["top1"]
    assert (results["accuracy"].dataset_type, results["accuracy"].dataset_revision) == ("alice/digits", data)
    assert done.stdout.startswith(f"model       alice/vit ({commit})\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, use_cpu",
    [
        # Without an accelerator, the command does not need --use_cpu.
        ("torchrun --standalone --nproc_per_node 2", ["--use_cpu"] * torch.accelerator.is_available()),
        ("accelerate launch --multi_gpu --num_processes 2 --main_process_port 0", ["--use_cpu"]),
    ],
)
def test_evaluate_on_two_processes_equals_one_process(launcher, use_cpu, tmp_path):
    model = save(vit(), tmp_path / "model")
    options = [model, "--dataset_name", "digits", "--batch_size", 50, "--eval_split", "test"]

    def measure(command, *more):
        done = launch(command, tmp_path, *options, *more, "--json", "result.json")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("top-1") == 1
        return json.loads((tmp_path / "result.json").read_text())

    one, two = measure([], "--use_cpu"), measure(launcher.split(), *use_cpu)
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    for name in ("num_images", "top1", "top5", "dataset_fingerprint", "model_revision", "macs", "num_parameters"):
        assert one[name] == two[name]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6) and one["num_images"] == 360
