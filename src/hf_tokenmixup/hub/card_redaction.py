"""Keeps what belongs to one machine or one person out of a card: folders of a disk, tokens."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..utils.environment import public_paths
from ..utils.redaction import remove_secrets

_PATH_KEYS = {"_name_or_path", "name_or_path", "best_model_checkpoint"}


def as_hub_repo_id(name: str | None) -> str | None:
    """The name if it is one of the Hub's, `owner/name`; None for a folder and for anything else."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def redact_json(path: Path) -> bytes | None:
    """A JSON file without folders of this machine; None if it names none, or is another kind of file.

    A text that only looks like a path, such as the class `/m/01yrx`, stays.
    """
    if path.suffix not in (".json", ".jsonl"):
        return None
    try:
        text = path.read_text(encoding="utf-8")
        lines = [text] if path.suffix == ".json" else text.splitlines()
        contents = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return None
    public = [_without_folders(content) for content in contents]
    if public == contents:
        return None
    if path.suffix == ".jsonl":
        return "".join(json.dumps(content) + "\n" for content in public).encode()
    return (json.dumps(public[0], indent=2, ensure_ascii=False) + "\n").encode()


def _without_folders(content: Any, key: str = "") -> Any:
    if isinstance(content, dict):
        return {name: _without_folders(value, name) for name, value in content.items()}
    if isinstance(content, list):
        return [_without_folders(value) for value in content]
    if not isinstance(content, str):
        return content
    path = Path(content)
    if key == "base_model_name_or_path":
        # A name would be looked up on the Hub.
        return "" if path.is_absolute() or path.exists() else content
    places = (Path.home(), Path.cwd())
    local = path.is_absolute() and (key in _PATH_KEYS or path.exists() or any(map(path.is_relative_to, places)))
    return path.name if local and path.name else content


def redact_text(text: str) -> str:
    """A text, a command say, without secrets, and with the last part alone of paths into one machine's folders."""
    return public_paths(remove_secrets(text).strip())


def redact_value(value: Any) -> str:
    """A setting's value as others may read it."""
    return redact_text(value if isinstance(value, str) else json.dumps(value, default=str))
