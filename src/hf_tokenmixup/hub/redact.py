"""Keeps what belongs to one machine or one person out of a card: folders of a disk, tokens."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..analysis.environment import public_paths
from ..analysis.redaction import without_secrets


def hub_name(name: str | None) -> str | None:
    """The name if it is one of the Hub's, `owner/name`; None for a folder and for anything else."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def public_text(text: str) -> str:
    """A text, a command say, without secrets, and with the last part alone of paths into one machine's folders."""
    return public_paths(without_secrets(text).strip())


def public_value(value: Any) -> str:
    """A setting's value as others may read it."""
    return public_text(value if isinstance(value, str) else json.dumps(value, default=str))
