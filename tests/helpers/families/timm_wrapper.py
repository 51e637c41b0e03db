"""Tiny models of timm behind `TimmWrapperForImageClassification`."""

from typing import Any

from hf_tokenmixup.models import FAMILIES

from . import Family

# Arguments of timm for attributes of `ViTConfig`.
_ARGUMENTS = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "image_size": "img_size",
    "patch_size": "patch_size",
    "hidden_dropout_prob": "proj_drop_rate",
    "attention_probs_dropout_prob": "attn_drop_rate",
    "drop_path_rate": "drop_path_rate",
}


def translate(settings: dict[str, Any]) -> dict[str, Any]:
    """Convert settings with names of `ViTConfig` to those of `TimmWrapperConfig`."""
    arguments = {_ARGUMENTS[name]: value for name, value in settings.items() if name in _ARGUMENTS}
    arguments["mlp_ratio"] = settings["intermediate_size"] / settings["hidden_size"]
    others = {name: value for name, value in settings.items() if name not in (*_ARGUMENTS, "intermediate_size")}
    return others | {"model_args": arguments | settings.get("model_args", {})}


def project(layer, normed, sources):
    weights, biases = layer.attn.qkv.weight.chunk(3), layer.attn.qkv.bias.chunk(3)
    inputs = (normed, sources, sources)
    return [states @ weight.T + bias for states, weight, bias in zip(inputs, weights, biases, strict=True)]


def rest_of_layer(layer, hidden, attn_output):
    hidden = hidden + attn_output
    return hidden + layer.mlp(layer.norm2(hidden))


def embed(model, images):
    return model.timm_model.norm_pre(model.timm_model._pos_embed(model.timm_model.patch_embed(images)))


CASES = {}
if "timm_wrapper" in FAMILIES:
    CASES["timm_wrapper"] = Family(
        own={"architecture": "vit_tiny_patch16_224", "model_args": {"dynamic_img_size": True}},
        translate=translate,
        rest_of_layer=rest_of_layer,
        project=project,
        output_projection="proj",
        embed=embed,
        final_norm="norm",
        embedding_module="norm_pre",
        embedding_parameters=("patch_embed", "cls_token", "pos_embed"),
        classifier="timm_model.head",
        output_attentions=False,
    )
