"""Which routes to adapters the installed versions of transformers and peft take together."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def skip_without_add_adapter() -> None:
    """Skip a test that needs transformers' own `add_adapter`, where the installed peft is too old for it."""
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(version("peft")) < Version(MIN_PEFT_VERSION):
        pytest.skip(
            f"add_adapter of transformers {version('transformers')} needs peft {MIN_PEFT_VERSION} or newer, and "
            f"{version('peft')} is installed"
        )
