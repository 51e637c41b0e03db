"""Tiny DeiT."""

from . import Family, rest_of_vit_layer

CASES = {"deit": Family(num_prefix_tokens=2, rest_of_layer=rest_of_vit_layer)}
