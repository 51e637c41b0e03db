"""Examples in the docstrings of public functions."""

import doctest
import importlib

import pytest
import torch


@pytest.mark.parametrize(
    "module",
    [
        "hf_tokenmixup.functional",
        "hf_tokenmixup.metrics",
        "hf_tokenmixup.models.in_place",
        "hf_tokenmixup.models.modeling_tokenmixup",
    ],
)
def test_docstring_examples_pass(module):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
