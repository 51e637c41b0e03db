"""Skip tests that the installed version of peft does not support."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def skip_without_add_adapter() -> None:
    """Skip a test of `add_adapter` of transformers if the installed version of peft is too old."""
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(version("peft")) < Version(MIN_PEFT_VERSION):
        pytest.skip(
            f"add_adapter of transformers {version('transformers')} needs peft {MIN_PEFT_VERSION} or newer, and "
            f"{version('peft')} is installed"
        )
