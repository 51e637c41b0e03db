"""Settings: validated when built, kept when saved."""

import json

import pytest
from transformers import AutoConfig, ViTConfig

from hf_tokenmixup.models import TokenMixupViTConfig, TokenMixupViTForImageClassification

SIZE = {"num_hidden_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"horizontal_layers": [4]}, r"horizontal_layers must lie between 0 and 3, got \[4\]"),
        ({"horizontal_layers": [-1]}, r"horizontal_layers must lie between 0 and 3, got \[-1\]"),
        ({"horizontal_layers": [1, 1]}, r"horizontal_layers must name each layer once, got \[1, 1\]"),
        ({"horizontal_layers": 2}, "horizontal_layers must be a list of layer numbers, got 2"),
        ({"horizontal_layers": ["2"]}, "horizontal_layers must be a list of layer numbers"),
        ({"horizontal_layers": [True]}, "horizontal_layers must be a list of layer numbers"),
        (
            {"vertical_layers": [0]},
            r"vertical_layers must lie between 1 and 3, as nothing lies before layer 0, got \[0\]",
        ),
        ({"vertical_layers": [2, 5]}, r"vertical_layers must lie between 1 and 3, got \[2, 5\]"),
        ({"horizontal_rho": -0.1}, "horizontal_rho must be a finite number of at least 0; got -0.1"),
        ({"horizontal_rho": float("inf")}, "horizontal_rho must be a finite number"),
        ({"horizontal_tau": float("nan")}, "horizontal_tau must be a finite number of at least 0; None makes"),
        ({"horizontal_tau": "1.0"}, "horizontal_tau must be a finite number"),
        ({"scorenet_loss_weight": -1}, "scorenet_loss_weight must be a finite number of at least 0; got -1"),
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
            "rollout_steps belong to saliency_detector='attention'; got 1 of them and 'random'",
        ),
        ({"assignment_group_size": 1}, "assignment_group_size must be an integer of at least 2, or None; got 1"),
        ({"assignment_group_size": 8, "assignment": "random"}, "assignment_group_size is for assignment='optimal'"),
        ({"manifold_mixup_layers": [4]}, r"manifold_mixup_layers must lie between 0 and 3, got \[4\]"),
        (
            {"manifold_mixup_alpha": 0},
            r"manifold_mixup_alpha must be above 0; manifold_mixup_layers=\[\] turns it off",
        ),
        ({"scorenet_detach": 1}, "scorenet_detach must be True or False, got 1"),
    ],
)
def test_invalid_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TokenMixupViTConfig(**SIZE, **settings)
    # Settings handed to from_pretrained reach the configuration after it was built: the model checks again.
    TokenMixupViTForImageClassification(TokenMixupViTConfig(**SIZE, intermediate_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        TokenMixupViTForImageClassification.from_pretrained(tmp_path, **settings)


class WithoutCls(TokenMixupViTConfig):
    @property
    def num_prefix_tokens(self):
        return 0


def test_choices_that_need_a_cls_token_are_refused_without_one():
    with pytest.raises(ValueError, match="scorenet_pooling='cls' needs a CLS token.*'attention' or 'mean'"):
        WithoutCls(**SIZE)
    with pytest.raises(ValueError, match="saliency_query='cls' needs a CLS token.*'mean'"):
        WithoutCls(**SIZE, scorenet_pooling="mean")
    WithoutCls(**SIZE, scorenet_pooling="attention", saliency_query="mean")


def test_settings_survive_saving_and_leave_a_plain_vit_config(tmp_path):
    settings = {"horizontal_layers": [1, 2], "horizontal_tau": None, "vertical_layers": [3], "relabel": "count"}
    config = TokenMixupViTConfig(**SIZE, **settings, horizontal_rho=0.0)
    config.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = TokenMixupViTConfig.from_pretrained(tmp_path, horizontal_tau=1.5)
    assert again.horizontal_tau == 1.5 and again.horizontal_rho == 0.0
    assert again.to_dict() == {
        **config.to_dict(),
        "horizontal_tau": 1.5,
        "transformers_version": again.to_dict()["transformers_version"],
    }
    plain = AutoConfig.from_pretrained(tmp_path)
    assert type(plain) is ViTConfig and plain.num_hidden_layers == 4


def test_lists_are_not_shared_between_configurations():
    first, second = TokenMixupViTConfig(), TokenMixupViTConfig()
    first.horizontal_layers.append(1)
    assert second.horizontal_layers == [] and not second.tokenmixup_enabled


def test_a_plain_configuration_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="TokenMixupViTConfig.from_dict"):
        TokenMixupViTForImageClassification(ViTConfig(**SIZE))
