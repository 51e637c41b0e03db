"""scripts/finetune.py: training, resuming and evaluation, on digits and image folders, and with other models."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import HANG_S, SCRIPTS, import_command
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ViTForImageClassification,
)

from hf_tokenmixup import TokenMixupViTForImageClassification
from hf_tokenmixup.data import load_digits_dataset

SCRIPT = SCRIPTS / "finetune.py"
TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY |= {"intermediate_size": 32}
COMMON = "--use_cpu --report_to none --disable_tqdm true --seed 3 --per_device_train_batch_size 16".split()
DIGITS = "--dataset_name digits --eval_split test --max_train_samples 72 --max_eval_samples 40 --hflip 0".split()
SCRATCH = ["--from_scratch", "--model_type", "vit", "--config_overrides", json.dumps(TINY)]
MIXING = "--horizontal_layers 1 --horizontal_tau none --horizontal_rho 0 --vertical_layers 2".split()


@pytest.fixture(scope="module")
def finetune():
    return import_command("finetune")


def run(finetune, *arguments):
    trainer = finetune.build_trainer([*COMMON, *map(str, arguments)])
    finetune.train_and_evaluate(trainer)
    return trainer


def metrics(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_finetune_evaluation_of_saved_model_equals_result(finetune, tmp_path, capsys):
    out = tmp_path / "out"
    options = [*DIGITS, *SCRATCH, *MIXING, "--num_train_epochs", 2, "--logging_steps", 1, "--save_strategy", "no"]
    trainer = run(finetune, *options, "--do_train", "--do_eval", "--eval_strategy", "epoch", "--output_dir", out)
    printed = capsys.readouterr().out
    assert all(
        f"{out}/{name}" in printed for name in ("all_results.json", "training_log.jsonl", "training_curves.png")
    )
    result = metrics(out)
    assert (
        f"top-1 {result['eval_top1']:.2%}   top-5 {result['eval_top5']:.2%}" in printed
        and f"model    {out}\n" in printed
    )
    records = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    mixed = [record["mixed_samples"] for record in records if "mixed_samples" in record]
    assert len(mixed) == 10 and max(mixed) > 0

    # The folder has a plain ViT with its image processor and the names of the digits.
    model, info = ViTForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.label2id["9"] == 9
    assert AutoImageProcessor.from_pretrained(out).size["height"] == 16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])
    ours = TokenMixupViTForImageClassification.from_pretrained(out)
    assert ours.config.horizontal_layers == [1] and ours.config.horizontal_tau is None

    evaluated = tmp_path / "evaluated"
    run(finetune, *DIGITS, "--model_name_or_path", out, "--do_eval", "--output_dir", evaluated)
    again = metrics(evaluated)
    assert (again["eval_top1"], again["eval_top5"]) == (result["eval_top1"], result["eval_top5"])
    assert again["eval_loss"] == pytest.approx(result["eval_loss"], rel=1e-5)
    assert not list(evaluated.glob("*.safetensors"))
    assert f"{evaluated}/all_results.json" in capsys.readouterr().out


def test_finetune_resumed_run_equals_uninterrupted_run(finetune, tmp_path):
    """A run stopped within an epoch ends with the same weights, ScoreNet included, and the same log."""
    options = [*DIGITS, *SCRATCH, *MIXING, "--do_train", "--do_eval", "--num_train_epochs", 2, "--logging_steps", 1]
    options += ["--save_steps", 3, "--mixup_alpha", 0.8, "--label_smoothing_factor", 0.1]
    uninterrupted, parts = tmp_path / "uninterrupted", tmp_path / "parts"
    expected = run(finetune, *options, "--output_dir", uninterrupted)

    first = finetune.build_trainer([*COMMON, *map(str, options), "--output_dir", str(parts)])
    first.add_callback(StopAt(7))
    first.train()
    resumed = run(finetune, *options, "--output_dir", parts, "--resume_from_checkpoint", "last")
    assert resumed.state.global_step == expected.state.global_step == 10
    weights = resumed.model.state_dict()
    assert any("scorenet" in name for name in weights)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    logs = [(folder / "training_log.jsonl").read_text().splitlines() for folder in (uninterrupted, parts)]
    losses = [[record["loss"] for line in log if "loss" in (record := json.loads(line))] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 10


def test_finetune_resume_auto_starts_resumes_and_repeats_evaluation(finetune, tmp_path, capsys):
    """The same command starts, resumes, and finally only repeats the evaluation."""
    options = [*COMMON, *DIGITS, *SCRATCH, "--do_train", "--do_eval", "--max_steps", "4", "--save_steps", "1"]
    options += ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"]
    first = finetune.build_trainer(options)
    assert first.args.resume_from_checkpoint is None
    first.add_callback(StopAt(2))
    first.train()
    second = finetune.build_trainer(options)
    assert second.args.resume_from_checkpoint == str(tmp_path / "checkpoint-2")
    finetune.train_and_evaluate(second)
    results, weights = metrics(tmp_path), load_file(tmp_path / "model.safetensors")
    again = finetune.build_trainer(options)
    assert again.args.resume_from_checkpoint == str(tmp_path / "checkpoint-4")
    finetune.train_and_evaluate(again)
    assert all(metrics(tmp_path)[name] == results[name] for name in ("eval_top1", "eval_loss", "train_loss"))
    repeated = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(repeated[name], tensor) for name, tensor in weights.items())


def StopAt(step):  # noqa: N802
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == step

    return Stop()


def test_finetune_load_best_model_at_end_saves_best_model(finetune, tmp_path):
    options = [
        *DIGITS,
        *SCRATCH,
        *MIXING,
        "--do_train",
        "--do_eval",
        "--num_train_epochs",
        3,
        "--output_dir",
        tmp_path,
    ]
    options += "--eval_strategy epoch --save_strategy epoch --load_best_model_at_end".split()
    options += "--metric_for_best_model top1 --learning_rate 0.01".split()
    trainer = run(finetune, *options)
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    left = load_file(tmp_path / "model.safetensors")
    assert {name for name in best if "scorenet" not in name} == left.keys() != best.keys()
    assert all(torch.equal(best[name], tensor) for name, tensor in left.items())
    assert metrics(tmp_path)["eval_top1"] == trainer.state.best_metric


def test_finetune_on_image_folders_replaces_classifier(finetune, tmp_path):
    digits = load_digits_dataset()
    for split, count in (("train", 40), ("test", 30)):
        for index, row in enumerate(digits[split].select(range(count))):
            folder = tmp_path / split / f"class{row['label'] % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{index}.png")
    pretrained = tmp_path / "pretrained"
    run(finetune, *DIGITS, *SCRATCH, "--do_train", "--max_steps", 1, "--output_dir", pretrained)
    out = tmp_path / "out"
    options = ["--model_name_or_path", pretrained, "--ignore_mismatched_sizes", "--train_dir", tmp_path / "train"]
    options += ["--validation_dir", tmp_path / "test", "--do_train", "--do_eval", "--max_steps", 2, *MIXING]
    run(finetune, *options, "--cache_dir", tmp_path / "cache", "--output_dir", out)
    model = AutoModelForImageClassification.from_pretrained(out)
    assert list(model.config.label2id) == ["class0", "class1", "class2"]
    assert metrics(out)["eval_top5"] == 1.0  # three classes


def test_finetune_resnet_trains_without_tokenmixup(finetune, tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    overrides = {name: getattr(config, name) for name in ("embedding_size", "hidden_sizes", "depths")}
    options = ["--from_scratch", "--model_type", "resnet", "--config_overrides", json.dumps(overrides)]
    trainer = finetune.build_trainer(
        [
            *COMMON,
            *DIGITS,
            *options,
            "--image_size",
            "16",
            "--do_train",
            "--do_eval",
            "--max_steps",
            "2",
            "--cutmix_alpha",
            "1.0",
            "--output_dir",
            str(tmp_path),
        ]
    )
    finetune.train_and_evaluate(trainer)
    saved = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert saved.config.model_type == "resnet" and saved.config.problem_type == "single_label_classification"
    assert 0 <= metrics(tmp_path)["eval_top1"] <= metrics(tmp_path)["eval_top5"] <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*DIGITS, *SCRATCH], "Nothing to do: pass --do_train, --do_eval or both"),
        ([*DIGITS, "--do_train"], "There is no model"),
        ([*SCRATCH, "--do_train"], "Expected either `dataset_name` or image folders"),
        ([*DIGITS, *SCRATCH, "--do_train", "--image_column_name", "picture"], "no column 'picture'. The columns are"),
        (
            [*DIGITS, *SCRATCH, "--do_train", "--vertical_kappa", "17"],
            "vertical_kappa must be an integer between 0 and 16",
        ),
        ([*DIGITS, *SCRATCH, "--do_train", "--mixup_alpha", "-1"], "mixup_alpha"),
    ],
)
def test_build_trainer_with_wrong_option_raises(finetune, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune.build_trainer([*COMMON, *arguments, "--output_dir", str(tmp_path)])


def test_build_trainer_evaluating_model_of_other_classes_raises(finetune, tmp_path):
    run(finetune, *DIGITS, *SCRATCH, "--do_train", "--max_steps", 1, "--output_dir", tmp_path / "digits")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / name / "0.png")
    arguments = ["--model_name_or_path", tmp_path / "digits", "--validation_dir", tmp_path / "images", "--do_eval"]
    with pytest.raises(ValueError, match="The model has 10 classes and the dataset has 2"):
        finetune.build_trainer([*COMMON, *map(str, arguments), "--cache_dir", str(tmp_path / "cache")])


def test_finetune_evaluation_maps_labels_as_requested(finetune, tmp_path, caplog):
    digits = load_digits_dataset()["test"].select(range(60))
    names = {0: "cat", 1: "ant", 2: "bee"}
    for index, row in enumerate(digits):
        folder = tmp_path / "images" / names[row["label"] % 3]
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{index}.png")
    where = ["--validation_dir", tmp_path / "images", "--cache_dir", tmp_path / "cache"]
    train = ["--train_dir", tmp_path / "images", *where[2:], *SCRATCH, "--do_train", "--max_steps", 20]
    run(finetune, *train, "--learning_rate", 0.003, "--output_dir", tmp_path / "out")
    evaluate = [*where, "--do_eval", "--output_dir", tmp_path / "evaluated"]
    run(finetune, "--model_name_or_path", tmp_path / "out", *evaluate)
    expected = metrics(tmp_path / "evaluated")["eval_top1"]
    assert expected > 0.4 and "ScoreNet" not in caplog.text

    model = ViTForImageClassification.from_pretrained(tmp_path / "out")
    order = torch.tensor([2, 0, 1])
    model.classifier.weight.data, model.classifier.bias.data = (
        model.classifier.weight[order],
        model.classifier.bias[order],
    )
    model.config.id2label = {new: model.config.id2label[int(old)] for new, old in enumerate(order)}
    model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"3 of 3 classes have different names: 0 \('cat' and 'ant'\)"):
        finetune.build_trainer([*COMMON, "--model_name_or_path", str(tmp_path / "out"), *map(str, evaluate)])
    run(finetune, "--model_name_or_path", tmp_path / "out", *evaluate, "--label_mapping", "name")
    assert metrics(tmp_path / "evaluated")["eval_top1"] == expected
    run(finetune, "--model_name_or_path", tmp_path / "out", *evaluate, "--label_mapping", "number")
    assert metrics(tmp_path / "evaluated")["eval_top1"] < expected


def test_finetune_expected_error_is_one_line_and_other_has_traceback(tmp_path, monkeypatch):
    options = [*COMMON, *DIGITS, *SCRATCH, "--do_train", "--max_steps", "3", "--logging_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options, "--output_dir", str(tmp_path / "a")])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [*sys.argv, "--learning_rate", "1e30"])
        with pytest.raises(SystemExit, match="finetune.py: The loss of step . is infinite or not a number"):
            runpy.run_path(str(SCRIPT), run_name="__main__")

    def fail(self, *args, **kwargs):
        raise ValueError("an error")

    monkeypatch.setattr("transformers.Trainer.training_step", fail)
    with pytest.raises(ValueError, match="an error"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "torchrun --standalone --nproc_per_node 2",
        "accelerate launch --multi_gpu --num_processes 2 --main_process_port 0",
    ],
)
def test_finetune_on_two_processes_equals_one_process(launcher, tmp_path):
    """Without TokenMixup, two processes with batches of 8 end with the weights of one with batches of 16."""
    options = [*DIGITS, *SCRATCH, "--do_train", "--do_eval", "--num_train_epochs", 1, "--save_strategy", "no"]
    options += ["--use_cpu", "--report_to", "none", "--max_train_samples", 64, "--seed", 3, "--optim", "sgd"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def launch(command, batch, folder, *more):
        arguments = [SCRIPT, *options, "--per_device_train_batch_size", batch, "--output_dir", folder, *more]
        program = [Path(sys.executable).with_name(command[0]), *command[1:]] if command else [sys.executable]
        subprocess.run(list(map(str, program + arguments)), check=True, env=environment, cwd=tmp_path, timeout=HANG_S)
        return load_file(tmp_path / folder / "model.safetensors"), metrics(tmp_path / folder)

    one, one_metrics = launch([], 16, "one")
    two, two_metrics = launch(launcher.split(), 8, "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-5)
    assert one_metrics["eval_top1"] == two_metrics["eval_top1"]
    launch(launcher.split(), 8, "mixed", *MIXING, "--logging_steps", 1)
    lines = (tmp_path / "mixed" / "training_log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"mixed_samples"' in line]
    assert steps == [1, 2, 3, 4]
