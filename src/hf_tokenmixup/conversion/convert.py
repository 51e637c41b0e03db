"""Turns a released weight file into a folder that ``from_pretrained`` opens: config, safetensors, image processor."""

import dataclasses
import difflib
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
from .infer_config import infer_config_kwargs, refusal
from .released_weights import FORMATS, ConvertedStateDict, detect_format, load_released_weights, rename, source_name

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
    """Convert a released weight file; either the whole folder comes into being or nothing.

    What cannot be seen in the file, and is told in the log: ScoreNet that is left out, and an assumed normalisation.

    Args:
        path: weights of the authors' CCT or ViT, of Compact-Transformers, or of the original ViT (``.npz``).
        output_dir: a folder that does not exist yet, or is empty.
        horizontal_layers: layers of HTM, to be checked; None takes those where ScoreNet lies in the file.
        vertical_layers: layers of VTM; None takes those whose query, key and value are stored apart, if any.
        settings: of TokenMixup, by the names of its configuration, tau in nats. With these or with layers given the
            folder holds the TokenMixup model with ScoreNet, else the plain model without.
        image_size: pixels, or height and width; None: those of the file. Learned positions are interpolated.
        num_attention_heads: H; None takes the usual number for the hidden size, or that of the ``.npz``.
        label_names: of the classes in order.
        image_mean: per channel of images in [0, 1]; None: 0.5.
        image_std: per channel; None: 0.5.

    Returns:
        The folder.

    Raises:
        ValueError: for a file that cannot be read safely or is of no known format; one error with every name that maps
            nowhere, is missing or has a wrong shape; for settings that do not fit, and for a folder that is not empty.
    """
    path, output_dir = Path(path), Path(output_dir)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise ValueError(f"The output folder must be new or empty, and {output_dir} is not: name another.")
    given = _tokenmixup_settings(settings, horizontal_layers, vertical_layers)
    weights = load_released_weights(path)
    kind = detect_format(weights)
    logger.info("%s: %s", path.name, FORMATS[kind])
    vertical = sorted(
        int(match[1]) for name in weights if (match := re.search(r"blocks\.(\d+)\.self_attn\.query\.weight$", name))
    )
    renamed = rename(kind, weights)
    attributes = infer_config_kwargs(kind, path.name, weights, renamed, image_size, num_attention_heads)
    attributes |= _labels(label_names, attributes["num_labels"])
    normalisation = _normalisation(image_mean, image_std, attributes["num_channels"])
    family = "cct" if kind == "cct" else "vit"
    has_cls = attributes.get("pooling", "cls") == "cls"
    if given is None:
        model_class = FAMILIES[family][1].base_model_class
    else:
        model_class = FAMILIES[family][1]
        stored = sorted({int(name.split(".")[2]) for name in renamed.tensors if ".scorenet." in name})
        if sorted(given.setdefault("horizontal_layers", stored)) != stored:
            raise ValueError(
                f"In {path.name} ScoreNet lies in the layers {stored}, and horizontal_layers are "
                f"{given['horizontal_layers']}: give {stored} or leave them out. For HTM elsewhere convert without "
                "settings and open the folder with horizontal_layers for training: ScoreNet then starts untrained."
            )
        given.setdefault("vertical_layers", vertical)
        attributes |= {"scorenet_pooling": "cls", "saliency_query": "cls"} if has_cls else {}
        attributes |= given
    config = model_class.config_class(**attributes)
    logger.info("%d layers of width %d", config.num_hidden_layers, config.hidden_size)
    with torch.device("meta"):
        model = model_class(config)
    _drop_unused_scorenet_weights(renamed, model, plain=given is None)
    _load(path.name, kind, model, renamed)
    height, width = height_and_width(config.image_size)
    processor = ViTImageProcessor(size={"height": height, "width": width}, **normalisation)
    _write(model.eval(), processor, output_dir)
    return output_dir


def _tokenmixup_settings(
    settings: dict[str, Any] | None, horizontal_layers: Sequence[int] | None, vertical_layers: Sequence[int] | None
) -> dict[str, Any] | None:
    layers = {"horizontal_layers": horizontal_layers, "vertical_layers": vertical_layers}
    layers = {name: list(value) for name, value in layers.items() if value is not None}
    if settings is None and not layers:
        return None
    known = [item.name for item in dataclasses.fields(TokenMixupConfigMixin)]
    for name in settings or {}:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"TokenMixup has no setting {name!r}"
                + (f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}.")
            )
    return {**(settings or {}), **layers}


def _drop_unused_scorenet_weights(renamed: ConvertedStateDict, model: PreTrainedModel, plain: bool) -> None:
    known = model.state_dict()
    unused = [name for name in renamed.tensors if ".scorenet." in name and name not in known]
    if not plain:  # with a CLS token the authors' layers hold a pooling that they never use
        unused = [name for name in unused if ".scorenet.attention." in name]
    for name in unused:
        del renamed.tensors[name]
    if unused:
        why = "the plain model has no ScoreNet" if plain else "this ScoreNet reads the CLS token"
        logger.warning("left out, as %s: %s", why, ", ".join(sorted(renamed.sources[name] for name in unused)))


def _load(file: str, kind: str, model: PreTrainedModel, renamed: ConvertedStateDict) -> None:
    problems, expected = list(renamed.problems), model.state_dict()
    for name, tensor in renamed.tensors.items():
        source = renamed.sources[name]
        if name not in expected:
            problems.append(f"{source}: no place for it in this architecture")
        elif tensor.shape != (0,) and tensor.shape != expected[name].shape:  # (0,): told by ``rename`` already
            problems.append(f"{source}: shape {tuple(expected[name].shape)} expected, got {tuple(tensor.shape)}")
    problems += [f"{source_name(kind, name)}: missing" for name in expected if name not in renamed.tensors]
    if problems:
        raise refusal(file, kind, problems)
    # Each its own memory: a file may hold one tensor under two names.
    model.load_state_dict({name: tensor.clone() for name, tensor in renamed.tensors.items()}, assign=True)


def _labels(names: Sequence[str] | None, classes: int) -> dict[str, Any]:
    if names is None:
        return {}
    names = list(names)
    if len(names) != classes or len(set(names)) != classes:
        raise ValueError(
            f"label_names must be {classes} different names, as the file has {classes} classes, got {len(names)} "
            f"({len(set(names))} different)."
        )
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def _normalisation(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> dict[str, list[float]]:
    if mean is None or std is None:
        logger.warning(
            "The file does not tell how images were normalised: 0.5 is put down per channel for what of image_mean "
            "and image_std is not given."
        )
    result = {}
    for name, values in (("image_mean", mean), ("image_std", std)):
        values = [0.5] * channels if values is None else [float(value) for value in values]
        if len(values) != channels or not all(map(math.isfinite, values)):
            raise ValueError(f"{name} must be {channels} numbers, one per channel, got {values}.")
        result[name] = values
    if min(result["image_std"]) <= 0:
        raise ValueError(f"image_std must be positive, got {result['image_std']}.")
    return result


def _write(model: PreTrainedModel, processor: ViTImageProcessor, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
