"""What a base model's configuration says of its own task, and what single-label classification needs instead."""

import logging
from typing import Any

from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

SINGLE_LABEL = "single_label_classification"
# The Trainer and the evaluation read `.logits` of an output, and nothing else of it.
PLAIN_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


def validate_single_label(config: PreTrainedConfig) -> None:
    """Set what training on one label per image needs, in place; what the base model was trained for is logged.

    `problem_type` chooses the loss of the forward, whether tokens are mixed, and what `pipeline` makes of the logits.

    Raises:
        ValueError: for fewer than two classes.
    """
    if config.num_labels < 2:
        raise ValueError(
            f"num_labels is {config.num_labels}, but classification needs at least 2 classes. Open the model with the "
            "class names of the dataset (num_labels, id2label, label2id) and ignore_mismatched_sizes=True, which "
            "trains a new classifier."
        )
    found = config.problem_type
    if found not in (None, SINGLE_LABEL):
        logger.warning(
            "problem_type of the base model is %r. It is set to %r, as the images have one label each.",
            found,
            SINGLE_LABEL,
        )
    config.problem_type = SINGLE_LABEL
    for name, value in PLAIN_OUTPUTS.items():
        if getattr(config, name, value) != value:
            setattr(config, name, value)


def validate_evaluated_task(stored: dict[str, Any], name: str) -> None:
    """Look at the problem type of a model that is evaluated on single labels.

    Args:
        stored: the content of its config.json.
        name: of the model.

    Raises:
        ValueError: for a model of fewer than two outputs.
    """
    classes = len(stored["id2label"]) if isinstance(stored.get("id2label"), dict) else stored.get("num_labels", 2)
    if classes < 2:
        raise ValueError(
            f"{name} has {classes} output, as a model for regression or for one yes-or-no label. Top-1, top-5 and "
            "cross-entropy need at least 2 classes: name another model."
        )
    if stored.get("problem_type") not in (None, SINGLE_LABEL):
        logger.warning(
            "%s was trained with problem_type %r. It is evaluated on one label per image: its highest output is the "
            "class, and the loss is the cross-entropy of the softmax of its outputs, which it was not trained with.",
            name,
            stored["problem_type"],
        )
