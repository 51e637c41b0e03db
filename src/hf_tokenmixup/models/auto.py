"""Any image classifier by name: with TokenMixup where its family has it, plain otherwise."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from .cct import TokenMixupCctConfig, TokenMixupCctForImageClassification
from .vit import TokenMixupViTConfig, TokenMixupViTForImageClassification

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "cct": (TokenMixupCctConfig, TokenMixupCctForImageClassification),
    "vit": (TokenMixupViTConfig, TokenMixupViTForImageClassification),
}


def load_classifier(
    name_or_path: str | None = None,
    *,
    model_type: str | None = None,
    from_scratch: bool = False,
    plain: bool = False,
    label_names: Sequence[str] | None = None,
    tokenmixup: dict[str, Any] | None = None,
    config_overrides: dict[str, Any] | None = None,
    ignore_mismatched_sizes: bool = False,
    attn_implementation: str | None = None,
    **hub_options,
) -> PreTrainedModel:
    """Open or build an image classifier, in float32.

    Args:
        name_or_path: a model on the Hub or a folder.
        model_type: in place of ``name_or_path`` when training from scratch: the type's default configuration.
        from_scratch: take the configuration alone, with fresh weights.
        plain: without TokenMixup in any case, which is enough to evaluate.
        label_names: the class names in order; None leaves the model's own.
        tokenmixup: settings of TokenMixup; those not named stay as the checkpoint has them.
        config_overrides: other attributes of the configuration.
        ignore_mismatched_sizes: start a fresh classifier where the number of classes differs.
        attn_implementation: as in transformers, its choice if None.
        hub_options: ``revision``, ``token``, ``cache_dir``.

    Raises:
        ValueError: without a name or model type, for settings of TokenMixup with a family that has none, for
            attributes that the configuration does not have, and for a classifier of another size without
            ``ignore_mismatched_sizes``.
    """
    if name_or_path is None and not (from_scratch and model_type):
        raise ValueError(
            "No model was named: give model_name_or_path, or from_scratch with a model_type (and config_overrides)."
        )
    stored = PreTrainedConfig.get_config_dict(name_or_path, **hub_options)[0] if name_or_path else {}
    model_type = stored.get("model_type", model_type)
    tokenmixup = {} if plain else tokenmixup or {}
    changes = {**(config_overrides or {}), **tokenmixup}
    if label_names is not None:
        changes["num_labels"] = len(label_names)
        changes["id2label"] = dict(enumerate(label_names))
        changes["label2id"] = {name: index for index, name in enumerate(label_names)}

    if model_type in FAMILIES and not plain:
        config_class, model_class = FAMILIES[model_type]
    elif tokenmixup:
        raise ValueError(
            f"TokenMixup is there for the model types {', '.join(sorted(FAMILIES))}, and this model is of type "
            f"{model_type!r}: leave out {', '.join(sorted(tokenmixup))} to train it as it is."
        )
    else:
        config_class, model_class = AutoConfig, AutoModelForImageClassification

    if name_or_path is None:
        known = PreTrainedConfig if config_class is AutoConfig else config_class
        defaults = AutoConfig.for_model(model_type) if known is PreTrainedConfig else config_class()
        _refuse_unknown(changes, defaults)
        config = type(defaults)(**changes)
    else:
        config, unused = config_class.from_pretrained(
            name_or_path, return_unused_kwargs=True, **changes, **hub_options
        )
        _refuse_unknown(unused, config)

    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if from_scratch:
        build = model_class.from_config if model_class is AutoModelForImageClassification else model_class._from_config
        return build(config, dtype=torch.float32, **options)
    try:
        return model_class.from_pretrained(
            name_or_path,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **options,
            **hub_options,
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{name_or_path} does not fit {config.num_labels} classes, as asked for, or another attribute that was "
            "changed. To start a fresh classifier for them give ignore_mismatched_sizes."
        ) from error


def _refuse_unknown(changes: dict[str, Any], config: PreTrainedConfig) -> None:
    known = [*config.to_dict(), "num_labels", "id2label", "label2id"]
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"{type(config).__name__} has no attribute {name!r}"
                + (f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(known))}.")
            )
