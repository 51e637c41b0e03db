"""Fixtures for the tests of all model families. Some test files have their own instead."""

import pytest
import torch
from helpers.families import CASES, TESTED, build_tiny


@pytest.fixture
def images():
    return torch.randn(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.fixture(params=TESTED)
def build(request):
    """Builds a small model of a family, in training mode, always from the same seed."""

    def build_model(**changes):
        return build_tiny(request.param, **changes)

    build_model.family, build_model.case = request.param, CASES[request.param]
    return build_model
