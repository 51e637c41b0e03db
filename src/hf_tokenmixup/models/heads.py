"""Fit the classifier of a checkpoint to the classes of a dataset: reuse, reorder or initialize it."""

import logging
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.class_names import has_class_names, normalize_class_name
from ..utils.text import format_list

logger = logging.getLogger(__name__)

MAX_SHOWN = 3


def class_names(config: PreTrainedConfig, name: str) -> list[str]:
    """Return the class names of a configuration in order.

    Args:
        config: configuration of the model.
        name: name of the model, for the message.

    Raises:
        ValueError: if `id2label` does not name all classes from 0.
    """
    found = config.id2label
    if set(found) != set(range(config.num_labels)):
        raise ValueError(
            f"id2label in the config.json of {name} must name the classes 0 to {config.num_labels - 1}, got "
            f"{format_list(found, MAX_SHOWN)}. Correct it in the config.json."
        )
    return [found[index] for index in range(config.num_labels)]


def fit_classifier(
    model: PreTrainedModel,
    newly_initialized: set[str],
    model_names: Sequence[str],
    dataset_names: Sequence[str],
    allow_new: bool,
    name: str,
) -> None:
    """Fit a loaded classifier to the classes of a dataset, in place.

    With the same names in another order, the rows of the classifier and of ScoreNet's classifier are reordered. If one
    side has no names (`LABEL_0`, or numbers in order), classes are matched by index and a warning is logged.

    Args:
        model: model with one output per class of the dataset.
        newly_initialized: names of the parameters that were not loaded from the checkpoint.
        model_names: class names of the checkpoint in order.
        dataset_names: class names of the dataset in order.
        allow_new: initialize the classifier again if the classes differ.
        name: name of the checkpoint, for messages.

    Raises:
        ValueError: if the classes differ (without `allow_new`), or the model has no known linear classifier to change.
    """
    layers = get_class_layers(model)
    if layers and all(f"{key}.weight" in newly_initialized for key in layers if ".scorenet." not in key):
        return
    heads = list(layers.values())
    model_keys, dataset_keys = (
        [normalize_class_name(item) for item in names] for names in (model_names, dataset_names)
    )
    if model_keys == dataset_keys:
        return
    same = sorted(model_keys) == sorted(dataset_keys) and len(set(dataset_keys)) == len(dataset_keys)
    if same and heads:
        order = torch.tensor([model_keys.index(key) for key in dataset_keys])
        for head in heads:
            _reorder(head, order)
        logger.warning(
            "%s has the classes of the dataset in another order. The rows of its classifier are reordered to that of "
            "the dataset: %s.",
            name,
            format_list(dataset_names, MAX_SHOWN),
        )
        return
    sides = ((name, model_names), ("the dataset", dataset_names))
    nameless = [side for side, names in sides if not has_class_names(names)]
    if nameless and not same:
        logger.warning(
            "There are no class names in %s. The classifier is reused for the %d classes of the dataset by index: "
            "class 0 is %r in the model and %r in the dataset.",
            " and in ".join(nameless),
            len(dataset_names),
            model_names[0],
            dataset_names[0],
        )
        return
    found = (
        f"The classes of {name} are {format_list(model_names, MAX_SHOWN)}, and those of the dataset are "
        f"{format_list(dataset_names, MAX_SHOWN)}."
    )
    if not heads:
        raise ValueError(
            f"{found} {type(model).__name__} has no linear classifier that could be initialized again. If these are "
            "the same classes, correct id2label in its config.json. Otherwise choose another model."
        )
    if not allow_new:
        raise ValueError(
            f"{found} Pass `ignore_mismatched_sizes` to train a new classifier. If these are the same classes under "
            "other names, correct id2label in the model's config.json."
        )
    for head in heads:
        _initialize(model, head)
    logger.warning("%s The classifier is newly initialized.", found)


def get_class_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Find the linear layers with one output per class, including ScoreNet's; empty if their role is unclear."""
    num_classes = model.config.num_labels
    # Some classifiers, such as CLIP's, have a complete model as part under another name than the prefix.
    models = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
    inside = tuple(f"{name}." for name in (model.base_model_prefix, *models))
    # Models of timm contain their classifier, or two after distillation.
    inner = model.base_model.get_classifier() if hasattr(model.base_model, "get_classifier") else ()
    inner = set(map(id, inner if isinstance(inner, tuple) else (inner,)))
    outside = {
        key: module
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (not key.startswith(inside) or key.endswith(".scorenet.classifier") or id(module) in inner)
    }
    # A layer with this number of inputs follows a hidden layer, which is no classifier.
    hidden = [key for key, module in outside.items() if ".scorenet." not in key and module.in_features == num_classes]
    if hidden and len([key for key in outside if ".scorenet." not in key]) > 1:
        return {}
    return {key: module for key, module in outside.items() if module.out_features == num_classes}


@torch.no_grad()
def _reorder(layer: nn.Linear, order: torch.Tensor) -> None:
    for parameter in layer.parameters(recurse=False):
        parameter.copy_(parameter[order.to(parameter.device)].clone())


@torch.no_grad()
def _initialize(model: PreTrainedModel, layer: nn.Linear) -> None:
    # transformers does not initialize loaded parameters again, so replace them.
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(torch.zeros_like(parameter), parameter.requires_grad))
    model._init_weights(layer)
