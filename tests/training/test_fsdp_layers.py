"""What FSDP2 shards a model by."""

from types import SimpleNamespace

import pytest
from helpers.tiny_training import plain_vit, resnet, tokenmixup_cct, tokenmixup_vit

from hf_tokenmixup.training.fsdp import set_transformer_layer_cls_to_wrap


@pytest.mark.parametrize(
    "make_model, given, expected",
    [
        (tokenmixup_vit, None, ["TokenMixupViTLayer"]),
        (plain_vit, None, ["ViTLayer"]),
        (tokenmixup_cct, None, ["TokenMixupCctLayer"]),
        (tokenmixup_vit, ["ViTEmbeddings"], ["ViTEmbeddings"]),
        (resnet, None, None),
    ],
)
def test_fsdp_wraps_transformer_layers_by_default(make_model, given, expected):
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=given)
    set_transformer_layer_cls_to_wrap(plugin, make_model())
    assert plugin.transformer_cls_names_to_wrap == expected
