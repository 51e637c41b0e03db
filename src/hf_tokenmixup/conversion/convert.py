"""Conversion of a released weight file to a folder for `from_pretrained`: config, safetensors, image processor."""

import dataclasses
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ViTImageProcessor

from ..configuration import TokenMixupConfigMixin
from ..models import FAMILIES, height_and_width
from ..utils.text import did_you_mean
from .infer_config import conversion_error, infer_config_kwargs
from .released_weights import (
    FORMATS,
    ConvertedStateDict,
    convert_state_dict,
    detect_format,
    get_original_name,
    load_released_weights,
)

logger = logging.getLogger(__name__)


def convert_weights(
    path: str | Path,
    output_dir: str | Path,
    *,
    horizontal_layers: Sequence[int] | None = None,
    vertical_layers: Sequence[int] | None = None,
    settings: dict[str, Any] | None = None,
    image_size: int | Sequence[int] | None = None,
    num_attention_heads: int | None = None,
    label_names: Sequence[str] | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> Path:
    """Convert a released weight file. The output folder is written atomically.

    Warnings are logged if ScoreNet weights are dropped or the normalization statistics are assumed.

    Args:
        path: Weights of the authors' CCT or ViT, of Compact-Transformers, or of the original ViT (`.npz`).
        output_dir: A folder that does not exist or is empty.
        horizontal_layers: Indices of the layers with HTM, which must be those with ScoreNet in the file. None: those.
        vertical_layers: Indices of the layers with VTM. None: those with separate query, key and value in the file.
        settings: TokenMixup settings by name; tau is in nats. With settings or layers, the folder contains the
            TokenMixup model with ScoreNet, otherwise the plain model.
        image_size: Pixels, or height and width; learned positions are interpolated. None: that of the file.
        num_attention_heads: Number of attention heads. None: that of the `.npz` file, or the usual number for the
            hidden size.
        label_names: Class names in order.
        image_mean: Mean per channel for images in [0, 1]. None: 0.5.
        image_std: Standard deviation per channel. None: 0.5.

    Returns:
        The output folder.

    Raises:
        ValueError: The file cannot be read safely, has an unknown format, or does not match the architecture (the
            message lists all unknown and missing tensors and wrong shapes); an argument is invalid; or the output
            folder is not empty.
    """
    path, output_dir = Path(path), Path(output_dir)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise ValueError(f"output_dir must be new or empty, and {output_dir} is not. Choose another folder.")
    tokenmixup_kwargs = _build_tokenmixup_kwargs(settings, horizontal_layers, vertical_layers)
    weights = load_released_weights(path)
    weight_format = detect_format(weights)
    logger.info("%s: %s", path.name, FORMATS[weight_format])
    converted = convert_state_dict(weight_format, weights)
    config_kwargs = infer_config_kwargs(weight_format, path.name, weights, converted, image_size, num_attention_heads)
    config_kwargs |= _build_label_kwargs(label_names, config_kwargs["num_labels"])
    normalization = _build_normalization(image_mean, image_std, config_kwargs["num_channels"])
    family = "cct" if weight_format == "cct" else "vit"
    model_class = FAMILIES[family][1]
    if tokenmixup_kwargs is None:
        model_class = model_class.base_model_class
    else:
        stored_layers = sorted({int(name.split(".")[2]) for name in converted.tensors if ".scorenet." in name})
        if sorted(tokenmixup_kwargs.setdefault("horizontal_layers", stored_layers)) != stored_layers:
            raise ValueError(
                f"horizontal_layers is {tokenmixup_kwargs['horizontal_layers']}, but {path.name} has ScoreNet weights "
                f"for the layers {stored_layers}. Pass {stored_layers} or omit horizontal_layers. For HTM in other "
                "layers, convert without settings and load the folder with horizontal_layers: ScoreNet is then newly "
                "initialized."
            )
        tokenmixup_kwargs.setdefault("vertical_layers", _find_vertical_layers(weights))
        config_kwargs |= tokenmixup_kwargs
    config = model_class.config_class(**config_kwargs)
    logger.info("%d layers, hidden size %d", config.num_hidden_layers, config.hidden_size)
    with torch.device("meta"):
        model = model_class(config)
    _drop_unused_scorenet_weights(converted, model, is_plain=tokenmixup_kwargs is None)
    _load_state_dict(path.name, weight_format, model, converted)
    height, width = height_and_width(config.image_size)
    processor = ViTImageProcessor(size={"height": height, "width": width}, **normalization)
    _save(model.eval(), processor, output_dir)
    return output_dir


def _build_tokenmixup_kwargs(
    settings: dict[str, Any] | None, horizontal_layers: Sequence[int] | None, vertical_layers: Sequence[int] | None
) -> dict[str, Any] | None:
    layers = {"horizontal_layers": horizontal_layers, "vertical_layers": vertical_layers}
    layers = {name: list(value) for name, value in layers.items() if value is not None}
    if settings is None and not layers:
        return None
    known = [item.name for item in dataclasses.fields(TokenMixupConfigMixin)]
    for name in settings or {}:
        if name not in known:
            suggestion = did_you_mean(name, known, repr, otherwise=f". Settings: {', '.join(known)}.")
            raise ValueError(f"TokenMixup has no setting {name!r}{suggestion}")
    return {**(settings or {}), **layers}


def _find_vertical_layers(weights: dict[str, torch.Tensor]) -> list[int]:
    """List the layers of the authors' CCT that store query, key and value separately."""
    matches = (re.search(r"blocks\.(\d+)\.self_attn\.query\.weight$", name) for name in weights)
    return sorted(int(match[1]) for match in matches if match)


def _drop_unused_scorenet_weights(converted: ConvertedStateDict, model: PreTrainedModel, is_plain: bool) -> None:
    expected = model.state_dict()
    unused = [name for name in converted.tensors if ".scorenet." in name and name not in expected]
    if not is_plain:
        # With a CLS token, the authors' layers have an attention pooling that is never used.
        unused = [name for name in unused if ".scorenet.attention." in name]
    for name in unused:
        del converted.tensors[name]
    if unused:
        reason = "the plain model has no ScoreNet" if is_plain else "ScoreNet uses the CLS token"
        names = ", ".join(sorted(converted.original_names[name] for name in unused))
        logger.warning("Ignoring %s: %s.", names, reason)


def _load_state_dict(file: str, weight_format: str, model: PreTrainedModel, converted: ConvertedStateDict) -> None:
    problems, expected = list(converted.problems), model.state_dict()
    for name, tensor in converted.tensors.items():
        original_name = converted.original_names[name]
        if name not in expected:
            problems.append(f"{original_name}: not part of this architecture")
        elif tensor.shape != (0,) and tensor.shape != expected[name].shape:  # (0,) is already in `problems`
            problems.append(
                f"{original_name}: shape {tuple(expected[name].shape)} expected, got {tuple(tensor.shape)}"
            )
    missing = [name for name in expected if name not in converted.tensors]
    problems += [f"{get_original_name(weight_format, name)}: missing" for name in missing]
    if problems:
        raise conversion_error(file, weight_format, problems)
    # Clone, as a file may store one tensor under two names.
    model.load_state_dict({name: tensor.clone() for name, tensor in converted.tensors.items()}, assign=True)


def _build_label_kwargs(names: Sequence[str] | None, num_labels: int) -> dict[str, Any]:
    if names is None:
        return {}
    names = list(names)
    if len(names) != num_labels or len(set(names)) != num_labels:
        raise ValueError(
            f"label_names must have {num_labels} different names, as the file has {num_labels} classes, got "
            f"{len(names)} ({len(set(names))} different)."
        )
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def _build_normalization(
    mean: Sequence[float] | None, std: Sequence[float] | None, num_channels: int
) -> dict[str, list[float]]:
    if mean is None or std is None:
        logger.warning(
            "The file has no normalization statistics, so 0.5 per channel is used. Set image_mean and image_std to "
            "change this."
        )
    result = {}
    for name, values in (("image_mean", mean), ("image_std", std)):
        values = [0.5] * num_channels if values is None else [float(value) for value in values]
        if len(values) != num_channels or not all(map(math.isfinite, values)):
            raise ValueError(f"{name} must have {num_channels} finite numbers, one per channel, got {values}.")
        result[name] = values
    if min(result["image_std"]) <= 0:
        raise ValueError(f"image_std must be positive, got {result['image_std']}.")
    return result


def _save(model: PreTrainedModel, processor: ViTImageProcessor, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary_dir = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    temporary_dir.mkdir()
    try:
        model.save_pretrained(temporary_dir)
        processor.save_pretrained(temporary_dir)
        os.replace(temporary_dir, folder)
    except BaseException:
        shutil.rmtree(temporary_dir, ignore_errors=True)
        raise
