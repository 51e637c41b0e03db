"""Settings of TokenMixup: validation and saving."""

import json

import pytest
from transformers import AutoConfig, ViTConfig

from hf_tokenmixup.models import TokenMixupViTConfig, TokenMixupViTForImageClassification

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
        ({"scorenet_loss_weight": -1}, "scorenet_loss_weight must be a finite number of at least 0, got -1"),
        ({"vertical_kappa": -1}, r"vertical_kappa must be an integer between 0 and 16 \(the number of patch tokens\)"),
        ({"vertical_kappa": 17}, "got 17"),
        ({"vertical_kappa": 1.5}, "got 1.5"),
        ({"rollout_steps": 2, "horizontal_layers": [2]}, "rollout_steps must be an integer between 0 and 1"),
        ({"rollout_steps": -1}, "rollout_steps"),
        ({"scorenet_pooling": "max"}, "scorenet_pooling must be one of 'cls', 'mean', 'attention', got 'max'"),
        ({"saliency_query": "all"}, "saliency_query must be one of 'cls', 'mean', got 'all'"),
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
    @property
    def num_prefix_tokens(self):
        return 0


def test_config_cls_choice_without_cls_token_raises():
    with pytest.raises(ValueError, match="scorenet_pooling='cls' needs a CLS token.*'attention' or 'mean'"):
        WithoutCls(**SIZE)
    with pytest.raises(ValueError, match="saliency_query='cls' needs a CLS token.*'mean'"):
        WithoutCls(**SIZE, scorenet_pooling="mean")
    WithoutCls(**SIZE, scorenet_pooling="attention", saliency_query="mean")


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
