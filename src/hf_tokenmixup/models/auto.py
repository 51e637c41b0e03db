"""Load or create image classifiers, with TokenMixup if the model family supports it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from ..utils.text import did_you_mean, format_list
from .cct.configuration_cct import height_and_width
from .families import FAMILIES, UNSUPPORTED, describe_unsupported, get_family_config
from .heads import class_names, fit_classifier, get_class_layers
from .positions import (
    border_hint,
    config_to_load_with,
    get_image_size,
    get_vision_config,
    resize_positions,
    token_grid,
)
from .task import PLAIN_OUTPUTS, SINGLE_LABEL, validate_single_label

logger = logging.getLogger(__name__)

# Errors that transformers raises for an invalid configuration.
MODEL_INIT_ERRORS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, StrictDataclassError)


def load_classifier(
    name_or_path: str | None = None,
    *,
    model_type: str | None = None,
    from_scratch: bool = False,
    plain: bool = False,
    label_names: Sequence[str] | None = None,
    tokenmixup: dict[str, Any] | None = None,
    config_overrides: dict[str, Any] | None = None,
    image_size: int | Sequence[int] | None = None,
    ignore_mismatched_sizes: bool = False,
    attn_implementation: str | None = None,
    **hub_options,
) -> PreTrainedModel:
    """Load or create an image classifier in float32.

    Args:
        name_or_path: name of a model on the Hub, or a folder.
        model_type: model type for training from scratch with its default configuration, instead of `name_or_path`.
        from_scratch: use only the configuration, with newly initialized weights.
        plain: load the base model without TokenMixup, as for evaluation.
        label_names: class names in order, for training with one label per image; None keeps the model's classes. A
            classifier with the same classes in another order is reordered.
        tokenmixup: settings of TokenMixup. Other settings are those of the checkpoint.
        config_overrides: other attributes of the configuration. For another `image_size`, learned positions are
            interpolated.
        image_size: image size for models whose configuration has one; ignored for other models.
        ignore_mismatched_sizes: initialize a new classifier if the classes or their number differ.
        attn_implementation: attention implementation of transformers; None: the default.
        hub_options: `revision`, `token`, `cache_dir`, `trust_remote_code`.

    Returns:
        The model, a TokenMixup classifier if `model_type` is one of `FAMILIES` and `plain` is False.

    Raises:
        ValueError: if the model or model type does not exist, the family does not support TokenMixup, an attribute of
            the configuration is unknown or invalid, the weights cannot be read, are quantized or do not fit the model,
            the classifier has other classes (without `ignore_mismatched_sizes`), or, with `plain`, weights are
            missing.
    """
    name_or_path = name_or_path or None
    if name_or_path is None and not (from_scratch and model_type):
        raise ValueError(
            "There is no model. Pass `model_name_or_path`, or `from_scratch` with `model_type` (and "
            "`config_overrides`)."
        )
    config_dict = load_config_dict(name_or_path, **hub_options) if name_or_path else {}
    if model_type is not None and config_dict.get("model_type", model_type) != model_type:
        raise ValueError(
            f"model_type {model_type!r} does not match {name_or_path}, whose type is {config_dict['model_type']!r}. "
            "Remove `model_type`."
        )
    model_type = config_dict.get("model_type", model_type)
    tokenmixup = {} if plain else tokenmixup or {}
    changes = {**PLAIN_OUTPUTS, **(config_overrides or {}), **tokenmixup}
    if "model_type" in changes:
        raise ValueError("model_type is not allowed in config_overrides. Pass `model_type`, or choose another model.")
    if label_names is not None:
        if overridden := sorted({"num_labels", "id2label", "label2id"} & changes.keys()):
            raise ValueError(
                f"The dataset determines the {len(label_names)} classes. Remove {', '.join(overridden)} from "
                "config_overrides."
            )
        # They determine the number of classes. With `num_labels`, transformers would warn about the model's own names,
        # but the configuration of timm models needs it.
        if model_type == "timm_wrapper":
            changes["num_labels"] = len(label_names)
        changes["id2label"] = dict(enumerate(label_names))
        changes["label2id"] = {name: index for index, name in enumerate(label_names)}
        if (problem_type := changes.get("problem_type")) not in (None, SINGLE_LABEL):
            raise ValueError(
                f"Images have one label each, so problem_type must be {SINGLE_LABEL!r}, got {problem_type!r}. Remove "
                "it from config_overrides."
            )
    if config_dict.get("quantization_config") and not from_scratch:
        raise ValueError(
            f"{name_or_path} has quantized weights (quantization_config in its config.json), which cannot be loaded "
            "in float32. Choose the model before quantization."
        )

    reason = describe_unsupported({"model_type": model_type, **config_dict, **changes})
    if reason is None and not plain:
        config_class, model_class = FAMILIES[model_type]
    elif tokenmixup:
        raise ValueError(f"{reason}. Remove {', '.join(sorted(tokenmixup))} to train without TokenMixup.")
    else:
        if not hub_options.get("trust_remote_code"):
            _validate_model_type(model_type)
        config_class, model_class = AutoConfig, AutoModelForImageClassification

    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if name_or_path is None:
        known = PreTrainedConfig if config_class is AutoConfig else config_class
        defaults = AutoConfig.for_model(model_type) if known is PreTrainedConfig else config_class()
        changes |= _image_size_change(image_size, config_overrides, defaults)
        changes = _nest_vision_attributes(changes, defaults)
        _validate_config_keys(changes, defaults)
        with _wrap_init_errors(model_type, config_overrides):
            config = type(defaults)(**changes)
    else:
        original = config_class.from_pretrained(name_or_path, **hub_options)
        changes |= _image_size_change(image_size, config_overrides, original)
        changes = _nest_vision_attributes(changes, original)
        with _wrap_init_errors(model_type, config_overrides):
            config, unused = config_class.from_pretrained(
                name_or_path, return_unused_kwargs=True, **changes, **hub_options
            )
        _validate_config_keys(unused, config)
        if (grid := token_grid(config)) is not None and min(grid) < 1:
            vision = get_vision_config(config)
            raise ValueError(
                f"image_size {vision.image_size} is smaller than the patch size "
                f"{getattr(vision, 'patch_size', None)}, so there are no tokens. Increase image_size."
            )
    if label_names is not None:
        validate_single_label(config)
    # TokenMixup classifiers log this warning themselves.
    if plain and (family_config := get_family_config(config)) and (hint := border_hint(family_config)):
        logger.warning(hint)
    if from_scratch:
        build = model_class.from_config if model_class is AutoModelForImageClassification else model_class._from_config
        with _wrap_init_errors(model_type, config_overrides):
            return build(config, dtype=torch.float32, **options)
    loaded = None
    if model_class is AutoModelForImageClassification:
        loaded = config_to_load_with(model_class, config, original)
    try:
        with _wrap_init_errors(model_type, config_overrides, unchanged="ignore_mismatched_sizes"):
            model, report = model_class.from_pretrained(
                name_or_path,
                config=loaded or config,
                dtype=torch.float32,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                output_loading_info=True,
                **options,
                **hub_options,
            )
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {name_or_path} cannot be read ({error}): the file is corrupted or truncated. Copy or "
            "download it again."
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        num_trained = original.num_labels
        if num_trained != config.num_labels:
            raise ValueError(
                f"{name_or_path} was trained for {num_trained} classes, but the data has {config.num_labels} classes. "
                "Pass `ignore_mismatched_sizes` to train a new classifier."
            ) from error
        hint = f"Remove {config_overrides} from config_overrides" if config_overrides else "Correct its config.json"
        raise ValueError(f"The weights of {name_or_path} have other shapes than its configuration. {hint}.") from error
    if loaded is not None:
        resize_positions(model, config, str(name_or_path))
    newly_initialized = _validate_loaded_weights(
        name_or_path, model, report, require_all=plain, overrides=config_overrides
    )
    if label_names is not None:
        # If the number of names differs from the number of outputs, the classifier has no names.
        names = [f"LABEL_{index}" for index in range(len(label_names))]
        if original.num_labels == len(label_names):
            names = class_names(original, str(name_or_path))
        fit_classifier(model, newly_initialized, names, label_names, ignore_mismatched_sizes, str(name_or_path))
    return model


def _image_size_change(
    image_size: int | Sequence[int] | None, overrides: dict[str, Any] | None, config: PreTrainedConfig
) -> dict[str, Any]:
    if image_size is None or get_image_size(config) is None:
        return {}
    override = (overrides or {}).get("image_size", image_size)
    height, width = height_and_width(image_size)
    if height_and_width(override) != (height, width):
        raise ValueError(
            f"image_size is {image_size}, but config_overrides has image_size {override}. Remove one of them."
        )
    return {"image_size": height if height == width else image_size}


def _nest_vision_attributes(changes: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Move attributes that only `vision_config` has into it, such as the `image_size` of CLIP."""
    vision = get_vision_config(config)
    known = vision.to_dict().keys() - config.to_dict().keys()
    nested = {name: value for name, value in changes.items() if name in known}
    if not nested:
        return changes
    others = {name: value for name, value in changes.items() if name not in known}
    return others | {"vision_config": {**(changes.get("vision_config") or {}), **nested}}


def load_config_dict(name_or_path: str, **hub_options) -> dict[str, Any]:
    """Load the config.json of a model.

    Args:
        name_or_path: name of a model on the Hub, or a folder.
        hub_options: `revision`, `token`, `cache_dir`.

    Raises:
        ValueError: if the model does not exist, or its config.json is invalid.
    """
    expected = "expected a folder with a config.json, as save_pretrained writes it, or the name of a model on the Hub"
    if Path(name_or_path).is_file():
        raise ValueError(f"{str(name_or_path)!r} is a file, not a model: {expected}.")
    not_an_object = f"The config.json of {name_or_path} must contain a JSON object: {expected}."
    try:
        config_dict = PreTrainedConfig.get_config_dict(name_or_path, **hub_options)[0]
    except (OSError, HFValidationError) as error:
        raise ValueError(f"Model {str(name_or_path)!r} not found: {expected}. ({error})") from error
    # Older versions of transformers fail if the content is no object.
    except (AttributeError, TypeError) as error:
        raise ValueError(not_an_object) from error
    if not isinstance(config_dict, dict):
        raise ValueError(not_an_object)
    if not config_dict.get("model_type"):
        raise ValueError(f"{name_or_path} has no config.json that names a model_type: {expected}.")
    return config_dict


def _validate_model_type(model_type: str) -> None:
    # Registered types are in the mappings, but not among the names.
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        own = (config_class.model_type for config_class, _ in FAMILIES.values())
        known = sorted({*MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, *own})
        suggestion = did_you_mean(str(model_type), known, repr, otherwise=f". The types are {', '.join(known)}.")
        if model_type in UNSUPPORTED:
            suggestion = f": {UNSUPPORTED[model_type]}."
        raise ValueError(
            f"There is no image classifier of type {model_type!r} in this version of transformers{suggestion}"
        )


@contextmanager
def _wrap_init_errors(
    model_type: str, overrides: dict[str, Any] | None, unchanged: str | None = None
) -> Iterator[None]:
    """Add `config_overrides` to the message of errors that transformers raises for them.

    Args:
        model_type: type of the model.
        overrides: `config_overrides`; without them, errors are not changed.
        unchanged: errors whose message contains this text are not changed.
    """
    try:
        yield
    except MODEL_INIT_ERRORS as error:
        if not overrides or type(error) is ValueError or (unchanged is not None and unchanged in str(error)):
            raise
        raise ValueError(
            f"config_overrides {overrides} are invalid for a {model_type} ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Correct or remove the invalid values."
        ) from error


def _validate_loaded_weights(
    name_or_path: str,
    model: PreTrainedModel,
    report: dict[str, Any],
    require_all: bool,
    overrides: dict[str, Any] | None,
) -> set[str]:
    """Return the names of the newly initialized tensors.

    Raises:
        ValueError: if more than half of the tensors are newly initialized, or any of them with `require_all`, or if
            `overrides` of the configuration change the shape of other tensors than the classifier's.
    """
    mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    classifier_prefixes = tuple(f"{name}." for name in get_class_layers(model))
    lost = sorted(name for name in mismatched if not name.startswith(classifier_prefixes))
    if overrides and classifier_prefixes and lost:
        raise ValueError(
            f"With config_overrides {overrides}, {len(lost)} tensors of {name_or_path} have another shape "
            f"({format_list(lost, 3)}) and would be initialized randomly. Remove config_overrides, or pass "
            "`from_scratch` to use only the configuration."
        )
    newly_initialized = sorted({*report["missing_keys"], *mismatched})
    total = len([name for name in model.state_dict() if ".scorenet." not in name])
    if not newly_initialized or not require_all and 2 * len(newly_initialized) <= total:
        return set(newly_initialized)
    raise ValueError(
        f"The weights of {name_or_path} do not fit a {type(model).__name__} with its configuration: "
        f"{len(newly_initialized)} of {total} tensors are missing or have another shape "
        f"({format_list(newly_initialized, 3)}) and would be initialized randomly. Choose a checkpoint of this type "
        "and size, or pass `from_scratch` to use only the configuration."
    )


def _validate_config_keys(changes: dict[str, Any], config: PreTrainedConfig) -> None:
    attributes = [config.to_dict(), get_vision_config(config).to_dict()]
    known = [*{name: None for part in attributes for name in part}, "num_labels", "id2label", "label2id"]
    known += [] if "image_size" in known or not hasattr(config, "image_size") else ["image_size"]
    for name in changes:
        if name not in known:
            suggestion = did_you_mean(name, known, repr, otherwise=f". It has {', '.join(sorted(known))}.")
            raise ValueError(f"{type(config).__name__} has no attribute {name!r}{suggestion}")
