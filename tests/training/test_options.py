"""Command line and recipes: what is given arrives, and what is misspelt is said."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from hf_tokenmixup.configuration import TokenMixupSettings
from hf_tokenmixup.models import FAMILIES, TokenMixupCctConfig
from hf_tokenmixup.training import parse_options
from hf_tokenmixup.training.options import build_parser

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
    assert {setting.name for setting in dataclasses.fields(TokenMixupSettings)} <= names


def test_flags_override_the_recipe_wherever_they_stand(tmp_path):
    recipe = write(tmp_path, learning_rate=0.5, horizontal_layers=[1, 2], horizontal_tau=None, crop_scale=[0.5, 1.0])
    _, _, augmentation, training, *_, settings = parse("--learning_rate", 0.25, "--recipe", recipe, "--hflip", 0)
    assert training.learning_rate == 0.25 and training.use_cpu
    assert settings == {"horizontal_layers": [1, 2], "horizontal_tau": None}
    assert augmentation.crop_scale == [0.5, 1.0] and augmentation.hflip == 0.0


def test_nothing_in_a_recipe_is_as_if_it_were_not_there(tmp_path):
    _, data, augmentation, *_ = parse("--recipe", write(tmp_path, eval_split=None, color_jitter=None))
    assert data.eval_split is None and augmentation.color_jitter is None


def test_config_overrides_come_as_a_mapping_or_as_json(tmp_path):
    recipe = write(tmp_path, config_overrides={"hidden_size": 96, "hidden_dropout_prob": 0.1})
    model, *_ = parse("--recipe", recipe)
    assert model.config_changes() == {"hidden_size": 96, "hidden_dropout_prob": 0.1}
    model, *_ = parse("--config_overrides", "hidden_size=96")
    with pytest.raises(ValueError, match="must be a JSON object .* got 'hidden_size=96'"):
        model.config_changes()


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
    config = config_class(**model.config_changes(), **settings)
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
    config = TokenMixupCctConfig(**model.config_changes(), **settings)
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
