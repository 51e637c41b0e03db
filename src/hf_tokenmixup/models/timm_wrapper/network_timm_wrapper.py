"""Facts about an architecture of timm, read from the model without weights."""

import copy
import json
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ...network import Network
from .layers_timm_wrapper import LAYER_CLASSES, VERTICAL_ATTENTION_CLASSES, find_unsupported_layer

# Their subclasses may compute features in another way.
SUPPORTED_MODELS = (VisionTransformer, VisionTransformerDistilled, Eva)
# What the classifier reads, by `global_pool` of timm. It is the mean of the patch tokens for all others.
_CLS_POOLS = ("token", "prr")
_NETWORKS: list[tuple[str, dict[str, Any] | None, Network]] = []


def create_without_weights(architecture: str, model_args: dict[str, Any] | None) -> nn.Module:
    """Create a model of timm on the meta device. Models are cached, so do not change them.

    Args:
        architecture: name of the architecture, with or without a tag after a dot.
        model_args: further arguments of `timm.create_model`.

    Raises:
        ValueError: if timm cannot create the model.
    """
    try:
        return _create_cached(architecture, json.dumps(model_args or {}, sort_keys=True))
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, KeyError) as error:
        raise ValueError(
            f"timm {timm.__version__} cannot create {architecture!r} with model_args={model_args or {}}: {error} "
            "Correct `architecture` and `model_args`, or install a newer version of timm."
        ) from error


@lru_cache(maxsize=64)
def _create_cached(architecture: str, model_args: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(architecture, pretrained=False, num_classes=2, **json.loads(model_args))


def describe_unsupported_model(architecture: str, model: nn.Module) -> str | None:
    """Describe why a model of timm does not support TokenMixup.

    Args:
        architecture: name of the architecture.
        model: the model.

    Returns:
        A sentence for an error message, without the full stop; None if it is supported.
    """
    if type(model) not in SUPPORTED_MODELS:
        names = ", ".join(supported.__name__ for supported in SUPPORTED_MODELS)
        return f"TokenMixup supports the classes {names} of timm, but {architecture!r} is a {type(model).__name__}"
    if (found := find_unsupported_layer(model.blocks)) is not None:
        blocks, attention = (
            ", ".join(supported.__name__ for supported in classes)
            for classes in (LAYER_CLASSES, VERTICAL_ATTENTION_CLASSES)
        )
        return (
            f"TokenMixup supports blocks of the classes {blocks} of timm with attention of the classes {attention}, "
            f"but {architecture!r} has {found}"
        )
    if not model.global_pool:
        return f"{architecture!r} has global_pool={model.global_pool!r}, so its classifier reads each token by itself"
    if getattr(model.patch_drop, "prob", 0) > 0:
        return (
            f"{architecture!r} has patch_drop_rate={model.patch_drop.prob} in `model_args`, which removes other "
            "tokens in each image"
        )
    return None


def get_network(architecture: str, model_args: dict[str, Any] | None) -> Network:
    """Return the sizes of a model of timm, and what its classifier reads.

    Args:
        architecture: name of the architecture.
        model_args: further arguments of `timm.create_model`.

    Raises:
        ValueError: if timm cannot create the model, or it does not support TokenMixup.
    """
    # A compiler cannot trace the creation of a model, so a forward pass reads the sizes from this list.
    for known_architecture, known_args, network in _NETWORKS:
        if known_architecture == architecture and known_args == model_args:
            return network
    model = create_without_weights(architecture, model_args)
    if reason := describe_unsupported_model(architecture, model):
        raise ValueError(f"{reason}. Choose another architecture, or train without settings of TokenMixup.")
    network = _describe_network(model)
    _NETWORKS.append((architecture, copy.deepcopy(model_args), network))
    return network


def _describe_network(model: nn.Module) -> Network:
    return Network(
        hidden_size=model.embed_dim,
        num_layers=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        mlp_size=model.blocks[0].mlp.fc2.in_features,
        image_size=tuple(model.patch_embed.img_size),
        patch_size=tuple(model.patch_embed.feat_ratio(as_scalar=False)),
        num_prefix_tokens=model.num_prefix_tokens,
        classifier_pooling="cls" if model.global_pool in _CLS_POOLS and model.num_prefix_tokens else "mean",
    )
