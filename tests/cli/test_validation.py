"""Checks of the options of finetune.py, and of the size of the images."""

from types import SimpleNamespace

import pytest
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_tokenmixup.cli.arguments import DataArguments, ModelArguments
from hf_tokenmixup.cli.validation import (
    validate_best_model_args,
    validate_image_size,
    validate_lora_args,
    validate_normalization,
    validate_normalization_in_force,
    validate_output_dir,
    warn_of_unused_options,
)
from hf_tokenmixup.training import TokenMixupTrainingArguments

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY |= {"intermediate_size": 32}


def test_validate_image_size_counts_no_flops_and_restores_mode_and_attention(monkeypatch):
    monkeypatch.setattr("torch.utils.flop_counter.FlopCounterMode.__enter__", lambda self: pytest.fail("counts FLOPs"))
    model = ViTForImageClassification(ViTConfig(**TINY, attn_implementation="sdpa")).train()
    validate_image_size(model, 16, 16)
    assert model.training and model.config._attn_implementation == "sdpa"
    with pytest.raises(
        ValueError, match="makes images of 24x20 pixels, and the model is for 16x16. Pass --image_size 24"
    ):
        validate_image_size(model, 24, 20)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("image_mean", [0.5, 0.5], r"--image_mean must be three finite numbers, or one for all channels, got \[0.5"),
        ("image_mean", [float("nan")], "--image_mean must be three finite numbers"),
        ("image_std", [0.5, 0.0, 0.5], "--image_std must be three numbers above 0"),
    ],
)
def test_validate_normalization_invalid_values_raise(name, values, message):
    validate_normalization(name, None)
    validate_normalization(name, [0.5])
    with pytest.raises(ValueError, match=message):
        validate_normalization(name, values)


@pytest.mark.parametrize("name", ["train_dir", "validation_dir", "dataset_name"])
def test_validate_output_dir_inside_data_raises(tmp_path, name):
    data_args = DataArguments(**{name: str(tmp_path)})
    validate_output_dir(str(tmp_path.parent / "out"), data_args)
    for output_dir in (tmp_path, tmp_path / "sub" / "out", tmp_path / "x" / ".." / "out"):
        with pytest.raises(ValueError, match=f"is inside the data, --{name} "):
            validate_output_dir(str(output_dir), data_args)


def test_validate_lora_args_model_in_output_dir_raises_for_training_only(tmp_path):
    model_args = ModelArguments(model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="need the unchanged model in .* Pass another --output_dir"):
        validate_lora_args(model_args, SimpleNamespace(do_train=True, output_dir=str(tmp_path / "x" / "..")))
    validate_lora_args(model_args, SimpleNamespace(do_train=False, output_dir=str(tmp_path)))
    validate_lora_args(model_args, SimpleNamespace(do_train=True, output_dir=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("metric", "greater_is_better", "message"),
    [
        ("top2", None, "--metric_for_best_model must be one of top1, top5, loss, got 'top2'"),
        ("eval_top1", False, "--greater_is_better is False with --metric_for_best_model eval_top1"),
        ("loss", True, "--greater_is_better is True with --metric_for_best_model loss"),
    ],
)
def test_validate_best_model_args_invalid_metric_or_direction_raises(metric, greater_is_better, message):
    for name, direction in ((None, None), ("eval_top1", True), ("top5", None), ("loss", False)):
        validate_best_model_args(SimpleNamespace(metric_for_best_model=name, greater_is_better=direction))
    with pytest.raises(ValueError, match=message):
        validate_best_model_args(SimpleNamespace(metric_for_best_model=metric, greater_is_better=greater_is_better))


@pytest.mark.parametrize(
    ("option", "value", "effective"),
    [("eval_steps", 3, {"eval_strategy": "steps"}), ("hub_model_id", "user/model", {"push_to_hub": True})],
)
def test_warn_of_unused_options_names_options_without_effect(tmp_path, caplog, option, value, effective):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", option: value}
    warn_of_unused_options(TokenMixupTrainingArguments(**settings, **effective))
    assert not caplog.text
    warn_of_unused_options(TokenMixupTrainingArguments(**settings))
    assert f"--{option} has no effect without" in caplog.text


def test_validate_normalization_in_force_ignored_mean_raises():
    size = {"height": 16, "width": 16}
    validate_normalization_in_force(ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3]), [0.1, 0.2, 0.3], None)
    validate_normalization_in_force(ViTImageProcessor(size=size, image_std=[0.25] * 3), None, [0.25])
    # The image processor of timm models ignores these attributes, too.
    ignoring = ViTImageProcessor(size=size, image_std=[0.2] * 3, do_normalize=False)
    with pytest.raises(
        ValueError, match=r"--image_std 0.2 has no effect on a ViTImageProcessor\w*, which uses 1, 1, 1"
    ):
        validate_normalization_in_force(ignoring, None, [0.2])
    validate_normalization_in_force(ignoring, None, None)
