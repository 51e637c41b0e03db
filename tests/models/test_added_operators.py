"""Number of operators that TokenMixup adds to a training step: its cost where kernel launches are the limit."""

import pytest
import torch

from hf_tokenmixup.benchmarks.operators import CountOperators
from hf_tokenmixup.models import (
    TokenMixupCctConfig,
    TokenMixupCctForImageClassification,
    TokenMixupViTConfig,
    TokenMixupViTForImageClassification,
)

SIZE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 5, "image_size": 32}
FAMILIES = {
    "vit": lambda **settings: TokenMixupViTForImageClassification(
        TokenMixupViTConfig(**SIZE, patch_size=8, num_hidden_layers=12, **settings)
    ),
    "cct": lambda **settings: TokenMixupCctForImageClassification(TokenMixupCctConfig(**SIZE, **settings)),
    "cct without dropout": lambda **settings: FAMILIES["cct"](attention_probs_dropout_prob=0.0, **settings),
}
HTM, VTM = {"horizontal_layers": [3]}, {"vertical_layers": [3]}
BOTH = {"horizontal_layers": [3], "vertical_layers": [4]}
LIMITS = {
    ("vit", "htm"): (HTM, 44, 8),
    ("vit", "vtm"): (VTM, 38, 10),
    ("vit", "both"): (BOTH, 85, 19),
    ("cct", "htm"): (HTM, 47, 13),
    ("cct", "vtm"): (VTM, 20, 10),
    ("cct", "both"): (BOTH, 64, 23),
    # On a CPU, `sdpa` computes the maps that saliency can be read from only with dropout.
    ("cct without dropout", "htm"): (HTM, 47, 13),
    ("cct without dropout", "vtm"): (VTM, 35, 13),
    ("cct without dropout", "both"): (BOTH, 84, 27),
}


def operators_of_step(model):
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4) % 5
    with CountOperators() as forward:
        loss = model.train()(pixel_values=images, labels=labels).loss
    with CountOperators() as backward:
        loss.backward()
    return forward.counts.total(), backward.counts.total()


@pytest.mark.parametrize("family, mixing", LIMITS)
def test_training_step_adds_few_operators(family, mixing):
    settings, max_forward, max_backward = LIMITS[family, mixing]
    plain = operators_of_step(FAMILIES[family]())
    mixed = operators_of_step(FAMILIES[family](**settings))
    added = [count - base for count, base in zip(mixed, plain, strict=True)]
    assert added[0] <= max_forward and added[1] <= max_backward, added
