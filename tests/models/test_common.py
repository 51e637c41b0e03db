"""What the common model tests of transformers check, for each TokenMixup class and for its base class.

`test_family_*.py` have those on loading, saving, gradient checkpointing and attention implementations.
"""

import copy
import inspect

import pytest
import torch
from helpers.families import BOTH, TESTED, WITH_MAPS, build_tiny

with_maps = pytest.mark.parametrize("models", WITH_MAPS, indirect=True)
IMAGES = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=TESTED)
def models(request):
    """A TokenMixup model that mixes in training mode, and its base model with the same weights."""

    def build(**settings):
        model = build_tiny(request.param, **BOTH, **settings)
        return model, copy.deepcopy(model.to_plain_model())

    return build


def test_forward_signature_matches_base_model(models):
    names = [list(inspect.signature(model.forward).parameters) for model in models()]
    assert names[0][:2] == names[1][:2] == ["pixel_values", "labels"]


def test_input_embeddings_match_base_model(models):
    found = []
    for model in models():
        try:
            found.append(type(model.get_input_embeddings()))
        except NotImplementedError as error:
            # The plain classes of CLIP have none.
            found.append(type(error))
    assert found[0] is found[1]


@with_maps
def test_outputs_by_config_attributes_match_base_model(models):
    outputs = []
    for model in models(attn_implementation="eager"):
        for config in (model.config, getattr(model.config, "vision_config", model.config)):
            config.output_attentions = config.output_hidden_states = True
        outputs.append(model.eval()(IMAGES))
    for name in ("attentions", "hidden_states"):
        assert len(outputs[0][name]) == len(outputs[1][name]) >= 4
        assert all(torch.equal(first, second) for first, second in zip(*(o[name] for o in outputs), strict=True))


@with_maps
def test_gradients_of_hidden_states_and_attentions_are_retained(models):
    for model in models(attn_implementation="eager"):
        output = model.eval()(IMAGES, output_attentions=True, output_hidden_states=True)
        hidden, attention = output.hidden_states[0], output.attentions[0]
        hidden.retain_grad()
        attention.retain_grad()
        output.logits.flatten()[0].backward()
        assert hidden.grad.any() and attention.grad.any()


def test_logits_do_not_depend_on_other_images(models):
    for model in models():
        together = model.eval()(IMAGES).logits
        for index in range(len(IMAGES)):
            alone = model(IMAGES[index : index + 1]).logits
            torch.testing.assert_close(alone, together[index : index + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_loss_of_other_problem_types_matches_base_model(models, problem_type):
    losses = []
    for model in models():
        model.config.problem_type = problem_type
        loss = model(IMAGES, labels=torch.linspace(0, 1, 15).view(3, 5)).loss
        loss.backward()
        losses.append(loss)
    assert losses[0].isfinite() and torch.equal(*losses)


def test_model_is_created_on_meta_device(models):
    for model in models():
        with torch.device("meta"):
            created = type(model)(copy.deepcopy(model.config))
        assert {parameter.device.type for parameter in created.parameters()} == {"meta"}


def test_from_pretrained_with_dtype_loads_all_parameters_in_it(models, tmp_path):
    for model in models():
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert loaded.eval()(IMAGES.to(torch.bfloat16)).logits.isfinite().all()


def test_training_step_trains_used_parameters(models):
    is_unused = models()[0].is_unused_parameter
    for model in models():
        model.train()(IMAGES, labels=torch.tensor([0, 1, 2])).loss.backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert all(map(is_unused, without))
