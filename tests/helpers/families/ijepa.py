"""Tiny I-JEPA."""

from . import Family, read_patch_mean, rest_of_vit_layer

CASES = {"ijepa": Family(num_prefix_tokens=0, rest_of_layer=rest_of_vit_layer, pool=read_patch_mean)}
