"""Tiny DINOv2, without and with registers."""

from . import Family, read_cls_and_patch_mean

OWN = {"mlp_ratio": 2, "layerscale_value": 0.7}


def rest_of_layer(layer, hidden, attn_output):
    hidden = hidden + 0.7 * attn_output
    return hidden + 0.7 * layer.mlp(layer.norm2(hidden))


CASES = {
    "dinov2": Family(own=OWN, rest_of_layer=rest_of_layer, pool=read_cls_and_patch_mean),
    "dinov2_with_registers": Family(
        own=OWN | {"num_register_tokens": 3},
        num_prefix_tokens=4,
        rest_of_layer=rest_of_layer,
        pool=read_cls_and_patch_mean,
    ),
}
