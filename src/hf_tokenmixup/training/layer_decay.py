"""Layer-wise decay of the learning rate for fine-tuning, as in BEiT (Bao et al., 2022), MAE and timm.

In a model of L layers, the learning rate is multiplied by

- decay^(L + 1) before the layers: patch and position embeddings, CLS and register tokens;
- decay^(L - i) in layer i, counted from 0;
- 1 after the layers: final normalization, pooling and classifier.

Adapters of LoRA have the factor of their layer. ScoreNet, which is a new classifier, has the factor 1. timm differs in
one place: a normalization directly after the layers has the factor of the last layer there.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..models import FAMILIES

if TYPE_CHECKING:
    from .trainer import TokenMixupTrainer


def layer_decay_factors(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the factor of the learning rate by parameter name.

    Args:
        model: classifier without wrappers.
        layer_decay: factor between two layers.

    Raises:
        ValueError: The transformer layers of the model are not known.
    """
    layers = find_transformer_layers(model)
    layer_of = {parameter: index for index, layer in enumerate(layers) for parameter in layer.parameters()}
    factors, is_after_layers = {}, False
    for name, parameter in model.named_parameters():
        is_after_layers |= parameter in layer_of
        if ".scorenet." in name:
            exponent = 0
        elif parameter in layer_of:
            exponent = len(layers) - layer_of[parameter]
        else:
            exponent = 0 if is_after_layers else len(layers) + 1
        factors[name] = layer_decay**exponent
    return factors


def find_transformer_layers(model: nn.Module) -> Sequence[nn.Module]:
    """Return the transformer layers of a classifier, with TokenMixup or without.

    Raises:
        ValueError: There are none, or several lists of modules could be the layers.
    """
    if hasattr(model, "get_transformer_layers"):
        return model.get_transformer_layers()
    for _, model_class in FAMILIES.values():
        if type(model) is model_class.base_model_class:
            try:
                return model_class.get_transformer_layers(model)
            except AttributeError:
                break  # An architecture of timm without transformer layers.
    config = getattr(model, "config", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and len(set(map(type, module))) == 1
    ]
    # `num_hidden_layers` is the number of stages in hierarchical models, which have `depths`.
    if len(found) == 1 and not hasattr(config, "depths"):
        return found[0]
    raise ValueError(
        f"`layer_decay` needs a model with a single list of transformer layers, and there is none in a "
        f"{type(model).__name__}. Remove `layer_decay`, or set it to 1."
    )


def validate_layer_decay(trainer: "TokenMixupTrainer") -> None:
    """Check that `layer_decay` has an effect on the model and the optimizer of a trainer.

    Raises:
        ValueError: It has none.
    """
    if trainer.args.layer_decay == 1:
        return
    # With `model_init`, it is the optimizer of an earlier run, which is created again.
    if trainer.optimizer is not None and trainer.model_init is None:
        raise ValueError(
            "`layer_decay` has no effect on an optimizer that is passed to the trainer. Set the learning rates of its "
            "parameter groups by hf_tokenmixup.training.apply_layer_decay(optimizer, model, layer_decay), and remove "
            "`layer_decay` from the arguments."
        )
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.deepspeed_config.get("optimizer"):
        raise ValueError(
            "`layer_decay` has no effect on the optimizer of the DeepSpeed configuration. Remove `optimizer` there, "
            "and select it by `optim`."
        )
    find_transformer_layers(trainer.classifier_model)


def apply_layer_decay(optimizer: torch.optim.Optimizer, model: nn.Module, layer_decay: float) -> None:
    """Split the parameter groups of an optimizer by layer and multiply their learning rates, in place.

    Call it before the first step and before a scheduler is created. Other options of a group, such as its weight
    decay, stay. The first group has the largest learning rate, which is the one that Trainer logs.

    Args:
        optimizer: optimizer of the parameters of `model`.
        model: classifier without wrappers.
        layer_decay: factor between two layers.

    Raises:
        ValueError: The optimizer does not contain all trainable parameters, so it does not use parameter groups, or it
            has no learning rate; or the transformer layers of the model are not known.
    """
    factors = layer_decay_factors(model, layer_decay)
    factor_of = {parameter: factors[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = list(optimizer.param_groups)
    optimized = {parameter for group in groups for parameter in group["params"]}
    if optimized != factor_of.keys() or any(group.get("lr") is None for group in groups):
        raise ValueError(
            f"`layer_decay` has no effect on {type(optimizer).__name__}, whose parameter groups do not have the "
            "parameters of the model and a learning rate. Remove `layer_decay`, or choose another optimizer, such as "
            "optim='adamw_torch'."
        )
    split = [
        group | {"lr": group["lr"] * factor, "params": [p for p in group["params"] if factor_of[p] == factor]}
        for factor in sorted(set(factor_of.values()), reverse=True)
        for group in groups
    ]
    optimizer.param_groups[:] = [group for group in split if group["params"]]
