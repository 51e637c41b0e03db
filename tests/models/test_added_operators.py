"""Number of operators that TokenMixup adds to a training step: its cost where kernel launches are the limit."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
}
# Operators that launch no kernel.
FREE = ("detach", "_unsafe_view", "empty", "scalar_tensor")
# Before the metrics were stacked and small operators merged, the limits were 106, 66 and 186.
LIMITS = {
    "htm": ({"horizontal_layers": [3]}, 68, 16),
    "vtm": ({"vertical_layers": [3]}, 49, 18),
    "both": ({"horizontal_layers": [3], "vertical_layers": [4]}, 120, 36),
}


class CountOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or func._opname in FREE):
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def count_operators(model):
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    with CountOperators() as forward:
        loss = model.train()(pixel_values=images, labels=labels).loss
    with CountOperators() as backward:
        loss.backward()
    return forward.counts.total(), backward.counts.total()


@pytest.mark.parametrize("mixing", LIMITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_step_adds_few_operators(family, mixing):
    settings, max_forward, max_backward = LIMITS[mixing]
    plain = count_operators(FAMILIES[family]())
    mixed = count_operators(FAMILIES[family](**settings))
    added = [count - base for count, base in zip(mixed, plain, strict=True)]
    assert added[0] <= max_forward and added[1] <= max_backward, added
