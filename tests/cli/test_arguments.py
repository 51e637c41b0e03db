"""The options of finetune: parsing, help, and messages about unknown options."""

import dataclasses
import re
from argparse import ArgumentParser

import pytest
import yaml

from hf_tokenmixup.cli.arguments import build_parser, parse_options
from hf_tokenmixup.cli.recipes import check_unknown_options, option_names
from hf_tokenmixup.cli.successors import SUCCESSORS
from hf_tokenmixup.configuration import TokenMixupConfigMixin


def parse(*arguments):
    return parse_options(["--use_cpu", *map(str, arguments)])


def write(folder, **options):
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def test_parse_options_returns_only_settings_given(tmp_path):
    assert parse("--output_dir", tmp_path).tokenmixup == {}
    options = parse("--horizontal_layers", 1, 3, "--horizontal_tau", "none", "--scorenet_detach", "false")
    assert options.tokenmixup == {"horizontal_layers": [1, 3], "horizontal_tau": None, "scorenet_detach": False}
    options = parse("--horizontal_layers", "--vertical_detach")
    assert options.tokenmixup == {"horizontal_layers": [], "vertical_detach": True}


def test_build_parser_has_flag_for_every_setting():
    names = {action.dest for action in build_parser()._actions}
    assert {setting.name for setting in dataclasses.fields(TokenMixupConfigMixin)} <= names


@pytest.mark.parametrize("recipe_name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize(
    "flag", ["--gradient_checkpointing", "--activation_checkpointing", "--gradient-checkpointing"]
)
@pytest.mark.filterwarnings("error")
def test_parse_options_checkpointing_flag_of_either_name_overrides_recipe(tmp_path, recipe_name, flag):
    training = parse(flag).training
    assert training.gradient_checkpointing is training.activation_checkpointing is True
    recipe = write(tmp_path, **{recipe_name: True, f"{recipe_name}_kwargs": {"use_reentrant": True}})
    training = parse("--recipe", recipe).training
    assert training.gradient_checkpointing is training.activation_checkpointing is True
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": True}
    words = [flag, "false", f"{flag}_kwargs={{}}"] if "_" in flag else [f"{flag}=false", f"{flag}-kwargs={{}}"]
    training = parse("--recipe", recipe, *words).training
    assert training.gradient_checkpointing is training.activation_checkpointing is False
    assert training.activation_checkpointing_kwargs == {} == training.gradient_checkpointing_kwargs


def test_parse_options_config_overrides_accepts_mapping_and_json(tmp_path):
    recipe = write(tmp_path, config_overrides={"hidden_size": 96, "hidden_dropout_prob": 0.1})
    model = parse("--recipe", recipe).model
    assert model.parse_config_overrides() == {"hidden_size": 96, "hidden_dropout_prob": 0.1}
    model = parse("--config_overrides", "hidden_size=96").model
    with pytest.raises(ValueError, match="must be a JSON object .* got 'hidden_size=96'"):
        model.parse_config_overrides()


def test_parse_options_unknown_argument_raises_with_nearest_flag():
    with pytest.raises(ValueError, match="no option --vertical_layer: did you mean --vertical_layers"):
        parse("--vertical_layer", 1)
    with pytest.raises(ValueError, match="Unknown arguments: stray"):
        parse("true", "stray")


def test_help_lists_common_options_and_help_all_lists_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def text(flag):
        with pytest.raises(SystemExit) as exit:
            build_parser("About.").parse_args([flag])
        assert exit.value.code == 0
        return capsys.readouterr().out

    brief, full = text("--help"), text("--help_all")
    assert "About." in brief and "--horizontal_layers" in brief and "--learning_rate" in brief
    assert "--fsdp_config" not in brief and "--fsdp_config" in full
    assert len(brief.splitlines()) < 320 < len(full.splitlines())


def test_parse_options_list_with_commas_equals_list_with_spaces(tmp_path):
    options = parse(
        "--horizontal_layers", "1,2", "--vertical_layers=2,3", "--manifold_mixup_layers", "[1,", "3]",
        "--crop_scale", "0.8,1", "--image_size", "24,32", "--lora_rank", 4, "--lora_target_modules", "q_proj,k_proj",
    )  # fmt: skip
    assert options.tokenmixup == {
        "horizontal_layers": [1, 2], "vertical_layers": [2, 3], "manifold_mixup_layers": [1, 3],
    }  # fmt: skip
    assert options.augmentation.crop_scale == [0.8, 1.0] and options.model.image_size == [24, 32]
    assert options.lora.lora_target_modules == ["q_proj", "k_proj"]
    options = parse("--recipe", write(tmp_path, vertical_layers="1, 2", crop_scale="0.5,1"))
    assert options.tokenmixup == {"vertical_layers": [1, 2]} and options.augmentation.crop_scale == [0.5, 1.0]


def test_parse_options_hyphens_equal_underscores():
    options = parse("--learning-rate", 0.25, "--horizontal-rho", 0.5, "--crop-ratio", "0.5,1", "--vertical-layers", 1)
    assert options.training.learning_rate == 0.25 and options.augmentation.crop_ratio == [0.5, 1.0]
    assert options.tokenmixup == {"horizontal_rho": 0.5, "vertical_layers": [1]}


@pytest.mark.parametrize("name", sorted(SUCCESSORS))
def test_parse_options_removed_option_raises_with_replacement(name):
    known = option_names(build_parser())
    if name in known:
        return  # in this version of transformers
    with pytest.raises(ValueError, match=rf"^--{name} (was|is|has) ") as raised:
        parse(f"--{name}", "x")
    for flag in re.findall(r"--(\w+)", str(raised.value)):
        assert flag == name or flag in known


def test_parse_options_removed_option_without_replacement_is_unknown():
    parser = ArgumentParser()
    parser.add_argument("--use_cpu", action="store_true")
    with pytest.raises(ValueError, match="--no_cuda was removed in transformers 5: pass --use_cpu"):
        check_unknown_options(["--no_cuda"], parser)
    with pytest.raises(ValueError, match=r"There is no option --warmup_ratio\."):
        check_unknown_options(["--warmup_ratio"], parser)


def test_parse_options_unknown_option_is_reported_before_wrong_values():
    with pytest.raises(ValueError, match=r"There is no option --max_step: did you mean --max_steps\?"):
        parse("--max_step", "5", "--max_time", "-1")
