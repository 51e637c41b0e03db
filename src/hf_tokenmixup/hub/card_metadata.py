"""Evaluation results in the Hub's metadata format, and changes to the metadata of existing model cards.

`ModelCard`, `metadata_update` and `metadata_save` of huggingface_hub dump all metadata again. That loses comments and
the style of other entries, and fails on results of other tools that `EvalResult` cannot represent. So changed keys are
replaced in the text here, and only their content comes from huggingface_hub.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from ..evaluation.evaluate import EvaluationResult
from ..utils.environment import is_local_dataset, public_dataset

# Like REGEX_YAML_BLOCK of huggingface_hub, which continues into the text after an empty block.
_FRONT_MATTER = re.compile(r"\A(\s*---(\r\n|\r|\n))(.*?)(?<=[\r\n])---[ \t]*(?:[\r\n]|\Z)", re.DOTALL)
_LINE_BREAK = re.compile(r"\r\n|\r|\n")
# Dataset type for local folders, as in the model cards of transformers.
LOCAL_DATASET_TYPE = "imagefolder"
# Tag of generated cards.
GENERATED_TAG = "hf_tokenmixup"
_GENERATED_LICENSE = re.compile(
    r"(\n## License(?:\r\n|\r|\n){2})(?:`[^`\n]+`|The license of these weights is not recorded here)"
)


def build_eval_results(evaluation: EvaluationResult) -> list[EvalResult]:
    """Convert an evaluation to the Hub's format: accuracies and calibration error in [0, 1], loss in nats.

    Metrics that are unknown or not finite are omitted.
    """
    dataset = public_dataset(evaluation.dataset)
    metrics = (
        ("accuracy", "Top-1 accuracy", evaluation.top1),
        ("top_5_accuracy", "Top-5 accuracy", evaluation.top5),
        ("loss", "Cross-entropy", evaluation.loss),
        ("calibration_error", "Expected calibration error (15 bins)", evaluation.calibration_error),
    )
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=LOCAL_DATASET_TYPE if is_local_dataset(dataset) else dataset,
            dataset_name=dataset,
            dataset_config=evaluation.dataset_config,
            dataset_split=evaluation.split,
            dataset_revision=evaluation.dataset_revision,
            metric_type=metric_type,
            metric_name=name,
            metric_value=float(value),
        )
        for metric_type, name, value in metrics
        if value is not None and math.isfinite(value)
    ]


def insert_eval_results(card: str, model_name: str, results: list[EvalResult]) -> str:
    """Insert evaluation results into the metadata of a model card.

    Results for the same task, dataset, configuration, split and metric are replaced. The text and the other metadata
    do not change. If the YAML style does not allow replacing one key, all metadata is dumped with the same values.

    Args:
        card: Text of the card, with or without metadata, with any line breaks.
        model_name: Name of the model for a card without results.
        results: At least one result.

    Returns:
        The new text of the card.

    Raises:
        ValueError: The metadata is not a YAML mapping, or `model-index` is not in the Hub's format.
    """
    return _set_metadata(card, "model-index", lambda index: _merge_results(index, model_name, results))


def read_card(path: Path) -> str:
    """Read a model card with its line breaks unchanged.

    Raises:
        ValueError: The file is not text in UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"The model card {path} must be text in UTF-8: {error}. Fix or remove it.") from error


def validate_card(folder: Path) -> None:
    """Check that results can be inserted into the model card of a folder, if it has one.

    Raises:
        ValueError: The card is not text in UTF-8, or its metadata is not a YAML mapping.
    """
    path = folder / "README.md"
    if path.is_file() and (found := _FRONT_MATTER.match(read_card(path).removeprefix("\ufeff"))):
        _parse(found[3])


def insert_license(card: str, license: str) -> str:
    """Set the license in the metadata of a model card, and in the License section of a generated card, or add that.

    Args:
        card: Text of the card, with or without metadata, with any line breaks.
        license: License identifier of the Hub.

    Returns:
        The new text of the card.

    Raises:
        ValueError: The metadata is not a YAML mapping.
    """
    if found := _FRONT_MATTER.match(card.removeprefix("\ufeff")):
        card = _GENERATED_LICENSE.sub(lambda match: f"{match[1]}`{license}`", card)
        if GENERATED_TAG in (_parse(found[3]).get("tags") or []) and "## License" not in card:
            line_break = found[2]
            card = line_break.join([card.rstrip(), "", "## License", "", f"`{license}`.", ""])
    return _set_metadata(card, "license", lambda _: license)


def _set_metadata(card: str, key: str, update_fn: Callable[[Any], Any]) -> str:
    """Set a key of the metadata to `update_fn(old value)`. A card without metadata gets a block with this key."""
    bom, card = card[: card.startswith("\ufeff")], card.removeprefix("\ufeff")
    found = _FRONT_MATTER.match(card)
    if found is None:
        first = _LINE_BREAK.search(card)
        line_break = first[0] if first else "\n"
        block = yaml_dump({key: update_fn(None)}, sort_keys=False, line_break=line_break)
        return f"{bom}---{line_break}{block}---{line_break}{card}"
    metadata = _parse(found[3])
    metadata[key] = update_fn(metadata.get(key))
    block = _replace_yaml_key(found[3], metadata, key, line_break=found[2])
    return bom + card[: found.start(3)] + block + card[found.end(3) :]


def _parse(block: str) -> dict[str, Any]:
    try:
        metadata = yaml.safe_load(block)
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata of the model card is not valid YAML: {error}. Fix or remove it.") from error
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError(
            f"The metadata of the model card must be a mapping, got {type(metadata).__name__}. Fix or remove it."
        )
    return metadata


def _merge_results(index: list | None, model_name: str, results: list[EvalResult]) -> list[dict[str, Any]]:
    new = eval_results_to_model_index(model_name, results)
    if not index:
        return new
    replaced = {_result_key(result, metric) for result in new[0]["results"] for metric in result["metrics"]}
    try:
        models = [{**model, "results": _drop_results(model.get("results") or [], replaced)} for model in index]
        models[0]["results"] += new[0]["results"]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            "The model-index of the model card must be a list of models with names and results "
            f"({type(error).__name__}: {error}). Fix or remove it."
        ) from error
    return models


def _drop_results(results: list[dict], replaced: set[tuple]) -> list[dict]:
    remaining = []
    for result in results:
        metrics = result.get("metrics") or []
        others = [metric for metric in metrics if _result_key(result, metric) not in replaced]
        if len(others) == len(metrics):
            remaining.append(result)
        elif others:
            remaining.append({**result, "metrics": others})
    return remaining


def _result_key(result: dict, metric: dict) -> tuple:
    task, dataset = result.get("task") or {}, result.get("dataset") or {}
    # Local folders have the same type and differ in name only.
    name = dataset.get("name") if dataset.get("type") == LOCAL_DATASET_TYPE else None
    return task.get("type"), dataset.get("type"), name, dataset.get("config"), dataset.get("split"), metric.get("type")


def _replace_yaml_key(block: str, metadata: dict[str, Any], key: str, line_break: str) -> str:
    """Replace `key` in a YAML block by its value in `metadata`. The other lines stay if the YAML style allows it."""
    new = yaml_dump({key: metadata[key]}, sort_keys=False, line_break=line_break)
    replaced = block + new
    root = yaml.compose(block, Loader=yaml.SafeLoader)
    for name, node in root.value if root else ():
        if name.value == key:
            start = name.start_mark.index
            end = start + len(_strip_trailing_comments(block[start : node.end_mark.index]))
            rest = block[end:]
            replaced = block[:start] + (new if block[end - 1] in "\r\n" else new.rstrip()) + rest
    try:
        is_equal = yaml.safe_load(replaced) == metadata
    except yaml.YAMLError:
        is_equal = False
    return replaced if is_equal else yaml_dump(metadata, sort_keys=False, line_break=line_break)


def _strip_trailing_comments(text: str) -> str:
    """Remove comments and empty lines at the end, which belong to the next key."""
    lines = text.splitlines(keepends=True)
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    return "".join(lines)
