"""Recipes: bases, merging, the packaged files, and --print_recipe."""

import json
import re
from pathlib import Path

import pytest
import transformers
import yaml
from packaging import version

from hf_tokenmixup.cli import finetune
from hf_tokenmixup.cli.arguments import build_parser, format_recipe, parse_options
from hf_tokenmixup.cli.recipes import RECIPES, dump_recipe, expand_recipe, list_recipes, load_recipe
from hf_tokenmixup.models import FAMILIES, TokenMixupCctConfig

C100, C10, VIT = "cct-7-3x1-cifar100", "cct-7-3x1-cifar10", "vit-b16-imagenet1k"


def write(path: Path, **options) -> Path:
    path.write_text(yaml.safe_dump(options))
    return path


def parse(*arguments):
    return parse_options(["--use_cpu", *map(str, arguments)])


# The packaged recipes.


def resolve_by_hand(name: str) -> dict:
    """A packaged recipe by plain YAML and the rules of the README, without the package's code."""
    own = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    options = resolve_by_hand(own.pop("base")) if "base" in own else {}
    for key, value in own.items():
        if isinstance(value, dict) and key in options:
            options[key] = {**options[key], **value}
        elif value is None and key != "horizontal_tau":
            del options[key]
        else:
            options[key] = value
    return options


@pytest.mark.parametrize("name", list_recipes())
def test_load_recipe_packaged_equals_manual_resolution(name):
    assert load_recipe(name) == resolve_by_hand(name)


# Number of options, and some values, of the files before they had bases.
FROZEN = {
    "cct-2-3x2-cifar10-cpu": (40, {"vertical_layers": [1], "horizontal_rho_relative": 1.3, "learning_rate": 0.001}),
    f"{C10}-baseline": (44, {"label_column_name": "label", "learning_rate": 0.0005, "weight_decay": 0.05}),
    f"{C10}-htm": (51, {"horizontal_layers": [2], "horizontal_tau": 1.0, "horizontal_rho": 0.003}),
    f"{C10}-htm-vtm": (53, {"horizontal_layers": [2], "vertical_layers": [3], "horizontal_rho": 0.004}),
    f"{C10}-vtm": (47, {"vertical_layers": [1], "vertical_kappa": 5, "saliency_query": "mean"}),
    f"{C100}-baseline": (44, {"label_column_name": "fine_label", "learning_rate": 0.0006, "mixup_prob": 1.0}),
    f"{C100}-baseline-no-input-mixing": (42, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "random_erasing": 0.25}),
    f"{C100}-htm-300": (51, {"horizontal_layers": [2], "horizontal_tau": 2.0, "num_train_epochs": 310}),
    f"{C100}-htm-all-easy": (51, {"horizontal_tau": None, "horizontal_rho": 0.005, "num_train_epochs": 1510}),
    f"{C100}-htm-no-input-mixing": (49, {"horizontal_tau": 2.0, "cutmix_alpha": 0.0, "hflip": 0.5}),
    f"{C100}-htm-random-tokens": (52, {"token_selection": "random", "scorenet_detach": False}),
    f"{C100}-htm-vtm-300": (53, {"horizontal_layers": [3], "vertical_layers": [2], "num_train_epochs": 310}),
    f"{C100}-manifold-no-input-mixing": (44, {"manifold_mixup_layers": [0, 1, 2], "mixup_alpha": 0.0}),
    f"{C100}-vtm": (47, {"vertical_layers": [2], "vertical_kappa": 80, "warmup_steps": 3900}),
    "dinov2-s14-cifar100": (40, {"layer_decay": 0.75, "config_overrides": {"drop_path_rate": 0.1}}),
    "dinov3-s16-cifar100": (39, {"layer_decay": 0.75, "config_overrides": {"model_args": {"drop_path_rate": 0.1}}}),
    "siglip2-b16-cifar100": (39, {"layer_decay": 0.65, "learning_rate": 0.00005, "gradient_accumulation_steps": 2}),
    "digits-quickstart": (30, {"dataset_name": "digits", "hflip": 0.0, "save_strategy": "no"}),
    f"{VIT}-baseline": (32, {"per_device_train_batch_size": 504, "optim_args": "momentum=0.9"}),
    f"{VIT}-htm": (38, {"per_device_train_batch_size": 504, "horizontal_layers": [3], "scorenet_detach": True}),
    f"{VIT}-htm-vtm": (40, {"per_device_train_batch_size": 126, "horizontal_layers": [3], "vertical_layers": [4]}),
    f"{VIT}-vtm": (34, {"per_device_train_batch_size": 126, "vertical_layers": [3], "color_jitter": 0.4}),
}


@pytest.mark.parametrize("name", FROZEN)
def test_load_recipe_packaged_equals_complete_file(name):
    size, values = FROZEN[name]
    options = load_recipe(name)
    assert len(options) == size and options["output_dir"] == f"outputs/{name}" and options["seed"] == 42
    assert {key: options[key] for key in values} == values


def test_load_recipe_cifar_baselines_share_network_and_differ_in_schedule():
    first, second = load_recipe(f"{C10}-baseline"), load_recipe(f"{C100}-htm-vtm-300")
    network = {"image_size": 32, "hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 4}
    network |= {"intermediate_size": 512, "tokenizer": "convolution", "num_conv_layers": 1, "conv_kernel_size": 3}
    network |= {"pooling": "sequence", "position_embedding": "learned", "attention_probs_dropout_prob": 0.1}
    network |= {"hidden_dropout_prob": 0.0, "drop_path_rate": 0.1}
    assert first["config_overrides"] == second["config_overrides"] == network
    assert first["lr_scheduler_kwargs"] == {"min_lr": 1e-5, "warmup_lr_rate": 0.02}
    assert second["lr_scheduler_kwargs"] == {"min_lr": 1e-5, "warmup_lr_rate": 0.0016667}


# Model type of the pretrained model of a recipe, and what its configuration has besides the defaults.
PRETRAINED = {
    "google/vit-base-patch16-224": ("vit", {}),
    "facebook/dinov2-small": ("dinov2", {"hidden_size": 384, "num_attention_heads": 6, "patch_size": 14}),
    "google/siglip2-base-patch16-224": ("siglip", {}),
    "outputs/vit-cifar100-pretraining-cpu": ("vit", load_recipe("vit-cifar100-pretraining-cpu")["config_overrides"]),
    "timm/vit_small_patch16_dinov3.lvd1689m": ("timm_wrapper", {"architecture": "vit_small_patch16_dinov3"}),
}


@pytest.mark.parametrize("name", list_recipes())
def test_packaged_recipe_parses_and_fits_model(name):
    options = parse("--recipe", name)
    training, settings = options.training, options.tokenmixup
    assert training.do_train and training.do_eval and options.data.dataset_name and training.output_dir.endswith(name)
    model_type, attributes = options.model.model_type, {}
    if options.model.model_name_or_path:
        model_type, attributes = PRETRAINED[options.model.model_name_or_path]
    if model_type not in FAMILIES:
        pytest.skip(f"the family {model_type} is not supported yet")
    config_class, model_class = FAMILIES[model_type]
    required = getattr(model_class, "min_transformers_version", None)
    if required is not None and version.parse(transformers.__version__) < version.parse(required):
        pytest.skip(f"{model_type} needs transformers {required}")
    size = {"image_size": options.model.image_size[0]} if options.model.image_size else {}
    config = config_class(**attributes | size | options.model.parse_config_overrides(), **settings)
    resolved = load_recipe(name)
    for key, value in settings.items():
        assert getattr(config, key) == value == resolved[key]
    assert config.tokenmixup_enabled == ("baseline" not in name and "pretraining" not in name)


def test_transfer_recipes_have_disjoint_classes_that_cover_the_dataset():
    first, second = (load_recipe(f"vit-cifar100-{stage}-cpu") for stage in ("pretraining", "fine-tuning"))
    assert len(first["classes"]) == len(second["classes"]) == 50 and first["classes"][-1] < second["classes"][0]
    assert first["classes"] + second["classes"] == sorted({*first["classes"], *second["classes"]})
    # 10 % of the 500 images of each class.
    assert second["max_train_samples"] == 2500 and second["model_name_or_path"] == first["output_dir"]


@pytest.mark.parametrize("name", ["dinov2-s14-cifar100", "siglip2-b16-cifar100", "dinov3-s16-cifar100"])
def test_fine_tuning_recipe_has_relative_thresholds_and_states_no_result(name):
    options = parse("--recipe", name)
    training, settings = options.training, options.tokenmixup
    assert (settings["horizontal_layers"], settings["vertical_layers"]) == ([3], [4])
    assert settings["horizontal_rho_relative"] and settings["horizontal_tau_relative"]
    assert not {"horizontal_rho", "horizontal_tau"} & settings.keys()
    assert training.optim == "adamw_torch" and training.learning_rate <= 1e-4 and 0.6 < training.layer_decay < 0.8
    assert training.mixup_alpha == training.cutmix_alpha == 0
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 128
    header = re.match(r"(#.*\n)+", (RECIPES / f"{name}.yaml").read_text())
    assert header and "not measured" in header[0] and "Not in the paper" in header[0]


def test_vit_recipe_has_settings_of_paper():
    options = parse("--recipe", f"{VIT}-htm-vtm")
    settings, training = options.tokenmixup, options.training
    assert settings["horizontal_layers"] == [3] and settings["vertical_layers"] == [4]
    assert (settings["horizontal_tau"], settings["horizontal_rho"], settings["vertical_kappa"]) == (1.0, 0.01, 3)
    assert (training.optim, training.optim_args, training.learning_rate) == ("sgd", "momentum=0.9", 0.015)
    assert (training.lr_scheduler_type, training.max_grad_norm, training.weight_decay) == ("constant", 1.0, 0.0)
    assert (options.augmentation.color_jitter, options.augmentation.crop_scale) == (0.4, [0.08, 1.0])


@pytest.mark.parametrize(
    "recipe, horizontal, vertical, tau, rho, kappa, rate, decay, start",
    [
        ("cifar10-htm", [2], [], 1.0, 0.003, 3, 5e-4, 0.05, 1e-5),
        ("cifar10-vtm", [], [1], None, None, 5, 5e-4, 0.05, 1e-5),
        ("cifar10-htm-vtm", [2], [3], 1.0, 0.004, 3, 5e-4, 0.05, 1e-5),
        ("cifar100-htm", [2], [], 2.0, 0.005, 3, 6e-4, 0.06, 1e-6),
        ("cifar100-vtm", [], [2], None, None, 80, 6e-4, 0.06, 1e-6),
        ("cifar100-htm-vtm", [3], [2], 2.0, 0.005, 3, 6e-4, 0.06, 1e-6),
        ("cifar100-htm-vtm-300", [3], [2], 2.0, 0.005, 3, 6e-4, 0.06, 1e-6),
    ],
)
def test_cct_recipe_has_settings_of_paper(recipe, horizontal, vertical, tau, rho, kappa, rate, decay, start):
    options = parse("--recipe", f"cct-7-3x1-{recipe}")
    training, augmentation = options.training, options.augmentation
    config = TokenMixupCctConfig(**options.model.parse_config_overrides(), **options.tokenmixup)
    assert (config.horizontal_layers, config.vertical_layers) == (horizontal, vertical)
    assert (config.horizontal_tau, config.horizontal_rho, config.vertical_kappa) == (tau, rho, kappa)
    if horizontal:
        scorenet = (config.scorenet_pooling, config.scorenet_loss_weight, config.scorenet_detach)
        assert scorenet == ("attention", 1e-3, False)
    assert (training.learning_rate, training.weight_decay, training.seed) == (rate, decay, 42)
    assert training.lr_scheduler_kwargs["warmup_lr_rate"] * rate == pytest.approx(start, rel=1e-4)
    assert training.lr_scheduler_kwargs["min_lr"] == 1e-5
    assert training.num_train_epochs == (310 if recipe.endswith("300") else 1510)
    assert (training.mixup_alpha, training.cutmix_alpha, training.mixup_switch_prob) == (0.8, 1.0, 0.5)
    assert (augmentation.auto_augment, augmentation.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)


# Bases.


def test_load_recipe_base_chain_by_path_overrides_in_order(tmp_path):
    (tmp_path / "bases").mkdir()
    write(tmp_path / "bases" / "first.yaml", seed=1, hflip=0.5, config_overrides={"hidden_size": 8, "hidden_act": "x"})
    write(tmp_path / "bases" / "second.yaml", base="first.yaml", hflip=0.25, crop_scale=[0.5, 1.0])
    recipe = write(
        tmp_path / "mine.yaml", base="bases/second.yaml", crop_scale=[0.75, 1.0], config_overrides={"hidden_act": "y"}
    )
    assert load_recipe(recipe) == {
        "seed": 1,
        "hflip": 0.25,
        "config_overrides": {"hidden_size": 8, "hidden_act": "y"},
        "crop_scale": [0.75, 1.0],
    }
    options = parse("--recipe", recipe, "--hflip", 0, "--config_overrides", '{"hidden_size": 16}')
    assert (options.training.seed, options.augmentation.hflip) == (1, 0.0)
    assert options.model.parse_config_overrides() == {"hidden_size": 16, "hidden_act": "y"}


def test_load_recipe_base_by_packaged_name_is_found_from_any_folder(tmp_path):
    recipe = write(tmp_path / "mine.yaml", base="digits-quickstart", seed=7)
    assert load_recipe(recipe) == load_recipe("digits-quickstart") | {"seed": 7}


def test_load_recipe_null_removes_base_value_except_tau(tmp_path):
    write(tmp_path / "base.yaml", hflip=0.5, seed=1, horizontal_tau=1.0)
    recipe = write(tmp_path / "mine.yaml", base="base.yaml", hflip=None, horizontal_tau=None)
    assert load_recipe(recipe) == {"seed": 1, "horizontal_tau": None}


def test_load_recipe_empty_json_object_replaces_base_object(tmp_path):
    write(tmp_path / "base.yaml", config_overrides={"hidden_size": 8})
    assert load_recipe(write(tmp_path / "mine.yaml", base="base.yaml", config_overrides={})) == {
        "config_overrides": {}
    }


def test_load_recipe_deepspeed_and_other_scheduler_arguments_are_replaced(tmp_path):
    base = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1}, "deepspeed": {"a": 1}}
    write(tmp_path / "base.yaml", **base)
    changes = {"lr_scheduler_kwargs": {"min_lr": 0.1}, "deepspeed": {"b": 2}}
    same = load_recipe(write(tmp_path / "same.yaml", base="base.yaml", **changes))
    assert same["lr_scheduler_kwargs"] == {"num_cycles": 1, "min_lr": 0.1} and same["deepspeed"] == {"b": 2}
    other = write(tmp_path / "other.yaml", base="base.yaml", lr_scheduler_type="cosine_with_min_lr", **changes)
    assert load_recipe(other)["lr_scheduler_kwargs"] == {"min_lr": 0.1}


def one_line_error(*arguments) -> str:
    with pytest.raises(ValueError) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_load_recipe_base_cycle_raises_with_files_in_order(tmp_path):
    write(tmp_path / "a.yaml", base="b.yaml")
    write(tmp_path / "b.yaml", base="c.yaml")
    write(tmp_path / "c.yaml", base="./b.yaml")
    message = one_line_error("--recipe", tmp_path / "a.yaml")
    assert f"Recipe {tmp_path / 'a.yaml'} " in message and "a.yaml -> b.yaml -> c.yaml -> b.yaml" in message
    own = write(tmp_path / "own.yaml", base="own.yaml")
    assert "own.yaml -> own.yaml" in one_line_error("--recipe", own)


def test_load_recipe_unknown_base_raises_with_nearest_name(tmp_path):
    message = one_line_error("--recipe", write(tmp_path / "mine.yaml", base="digits-quikstart"))
    assert f"Recipe {tmp_path / 'mine.yaml'} has the base 'digits-quikstart'" in message
    assert "did you mean digits-quickstart?" in message and f"relative to {tmp_path}" in message


@pytest.mark.parametrize("base", [3, ["a"], ""])
def test_load_recipe_base_without_name_raises(tmp_path, base):
    message = one_line_error("--recipe", write(tmp_path / "mine.yaml", base=base))
    assert f"base must be a recipe's name or path, got {base!r}" in message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: [1\n", "is not valid YAML"),
        ("- a\n", "must be a mapping of options to values, got list"),
        ("? [a]\n: 1\n", "is not valid YAML"),
        ("learning_rat: 1\n", "did you mean learning_rate?"),
        ("learning_rat: null\n", "did you mean learning_rate?"),
        ("bas: digits-quickstart\n", "did you mean base?"),
        ("seed: x\n", "seed must be an integer, got 'x'"),
        ("base: none-such\n", "has the base 'none-such', which does not exist."),
    ],
)
def test_load_recipe_error_in_base_names_base_file(tmp_path, text, expected):
    (tmp_path / "broken.yaml").write_text(text)
    message = one_line_error("--recipe", write(tmp_path / "mine.yaml", base="broken.yaml", seed=1))
    assert f"Recipe {tmp_path / 'broken.yaml'}" in message and expected in message


def test_recipe_unusable_base_value_raises_with_recipe_name(tmp_path):
    write(tmp_path / "base.yaml", mixup_prob=2.0)
    recipe = write(tmp_path / "mine.yaml", base="base.yaml", seed=1)
    message = one_line_error("--recipe", recipe)
    assert f"The recipe {recipe} sets `mixup_prob: 2.0`; `--mixup_prob VALUE` on the command line" in message


# --print_recipe.


@pytest.mark.parametrize("name", list_recipes())
def test_print_recipe_packaged_round_trips(tmp_path, name):
    path = tmp_path / "printed.yaml"
    path.write_text(format_recipe(name))
    assert "base" not in yaml.safe_load(path.read_text())
    assert load_recipe(path) == load_recipe(name) and list(load_recipe(path)) == list(load_recipe(name))


def test_print_recipe_with_flags_equals_recipe_with_flags(tmp_path):
    flags = ["--learning-rate=1e-5", "--vertical_layers", "1,2", "--horizontal_tau", "none", "--eval_strategy", "no"]
    flags += ["--config_overrides", '{"hidden_size": 8}', "--accelerator_config", '{"even_batches": false}']
    flags += ["--bf16", "false", "--gradient_checkpointing", "--optim_args", "1e-5"]
    path = tmp_path / "printed.yaml"
    path.write_text(format_recipe(f"{C100}-htm", flags))
    printed, given = parse("--recipe", path), parse("--recipe", f"{C100}-htm", *flags)
    assert printed.tokenmixup == given.tokenmixup and given.tokenmixup["horizontal_tau"] is None
    assert (printed.data, printed.augmentation, printed.lora) == (given.data, given.augmentation, given.lora)
    assert printed.model.parse_config_overrides() == given.model.parse_config_overrides()
    assert printed.training.to_dict() == given.training.to_dict() and printed.training.optim_args == "1e-5"


def test_print_recipe_starts_no_run(capsys, monkeypatch):
    monkeypatch.setattr(finetune, "build_trainer", lambda arguments: pytest.fail("prepared a run"))
    finetune.main(["--seed", "5", "--print_recipe", "digits-quickstart"])
    assert yaml.safe_load(capsys.readouterr().out) == load_recipe("digits-quickstart") | {"seed": 5}
    monkeypatch.setattr("sys.argv", ["finetune.py", "--print-recipe=digits-quickstart"])
    assert finetune.entry_point() is None
    assert yaml.safe_load(capsys.readouterr().out) == load_recipe("digits-quickstart")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--print_recipe", "digits-quikstart"], "did you mean digits-quickstart?"),
        (["--print_recipe", "digits-quickstart", "--sed", "1"], "There is no option --sed: did you mean --seed?"),
        (["--print_recipe", "digits-quickstart", "--seed", "x"], "invalid int value: 'x'"),
        (["--print_recipe", "digits-quickstart", "--recipe", "x"], "cannot be used together. Remove --recipe."),
        (["--print_recipe"], "expected one argument"),
    ],
)
def test_print_recipe_with_mistake_raises(arguments, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        finetune.main(arguments)


def test_parse_options_with_print_recipe_raises():
    with pytest.raises(ValueError, match="--print_recipe is an option of finetune.py alone"):
        parse("--print_recipe", "digits-quickstart")


# Reading and merging with the command line.


def test_dump_recipe_strings_like_numbers_are_quoted(tmp_path):
    options = {"optim_args": "1e-5", "save_strategy": "no", "learning_rate": 1e-5, "horizontal_tau": None}
    path = tmp_path / "mine.yaml"
    path.write_text(dump_recipe(options))
    assert load_recipe(path) == options


def test_load_recipe_numbers_with_exponent_are_floats(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1e-3\nconfig_overrides: {layer_norm_eps: 1e-6, hidden_act: e1}\n")
    options = parse("--recipe", path)
    assert options.model.parse_config_overrides() == {"layer_norm_eps": 1e-6, "hidden_act": "e1"}
    assert options.training.learning_rate == 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"horizontal_layer": [1]},
            "has the key 'horizontal_layer', which is not an option: did you mean horizontal_layers?",
        ),
        ({"learning_rat": 1}, "did you mean learning_rate?"),
        ({"zzzz": 1}, "which is not an option."),
        ({"recipe": "digits-quickstart"}, "has the key 'recipe'"),
        ({"print_recipe": "digits-quickstart"}, "has the key 'print_recipe'"),
    ],
)
def test_recipe_with_unknown_key_raises(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse("--recipe", write(tmp_path / "mine.yaml", **options))


def test_recipe_missing_or_no_mapping_raises(tmp_path):
    with pytest.raises(ValueError, match="no recipe 'digits-quikstart': did you mean digits-quickstart"):
        parse("--recipe", "digits-quikstart")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must be a mapping of options to values, got list"):
        parse("--recipe", tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        parse("--recipe", tmp_path / "broken.yaml")


def test_recipe_null_equals_missing_value(tmp_path):
    options = parse("--recipe", write(tmp_path / "mine.yaml", eval_split=None, color_jitter=None))
    assert options.data.eval_split is None and options.augmentation.color_jitter is None


def test_recipe_flags_before_and_after_override_values(tmp_path):
    options = {"learning_rate": 0.5, "horizontal_layers": [1, 2], "horizontal_tau": None, "crop_scale": [0.5, 1.0]}
    recipe = write(tmp_path / "mine.yaml", **options)
    options = parse("--learning_rate", 0.25, "--recipe", recipe, "--hflip", 0)
    assert options.training.learning_rate == 0.25 and options.training.use_cpu
    assert options.tokenmixup == {"horizontal_layers": [1, 2], "horizontal_tau": None}
    assert options.augmentation.crop_scale == [0.5, 1.0] and options.augmentation.hflip == 0.0


OBJECTS = {
    "config_overrides": {"hidden_size": 96, "num_hidden_layers": 4},
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 0.125},
    "accelerator_config": {"non_blocking": True},
}


@pytest.mark.parametrize("form", ["{name} {value}", "{name}={value}", "{hyphens} {value}"])
def test_recipe_json_flag_is_merged_by_key(tmp_path, form):
    changes = {
        "config_overrides": '{"num_hidden_layers": 3, "hidden_act": "relu"}',
        "lr_scheduler_kwargs": '{"num_cycles": 2}',
        "accelerator_config": '{"even_batches": false}',
    }
    words = []
    for name, value in changes.items():
        text = form.format(name=f"--{name}", hyphens=f"--{name.replace('_', '-')}", value=value)
        words += [text] if "=" in form else text.split(" ", 1)
    options = parse(*words, "--recipe", write(tmp_path / "mine.yaml", **OBJECTS))
    assert options.model.parse_config_overrides() == {"hidden_size": 96, "num_hidden_layers": 3, "hidden_act": "relu"}
    assert options.training.lr_scheduler_kwargs == {"min_lr": 0.125, "num_cycles": 2}
    assert options.training.accelerator_config.non_blocking is True
    assert options.training.accelerator_config.even_batches is False


def test_recipe_empty_json_flag_replaces_recipe_object(tmp_path):
    options = parse("--recipe", write(tmp_path / "mine.yaml", **OBJECTS), "--config_overrides", "{}")
    assert options.model.parse_config_overrides() == {} and options.training.lr_scheduler_kwargs == {"min_lr": 0.125}


def test_recipe_arguments_of_other_scheduler_are_not_merged(tmp_path):
    recipe, kwargs = write(tmp_path / "mine.yaml", **OBJECTS), '{"num_cycles": 1}'
    same = parse("--recipe", recipe, "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", kwargs)
    other = parse("--recipe", recipe, "--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", kwargs)
    assert same.training.lr_scheduler_kwargs == {"min_lr": 0.125, "num_cycles": 1}
    assert other.training.lr_scheduler_kwargs == {"num_cycles": 1}


def test_expand_recipe_puts_recipe_before_command_line(tmp_path):
    recipe = write(tmp_path / "mine.yaml", seed=1, config_overrides={"hidden_size": 8})
    words = expand_recipe(["--seed", "2", "--recipe", str(recipe), "--hflip", "0"], build_parser())
    objects = ["--config_overrides", json.dumps({"hidden_size": 8})]
    assert words == ["--recipe", str(recipe), *objects, "--seed", "1", "--seed", "2", "--hflip", "0"]
