"""Fixtures for tests of datasets."""

import os

import pytest

from hf_tokenmixup.data import load_image_dataset


@pytest.fixture
def load(tmp_path):
    """`load_image_dataset` with a cache of its own, without an evaluation split unless there is a folder for it."""

    def load(**options):
        options = {"cache_dir": str(tmp_path / "cache"), "do_eval": "validation_dir" in options} | options
        return load_image_dataset(**{name: str(v) if isinstance(v, os.PathLike) else v for name, v in options.items()})

    return load
