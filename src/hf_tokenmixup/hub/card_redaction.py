"""Removal of secrets and local paths from model cards and uploaded JSON files."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..utils.environment import public_paths
from ..utils.redaction import remove_secrets

_PATH_KEYS = {"_name_or_path", "name_or_path", "best_model_checkpoint"}


def as_hub_repo_id(name: str | None) -> str | None:
    """Return a name of the form `owner/name` that is valid on the Hub. None for a folder or any other name."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def redact_json(path: Path) -> bytes | None:
    """Remove local paths from a `.json` or `.jsonl` file. The file on disk does not change.

    A value that only looks like a path, such as the class name `/m/01yrx`, stays.

    Args:
        path: The file.

    Returns:
        The new content. None if nothing changes, or if the file is of another kind or not valid JSON.
    """
    if path.suffix not in (".json", ".jsonl"):
        return None
    try:
        text = path.read_text(encoding="utf-8")
        lines = [text] if path.suffix == ".json" else text.splitlines()
        contents = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return None
    redacted = [_remove_local_paths(content) for content in contents]
    if redacted == contents:
        return None
    if path.suffix == ".jsonl":
        return "".join(json.dumps(content) + "\n" for content in redacted).encode()
    return (json.dumps(redacted[0], indent=2, ensure_ascii=False) + "\n").encode()


def _remove_local_paths(content: Any, key: str = "") -> Any:
    if isinstance(content, dict):
        return {name: _remove_local_paths(value, name) for name, value in content.items()}
    if isinstance(content, list):
        return [_remove_local_paths(value) for value in content]
    if not isinstance(content, str):
        return content
    path = Path(content)
    if key == "base_model_name_or_path":
        # peft would look up a folder name on the Hub.
        return "" if path.is_absolute() or path.exists() else content
    local_folders = (Path.home(), Path.cwd())
    is_local = path.is_absolute() and (
        key in _PATH_KEYS or path.exists() or any(map(path.is_relative_to, local_folders))
    )
    return path.name if is_local and path.name else content


def redact_text(text: str) -> str:
    """Remove secrets from a text such as a command, and shorten local paths to their last part."""
    return public_paths(remove_secrets(text).strip())


def redact_value(value: Any) -> str:
    """Format the value of a setting without secrets and local paths."""
    return redact_text(value if isinstance(value, str) else json.dumps(value, default=str))
