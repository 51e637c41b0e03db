"""Tiny ViT-MSN."""

from . import Family, rest_of_vit_layer

CASES = {"vit_msn": Family(rest_of_layer=rest_of_vit_layer)}
