"""scripts/calibrate.py and finetune.py --dry_run, with tiny models on the digits."""

import json
import math
import re
import runpy
import sys

import pytest
import torch
from helpers.commands import SCRIPTS, import_command
from helpers.tiny_training import resnet
from transformers import ViTImageProcessor

from hf_tokenmixup.cli.arguments import parse_options
from hf_tokenmixup.models import TokenMixupViTConfig, TokenMixupViTForImageClassification

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
TINY |= {"intermediate_size": 32, "initializer_range": 0.5}
COMMON = "--use_cpu --disable_tqdm true --report_to none --per_device_train_batch_size 16 --hflip 0".split()
DIGITS = [*COMMON, "--dataset_name", "digits"]
SCRATCH = ["--from_scratch", "--model_type", "vit", "--config_overrides", json.dumps(TINY)]


@pytest.fixture(scope="module")
def script():
    return import_command("calibrate")


@pytest.fixture(scope="module")
def finetune():
    return import_command("finetune")


def save_checkpoint(folder, num_labels=10):
    """Save a model with a ScoreNet in layer 2, as a training checkpoint has it."""
    torch.manual_seed(0)
    config = TokenMixupViTConfig(**TINY, horizontal_layers=[2], num_labels=num_labels)
    config.id2label = {index: str(index) for index in range(num_labels)}
    config.label2id = {name: index for index, name in config.id2label.items()}
    model = TokenMixupViTForImageClassification(config)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


def calibrate(script, *arguments):
    script.main([*map(str, arguments)])


def test_calibrate_prints_layers_and_flags_that_parse_and_writes_json_and_figure(script, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    calibrate(script, *DIGITS, *SCRATCH, "--num_images", 40, "--output_dir", out)
    printed = capsys.readouterr().out
    assert "48 images in batches of 16 (--per_device_train_batch_size; HTM" in printed
    assert "), 16 patch tokens, 10 classes" in printed and "They do not predict accuracy." in printed
    assert re.findall(r"^Layer (\d):.* (\w+) ScoreNet", printed, re.MULTILINE) == [
        (str(layer), "fitted") for layer in range(4)
    ]
    result = json.loads((out / "calibration.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["calibration.json", "calibration.png"]
    assert (out / "calibration.png").stat().st_size > 10_000
    assert f"{out / 'calibration.json'}\n{out / 'calibration.png'}" in printed
    flags = re.search(r"^Flags: (.*)$", printed, re.MULTILINE)[1].split()
    assert parse_options(["--use_cpu", *flags]).tokenmixup == result["suggestion"]
    (layer,) = result["suggestion"]["horizontal_layers"]
    rho = result["layers"][layer]["rho"]
    assert len(rho) == 8 and all(f"{item['images_mixed']:.1%}" in printed for item in rho)
    assert result["layers"][0]["tau"][0]["horizontal_tau"] == pytest.approx(0.1 * math.log(10))


def test_calibrate_with_recipe_measures_batches_of_recipe_and_writes_nothing(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--recipe", "digits-quickstart", "--use_cpu", "--num_images", 64, "--layers", "1,2"]
    calibrate(script, *options)
    printed = capsys.readouterr().out
    assert "64 images in batches of 64 (--per_device" in printed
    assert re.findall(r"^Layer (\d)", printed, re.MULTILINE) == ["1", "2"]
    assert list(tmp_path.iterdir()) == []


def test_calibrate_equal_seeds_print_the_same(script, capsys):
    options = [*DIGITS, *SCRATCH, "--num_images", 32, "--layers", 1]
    outputs = []
    for seed in (5, 5, 6):
        calibrate(script, *options, "--seed", seed)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize("num_labels, expected", [(10, "trained"), (7, "fitted")])
def test_calibrate_uses_scorenet_of_checkpoint_with_the_same_classes(script, tmp_path, capsys, num_labels, expected):
    save_checkpoint(tmp_path, num_labels)
    # The run mixes before another layer, whose ScoreNet is new.
    options = [*DIGITS, "--model_name_or_path", tmp_path, "--horizontal_layers", 1, "--num_images", 32]
    calibrate(script, *options)
    printed = capsys.readouterr().out
    found = re.findall(r"^Layer \d:.* (\w+) ScoreNet", printed, re.MULTILINE)
    assert found == ["fitted", "fitted", expected, "fitted"]
    calibrate(script, *options, "--from_scratch")
    assert "trained ScoreNet" not in capsys.readouterr().out


def test_read_scorenet_classifiers_of_sharded_checkpoint(script, tmp_path):
    model = save_checkpoint(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for name in ("one", "many"):
        weights = script.read_scorenet_classifiers(str(tmp_path / name))
        assert list(weights) == [2]
        assert torch.equal(weights[2], model.get_transformer_layers()[2].scorenet.classifier.weight)
    assert script.read_scorenet_classifiers(None) == {}


def test_has_weights_ignores_order_of_classes(script, tmp_path):
    model = save_checkpoint(tmp_path)
    weight = model.get_transformer_layers()[2].scorenet.classifier.weight.detach()
    assert script.has_weights(model, {2: weight.flip(0)})
    assert not script.has_weights(model, {2: weight + 1}) and not script.has_weights(model, {2: weight[:5]})


def test_calibrate_unsupported_model_raises(script, tmp_path):
    resnet().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected a ViT or CCT with TokenMixup"):
        calibrate(script, *DIGITS, "--model_name_or_path", tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num_images", "1"], "--num_images must be at least 2, got 1"),
        (["--layers", "4"], "layer must be between 0 and 3, got 4"),
        (["--layer", "1"], "There is no option --layer"),
    ],
)
def test_calibrate_with_wrong_option_raises(script, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(script, *DIGITS, *SCRATCH, *options)


def test_calibrate_output_dir_that_is_a_file_raises(script, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="--output_dir must name a file that can be written"):
        calibrate(script, *DIGITS, *SCRATCH, "--output_dir", tmp_path / "file")


def test_calibrate_script_shows_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/calibrate.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / "calibrate.py"), run_name="__main__")
    assert ended.value.code == 0 and "--num_images" in capsys.readouterr().out


def test_dry_run_prints_settings_in_force_and_writes_nothing(finetune, tmp_path, capsys):
    options = [*DIGITS, *SCRATCH, "--do_train", "--do_eval", "--output_dir", str(tmp_path / "out")]
    options += "--horizontal_layers 1 3 --horizontal_rho_relative 0.4 --horizontal_tau_relative 0.5".split()
    options += "--vertical_layers 2 --vertical_kappa 3 --dry_run".split()
    finetune.main(options)
    printed = capsys.readouterr().out
    assert "Dry run: nothing is trained or written.\n256 images in batches of 16 (--per_device" in printed
    tau = 0.5 * math.log(10)
    for layer in (1, 3):
        assert f"layer {layer}, HTM: rho 0.025 (0.4 / T), tau {tau:.3g} nats (0.5 ln C)\n" in printed
    assert re.search(r"layer 2, VTM: kappa 3\n  \d+\.\d% of the attention goes to 6 tokens of earlier layers", printed)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_forecast_equals_training_forward_of_the_same_batch(finetune, capsys):
    options = [*DIGITS, *SCRATCH, "--do_train", "--max_train_samples", "16", "--dry_run"]
    options += "--horizontal_layers 2 --horizontal_tau none --horizontal_rho_relative 0.3".split()
    options += ["--config_overrides", json.dumps(TINY | {"hidden_dropout_prob": 0.0})]
    trainer = finetune.build_trainer(options)
    (batch,) = trainer.get_train_dataloader()
    batch["pixel_values"] = trainer.device_transform.normalize(batch["pixel_values"])
    replaced = trainer.model.train()(**batch).horizontal[0].replaced
    finetune.train_and_evaluate(trainer)
    mixed = replaced.any(dim=1)
    expected = f"{mixed.float().mean():.1%} of the images are mixed, {replaced[mixed].float().mean():.1%} of their"
    assert mixed.sum() > 0 and expected in capsys.readouterr().out


def test_dry_run_without_tokenmixup_says_so(finetune, tmp_path, capsys):
    finetune.main([*DIGITS, *SCRATCH, "--do_train", "--dry_run"])
    assert "HTM and VTM are off" in capsys.readouterr().out
    resnet().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    options = ["--model_name_or_path", str(tmp_path), "--ignore_mismatched_sizes", "--do_train", "--dry_run"]
    finetune.main([*DIGITS, *options])
    assert "ResNetForImageClassification does not support TokenMixup." in capsys.readouterr().out


def test_dry_run_without_training_raises(finetune):
    with pytest.raises(ValueError, match="--dry_run forecasts a training run, but --do_train is off"):
        finetune.build_trainer([*DIGITS, *SCRATCH, "--do_eval", "--dry_run"])


def test_dry_run_does_not_create_a_repository_or_resume(finetune, hub, tmp_path):
    options = [*DIGITS, *SCRATCH, "--do_train", "--dry_run", "--push_to_hub", "--hub_token", "hf_alice"]
    options += ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "last"]
    trainer = finetune.build_trainer([*options, "--hub_model_id", "alice/new"])
    assert trainer.args.resume_from_checkpoint is None and not trainer.args.push_to_hub
    assert list(tmp_path.iterdir()) == []
