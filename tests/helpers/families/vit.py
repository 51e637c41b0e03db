"""Tiny ViT."""

from . import Family, rest_of_vit_layer

CASES = {"vit": Family(rest_of_layer=rest_of_vit_layer)}
