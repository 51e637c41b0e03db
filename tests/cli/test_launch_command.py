"""The launch command in a model card, and an evaluation without an output folder."""

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers.commands import import_command
from helpers.tiny_training import VIT, plain_vit
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_tokenmixup.cli.launch_command import DEEPSPEED_OPTIONS, DYNAMO_OPTIONS, FSDP_OPTIONS, launch_command
from hf_tokenmixup.training import TokenMixupTrainer, TokenMixupTrainingArguments


@pytest.mark.parametrize(
    ("environment", "settings", "command"),
    [
        ({}, {}, "accelerate launch"),
        ({}, {"bf16": True}, "accelerate launch"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "accelerate launch --mixed_precision bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"bf16": True}, "accelerate launch"),
        ({"ACCELERATE_USE_CPU": "True"}, {"use_cpu": False}, "accelerate launch --cpu"),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "max-autotune"}, {}, "accelerate launch"),
        (
            {
                "ACCELERATE_DYNAMO_BACKEND": "EAGER",
                "ACCELERATE_DYNAMO_MODE": "reduce-overhead",
                "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True",
                "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
            },
            {},
            "accelerate launch --dynamo_backend eager --dynamo_mode reduce-overhead --dynamo_use_fullgraph",
        ),
    ],
)
def test_launch_command_has_settings_of_launcher(tmp_path, monkeypatch, environment, settings, command):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = {"use_cpu": True, "report_to": "none", "output_dir": str(tmp_path)} | settings
    trainer = TokenMixupTrainer(plain_vit(), TokenMixupTrainingArguments(**settings))
    assert launch_command(trainer) == command
    launch_command_parser().parse_args([*command.split()[2:], "script.py"])


def test_launch_command_options_equal_accelerate_options():
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*DYNAMO_OPTIONS, *FSDP_OPTIONS, *DEEPSPEED_OPTIONS} <= known


def test_finetune_evaluation_creates_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ViTForImageClassification(ViTConfig(**VIT | {"num_labels": 10}))
    model.config.id2label = {number: str(number) for number in range(10)}
    model.save_pretrained("model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained("model")
    words = (
        "--model_name_or_path model --dataset_name digits --do_eval --max_eval_samples 20 --cache_dir cache --use_cpu"
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    finetune = import_command("finetune")
    trainer = finetune.build_trainer(words.split())
    finetune.train_and_evaluate(trainer)
    assert "top-1" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "cache"}
    assert trainer.eval_card_data["command"].endswith("--dtype=bf16")
    assert trainer.training_card_data.command.startswith("accelerate launch --mixed_precision bf16 ")

    finetune.train_and_evaluate(finetune.build_trainer([*words.split(), "--output_dir", "results"]))
    assert (tmp_path / "results" / "all_results.json").is_file()
