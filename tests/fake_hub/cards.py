"""The rules of the tests' Hub for the metadata of a model or dataset card.

Checked, with the real Hub's messages where they are known: the front matter is YAML and a mapping; `license` names one
or more of the documented identifiers; `language`, `tags`, `datasets`, `metrics` and `base_model` are strings or lists
of strings; `base_model` and `datasets` look like repository names, so that a local path is refused; `library_name`,
`pipeline_tag` and `license_name` are strings; each result of `model-index` has a task with a type, a dataset with a
type and a name, and metrics with a type and a value. Not checked: whether a named repository, task, language, library
or metric exists, a dataset card's `dataset_info` and `configs`, and unknown keys.
"""

import re
from collections.abc import Iterator

import yaml

LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl "
    "gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql "
    "ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other"
).split()

FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*[\r\n]+(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
REPO_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)


def as_list(value: object) -> list:
    """Several keys hold one value or a list of them."""
    return [] if value is None else value if isinstance(value, list) else [value]


def read_card(text: str) -> dict:
    """The metadata of a card; empty where there is none or it cannot be read."""
    front = FRONT_MATTER.search(text)
    try:
        data = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        data = None
    return data if isinstance(data, dict) else {}


def check_card(text: str) -> tuple[list[str], list[str]]:
    """The errors and the warnings that the Hub has for the text of a README.md."""
    front = FRONT_MATTER.search(text.replace("\r\n", "\n"))
    try:
        data = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError as error:
        return [f"YAML metadata error: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["YAML metadata error: the metadata must be a mapping"], []
    return [*_check_values(data), *_check_model_index(data.get("model-index"))], []


def _check_values(data: dict) -> Iterator[str]:
    for key in ("library_name", "pipeline_tag", "license_name"):
        if data.get(key) is not None and not isinstance(data[key], str):
            yield f'"{key}" must be a string'
    for key in ("license", "language", "tags", "datasets", "metrics", "base_model"):
        several = isinstance(data.get(key), list)
        for number, value in enumerate(as_list(data.get(key))):
            name = f'"{key}[{number}]"' if several else f'"{key}"'
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


def _check_model_index(models: object) -> list[str]:
    errors: list[str] = []

    def entries(name: str, values: object, least: int = 0) -> list[tuple[str, object]]:
        if not isinstance(values, list) or len(values) < least:
            errors.append(
                f'"{name}" is required' if values is None else f'"{name}" must be an array of {least} or more'
            )
            return []
        return [(f"{name}[{number}]", value) for number, value in enumerate(values)]

    def require(name: str, value: object, *keys: str) -> bool:
        if isinstance(value, dict):
            errors.extend(f'"{name}.{key}" is required' for key in keys if value.get(key) is None)
        else:
            errors.append(f'"{name}" is required' if value is None else f'"{name}" must be of type object')
        return isinstance(value, dict)

    for name, model in entries("model-index", models) if models is not None else ():
        if not require(name, model, "name"):
            continue
        for result_name, result in entries(f"{name}.results", model.get("results")):
            if not require(result_name, result):
                continue
            require(f"{result_name}.task", result.get("task"), "type")
            require(f"{result_name}.dataset", result.get("dataset"), "type", "name")
            for metric_name, metric in entries(f"{result_name}.metrics", result.get("metrics"), least=1):
                require(metric_name, metric, "type", "value")
    return errors
