"""Defaults and validation of the arguments, and their command-line form."""

import pytest
import torch
from helpers.tiny_training import Images, plain_vit
from transformers import HfArgumentParser

from hf_tokenmixup.training import TokenMixupTrainer, TokenMixupTrainingArguments
from hf_tokenmixup.training import training_args as training_arguments


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mixup_alpha", -0.1),
        ("cutmix_alpha", float("inf")),
        ("mixup_prob", 1.5),
        ("mixup_switch_prob", -0.5),
        ("mixup_mode", "half"),
        ("label_smoothing_factor", 1.0),
    ],
)
def test_training_args_out_of_range_raise_with_name(arguments, setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` .*{value}"):
        arguments(**{setting: value})


def test_training_args_parse_flags(tmp_path):
    parser = HfArgumentParser(TokenMixupTrainingArguments)
    flags = ["--output_dir", str(tmp_path), "--mixup_alpha", "0.8", "--mixup_mode", "pair", "--use_cpu"]
    (args,) = parser.parse_args_into_dataclasses([*flags, "--report_to", "none"])
    assert (args.mixup_alpha, args.cutmix_alpha, args.mixup_mode) == (0.8, 0.0, "pair")
    assert args.remove_unused_columns is False
    assert args.logging_nan_inf_filter is False
    assert "--mixup_switch_prob" in parser.format_help()


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "`fp16`, set by the launcher, has no effect on a CPU"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "`fp8`, set by the launcher, has no effect on a CPU"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "1"}, {"use_cpu": False}, "no effect on a CPU"),
        ({}, {"fp16": True}, "`fp16` has no effect on a CPU.*`bf16=True`"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "4 steps .* is 1. .*`gradient_accumulation_steps=4`"),
        ({}, {"report_to": "mlflow"}, "'mlflow', which is not installed.*none"),
        ({}, {"report_to": ["tensorboard", "wandb"]}, "'wandb', which is not installed.*from tensorboard, none"),
    ],
)
def test_training_args_without_effect_raise(arguments, monkeypatch, environment, settings, message):
    monkeypatch.setattr(training_arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        arguments(**settings)


@pytest.mark.parametrize("name", ["bf16", "bf16_full_eval"])
@pytest.mark.parametrize(
    ("gpu", "found"), [(None, "there is no GPU"), ("Tesla T4", "Tesla T4 does not")], ids=["no gpu", "old gpu"]
)
def test_training_args_bf16_without_hardware_names_alternatives(arguments, monkeypatch, name, gpu, found):
    monkeypatch.setattr(training_arguments, "is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    with pytest.raises(ValueError, match=f"`{name}` needs a GPU .* {found}. Pass `{name}=False` .*`use_cpu=True`"):
        arguments(use_cpu=False, **{name: True})


@pytest.mark.parametrize("steps", ["1", "4"])
def test_training_args_accumulation_equal_to_launcher_is_accepted(arguments, monkeypatch, steps):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
    assert arguments(gradient_accumulation_steps=4).gradient_accumulation_steps == 4


def test_training_args_launcher_with_cpu_uses_cpu(arguments, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args = arguments(use_cpu=False, bf16=True)
    assert args.use_cpu and args.device == torch.device("cpu") and not args.dataloader_pin_memory


def test_training_args_worker_settings_without_workers_are_dropped(arguments):
    settings = {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4}
    args = arguments(dataloader_num_workers=0, **settings)
    for batch in TokenMixupTrainer(plain_vit(), args, train_dataset=Images(4)).get_train_dataloader():
        assert len(batch["labels"]) == 4
    args = arguments(dataloader_num_workers=1, **settings)
    assert args.dataloader_persistent_workers and args.dataloader_prefetch_factor == 4


def test_training_args_unconnected_processes_raise(arguments, monkeypatch):
    args = arguments()
    # Set after transformers has initialized its processes, since it would wait for a second one.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, .*`use_cpu=True`"):
        args._validate_distributed_init()
    monkeypatch.setenv("WORLD_SIZE", "1")
    args._validate_distributed_init()


@pytest.mark.parametrize(
    ("pinned", "config", "expected"),
    [
        (True, None, True),
        (False, None, False),
        (True, {"even_batches": False}, True),
        (True, '{"non_blocking": false}', False),
        (False, {"non_blocking": True}, True),
        (True, "file", False),
    ],
)
def test_training_args_batches_from_pinned_memory_are_copied_without_waiting(
    arguments, tmp_path, pinned, config, expected
):
    if config == "file":
        config = str(tmp_path / "accelerator.json")
        (tmp_path / "accelerator.json").write_text('{"non_blocking": false}')
    # `use_cpu` turns pinned memory off.
    args = arguments(use_cpu=False, dataloader_pin_memory=pinned, accelerator_config=config)
    assert args.accelerator_config.non_blocking is expected
