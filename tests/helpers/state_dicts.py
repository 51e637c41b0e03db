"""Copies and exact comparisons of state dicts."""

from collections.abc import Mapping

import torch
from torch import Tensor


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors, so that later updates in place do not change them."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that the names are the same and that the tensors are equal bit for bit."""
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
