"""Tiny ViT."""

from . import Family


def rest_of_layer(layer, hidden, attn_output):
    hidden = hidden + attn_output
    return hidden + layer.mlp(layer.layernorm_after(hidden))


CASES = {"vit": Family(rest_of_layer=rest_of_layer)}
