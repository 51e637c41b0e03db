"""Validate the metadata of model and dataset cards as the Hugging Face Hub does.

Validated, with the messages of the real Hub where they are known:

- The front matter is YAML, and a mapping.
- `license` is one or more of the documented identifiers.
- `language`, `tags`, `datasets`, `metrics` and `base_model` are strings or lists of strings.
- `base_model` and `datasets` look like repository ids. A local path is an error.
- `library_name`, `pipeline_tag` and `license_name` are strings.
- Each result of `model-index` has a task with a type, a dataset with a type and a name, and metrics with a type and a
  value.

Not validated: whether a repository, task, language, library or metric exists, the keys `dataset_info` and `configs` of
a dataset card, and unknown keys.
"""

import re
from collections.abc import Iterator

import yaml

LICENSES = (
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "lppl-1.3c", "ms-pl",
    "mpl-2.0", "odc-by", "odbl", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl",
    "lgpl-lr", "deepfloyd-if-license", "llama2", "gemma", "unknown", "other",
)  # fmt: skip

FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*[\r\n]+(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
REPO_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)


def as_list(value: object) -> list:
    """Return the values of a key whose value is missing, a single value or a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def read_card(text: str) -> dict:
    """Return the metadata of a card. The result is empty if there is none or if it is invalid YAML."""
    front_matter = FRONT_MATTER.search(text)
    try:
        data = yaml.safe_load(front_matter[1]) if front_matter else None
    except yaml.YAMLError:
        data = None
    return data if isinstance(data, dict) else {}


def validate_card(text: str) -> tuple[list[str], list[str]]:
    """Validate the text of a README.md.

    Returns:
        The errors and the warnings of the Hub.
    """
    front_matter = FRONT_MATTER.search(text.replace("\r\n", "\n"))
    try:
        data = yaml.safe_load(front_matter[1]) if front_matter else None
    except yaml.YAMLError as error:
        return [f"YAML metadata error: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["YAML metadata error: the metadata must be a mapping"], []
    return [*_validate_values(data), *_validate_model_index(data.get("model-index"))], []


def _validate_values(data: dict) -> Iterator[str]:
    for key in ("library_name", "pipeline_tag", "license_name"):
        if data.get(key) is not None and not isinstance(data[key], str):
            yield f'"{key}" must be a string'
    for key in ("license", "language", "tags", "datasets", "metrics", "base_model"):
        is_list = isinstance(data.get(key), list)
        for index, value in enumerate(as_list(data.get(key))):
            name = f'"{key}[{index}]"' if is_list else f'"{key}"'
            if not isinstance(value, str):
                yield f"{name} must be a string"
            elif not value:
                yield f"{name} is not allowed to be empty"
            elif key == "license" and value not in LICENSES:
                yield f"{name} must be one of [{', '.join(LICENSES)}]"
            elif key == "base_model" and not REPO_ID.fullmatch(value):
                yield f'{name} with value "{value}" is not valid. Use a model id from https://hf.co/models.'
            elif key == "datasets" and not REPO_ID.fullmatch(value):
                hint = "If possible, use a dataset id from https://hf.co/datasets."
                yield f'{name} with value "{value}" is not valid. {hint}'


def _validate_model_index(models: object) -> list[str]:
    errors: list[str] = []

    def list_items(name: str, values: object, min_length: int = 0) -> list[tuple[str, object]]:
        """Return the items of a list with their names. Anything else is an error."""
        if values is None:
            errors.append(f'"{name}" is required')
        elif not isinstance(values, list) or len(values) < min_length:
            errors.append(f'"{name}" must be an array of {min_length} or more')
        else:
            return [(f"{name}[{index}]", value) for index, value in enumerate(values)]
        return []

    def validate_keys(name: str, value: object, *keys: str) -> bool:
        """Require a mapping with these keys. Return whether it is a mapping."""
        if isinstance(value, dict):
            errors.extend(f'"{name}.{key}" is required' for key in keys if value.get(key) is None)
        elif value is None:
            errors.append(f'"{name}" is required')
        else:
            errors.append(f'"{name}" must be of type object')
        return isinstance(value, dict)

    for name, model in list_items("model-index", models) if models is not None else ():
        if not validate_keys(name, model, "name"):
            continue
        for result_name, result in list_items(f"{name}.results", model.get("results")):
            if not validate_keys(result_name, result):
                continue
            validate_keys(f"{result_name}.task", result.get("task"), "type")
            validate_keys(f"{result_name}.dataset", result.get("dataset"), "type", "name")
            for metric_name, metric in list_items(f"{result_name}.metrics", result.get("metrics"), min_length=1):
                validate_keys(metric_name, metric, "type", "value")
    return errors
