"""Any image classifier by name: with TokenMixup where its family has it, plain otherwise."""

import difflib
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

from .cct import TokenMixupCctConfig, TokenMixupCctForImageClassification
from .cct.configuration_cct import height_and_width
from .heads import class_names, fit_classifier
from .positions import border_hint, config_to_load_with, resize_positions, token_grid
from .task import PLAIN_OUTPUTS, SINGLE_LABEL, validate_single_label
from .vit import TokenMixupViTConfig, TokenMixupViTForImageClassification

logger = logging.getLogger(__name__)

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "cct": (TokenMixupCctConfig, TokenMixupCctForImageClassification),
    "vit": (TokenMixupViTConfig, TokenMixupViTForImageClassification),
}
# What the host raises for a configuration that no network can be built of.
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
    """Open or build an image classifier, in float32.

    Args:
        name_or_path: a model on the Hub or a folder.
        model_type: in place of ``name_or_path`` when training from scratch: the type's default configuration.
        from_scratch: take the configuration alone, with fresh weights.
        plain: without TokenMixup in any case, which is enough to evaluate.
        label_names: the class names in order, for training on one label per image; None leaves the model's own. A
            classifier of the same classes in another order is reordered.
        tokenmixup: settings of TokenMixup; those not named stay as the checkpoint has them.
        config_overrides: other attributes of the configuration. Learned positions are interpolated for another
            `image_size`.
        image_size: the same for models whose configuration has an image size; ignored for others.
        ignore_mismatched_sizes: start a fresh classifier where the classes or their number differ.
        attn_implementation: as in transformers, its choice if None.
        hub_options: ``revision``, ``token``, ``cache_dir``.

    Raises:
        ValueError: without a name or model type, or one that does not exist; for settings of TokenMixup with a family
            that has none; for attributes that the configuration does not have, or of which no network can be built;
            for weights that cannot be read, are quantized or are another network's, for a classifier of other classes
            without ``ignore_mismatched_sizes``, and, with ``plain``, for one that is not there.
    """
    if name_or_path is None and not (from_scratch and model_type):
        raise ValueError(
            "No model was named: give model_name_or_path, or from_scratch with a model_type (and config_overrides)."
        )
    stored = load_config_dict(name_or_path, **hub_options) if name_or_path else {}
    if model_type is not None and stored.get("model_type", model_type) != model_type:
        raise ValueError(
            f"{name_or_path} is of type {stored['model_type']!r}, got model_type {model_type!r} beside it: leave that "
            "out."
        )
    model_type = stored.get("model_type", model_type)
    tokenmixup = {} if plain else tokenmixup or {}
    changes = {**PLAIN_OUTPUTS, **(config_overrides or {}), **tokenmixup}
    if "model_type" in changes:
        raise ValueError("The model type is no override of a configuration: give model_type, or another model.")
    if label_names is not None:
        if ours := sorted({"num_labels", "id2label", "label2id"} & changes.keys()):
            raise ValueError(f"The classes are those of the data, {len(label_names)}: leave out {', '.join(ours)}.")
        changes["num_labels"] = len(label_names)
        changes["id2label"] = dict(enumerate(label_names))
        changes["label2id"] = {name: index for index, name in enumerate(label_names)}
        if (problem_type := changes.get("problem_type")) not in (None, SINGLE_LABEL):
            raise ValueError(
                f"The images have one label each, so problem_type must be {SINGLE_LABEL!r}, got {problem_type!r}: "
                "remove it from config_overrides."
            )
    if stored.get("quantization_config") and not from_scratch:
        raise ValueError(
            f"{name_or_path} has quantized weights (quantization_config in its config.json), which are not trained or "
            "evaluated in float32. Name the model that was quantized."
        )

    if model_type in FAMILIES and not plain:
        config_class, model_class = FAMILIES[model_type]
    elif tokenmixup:
        raise ValueError(
            f"TokenMixup is there for the model types {', '.join(sorted(FAMILIES))}, and this model is of type "
            f"{model_type!r}: leave out {', '.join(sorted(tokenmixup))} to train it as it is."
        )
    else:
        if not hub_options.get("trust_remote_code"):
            _validate_model_type(model_type)
        config_class, model_class = AutoConfig, AutoModelForImageClassification

    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if name_or_path is None:
        known = PreTrainedConfig if config_class is AutoConfig else config_class
        defaults = AutoConfig.for_model(model_type) if known is PreTrainedConfig else config_class()
        changes |= _image_size_change(image_size, config_overrides, defaults)
        _refuse_unknown(changes, defaults)
        with _wrap_init_errors(model_type, config_overrides):
            config = type(defaults)(**changes)
    else:
        original = config_class.from_pretrained(name_or_path, **hub_options)
        changes |= _image_size_change(image_size, config_overrides, original)
        with _wrap_init_errors(model_type, config_overrides):
            config, unused = config_class.from_pretrained(
                name_or_path, return_unused_kwargs=True, **changes, **hub_options
            )
        _refuse_unknown(unused, config)
        if (grid := token_grid(config)) is not None and min(grid) < 1:
            raise ValueError(
                f"image_size {config.image_size} is smaller than a patch of {getattr(config, 'patch_size', None)} "
                "pixels: no token is left. Pass a larger image_size."
            )
    if label_names is not None:
        validate_single_label(config)
    # The classes with TokenMixup warn of it themselves.
    if model_type in FAMILIES and plain and (hint := border_hint(config)):
        logger.warning(hint)
    if from_scratch:
        build = model_class.from_config if model_class is AutoModelForImageClassification else model_class._from_config
        with _wrap_init_errors(model_type, config_overrides):
            return build(config, dtype=torch.float32, **options)
    loaded = None
    if model_class is AutoModelForImageClassification:
        loaded = config_to_load_with(model_class, config, original)
    try:
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
            f"The weights of {name_or_path} cannot be read ({error}): the file is damaged or cut short. Copy or "
            "download it anew."
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        trained = len(stored.get("id2label", "LABEL_0 LABEL_1".split()))
        if trained != config.num_labels:
            raise ValueError(
                f"{name_or_path} was trained for {trained} classes and does not fit {config.num_labels} classes, as "
                "asked for. To start a fresh classifier for them give ignore_mismatched_sizes."
            ) from error
        raise ValueError(
            f"The weights of {name_or_path} are of other shapes than its configuration says"
            + (f" with {config_overrides}: leave that out" if config_overrides else ": correct its config.json")
            + ", or start those tensors afresh with ignore_mismatched_sizes."
        ) from error
    if loaded is not None:
        resize_positions(model, config, str(name_or_path))
    fresh = _validate_loaded_weights(name_or_path, model, report, whole=plain)
    if label_names is not None:
        # Without as many names as the classifier has outputs, it is one without names.
        names = [f"LABEL_{index}" for index in range(len(label_names))]
        if original.num_labels == len(label_names):
            names = class_names(original, str(name_or_path))
        fit_classifier(model, fresh, names, label_names, ignore_mismatched_sizes, str(name_or_path))
    return model


def _image_size_change(
    image_size: int | Sequence[int] | None, overrides: dict[str, Any] | None, config: PreTrainedConfig
) -> dict[str, Any]:
    if image_size is None or not hasattr(config, "image_size"):
        return {}
    given = (overrides or {}).get("image_size", image_size)
    if height_and_width(given) != height_and_width(image_size):
        raise ValueError(
            f"image_size is {image_size}, but config_overrides has image_size {given}: remove one of them."
        )
    return {"image_size": image_size}


def load_config_dict(name_or_path: str, **hub_options) -> dict[str, Any]:
    """The content of a model's config.json.

    Raises:
        ValueError: there is no such model, or its config.json is not that of one.
    """
    expected = "expected a folder with a config.json, as save_pretrained writes it, or the name of a model on the Hub"
    if Path(name_or_path).is_file():
        raise ValueError(f"{str(name_or_path)!r} is a file, not a model: {expected}.")
    try:
        stored = PreTrainedConfig.get_config_dict(name_or_path, **hub_options)[0]
    except (OSError, HFValidationError) as error:
        raise ValueError(f"No model {str(name_or_path)!r}: {expected}. ({error})") from error
    # Older versions of the host look into it at once.
    except (AttributeError, TypeError) as error:
        stored = error
    if not isinstance(stored, dict):
        raise ValueError(f"The config.json of {name_or_path} must hold a JSON object: {expected}.")
    if not stored.get("model_type"):
        raise ValueError(f"{name_or_path} has no config.json that names a model_type: {expected}.")
    return stored


def _validate_model_type(model_type: str) -> None:
    # Types that somebody registered are in the mappings and not among the names.
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        known = {*MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, *FAMILIES}
        near = difflib.get_close_matches(str(model_type), sorted(known), n=1)
        raise ValueError(
            f"There is no image classifier of type {model_type!r} in this version of transformers"
            + (f": did you mean {near[0]!r}?" if near else f"; the types are {', '.join(sorted(known))}.")
        )


@contextmanager
def _wrap_init_errors(model_type: str, overrides: dict[str, Any] | None) -> Iterator[None]:
    """Tell what was asked for where the host fails at it; errors of ours, and without overrides, say so themselves."""
    try:
        yield
    except MODEL_INIT_ERRORS as error:
        if not overrides or type(error) is ValueError:
            raise
        raise ValueError(
            f"No {model_type} can be built with config_overrides {overrides} ({type(error).__name__}: "
            f"{' '.join(str(error).split())}): correct or leave out what is not possible."
        ) from error


def _validate_loaded_weights(
    name_or_path: str, model: PreTrainedModel, report: dict[str, Any], whole: bool
) -> set[str]:
    """Names of the tensors that were not loaded.

    Raises:
        ValueError: the checkpoint was another network's, or ``whole`` and not everything was in it.
    """
    mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    fresh = sorted({*report["missing_keys"], *mismatched})
    total = len([name for name in model.state_dict() if ".scorenet." not in name])
    if not fresh or not whole and 2 * len(fresh) <= total:
        return set(fresh)
    shown = ", ".join(fresh[:3]) + (f" and {len(fresh) - 3} more" if len(fresh) > 3 else "")
    raise ValueError(
        f"The weights of {name_or_path} are not those of a {type(model).__name__} as its configuration has it: "
        f"{len(fresh)} of {total} tensors are not among them, or of another shape ({shown}), and would be random. "
        "Name a checkpoint of this type and size, or give from_scratch to take the configuration alone."
    )


def _refuse_unknown(changes: dict[str, Any], config: PreTrainedConfig) -> None:
    known = [*config.to_dict(), "num_labels", "id2label", "label2id"]
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"{type(config).__name__} has no attribute {name!r}"
                + (f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(known))}.")
            )
