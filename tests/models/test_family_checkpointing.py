"""Gradient checkpointing of all model families."""

import copy
import warnings

import pytest
from helpers.families import BOTH
from helpers.family_steps import DROPOUT, assert_same_step, layer_path, step

from hf_tokenmixup.models.gradient_checkpointing import enable_checkpointing

pytestmark = pytest.mark.usefixtures("separate_projections")

# For code that does not depend on the family.
general = pytest.mark.parametrize("build", ["vit", "cct"], indirect=True)


def usual_name(model, case, name):
    """Name of a parameter as in ViT, with `model.layers` for the layers."""
    if any(part in name for part in case.embedding_parameters):
        return f"embeddings.{name}"
    if name.startswith(f"{case.classifier}."):
        return name.replace(case.classifier, "classifier")
    return name.replace(layer_path(model), "model.layers")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("settings", [BOTH, {**BOTH, "horizontal_layers": [0, 3], "scorenet_detach": False}])
def test_gradient_checkpointing_is_exact(build, reentrant, settings, images, labels):
    model = build(**settings, **DROPOUT, attn_implementation=build.case.reproducible_attention)
    expected = step(model, images, labels)
    checkpointed = copy.deepcopy(model)
    enable_checkpointing(checkpointed, {"use_reentrant": reentrant})
    calls = []
    checkpointed.get_transformer_layers()[2].get_submodule(build.case.submodule).register_forward_hook(
        lambda *args: calls.append(1)
    )
    assert_same_step(expected, step(checkpointed, images, labels))
    assert len(calls) == 2


# Conditions on names in which the layers are `model.layers`, and as in ViT `embeddings` and `classifier`.
TRAINED = {
    "all but embeddings": lambda name: "embeddings" not in name,
    "last layers and head": lambda name: ".layers.2." in name or ".layers.3." in name or name.startswith("classifier"),
    "head": lambda name: name.startswith("classifier") or ".scorenet." in name,
    "every second layer": lambda name: ".layers.1." in name or ".layers.3." in name,
    "biases of layers": lambda name: ".layers." in name and name.endswith(".bias"),
    "one weight of layer 2": lambda name: ".layers.2." in name and name.endswith(".weight") and ".norm" not in name,
    "attention pooling and head": lambda name: ".layers." not in name and "embeddings" not in name,
}


@general
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"preserve_rng_state": True}])
@pytest.mark.parametrize("settings", [{}, BOTH])
@pytest.mark.filterwarnings("error:None of the inputs have requires_grad", "ignore:torch.utils.checkpoint")
def test_gradient_checkpointing_frozen_weights_is_exact(build, trained, kwargs, settings, images, labels):
    assert_checkpointed_step_is_exact(build, trained, kwargs, settings, images, labels)


@pytest.mark.parametrize("trained", ["last layers and head", "one weight of layer 2"])
@pytest.mark.filterwarnings("error:None of the inputs have requires_grad", "ignore:torch.utils.checkpoint")
def test_reentrant_checkpointing_frozen_weights_is_exact(build, trained, images, labels):
    assert_checkpointed_step_is_exact(build, trained, {"use_reentrant": True}, BOTH, images, labels)


def assert_checkpointed_step_is_exact(build, trained, kwargs, settings, images, labels):
    model = build(**settings, **DROPOUT, attn_implementation=build.case.reproducible_attention)
    for name, parameter in model.named_parameters():
        is_trained = TRAINED[trained](usual_name(model, build.case, name))
        parameter.requires_grad_(is_trained and not model.is_unused_parameter(name))
    expected = step(model, images, labels)
    assert len(expected[1]) == sum(parameter.requires_grad for parameter in model.parameters())
    enable_checkpointing(model, kwargs)
    assert_same_step(expected, step(model, images, labels))


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing_in_config_is_used_and_not_saved(build, name):
    config = build(**BOTH).config
    setattr(config, name, True)
    model = type(build())(config)
    assert model.is_activation_checkpointing and all(
        layer.gradient_checkpointing for layer in model.get_transformer_layers()
    )
    assert not {"gradient_checkpointing", "activation_checkpointing"} & model.config.to_dict().keys()


def test_gradient_checkpointing_both_method_names_work(build):
    model = build(**BOTH)
    layer = model.get_transformer_layers()[1]
    for name in ("gradient", "activation"):
        assert not model.is_gradient_checkpointing and not model.is_activation_checkpointing
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
            getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": True})
        assert model.is_gradient_checkpointing and model.is_activation_checkpointing
        assert layer._gradient_checkpointing_func.keywords["use_reentrant"]
        model.activation_checkpointing_disable()
