"""Command line and recipes: what is given arrives, and what is misspelt is said."""

import dataclasses
import re
from argparse import ArgumentParser
from pathlib import Path

import pytest
import yaml

from hf_tokenmixup.cli.arguments import build_parser, parse_options
from hf_tokenmixup.cli.recipes import check_unknown_options, option_names
from hf_tokenmixup.cli.successors import SUCCESSORS
from hf_tokenmixup.configuration import TokenMixupConfigMixin
from hf_tokenmixup.models import FAMILIES, TokenMixupCctConfig

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "src" / "hf_tokenmixup" / "recipes"


def parse(*arguments, recipes=RECIPES):
    return parse_options(["--use_cpu", *map(str, arguments)], recipes)


def write(folder, **options):
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def test_only_the_settings_given_are_returned(tmp_path):
    *_, settings = parse("--output_dir", tmp_path)
    assert settings == {}
    *_, settings = parse("--horizontal_layers", 1, 3, "--horizontal_tau", "none", "--scorenet_detach", "false")
    assert settings == {"horizontal_layers": [1, 3], "horizontal_tau": None, "scorenet_detach": False}
    *_, settings = parse("--horizontal_layers", "--vertical_detach")
    assert settings == {"horizontal_layers": [], "vertical_detach": True}


def test_every_setting_is_a_flag():
    names = {action.dest for action in build_parser("")._actions}
    assert {setting.name for setting in dataclasses.fields(TokenMixupConfigMixin)} <= names


def test_flags_override_the_recipe_wherever_they_stand(tmp_path):
    recipe = write(tmp_path, learning_rate=0.5, horizontal_layers=[1, 2], horizontal_tau=None, crop_scale=[0.5, 1.0])
    _, _, augmentation, training, *_, settings = parse("--learning_rate", 0.25, "--recipe", recipe, "--hflip", 0)
    assert training.learning_rate == 0.25 and training.use_cpu
    assert settings == {"horizontal_layers": [1, 2], "horizontal_tau": None}
    assert augmentation.crop_scale == [0.5, 1.0] and augmentation.hflip == 0.0


@pytest.mark.parametrize("recipe_name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize(
    "flag", ["--gradient_checkpointing", "--activation_checkpointing", "--gradient-checkpointing"]
)
@pytest.mark.filterwarnings("error")
def test_checkpointing_by_either_name_the_flag_overrides_the_recipe(tmp_path, recipe_name, flag):
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


def test_nothing_in_a_recipe_is_as_if_it_were_not_there(tmp_path):
    _, data, augmentation, *_ = parse("--recipe", write(tmp_path, eval_split=None, color_jitter=None))
    assert data.eval_split is None and augmentation.color_jitter is None


def test_config_overrides_come_as_a_mapping_or_as_json(tmp_path):
    recipe = write(tmp_path, config_overrides={"hidden_size": 96, "hidden_dropout_prob": 0.1})
    model, *_ = parse("--recipe", recipe)
    assert model.parse_config_overrides() == {"hidden_size": 96, "hidden_dropout_prob": 0.1}
    model, *_ = parse("--config_overrides", "hidden_size=96")
    with pytest.raises(ValueError, match="must be a JSON object .* got 'hidden_size=96'"):
        model.parse_config_overrides()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"horizontal_layer": [1]},
            "has the key 'horizontal_layer', which is no option: did you mean horizontal_layers?",
        ),
        ({"learning_rat": 1}, "did you mean learning_rate?"),
        ({"zzzz": 1}, "which is no option."),
        ({"recipe": "digits-quickstart"}, "has the key 'recipe'"),
    ],
)
def test_misspelt_keys_of_a_recipe(options, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse("--recipe", write(tmp_path, **options))


def test_recipes_that_are_not_there_or_no_mapping(tmp_path):
    with pytest.raises(ValueError, match="no recipe 'digits-quikstart': did you mean digits-quickstart"):
        parse("--recipe", "digits-quikstart")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must be a mapping of options to values, got list"):
        parse("--recipe", tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        parse("--recipe", tmp_path / "broken.yaml")


def test_misspelt_flags():
    with pytest.raises(ValueError, match="no option --vertical_layer: did you mean --vertical_layers"):
        parse("--vertical_layer", 1)
    with pytest.raises(ValueError, match="Not understood on the command line: stray"):
        parse("true", "stray")


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_parses_and_fits_its_model(recipe):
    model, data, _, training, recipe_name, *_, settings = parse("--recipe", recipe)
    assert training.do_train and training.do_eval and data.dataset_name and training.output_dir.endswith(recipe)
    config_class, _ = FAMILIES[model.model_type or "vit"]
    config = config_class(**model.parse_config_overrides(), **settings)
    written = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    for name, value in settings.items():
        assert getattr(config, name) == value == written[name]
    assert config.tokenmixup_enabled == ("baseline" not in recipe)


def test_the_paper_s_imagenet_settings():
    _, _, augmentation, training, *_, settings = parse("--recipe", "vit-b16-imagenet1k-htm-vtm")
    assert settings["horizontal_layers"] == [3] and settings["vertical_layers"] == [4]
    assert (settings["horizontal_tau"], settings["horizontal_rho"], settings["vertical_kappa"]) == (1.0, 0.01, 3)
    assert (training.optim, training.optim_args, training.learning_rate) == ("sgd", "momentum=0.9", 0.015)
    assert (training.lr_scheduler_type, training.max_grad_norm, training.weight_decay) == ("constant", 1.0, 0.0)
    assert (augmentation.color_jitter, augmentation.crop_scale) == (0.4, [0.08, 1.0])


@pytest.mark.parametrize(
    "recipe, horizontal, vertical, tau, rho, kappa, rate, decay, start",
    [
        ("cifar10-htm", [2], [], 1.0, 0.003, 3, 5e-4, 0.05, 1e-5),
        ("cifar10-vtm", [], [1], 1.0, 0.01, 5, 5e-4, 0.05, 1e-5),
        ("cifar10-htm-vtm", [2], [3], 1.0, 0.004, 3, 5e-4, 0.05, 1e-5),
        ("cifar100-htm", [2], [], 2.0, 0.005, 3, 6e-4, 0.06, 1e-6),
        ("cifar100-vtm", [], [2], 1.0, 0.01, 80, 6e-4, 0.06, 1e-6),
        ("cifar100-htm-vtm", [3], [2], 2.0, 0.005, 3, 6e-4, 0.06, 1e-6),
        ("cifar100-htm-vtm-300", [3], [2], 2.0, 0.005, 3, 6e-4, 0.06, 1e-6),
    ],
)
def test_the_paper_s_cifar_settings(recipe, horizontal, vertical, tau, rho, kappa, rate, decay, start):
    model, _, augmentation, training, *_, settings = parse("--recipe", f"cct-7-3x1-{recipe}")
    config = TokenMixupCctConfig(**model.parse_config_overrides(), **settings)
    assert (config.horizontal_layers, config.vertical_layers) == (horizontal, vertical)
    assert (config.horizontal_tau, config.horizontal_rho, config.vertical_kappa) == (tau, rho, kappa)
    if horizontal:
        assert (config.scorenet_pooling, config.scorenet_loss_weight, config.scorenet_detach) == (
            "attention",
            1e-3,
            False,
        )
    assert (training.learning_rate, training.weight_decay, training.seed) == (rate, decay, 42)
    assert training.lr_scheduler_kwargs["warmup_lr_rate"] * rate == pytest.approx(start, rel=1e-4)
    assert training.lr_scheduler_kwargs["min_lr"] == 1e-5
    assert training.num_train_epochs == (310 if recipe.endswith("300") else 1510)
    assert (training.mixup_alpha, training.cutmix_alpha, training.mixup_switch_prob) == (0.8, 1.0, 0.5)
    assert (augmentation.auto_augment, augmentation.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)


def test_help_is_brief_and_help_all_is_not(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def text(flag):
        with pytest.raises(SystemExit) as exit:
            build_parser("About.").parse_args([flag])
        assert exit.value.code == 0
        return capsys.readouterr().out

    brief, full = text("--help"), text("--help_all")
    assert "About." in brief and "--horizontal_layers" in brief and "--learning_rate" in brief
    assert "--fsdp_config" not in brief and "--fsdp_config" in full
    assert len(brief.splitlines()) < 240 < len(full.splitlines())


def test_lists_with_commas_equal_lists_with_spaces(tmp_path):
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


def test_hyphens_equal_underscores_for_every_kind_of_option():
    options = parse("--learning-rate", 0.25, "--horizontal-rho", 0.5, "--crop-ratio", "0.5,1", "--vertical-layers", 1)
    assert options.training.learning_rate == 0.25 and options.augmentation.crop_ratio == [0.5, 1.0]
    assert options.tokenmixup == {"horizontal_rho": 0.5, "vertical_layers": [1]}


OBJECTS = {
    "config_overrides": {"hidden_size": 96, "num_hidden_layers": 4},
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 0.125},
    "accelerator_config": {"non_blocking": True},
}


@pytest.mark.parametrize("form", ["{name} {value}", "{name}={value}", "{hyphens} {value}"])
def test_json_objects_are_merged_with_the_recipe_key_by_key(tmp_path, form):
    changes = {
        "config_overrides": '{"num_hidden_layers": 3, "hidden_act": "relu"}',
        "lr_scheduler_kwargs": '{"num_cycles": 2}',
        "accelerator_config": '{"even_batches": false}',
    }
    words = []
    for name, value in changes.items():
        text = form.format(name=f"--{name}", hyphens=f"--{name.replace('_', '-')}", value=value)
        words += [text] if "=" in form else text.split(" ", 1)
    options = parse(*words, "--recipe", write(tmp_path, **OBJECTS))
    assert options.model.parse_config_overrides() == {"hidden_size": 96, "num_hidden_layers": 3, "hidden_act": "relu"}
    assert options.training.lr_scheduler_kwargs == {"min_lr": 0.125, "num_cycles": 2}
    assert options.training.accelerator_config.non_blocking is True
    assert options.training.accelerator_config.even_batches is False


def test_an_empty_json_object_drops_the_recipe_s(tmp_path):
    options = parse("--recipe", write(tmp_path, **OBJECTS), "--config_overrides", "{}")
    assert options.model.parse_config_overrides() == {} and options.training.lr_scheduler_kwargs == {"min_lr": 0.125}


def test_scheduler_arguments_of_another_scheduler_are_not_merged(tmp_path):
    recipe, kwargs = write(tmp_path, **OBJECTS), '{"num_cycles": 1}'
    same = parse("--recipe", recipe, "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", kwargs)
    other = parse("--recipe", recipe, "--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", kwargs)
    assert same.training.lr_scheduler_kwargs == {"min_lr": 0.125, "num_cycles": 1}
    assert other.training.lr_scheduler_kwargs == {"num_cycles": 1}


def test_numbers_with_an_exponent_are_numbers_inside_a_recipe_s_object(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1e-3\nconfig_overrides: {layer_norm_eps: 1e-6, hidden_act: e1}\n")
    options = parse("--recipe", path)
    assert options.model.parse_config_overrides() == {"layer_norm_eps": 1e-6, "hidden_act": "e1"}
    assert options.training.learning_rate == 1e-3


@pytest.mark.parametrize("name", sorted(SUCCESSORS))
def test_every_option_of_transformers_4_names_what_takes_its_place(name):
    known = option_names(build_parser(""))
    if name in known:
        return  # in this version of transformers
    with pytest.raises(ValueError, match=rf"^--{name} (was|is|has) ") as raised:
        parse(f"--{name}", "x")
    for flag in re.findall(r"--(\w+)", str(raised.value)):
        assert flag == name or flag in known


def test_an_option_is_not_answered_with_one_that_the_command_lacks():
    parser = ArgumentParser()
    parser.add_argument("--use_cpu", action="store_true")
    with pytest.raises(ValueError, match="--no_cuda was removed in transformers 5: pass --use_cpu"):
        check_unknown_options(["--no_cuda"], parser)
    with pytest.raises(ValueError, match=r"There is no option --warmup_ratio\."):
        check_unknown_options(["--warmup_ratio"], parser)
