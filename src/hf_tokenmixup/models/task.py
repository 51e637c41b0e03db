"""Adapt the configuration of a base model to single-label classification."""

import logging
from typing import Any

from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

SINGLE_LABEL = "single_label_classification"
# Trainer and evaluation read only `.logits` of an output.
PLAIN_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


def validate_single_label(config: PreTrainedConfig) -> None:
    """Set the problem type to single-label classification, in place. A change is logged as a warning.

    `problem_type` determines the loss of the forward pass, whether tokens are mixed, and how `pipeline` converts the
    logits.

    Args:
        config: configuration of the model.

    Raises:
        ValueError: if there are fewer than two classes.
    """
    if config.num_labels < 2:
        raise ValueError(
            f"num_labels is {config.num_labels}, but classification needs at least 2 classes. Load the model with the "
            "class names of the dataset (num_labels, id2label, label2id) and ignore_mismatched_sizes=True, which "
            "trains a new classifier."
        )
    found = config.problem_type
    if found not in (None, SINGLE_LABEL):
        logger.warning(
            "problem_type of the base model is %r. It is changed to %r, since images have one label each.",
            found,
            SINGLE_LABEL,
        )
    config.problem_type = SINGLE_LABEL
    for name, value in PLAIN_OUTPUTS.items():
        if getattr(config, name, value) != value:
            setattr(config, name, value)


def validate_evaluated_task(stored: dict[str, Any], name: str) -> None:
    """Validate a model for evaluation with one label per image. Another problem type is logged as a warning.

    Args:
        stored: content of the config.json of the model.
        name: name of the model.

    Raises:
        ValueError: if the model has fewer than two outputs.
    """
    num_classes = len(stored["id2label"]) if isinstance(stored.get("id2label"), dict) else stored.get("num_labels", 2)
    if num_classes < 2:
        raise ValueError(
            f"{name} has {num_classes} output, as for regression or binary classification. Top-1, top-5 and "
            "cross-entropy need at least 2 classes. Choose another model."
        )
    if stored.get("problem_type") not in (None, SINGLE_LABEL):
        logger.warning(
            "%s was trained with problem_type %r. It is evaluated with one label per image: the highest output is the "
            "predicted class, and the loss is cross-entropy, which is not the loss it was trained with.",
            name,
            stored["problem_type"],
        )
