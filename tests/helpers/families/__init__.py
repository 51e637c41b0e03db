"""Tiny model of each family, with what the tests compare it with. A family has one module here."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging import version
from transformers import PreTrainedModel, set_seed

from hf_tokenmixup.models import FAMILIES

# Names as in `ViTConfig`. A family with other names has a `translate`.
SIZE = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "image_size": 20,
    "patch_size": 5,
    "num_labels": 5,
    "initializer_range": 0.2,
}
BOTH = {"horizontal_layers": [1], "horizontal_tau": None, "horizontal_rho": 0.002, "vertical_layers": [2, 3]}


def read_cls(hidden: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """The CLS token (B, D)."""
    return hidden[:, 0]


def read_patch_mean(hidden: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """The mean of the patch tokens (B, D)."""
    return hidden[:, num_prefix_tokens:].mean(dim=1)


def read_cls_and_patch_mean(hidden: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """The CLS token and the mean of the patch tokens (B, 2 D)."""
    return torch.cat([read_cls(hidden, num_prefix_tokens), read_patch_mean(hidden, num_prefix_tokens)], dim=1)


def project_separately(layer: torch.nn.Module, normed: torch.Tensor, sources: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values by separate projections, each (B, N, D)."""
    attention = layer.attention_module
    return [attention.q_proj(normed), attention.k_proj(sources), attention.v_proj(sources)]


def rest_of_vit_layer(layer: torch.nn.Module, hidden: torch.Tensor, attn_output: torch.Tensor) -> torch.Tensor:
    """The layer of a ViT after its attention."""
    hidden = hidden + attn_output
    return hidden + layer.mlp(layer.layernorm_after(hidden))


@dataclass(frozen=True, kw_only=True)
class Family:
    """Tiny model of a model type.

    Attributes:
        own: settings besides `SIZE`.
        translate: converts settings with names of `ViTConfig` to those of the family.
        submodule: a module that each plain layer calls once, after attention.
        num_prefix_tokens: P of the tiny model.
        rest_of_layer: the layer after its attention, from `(layer, hidden, attn_output)`; None: not written by hand.
        project: queries, keys and values from `(layer, normed, sources)`.
        score_bias: term of the attention scores (H, N, N), or None, from `(model, layer)`.
        output_projection: name of the projection after attention.
        embed: tokens of images, from `(model, images)`.
        pool: input of the classifier, from `(hidden, num_prefix_tokens)`, before or after `final_norm`.
        classify: logits, from `(model, hidden, num_prefix_tokens)`; None: `classifier(pool(final_norm(hidden)))`.
        final_norm: name of the last normalization in the base model.
        embedding_module: name of the module in the base model whose output is the input of the first layer.
        embedding_parameters: parts of the names of the parameters of the embeddings.
        classifier: name of the classifier.
        output_attentions: whether the plain model returns attention maps and hidden states (B, N, D).
        reproducible_attention: attention implementation with the same bits with and without gradients.
    """

    own: dict[str, Any] = field(default_factory=dict)
    translate: Callable[[dict[str, Any]], dict[str, Any]] = lambda settings: settings
    submodule: str = "mlp"
    num_prefix_tokens: int = 1
    rest_of_layer: Callable[..., torch.Tensor] | None = None
    project: Callable[..., list[torch.Tensor]] = project_separately
    score_bias: Callable[..., torch.Tensor | None] = lambda model, layer: None
    output_projection: str = "o_proj"
    embed: Callable[..., torch.Tensor] = lambda model, images: model.base_model.embeddings(images)
    pool: Callable[[torch.Tensor, int], torch.Tensor] = read_cls
    classify: Callable[..., torch.Tensor] | None = None
    final_norm: str = "layernorm"
    embedding_module: str = "embeddings"
    embedding_parameters: tuple[str, ...] = ("embeddings",)
    classifier: str = "classifier"
    output_attentions: bool = True
    reproducible_attention: str = "sdpa"


def collect_cases() -> dict[str, Family]:
    """Return the tiny model of each model type."""
    cases: dict[str, Family] = {}
    for info in pkgutil.iter_modules(__path__):
        cases |= getattr(importlib.import_module(f"{__name__}.{info.name}"), "CASES", {})
    return cases


CASES = collect_cases()
# Without aliases, and without families that the installed version of transformers is too old for.
TESTED = sorted(
    model_type
    for model_type, (config_class, model_class) in FAMILIES.items()
    if config_class.model_type == model_type
    and version.parse(model_class.min_transformers_version or "0") <= version.parse(transformers.__version__)
)


# The plain models of timm return no attention maps. `test_timm_wrapper.py` compares with their attention.
WITH_MAPS = [model_type for model_type in TESTED if CASES[model_type].output_attentions]


def build_tiny(model_type: str, *, seed: int = 0, randomize: bool = True, **settings: Any) -> PreTrainedModel:
    """Create the tiny model of a family in training mode, with the same random weights each time.

    Args:
        model_type: one of `TESTED`.
        seed: seed of the weights.
        randomize: give random values to tokens, positions and other parameters that start at zero, and would hide an
            error; otherwise the weights are those of a new model.
        settings: settings of TokenMixup, `attn_implementation`, and attributes with names of `ViTConfig`.
    """
    config_class, model_class = FAMILIES[model_type]
    case = CASES[model_type]
    attention = {"attn_implementation": settings.pop("attn_implementation", "sdpa")}
    if not model_class.base_model_class._supports_sdpa:
        # Older versions of transformers refuse any implementation for models of timm.
        attention = {}
    settings = SIZE | {"attention_probs_dropout_prob": 0.0} | case.own | settings
    set_seed(seed)
    model = model_class(config_class(**case.translate(settings), **attention)).train()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters() if randomize else ():
        if not name.endswith("bias") and not parameter.any():
            parameter.data.normal_(generator=generator)
    return model
