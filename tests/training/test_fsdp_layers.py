"""What FSDP2 shards a model by."""

from types import SimpleNamespace

import pytest
from helpers.families import BOTH, TESTED, build_tiny
from helpers.tiny_training import plain_vit, resnet, tokenmixup_cct, tokenmixup_vit

from hf_tokenmixup.models import FAMILIES
from hf_tokenmixup.training.fsdp import set_transformer_layer_cls_to_wrap


def wrapped_names(model, given=None):
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=given)
    set_transformer_layer_cls_to_wrap(plugin, model)
    return plugin.transformer_cls_names_to_wrap


@pytest.mark.parametrize(
    "make_model, given, expected",
    [
        (tokenmixup_vit, None, ["TokenMixupViTLayer"]),
        (plain_vit, None, ["ViTLayer"]),
        (tokenmixup_cct, None, ["TokenMixupCctLayer"]),
        (tokenmixup_vit, ["ViTEmbeddings"], ["ViTEmbeddings"]),
        (resnet, None, ["ResNetConvLayer", "ResNetShortCut"]),
    ],
)
def test_fsdp_wraps_transformer_layers_by_default(make_model, given, expected):
    assert wrapped_names(make_model(), given) == expected


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("model_type", TESTED)
def test_fsdp_wraps_transformer_layers_of_family(model_type, plain):
    model = build_tiny(model_type, **BOTH)
    if plain:
        model = model.to_plain_model()
    names = wrapped_names(model)
    modules = list(model.modules())
    (layer_name,) = {type(layer).__name__ for layer in FAMILIES[model_type][1].get_transformer_layers(model)}
    assert layer_name in names
    # Accelerate raises an error for a name without a module.
    assert set(names) <= {type(module).__name__ for module in modules}
    # Accelerate wraps the input embedding too. A module may be in one group only.
    embedding = model.get_input_embeddings()
    if embedding is not None:
        wrapped = [module for module in modules if type(module).__name__ in names]
        assert not any(embedding in module.modules() for module in wrapped)
