"""Add TokenMixup to a classifier that is already created, and remove it, in place."""

import dataclasses
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration import TokenMixupConfigMixin
from ..utils.text import did_you_mean
from .families import FAMILIES, UNSUPPORTED, describe_unsupported
from .modeling_tokenmixup import TokenMixupModelMixin
from .positions import border_hint

logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)

SETTINGS = tuple(field.name for field in dataclasses.fields(TokenMixupConfigMixin))
_PLAIN_CONFIG = "_plain_config"
# Attributes of a configuration that TokenMixup sets, and that of `save_pretrained` with the name of the model class.
_CONFIG_ATTRIBUTES = (*SETTINGS, "architectures")


class _PlainConfig(NamedTuple):
    config_class: type[PreTrainedConfig]
    attributes: dict[str, Any]


def add_tokenmixup(model: Model, **settings: Any) -> Model:
    """Add TokenMixup to a plain classifier, in place.

    The classes of the model, its configuration and its layers change to those of the family with TokenMixup. Weights,
    buffers, hooks, `requires_grad`, the mode and gradient checkpointing stay. Layers of HTM get a newly initialized
    ScoreNet, so create the optimizer afterwards, and wrap the model (peft, DDP, FSDP, accelerate) afterwards.

    Args:
        model: image classifier of a family that supports TokenMixup, such as a `ViTForImageClassification`.
        settings: settings of TokenMixup, see `hf_tokenmixup.configuration.TokenMixupConfigMixin`. Those that are not
            given are the ones that an exported model has in its configuration, or the defaults.

    Returns:
        The same model.

    Raises:
        ValueError: if the family does not support TokenMixup, the model has it already or is wrapped, no layers are
            given, or a setting is unknown, out of range or does not fit the model. The model is unchanged then.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_tokenmixup import add_tokenmixup, remove_tokenmixup
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=24, num_hidden_layers=3))
        >>> type(add_tokenmixup(model, horizontal_layers=[1], vertical_layers=[2])).__name__
        'TokenMixupViTForImageClassification'
        >>> type(remove_tokenmixup(model)).__name__
        'ViTForImageClassification'
    """
    config_class, model_class = _find_family(model)
    model_class._validate_transformers_version()
    if unknown := sorted(settings.keys() - set(SETTINGS)):
        others = f". The settings are {', '.join(SETTINGS)}."
        raise ValueError(f"TokenMixup has no setting {unknown[0]!r}{did_you_mean(unknown[0], SETTINGS, repr, others)}")
    config = config_class.from_dict(model.config.to_dict(), **settings)
    config.validate_tokenmixup_config()
    if not config.tokenmixup_enabled:
        raise ValueError(
            "No layer would mix tokens. Pass the layers: `horizontal_layers`, `vertical_layers` or both, such as "
            "add_tokenmixup(model, horizontal_layers=[3], vertical_layers=[4])."
        )
    if hint := border_hint(config):
        logger.warning_once(hint)

    plain = vars(model.config)
    vars(model)[_PLAIN_CONFIG] = _PlainConfig(
        type(model.config), {name: plain[name] for name in _CONFIG_ATTRIBUTES if name in plain}
    )
    model.config.__class__, model.__class__ = config_class, model_class
    plain.update({name: getattr(config, name) for name in SETTINGS})
    try:
        _validate_not_wrapped(model)
        model._convert_layers()
    except Exception:
        _restore(model)
        raise
    return model


def remove_tokenmixup(model: Model) -> Model:
    """Remove TokenMixup from a classifier, in place: undo `add_tokenmixup`.

    The classes are those of the plain model again, and ScoreNet and the settings of TokenMixup are removed. The
    remaining weights, buffers, hooks, `requires_grad`, the mode and gradient checkpointing stay as they are.

    Args:
        model: classifier with TokenMixup, by `add_tokenmixup` or loaded with it.

    Returns:
        The same model. See `TokenMixupModelMixin.to_plain_model` for a copy that can be loaded to train on.

    Raises:
        ValueError: if the model has no TokenMixup or is wrapped.
    """
    if not isinstance(model, TokenMixupModelMixin):
        raise ValueError(
            f"Expected a classifier with TokenMixup, got a {type(model).__name__}. Pass the classifier itself, "
            "without wrappers."
        )
    _validate_not_wrapped(model)
    return _restore(model)


def _restore(model: Model) -> Model:
    model._restore_layers()
    model.__class__ = model.base_model_class
    plain = vars(model).pop(_PLAIN_CONFIG, None)
    if plain is None:
        plain = _PlainConfig(model.config_class, {})
    vars(model).pop("_labels_validated", None)
    model.config.__class__ = plain.config_class
    for name in SETTINGS:
        vars(model.config).pop(name, None)
    vars(model.config).update(plain.attributes)
    return model


def _find_family(model: nn.Module) -> tuple[type[TokenMixupConfigMixin], type[TokenMixupModelMixin]]:
    """Return the classes with TokenMixup for a plain model.

    Raises:
        ValueError: if there are none.
    """
    if isinstance(model, TokenMixupModelMixin):
        raise ValueError(
            f"The model already is a {type(model).__name__}. To change its settings, call remove_tokenmixup(model) "
            "first."
        )
    families = {model_class.base_model_class: (config, model_class) for config, model_class in FAMILIES.values()}
    if type(model) in families:
        return families[type(model)]
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) in UNSUPPORTED:
        raise ValueError(f"{describe_unsupported(config.to_dict())}.")
    names = sorted(plain_class.__name__ for plain_class in families)
    raise ValueError(
        f"TokenMixup supports {', '.join(names)}, got {type(model).__name__}. Pass the classifier itself, before it "
        "is wrapped by peft, DDP, FSDP or torch.compile."
    )


def _validate_not_wrapped(model: TokenMixupModelMixin) -> None:
    """Validate that the classes of the model and of its layers determine the forward pass.

    Raises:
        ValueError: if accelerate replaced `forward`, or FSDP2 replaced a class.
    """
    for module in (model, *model.get_transformer_layers().modules()):
        if "forward" in vars(module) or isinstance(module, FSDPModule):
            raise ValueError(
                f"The forward pass of a {type(module).__name__} is replaced, as accelerate (`prepare`, `device_map`) "
                "and FSDP do. Call add_tokenmixup and remove_tokenmixup before that, or after "
                "accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
            )
