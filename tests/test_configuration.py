"""Settings of TokenMixup: validation and saving."""

import json

import pytest
import torch
from transformers import AutoConfig, ViTConfig

from hf_tokenmixup.models import TokenMixupCctConfig, TokenMixupViTConfig, TokenMixupViTForImageClassification

SIZE = {"num_hidden_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"horizontal_layers": [4]}, r"horizontal_layers must be between 0 and 3, got \[4\]"),
        ({"horizontal_layers": [-1]}, r"horizontal_layers must be between 0 and 3, got \[-1\]"),
        ({"horizontal_layers": [1, 1]}, r"horizontal_layers must name each layer once, got \[1, 1\]"),
        ({"horizontal_layers": 2}, "horizontal_layers must be a list of layer indices, got 2"),
        ({"horizontal_layers": ["2"]}, "horizontal_layers must be a list of layer indices"),
        ({"horizontal_layers": [True]}, "horizontal_layers must be a list of layer indices"),
        (
            {"vertical_layers": [0]},
            r"vertical_layers must be between 1 and 3 \(there is no layer before layer 0\), got \[0\]",
        ),
        ({"vertical_layers": [2, 5]}, r"vertical_layers must be between 1 and 3, got \[2, 5\]"),
        ({"horizontal_rho": -0.1}, "horizontal_rho must be a finite number of at least 0, got -0.1"),
        ({"horizontal_rho": float("inf")}, "horizontal_rho must be a finite number"),
        (
            {"horizontal_tau": float("nan")},
            "horizontal_tau must be a finite number of at least 0 .None makes all",
        ),
        ({"horizontal_tau": "1.0"}, "horizontal_tau must be a finite number"),
        ({"horizontal_rho_relative": -1}, "horizontal_rho_relative must be a finite number of at least 0, got -1"),
        ({"horizontal_layers": [1], "horizontal_rho": 1.0}, "horizontal_rho must be below 1, got 1.0: .* no token"),
        (
            {"horizontal_layers": [1], "horizontal_rho_relative": 16},
            "horizontal_rho_relative must be below 16, the number of patch tokens, got 16: .* no token",
        ),
        ({"horizontal_layers": [1], "horizontal_tau": 0}, "horizontal_tau must be above 0, got 0: no image"),
        ({"horizontal_layers": [1], "horizontal_tau_relative": 0.0}, "horizontal_tau_relative must be above 0, got 0"),
        (
            {"horizontal_rho": 0.01, "horizontal_rho_relative": 1.5},
            "`horizontal_rho=0.01` and `horizontal_rho_relative=1.5` are two forms of one threshold",
        ),
        ({"horizontal_tau": 1.0, "horizontal_tau_relative": 0.5}, "two forms of one threshold. Remove one"),
        ({"horizontal_rho_relative": None}, "horizontal_rho or horizontal_rho_relative must be a number, got None"),
        ({"scorenet_loss_weight": -1}, "scorenet_loss_weight must be a finite number of at least 0, got -1"),
        ({"vertical_kappa": -1}, r"vertical_kappa must be an integer between 0 and 16 \(the number of patch tokens\)"),
        ({"vertical_kappa": 17}, "got 17"),
        ({"vertical_kappa": 1.5}, "got 1.5"),
        ({"rollout_steps": 2, "horizontal_layers": [2]}, "rollout_steps must be an integer between 0 and 1"),
        ({"rollout_steps": -1}, "rollout_steps"),
        ({"scorenet_pooling": "max"}, "scorenet_pooling must be one of 'auto', 'cls', 'mean', 'attention', got 'max'"),
        ({"saliency_query": "all"}, "saliency_query must be one of 'auto', 'cls', 'mean', got 'all'"),
        ({"saliency_route": "fast"}, "saliency_route must be one of 'auto', 'output_attentions', got 'fast'"),
        ({"assignment": "greedy"}, "assignment must be one of 'optimal', 'random', got 'greedy'"),
        ({"token_selection": "top"}, "token_selection must be one of"),
        ({"relabel": "none"}, "relabel must be one of"),
        ({"saliency_detector": "edges"}, "saliency_detector must be one of 'attention', 'gradient', 'random'"),
        (
            {"saliency_detector": "random", "horizontal_layers": [1], "rollout_steps": 1},
            "rollout_steps=1 requires saliency_detector='attention', got 'random'",
        ),
        ({"assignment_group_size": 1}, "assignment_group_size must be an integer of at least 2, or None, got 1"),
        (
            {"assignment_group_size": 8, "assignment": "random"},
            "assignment_group_size=8 requires assignment='optimal'",
        ),
        ({"manifold_mixup_layers": [4]}, r"manifold_mixup_layers must be between 0 and 3, got \[4\]"),
        (
            {"manifold_mixup_alpha": 0},
            r"manifold_mixup_alpha must be above 0 .manifold_mixup_layers=\[\] turns it off., got 0",
        ),
        ({"scorenet_detach": 1}, "scorenet_detach must be True or False, got 1"),
    ],
)
def test_config_invalid_setting_raises(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TokenMixupViTConfig(**SIZE, **settings)
    # from_pretrained sets attributes after the configuration is built, so the model validates again.
    TokenMixupViTForImageClassification(TokenMixupViTConfig(**SIZE, intermediate_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        TokenMixupViTForImageClassification.from_pretrained(tmp_path, **settings)


class WithoutCls(TokenMixupViTConfig):
    num_prefix_tokens = 0
    classifier_pooling = "mean"


def test_config_cls_choice_without_cls_token_raises():
    with pytest.raises(ValueError, match="scorenet_pooling='cls' needs a CLS token.*'attention' or 'mean'"):
        WithoutCls(**SIZE, scorenet_pooling="cls")
    with pytest.raises(ValueError, match="saliency_query='cls' needs a CLS token.*'mean'"):
        WithoutCls(**SIZE, saliency_query="cls")


@pytest.mark.parametrize(
    "config, query, pooling",
    [
        (TokenMixupViTConfig(**SIZE), "cls", "cls"),
        (WithoutCls(**SIZE), "mean", "mean"),
        (TokenMixupCctConfig(), "mean", "attention"),
        (TokenMixupCctConfig(pooling="cls"), "cls", "cls"),
        (TokenMixupViTConfig(**SIZE, saliency_query="mean", scorenet_pooling="attention"), "mean", "attention"),
    ],
)
def test_config_auto_follows_what_the_classifier_reads(config, query, pooling):
    assert (config.effective_saliency_query, config.effective_scorenet_pooling) == (query, pooling)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_effective_thresholds_are_multiples_of_uniform_attention_and_of_the_loss_of_a_guess(classes):
    config = TokenMixupViTConfig(**SIZE, num_labels=classes, horizontal_rho_relative=1.5, horizontal_tau_relative=0.5)
    assert config.effective_rho(16) == 1.5 / 16 and config.effective_rho(196) == 1.5 / 196
    guess = torch.nn.functional.cross_entropy(torch.zeros(1, classes), torch.zeros(1, dtype=torch.long)).item()
    assert config.effective_tau == pytest.approx(0.5 * guess)


def test_effective_thresholds_absolute_form_does_not_depend_on_tokens_or_classes():
    config = TokenMixupViTConfig(**SIZE, num_labels=7, horizontal_rho=0.01, horizontal_tau=1.0)
    assert config.effective_rho(16) == config.effective_rho(196) == 0.01 and config.effective_tau == 1.0


def test_config_one_form_of_a_threshold_replaces_the_other(tmp_path):
    """Whether it is given to the class, set as an attribute, or passed to `from_pretrained`."""
    default = TokenMixupViTConfig(**SIZE)
    assert default.horizontal_rho is None and default.horizontal_rho_relative > 0
    absolute = TokenMixupViTConfig(**SIZE, horizontal_rho=0.02, horizontal_tau=None)
    assert absolute.horizontal_rho_relative is None and absolute.effective_rho(16) == 0.02
    assert absolute.horizontal_tau_relative is None and absolute.effective_tau is None
    absolute.save_pretrained(tmp_path)
    loaded = TokenMixupViTConfig.from_pretrained(tmp_path, horizontal_rho_relative=2.0, horizontal_rho=None)
    assert loaded.horizontal_rho is None and loaded.effective_rho(16) == 2 / 16 and loaded.effective_tau is None
    loaded.horizontal_rho = 0.25
    assert loaded.horizontal_rho_relative is None
    loaded.horizontal_tau_relative = 0.5
    assert loaded.horizontal_tau is None and loaded.effective_tau > 0


@pytest.mark.parametrize("tau", [None, 1.25])
def test_config_saved_without_relative_forms_keeps_its_meaning(tau, tmp_path):
    """As configurations were saved before there were relative forms."""
    TokenMixupViTConfig(**SIZE, horizontal_rho=0.01, horizontal_tau=tau).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for name in ("horizontal_rho_relative", "horizontal_tau_relative"):
        del content[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = TokenMixupViTConfig.from_pretrained(tmp_path)
    assert config.effective_tau == tau and config.effective_rho(16) == 0.01


def test_config_save_and_load_keeps_settings_and_model_type(tmp_path):
    settings = {"horizontal_layers": [1, 2], "horizontal_tau": None, "vertical_layers": [3], "relabel": "count"}
    config = TokenMixupViTConfig(**SIZE, **settings, horizontal_rho=0.0)
    config.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    loaded = TokenMixupViTConfig.from_pretrained(tmp_path, horizontal_tau=1.5)
    assert loaded.horizontal_tau == 1.5 and loaded.horizontal_rho == 0.0
    assert loaded.to_dict() == {
        **config.to_dict(),
        "horizontal_tau": 1.5,
        "transformers_version": loaded.to_dict()["transformers_version"],
    }
    base = AutoConfig.from_pretrained(tmp_path)
    assert type(base) is ViTConfig and base.num_hidden_layers == 4


def test_config_layer_lists_are_not_shared():
    first, second = TokenMixupViTConfig(), TokenMixupViTConfig()
    first.horizontal_layers.append(1)
    assert second.horizontal_layers == [] and not second.tokenmixup_enabled


def test_model_with_base_config_raises_and_suggests_from_dict():
    with pytest.raises(ValueError, match="TokenMixupViTConfig.from_dict"):
        TokenMixupViTForImageClassification(ViTConfig(**SIZE))
