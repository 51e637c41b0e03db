"""The classifier of a checkpoint for the classes of a dataset: reused, reordered or trained from scratch."""

import logging
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.class_names import has_class_names, normalize_class_name

logger = logging.getLogger(__name__)

MAX_SHOWN = 3


def class_names(config: PreTrainedConfig, name: str) -> list[str]:
    """The class names of a configuration in order.

    Args:
        config: of the model.
        name: of the model, for the message.

    Raises:
        ValueError: `id2label` does not name every class from 0 on.
    """
    found = config.id2label
    if set(found) != set(range(config.num_labels)):
        raise ValueError(
            f"id2label in the config.json of {name} must name the classes 0 to {config.num_labels - 1}, got "
            f"{', '.join(map(str, list(found)[:MAX_SHOWN]))}, ...: correct it there."
        )
    return [found[index] for index in range(config.num_labels)]


def fit_classifier(
    model: PreTrainedModel,
    fresh: set[str],
    model_names: Sequence[str],
    dataset_names: Sequence[str],
    allow_new: bool,
    name: str,
) -> None:
    """Compare the classes that a loaded classifier was trained for with those of the dataset, and fit it, in place.

    The same names in the same order: nothing is done. In another order: the rows of the classifier (and of ScoreNet's)
    are reordered. Where one side has no names (`LABEL_0`, or numbers in order), classes are taken by number, and a
    warning is logged.

    Args:
        model: with as many outputs as `dataset_names`.
        fresh: names of the parameters that the checkpoint did not have, or in another shape.
        model_names: of the checkpoint, in order.
        dataset_names: in order.
        allow_new: initialize the classifier where the classes are others.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: other classes without `allow_new`, or in another order in a classifier of a kind that is not known.
    """
    layers = class_layers(model)
    if layers and all(f"{key}.weight" in fresh for key in layers if ".scorenet." not in key):
        return
    heads = list(layers.values())
    theirs, ours = ([normalize_class_name(item) for item in names] for names in (model_names, dataset_names))
    if theirs == ours:
        return
    same = sorted(theirs) == sorted(ours) and len(set(ours)) == len(ours)
    if same and heads:
        order = torch.tensor([theirs.index(item) for item in ours])
        for head in heads:
            _reorder(head, order)
        logger.warning(
            "%s has the classes of the dataset in another order. The rows of its classifier are put into the order of "
            "the dataset: %s.",
            name,
            _some(dataset_names),
        )
        return
    nameless = [
        of for of, names in ((name, model_names), ("the dataset", dataset_names)) if not has_class_names(names)
    ]
    if nameless and not same:
        logger.warning(
            "There are no class names in %s. The classifier is reused for the %d classes of the dataset by number: "
            "class 0 is %r in the model and %r in the dataset.",
            " and in ".join(nameless),
            len(ours),
            model_names[0],
            dataset_names[0],
        )
        return
    found = f"The classes of {name} are {_some(model_names)}, and those of the dataset are {_some(dataset_names)}."
    if not heads:
        raise ValueError(
            f"{found} {type(model).__name__} has no linear classifier that could be initialized again. If these are "
            "the same classes, correct id2label in its config.json; otherwise name another model."
        )
    if not allow_new:
        raise ValueError(
            f"{found} Pass ignore_mismatched_sizes to train a new classifier. If these are the same classes under "
            "other names, correct id2label in the model's config.json."
        )
    for head in heads:
        _initialize(model, head)
    logger.warning("%s The classifier is initialized and trained from scratch.", found)


def class_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers with one output per class, ScoreNet's among them; none where their role is not certain."""
    classes, base = model.config.num_labels, f"{model.base_model_prefix}."
    outside = {
        key: module
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and (not key.startswith(base) or key.endswith(".scorenet.classifier"))
    }
    # A hidden layer of this width would be followed by one that reads it.
    hidden = [key for key, module in outside.items() if ".scorenet." not in key and module.in_features == classes]
    if hidden and len([key for key in outside if ".scorenet." not in key]) > 1:
        return {}
    return {key: module for key, module in outside.items() if module.out_features == classes}


@torch.no_grad()
def _reorder(layer: nn.Linear, order: torch.Tensor) -> None:
    for parameter in layer.parameters(recurse=False):
        parameter.copy_(parameter[order.to(parameter.device)].clone())


@torch.no_grad()
def _initialize(model: PreTrainedModel, layer: nn.Linear) -> None:
    # transformers does not initialize a parameter that it has loaded, so they are new ones.
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(torch.zeros_like(parameter), parameter.requires_grad))
    model._init_weights(layer)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(map(repr, names[:MAX_SHOWN])) + more
