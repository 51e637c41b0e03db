"""Results of an evaluation as the Hub's metadata has them, and their place in the text of an existing card."""

import math
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from ..evaluation.evaluate import EvaluationResult
from ..utils.environment import is_local_dataset, public_dataset

# As the Hub finds the metadata, but for an empty block, where its expression would run on into the text.
_FRONT_MATTER = re.compile(r"\A(\s*---(\r\n|\r|\n))(.*?)(?<=[\r\n])---[ \t]*(?:[\r\n]|\Z)", re.DOTALL)
_LINE_BREAK = re.compile(r"\r\n|\r|\n")
# The type of a dataset that is no name on the Hub, as transformers' own cards have it for folders.
LOCAL_TYPE = "imagefolder"
_OWN_LICENSE = re.compile(
    r"(\n## License(?:\r\n|\r|\n){2})(?:`[^`\n]+`|The license of these weights is not recorded here)"
)


def eval_results(evaluation: EvaluationResult) -> list[EvalResult]:
    """Top-1 and top-5 accuracy as shares of 1, and the mean cross-entropy in nats, each if it is a finite number."""
    dataset = public_dataset(evaluation.dataset)
    metrics = (
        ("accuracy", "Top-1 accuracy", evaluation.top1),
        ("top_5_accuracy", "Top-5 accuracy", evaluation.top5),
        ("loss", "Cross-entropy", evaluation.loss),
    )
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=LOCAL_TYPE if is_local_dataset(dataset) else dataset,
            dataset_name=dataset,
            dataset_config=evaluation.dataset_config,
            dataset_split=evaluation.split,
            dataset_revision=evaluation.dataset_revision,
            metric_type=kind,
            metric_name=name,
            metric_value=float(value),
        )
        for kind, name, value in metrics
        if math.isfinite(value)
    ]


def insert_eval_results(card: str, model_name: str, results: list[EvalResult]) -> str:
    """Put results into the metadata of a card and leave the rest as it is, the text byte for byte.

    Results of the same task, dataset, configuration, split and metric make room. Of the metadata only `model-index` is
    written anew, unless it is in a style that cannot be spliced: then all of it, with the same values.

    Args:
        card: the whole card, with or without metadata, with line breaks of any kind.
        model_name: for a card that has no results yet.
        results: at least one.

    Raises:
        ValueError: for metadata that is no YAML mapping, or a `model-index` that is not as the Hub has it.
    """
    mark, card = card[: card.startswith("\ufeff")], card.removeprefix("\ufeff")
    found = _FRONT_MATTER.match(card)
    if found is None:
        first = _LINE_BREAK.search(card)
        line_break = first[0] if first else "\n"
        block = yaml_dump(
            {"model-index": eval_results_to_model_index(model_name, results)}, sort_keys=False, line_break=line_break
        )
        return f"{mark}---{line_break}{block}---{line_break}{card}"
    block, line_break = found[3], found[2]
    metadata = _parse(block)
    metadata["model-index"] = _replace(metadata.get("model-index"), model_name, results)
    return (
        mark
        + card[: found.start(3)]
        + _replace_yaml_key(block, metadata, "model-index", line_break)
        + card[found.end(3) :]
    )


def read_card(path: Path) -> str:
    """The text of a card.

    Raises:
        ValueError: It is no text in UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"The card {path} must be text in UTF-8: {error}. Correct or remove it.") from error


def check_card(folder: Path) -> None:
    """Check that results can be put into the card in a folder, if there is one.

    Raises:
        ValueError: It is no text, or its metadata is no YAML mapping.
    """
    path = folder / "README.md"
    if path.is_file() and (found := _FRONT_MATTER.match(read_card(path).removeprefix("\ufeff"))):
        _parse(found[3])


def with_license(card: str, license: str) -> str:
    """Name a license in the metadata of a card and, where the text is ours, under its heading.

    Args:
        card: With or without metadata, with line breaks of any kind.
        license: An identifier of the Hub.

    Raises:
        ValueError: For metadata that is no YAML mapping.
    """
    mark, card = card[: card.startswith("\ufeff")], card.removeprefix("\ufeff")
    found = _FRONT_MATTER.match(card)
    if found is None:
        first = _LINE_BREAK.search(card)
        line_break = first[0] if first else "\n"
        return f"{mark}---{line_break}license: {license}{line_break}---{line_break}{card}"
    metadata = _parse(found[3]) | {"license": license}
    text = _OWN_LICENSE.sub(lambda own: f"{own[1]}`{license}`", card[found.end(3) :])
    return mark + card[: found.start(3)] + _replace_yaml_key(found[3], metadata, "license", found[2]) + text


def _parse(block: str) -> dict[str, Any]:
    try:
        metadata = yaml.safe_load(block)
    except yaml.YAMLError as error:
        raise ValueError(f"The card's metadata is not valid YAML, mend or remove it: {error}") from error
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError(f"The card's metadata must be a mapping, got {type(metadata).__name__}: mend or remove it.")
    return metadata


def _replace(index: list | None, model_name: str, results: list[EvalResult]) -> list[dict[str, Any]]:
    new = eval_results_to_model_index(model_name, results)
    if not index:
        return new
    replaced = {_identity(result, metric) for result in new[0]["results"] for metric in result["metrics"]}
    try:
        models = [{**model, "results": _drop_results(model.get("results") or [], replaced)} for model in index]
        models[0]["results"] += new[0]["results"]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            "The card's model-index must be a list of models with a name and results, as the Hub has it, and is not: "
            f"mend or remove it ({type(error).__name__}: {error})."
        ) from error
    return models


def _drop_results(results: list[dict], replaced: set[tuple]) -> list[dict]:
    kept = []
    for result in results:
        metrics = result.get("metrics") or []
        others = [metric for metric in metrics if _identity(result, metric) not in replaced]
        if len(others) == len(metrics):
            kept.append(result)
        elif others:
            kept.append({**result, "metrics": others})
    return kept


def _identity(result: dict, metric: dict) -> tuple:
    task, dataset = result.get("task") or {}, result.get("dataset") or {}
    # Local folders differ by their names alone.
    name = dataset.get("name") if dataset.get("type") == LOCAL_TYPE else None
    return task.get("type"), dataset.get("type"), name, dataset.get("config"), dataset.get("split"), metric.get("type")


def _replace_yaml_key(block: str, metadata: dict[str, Any], key: str, line_break: str) -> str:
    """The YAML `block` with `key` as in `metadata`, the other lines as they were if that can be."""
    new = yaml_dump({key: metadata[key]}, sort_keys=False, line_break=line_break)
    spliced = block + new
    root = yaml.compose(block, Loader=yaml.SafeLoader)
    for name, node in root.value if root else ():
        if name.value == key:
            start = name.start_mark.index
            end = start + len(_strip_trailing_comments(block[start : node.end_mark.index]))
            rest = block[end:]
            spliced = block[:start] + (new if block[end - 1] in "\r\n" else new.rstrip()) + rest
    try:
        same = yaml.safe_load(spliced) == metadata
    except yaml.YAMLError:
        same = False
    return spliced if same else yaml_dump(metadata, sort_keys=False, line_break=line_break)


def _strip_trailing_comments(text: str) -> str:
    """Without the comments and empty lines at the end, which belong to what follows."""
    lines = text.splitlines(keepends=True)
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    return "".join(lines)
