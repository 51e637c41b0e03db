"""Training, evaluation, loading and saving of all model families."""

import copy
import logging
import threading
import warnings

import pytest
import torch
from helpers.families import BOTH, CASES, SIZE, TESTED, build_tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
    set_seed,
)

from hf_tokenmixup.functional import horizontal_mix, select_salient_tokens, token_saliency
from hf_tokenmixup.models import FAMILIES, TokenMixupViTForImageClassification
from hf_tokenmixup.models.gradient_checkpointing import enable_checkpointing
from hf_tokenmixup.models.layer_inputs import layer_inputs
from hf_tokenmixup.models.layers import TokenMixupLayerMixin
from hf_tokenmixup.saliency import attention_saliency

WITH_ATTENTIONS = [name for name in TESTED if CASES[name].output_attentions]
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.2}


@pytest.fixture
def images():
    return torch.randn(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 3, 4, 0])


def test_cases_cover_all_families():
    assert CASES.keys() == {config_class.model_type for config_class, _ in FAMILIES.values()}


@pytest.fixture(params=TESTED)
def build(request):
    """Builds a small model of a family, in training mode, always from the same seed."""

    def build_model(**changes):
        return build_tiny(request.param, **changes)

    build_model.family, build_model.case = request.param, CASES[request.param]
    return build_model


def only(family):
    return pytest.mark.parametrize("build", [family], indirect=True)


# For code that does not depend on the family.
general = pytest.mark.parametrize("build", ["vit", "cct"], indirect=True)


def layer_path(model):
    """Name of the list of transformer layers."""
    layers = model.get_transformer_layers()
    return next(name for name, module in model.named_modules() if module is layers)


def usual_name(model, case, name):
    """Name of a parameter as in ViT, with `model.layers` for the layers."""
    if any(part in name for part in case.embedding_parameters):
        return f"embeddings.{name}"
    if name.startswith(f"{case.classifier}."):
        return name.replace(case.classifier, "classifier")
    return name.replace(layer_path(model), "model.layers")


def plain_classes(model):
    return model.base_model_class, model.base_model_class.config_class


def step(model, images, labels, seed=2, **kwargs):
    """Outputs and gradients of a training step."""
    model.zero_grad()
    set_seed(seed)
    output = model(images, labels=labels, **kwargs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(first, second):
    (output, gradients), (other, other_gradients) = first, second
    assert torch.equal(output.loss, other.loss) and torch.equal(output.logits, other.logits)
    assert gradients.keys() == other_gradients.keys()
    for name in gradients:
        assert torch.equal(gradients[name], other_gradients[name]), name


def test_disabled_tokenmixup_matches_base_model(build, images, labels):
    off = build(**DROPOUT)
    plain_class, config_class = plain_classes(off)
    plain = plain_class(config_class.from_dict(off.config.to_dict())).train()
    assert plain.state_dict().keys() == off.state_dict().keys()
    plain.load_state_dict(off.state_dict())
    assert_same_step(step(plain, images, labels), step(off, images, labels))


@pytest.mark.parametrize("settings", [{}, BOTH])
def test_initialization_matches_base_model(build, settings):
    model = build(**settings, randomize=False)
    plain_class, config_class = plain_classes(model)
    set_seed(0)
    expected = plain_class(config_class.from_dict(model.config.to_dict())).state_dict()
    found = {name: tensor for name, tensor in model.state_dict().items() if ".scorenet." not in name}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_layer_conversion_preserves_buffers_and_hooks(build, monkeypatch, images, labels):
    layer_class, calls = type(build().get_transformer_layers()[0]), []
    plain_class = next(base for base in layer_class.__mro__ if not issubclass(base, TokenMixupLayerMixin))
    original = plain_class.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.register_buffer("scale", torch.full((2,), 3.0), persistent=False)
        self.register_forward_hook(lambda *args: calls.append(1))

    monkeypatch.setattr(plain_class, "__init__", init)
    model = build(**BOTH)
    model(images, labels=labels)
    layers = model.get_transformer_layers()
    assert all(type(layer) is layer_class and torch.equal(layer.scale, torch.full((2,), 3.0)) for layer in layers)
    assert len(calls) == len(layers)
    exported = model.to_plain_model()
    scales = [buffer for name, buffer in exported.named_buffers() if name.endswith(".scale")]
    assert len(scales) == len(layers) and all(torch.equal(scale, torch.full((2,), 3.0)) for scale in scales)
    assert exported.eval()(images).logits.isfinite().all()


@pytest.mark.parametrize("route", ["auto", "output_attentions"])
def test_saliency_receives_layer_kwargs(build, monkeypatch, route, images, labels):
    model, seen = build(**BOTH, saliency_route=route), []
    layer_class = type(model.get_transformer_layers()[0])
    original = layer_class.compute_query_key

    def compute_query_key(self, hidden, cls_query_only, **kwargs):
        seen.append(kwargs["is_causal"])
        return original(self, hidden, cls_query_only, **kwargs)

    monkeypatch.setattr(layer_class, "compute_query_key", compute_query_key)
    model(images, labels=labels, is_causal=False)
    assert seen == [False] * 4


def test_evaluation_matches_base_model(build, images, labels):
    model = build(**BOTH, **DROPOUT).eval()
    plain_class, config_class = plain_classes(model)
    plain = plain_class(config_class.from_dict(model.config.to_dict())).eval()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "scorenet" not in name})
    output, expected = model(images, labels=labels), plain(images, labels=labels)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    assert type(output) is type(expected)
    assert torch.equal(model(images).logits, expected.logits)


@pytest.mark.parametrize("build", [name for name in TESTED if CASES[name].rest_of_layer], indirect=True)
def test_training_forward_matches_reference(build, images, labels):
    """Algorithm 1 and section 3.4 written out with the public functions and plain submodules."""
    model, case = build(**BOTH, scorenet_loss_weight=0.5), build.case
    output = model(images, labels=labels)

    targets = torch.nn.functional.one_hot(labels, 5).float()
    hidden, memory, config = case.embed(model, images), [], model.config
    prefix, query_kind = case.num_prefix_tokens, config.effective_saliency_query
    widths = []
    for index, layer in enumerate(model.get_transformer_layers()):
        norm, bias = layer.pre_norm, case.score_bias(model, layer)
        if index == 1:
            read = hidden[:, 0] if query_kind == "cls" else hidden[:, prefix:].mean(dim=1)
            scorenet_logits = layer.scorenet.classifier(read.detach())
            scorenet_loss = torch.nn.functional.cross_entropy(scorenet_logits, labels)
            easy = torch.ones(6, dtype=torch.bool)
            saliency = saliency_by_hand(case, model, layer, hidden)
            hidden, targets, _, replaced = horizontal_mix(
                hidden, targets, saliency, easy, config.horizontal_rho, prefix
            )
            assert replaced.any()
        collected = select_salient_tokens(hidden, saliency_by_hand(case, model, layer, hidden), 3, prefix)
        sources = norm(torch.cat([hidden, *memory], dim=1)) if index in (2, 3) else norm(hidden)
        query, key, value = split_in_heads(case.project(layer, norm(hidden), sources))
        scores = query @ key.transpose(2, 3) / 8**0.5
        if bias is not None:
            scores = scores + torch.nn.functional.pad(bias, (0, scores.shape[-1] - bias.shape[-1]))
        weights = scores.softmax(dim=-1)
        widths.append(weights.shape[-1])
        project_out = layer.attention_module.get_submodule(case.output_projection)
        hidden = case.rest_of_layer(layer, hidden, project_out((weights @ value).transpose(1, 2).flatten(2)))
        memory.append(collected)
    assert widths == [16 + prefix, 16 + prefix, 16 + prefix + 6, 16 + prefix + 9]
    if case.classify:
        logits = case.classify(model, hidden, prefix)
    else:
        logits = model.get_submodule(case.classifier)(
            case.pool(model.base_model.get_submodule(case.final_norm)(hidden), prefix)
        )
    loss = -(targets * logits.log_softmax(1)).sum(1).mean() + 0.5 * scorenet_loss
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.targets, targets)
    torch.testing.assert_close(output.loss, loss)
    assert output.mixing_metrics["vertical_tokens"] == 6 * 3 * 3


def split_in_heads(projected):
    return [states.unflatten(-1, (3, 8)).transpose(1, 2) for states in projected]


def saliency_by_hand(case, model, layer, hidden):
    """Eq. (3) from the attention probabilities of the layer without mixing."""
    normed = layer.pre_norm(hidden)
    query, key, _ = split_in_heads(case.project(layer, normed, normed))
    scores, bias = query @ key.transpose(2, 3) / 8**0.5, case.score_bias(model, layer)
    weights = (scores if bias is None else scores + bias).softmax(dim=-1).mean(dim=1)
    return token_saliency(weights, case.num_prefix_tokens, model.config.effective_saliency_query)


def test_horizontal_mixup_preserves_prefix_tokens(build, images, labels):
    model = build(**BOTH | {"vertical_layers": []})
    layer, entering, normed = model.get_transformer_layers()[1], [], []
    layer.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    layer.pre_norm.register_forward_pre_hook(lambda module, args: normed.append(args[0]))
    record = model(images, labels=labels).horizontal[0]
    (before,), mixed, prefix = entering, normed[-1], model.config.num_prefix_tokens
    assert record.replaced.any() and torch.equal(mixed[:, :prefix], before[:, :prefix])
    patches, replaced = before[:, prefix:], record.replaced[..., None]
    assert torch.equal(mixed[:, prefix:], torch.where(replaced, patches[record.partner], patches))


@pytest.mark.parametrize("build", [name for name in TESTED if "dinov2" in name], indirect=True)
def test_dinov2_auto_settings_read_cls_token(build):
    model = build(**BOTH)
    config = model.config
    assert config.effective_scorenet_pooling == config.effective_saliency_query == "cls"
    assert config.num_prefix_tokens == {"dinov2": 1, "dinov2_with_registers": 4}[build.family]
    assert model.classifier.in_features == 2 * model.get_transformer_layers()[1].scorenet.classifier.in_features


def test_model_that_needs_newer_transformers_raises(build, monkeypatch):
    model_class, config = type(build()), build().config
    monkeypatch.setattr(model_class, "min_transformers_version", "99.1")
    with pytest.raises(
        ValueError, match=r"needs transformers 99.1 or newer, found .*pip install 'transformers>=99.1'"
    ):
        model_class(config)


@pytest.mark.parametrize("settings", [{"horizontal_layers": [1]}, {"vertical_layers": [2]}, BOTH])
def test_training_all_parameters_have_gradients(build, settings, images, labels):
    # Also where no image is easy: data-parallel training stops on parameters without one.
    model = build(**{**settings, "horizontal_tau": 1e-9})
    _, gradients = step(model, images, labels)
    unused = {name for name, _ in model.named_parameters() if model.is_unused_parameter(name)}
    assert gradients.keys() == dict(model.named_parameters()).keys() - unused
    assert model.has_unused_parameters == bool(unused)
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    assert not model.has_unused_parameters


def test_training_without_easy_images_matches_base_model(build, images, labels):
    model = build(horizontal_layers=[1, 2], horizontal_tau=1e-9)
    output = model(images, labels=labels)
    assert output.mixing_metrics["easy_samples"] == 0 and output.mixing_metrics["mixed_samples"] == 0
    torch.testing.assert_close(output.logits, model.eval()(images).logits)
    torch.testing.assert_close(output.targets, torch.nn.functional.one_hot(labels, 5).float())


def test_second_horizontal_layer_mixes_mixed_tokens(build, images, labels):
    one = build(horizontal_layers=[1], horizontal_tau=None, horizontal_rho=0.0)
    two = build(horizontal_layers=[1, 3], horizontal_tau=None, horizontal_rho=0.0)
    first, both = one(images, labels=labels), two(images, labels=labels)
    assert torch.equal(first.horizontal[0].replaced, both.horizontal[0].replaced)
    entering = first.targets
    second = both.horizontal[1]
    loss = torch.nn.functional.cross_entropy(second.scorenet_logits, entering, reduction="none")
    torch.testing.assert_close(second.difficulty, loss)
    torch.testing.assert_close(both.scorenet_loss, first.scorenet_loss + loss.mean())
    assert not torch.equal(both.targets, entering)


@pytest.mark.parametrize("batch", [1, 5])
def test_forward_odd_batch_size(build, batch, images, labels):
    output = build(**BOTH)(images[:batch], labels=labels[:batch])
    assert output.logits.shape == (batch, 5) and output.loss.isfinite()
    torch.testing.assert_close(output.targets.sum(dim=1), torch.ones(batch))


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


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="plain ViT does not compile either: a host decorator")
def test_compiled_forward_is_one_graph(build, images, labels):
    model = build(**BOTH)
    expected_output, expected = step(model, images, labels)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, gradients = step(compiled, images, labels)
    torch.testing.assert_close(output.loss, expected_output.loss)
    assert torch.equal(output.horizontal[0].replaced, expected_output.horizontal[0].replaced)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[f"_orig_mod.{name}"], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="plain ViT does not compile either: a host decorator")
def test_compiled_forward_validates_labels(build, images, labels):
    compiled = torch.compile(build(**BOTH), fullgraph=True, backend="aot_eager")
    assert compiled(images, labels=labels).loss.isfinite()
    with pytest.raises(ValueError, match="got 5 for image 1"):
        compiled(images, labels=torch.tensor([0, 5, 2, 3, 4, 0]))


class NoWaiting(TorchDispatchMode):
    """Refuses the operations that make a host wait for an accelerator; custom operators count as one."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "item", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.seen.append(name)
        if any(name.startswith(word) for word in self.waiting):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("changes", [{}, {"assignment": "random", "token_selection": "random", "relabel": "count"}])
def test_training_forward_has_single_device_sync(build, changes, images, labels):
    model = build(**{**BOTH, "horizontal_layers": [1, 3], **changes})
    with NoWaiting() as log:
        model(images, labels=labels).loss.backward()
    assert log.seen.count("optimal_assignment") == (0 if changes else 2)
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        bool(labels.sum() > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_selects_same_tokens(build, dtype, images, labels):
    model = build(**{**BOTH, "horizontal_layers": [0]})
    expected = model(images, labels=labels).horizontal[0]
    embeddings = build.case.embed(model, images)
    model.get_transformer_layers()[0].register_forward_pre_hook(lambda module, args: (embeddings, *args[1:]))
    with torch.autocast("cpu", dtype):
        output = model(images, labels=labels)
    got = output.horizontal[0]
    assert torch.equal(got.saliency, expected.saliency) and got.saliency.dtype == torch.float32
    assert torch.equal(got.scorenet_logits, expected.scorenet_logits)
    assert torch.equal(got.partner, expected.partner) and torch.equal(got.replaced, expected.replaced)
    assert output.loss.dtype == torch.float32 and output.loss.isfinite()
    output.loss.backward()


def test_attention_implementations_agree(build, images, labels):
    model = build(**BOTH)
    eager = build(**BOTH, attn_implementation="eager")
    assert model.config._attn_implementation == "sdpa"
    output, expected = step(model, images, labels), step(eager, images, labels)
    torch.testing.assert_close(output[0].loss, expected[0].loss)
    for name in expected[1]:
        torch.testing.assert_close(output[1][name], expected[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("build", WITH_ATTENTIONS, indirect=True)
def test_output_attentions_and_hidden_states_in_both_modes(build, images, labels):
    model = build(**BOTH, attn_implementation="eager")
    output = model(images, labels=labels, output_attentions=True, output_hidden_states=True)
    prefix = model.config.num_prefix_tokens
    length = 16 + prefix
    assert [a.shape[-1] for a in output.attentions] == [length, length, length + 6, length + 9]
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))
    assert len(output.hidden_states) == 5
    assert torch.equal(output.hidden_states[0], build.case.embed(model, images))
    query = model.config.effective_saliency_query
    layer_kwargs = layer_inputs(model, images)[1].kwargs
    layers = model.get_transformer_layers()[1:2]
    saliency = attention_saliency(layers, output.hidden_states[1], prefix, query, layer_kwargs=layer_kwargs)
    torch.testing.assert_close(output.horizontal[0].saliency, saliency)
    evaluated = model.eval()(images, output_attentions=True, output_hidden_states=True)
    assert [a.shape[-1] for a in evaluated.attentions] == [length] * 4
    torch.testing.assert_close(
        token_saliency(evaluated.attentions[1].mean(dim=1), prefix, query), output.horizontal[0].saliency
    )


def test_saliency_routes_agree(build, images, labels):
    fast, whole = build(**BOTH), build(**BOTH, saliency_route="output_attentions")
    first, second = step(fast, images, labels), step(whole, images, labels)
    assert torch.equal(first[0].horizontal[0].replaced, second[0].horizontal[0].replaced)
    torch.testing.assert_close(first[0].targets, second[0].targets)
    for name in first[1]:
        torch.testing.assert_close(first[1][name], second[1][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("build", WITH_ATTENTIONS, indirect=True)
def test_rollout_steps_apply_in_forward(build, images, labels):
    model = build(**BOTH | {"vertical_layers": []}, rollout_steps=2, attn_implementation="eager")
    output = model(images, labels=labels)
    maps = [a.mean(dim=1) for a in model.eval()(images, output_attentions=True).attentions]
    config = model.config
    expected = token_saliency(maps[3] @ maps[2] @ maps[1], config.num_prefix_tokens, config.effective_saliency_query)
    torch.testing.assert_close(output.horizontal[0].saliency, expected, atol=1e-6, rtol=1e-5)


def test_forward_other_image_sizes(build, labels):
    model = build(**BOTH)
    output = model(torch.randn(6, 3, 30, 25), labels=labels, interpolate_pos_encoding=True)
    assert output.horizontal[0].replaced.shape == (6, 30) and output.loss.isfinite()
    few = build(**{**BOTH, "vertical_kappa": 10})
    with pytest.raises(ValueError, match=r"number of patch tokens \(4\), got 10"):
        few(torch.randn(6, 3, 10, 10), labels=labels, interpolate_pos_encoding=True)


def test_forward_soft_labels_in_both_modes(build, images, labels):
    model = build(**BOTH)
    one_hot = torch.nn.functional.one_hot(labels, 5)
    assert_same_step(step(model, images, labels), step(model, images, one_hot.float()))
    smooth = 0.9 * one_hot + 0.02
    output = model.eval()(images, labels=smooth)
    by_hand = -(smooth * output.logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(output.loss, by_hand)
    off = build()
    torch.testing.assert_close(off(images, labels=smooth).loss, off.eval()(images, labels=smooth).loss)
    assert off.config.problem_type is None and model.config.problem_type is None


def test_forward_num_items_in_batch_divides_loss(build, images, labels):
    model = build(**BOTH)
    mean = model(images, labels=labels).loss
    torch.testing.assert_close(model(images, labels=labels, num_items_in_batch=24).loss, mean / 4)
    torch.testing.assert_close(model(images, labels=labels, num_items_in_batch=torch.tensor(12)).loss, mean / 2)


@general
@pytest.mark.parametrize(
    "wrong, message",
    [
        (torch.tensor([0, 1, 5, 3, 4, 0]), "between 0 and 4 .* got 5 for image 2"),
        (torch.tensor([0, 1, 2, -1, 4, 0]), "got -1 for image 3"),
        (torch.zeros(4, dtype=torch.long), r"shape \(B,\) = \(6,\)"),
        (torch.zeros(6, 4), r"\(6, 5\), got \(6, 4\)"),
        (torch.full((6, 5), 0.3), "Row 0 has sum 1.5"),
        (torch.tensor([[1.2, -0.2, 0, 0, 0]] * 6), "minimum -0.2"),
        (torch.full((6, 5), float("nan")), "Row 0 has sum nan"),
        (torch.zeros(6, dtype=torch.bool), "got torch.bool"),
    ],
)
def test_forward_invalid_labels_raise(build, wrong, message, images):
    with pytest.raises(ValueError, match=message):
        build(**BOTH)(images, labels=wrong)


@only("vit")
def test_forward_attention_mask_raises(build, images, labels):
    mask = torch.ones(6, 17, dtype=torch.long)
    model = build(**BOTH)
    with pytest.raises(ValueError, match="attention_mask is not supported while tokens are mixed"):
        model(images, labels=labels, attention_mask=mask)
    torch.testing.assert_close(model.eval()(images, attention_mask=mask).logits, model(images).logits)


def test_forward_without_labels_warns_once(build, images, caplog):
    model = build(**BOTH)
    logging.Logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_tokenmixup.models.modeling_tokenmixup"):
        first = model(images)
        model(images)
    torch.testing.assert_close(first.logits, model.eval()(images).logits)
    assert sum("No tokens are mixed" in record.message for record in caplog.records) == 1


def test_vertical_kappa_zero_collects_no_tokens(build, images, labels):
    output = build(**BOTH, vertical_kappa=0)(images, labels=labels)
    assert "vertical_tokens" not in output.mixing_metrics
    horizontal = build(**{**BOTH, "vertical_layers": []})(images, labels=labels)
    torch.testing.assert_close(output.logits, horizontal.logits)


def test_changed_layers_after_init_raise(build, images, labels):
    model = build(**BOTH)
    model.config.vertical_layers = [1]
    with pytest.raises(ValueError, match=r"vertical_layers cannot change .* was \[2, 3\] then and is \[1\] now"):
        model(images, labels=labels)
    model.config.horizontal_layers, model.config.vertical_layers = [], []
    torch.testing.assert_close(model(images, labels=labels).logits, model.eval()(images).logits)


def test_forward_one_patch_token(build, images, labels):
    build(patch_size=20)  # fewer than the default kappa, which nothing uses
    model = build(
        patch_size=20,
        horizontal_layers=[1],
        horizontal_tau=None,
        horizontal_rho=0.0,
        vertical_layers=[2],
        vertical_kappa=1,
    )
    output = model(images, labels=labels)
    assert output.horizontal[0].replaced.shape == (6, 1) and output.mixing_metrics["vertical_tokens"] == 12
    # Without a CLS token, a single token receives all attention in every image: there is nothing to gain.
    assert bool(output.mixing_metrics["replaced_tokens"] > 0) == bool(model.config.num_prefix_tokens)


def test_forward_return_dict_false(build, images, labels):
    model = build(**BOTH)
    output = model(images, labels=labels)
    as_tuple = model(images, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)


def test_interleaved_forwards_are_independent(build, images, labels):
    """Nested and threaded forwards of two models give what each gives alone."""
    first, second = build(**BOTH), build(**{**BOTH, "vertical_layers": [1]})
    alone = first(images, labels=labels).logits, second(images.flip(0), labels=labels).logits
    nested = []
    first.get_transformer_layers()[2].register_forward_hook(
        lambda *a: nested.append(second(images.flip(0), labels=labels).logits)
    )
    assert torch.equal(first(images, labels=labels).logits, alone[0]) and torch.equal(nested[0], alone[1])
    results = {}

    def work(name, model, batch):
        for _ in range(5):
            results.setdefault(name, []).append(model(batch, labels=labels).logits)

    third = build(**BOTH)
    threads = [
        threading.Thread(target=work, args=("third", third, images)),
        threading.Thread(target=work, args=("second", second, images.flip(0))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(logits, alone[0]) for logits in results["third"])
    assert all(torch.equal(logits, alone[1]) for logits in results["second"])


def loading_info(model_class, folder, **settings):
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **settings)
    return model, {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


CLEAN = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}


def test_from_pretrained_loads_plain_checkpoint(build, tmp_path, caplog):
    model = build()
    plain_class, config_class = plain_classes(model)
    plain = plain_class(config_class.from_dict(model.config.to_dict()))
    plain.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model, info = loading_info(type(model), tmp_path, **BOTH)
    assert info == CLEAN
    said = [record.message for record in caplog.records if "ScoreNet" in record.message]
    path = layer_path(model)
    assert said == [f"ScoreNet is newly initialized: the checkpoint has no {path}.1.scorenet."]
    weights = model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items())
    scorenet = model.get_transformer_layers()[1].scorenet.classifier
    assert scorenet.weight.std().item() == pytest.approx(0.2, rel=0.3) and not scorenet.bias.any()


def test_from_pretrained_loads_checkpoint_of_transformers_4(tmp_path):
    from safetensors.torch import load_file

    ViTForImageClassification(ViTConfig(**SIZE)).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names
    _, info = loading_info(TokenMixupViTForImageClassification, tmp_path, **BOTH)
    assert info == CLEAN


def test_from_pretrained_checkpoint_without_classifier(tmp_path):
    ViTModel(ViTConfig(**SIZE), add_pooling_layer=False).save_pretrained(tmp_path)
    _, info = loading_info(TokenMixupViTForImageClassification, tmp_path, **BOTH)
    # The classifier alone, but for transformers 5.9, which finds no layer of such a checkpoint.
    assert info == loading_info(ViTForImageClassification, tmp_path)[1]
    assert {"classifier.bias", "classifier.weight"} <= set(info["missing_keys"])


def test_from_pretrained_other_number_of_classes(build, tmp_path):
    first = build(**BOTH)
    first.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(first).from_pretrained(tmp_path, num_labels=3)
    model = type(first).from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    classifier = model.get_submodule(build.case.classifier)
    assert classifier.out_features == model.get_transformer_layers()[1].scorenet.classifier.out_features == 3
    assert model.train()(torch.randn(2, 3, 20, 20), labels=torch.tensor([0, 2])).loss.isfinite()


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_save_and_load_keeps_weights_and_settings(build, pooling, tmp_path):
    model = build(**BOTH, scorenet_pooling=pooling)
    model.save_pretrained(tmp_path)
    again, info = loading_info(type(model), tmp_path)
    assert info == CLEAN
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys() and any("scorenet" in name for name in weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert again.config.to_diff_dict().items() >= BOTH.items()


def test_disabling_htm_drops_scorenet_without_warning(build, tmp_path):
    model = build(**BOTH)
    model.save_pretrained(tmp_path)
    _, info = loading_info(type(model), tmp_path, horizontal_layers=[])
    assert info == CLEAN


def test_to_plain_model_returns_base_model(build, tmp_path, images):
    model = build(**BOTH).eval()
    exported = model.to_plain_model()
    plain_class, _ = plain_classes(model)
    assert type(exported) is plain_class and not exported.training
    exported_classifier, classifier = (item.get_submodule(build.case.classifier) for item in (exported, model))
    assert exported_classifier.weight.data_ptr() == classifier.weight.data_ptr()
    exported.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 20, "width": 20}).save_pretrained(tmp_path)
    for model_class in (plain_class, AutoModelForImageClassification):
        opened, info = loading_info(model_class, tmp_path)
        assert info == CLEAN and type(opened) is plain_class
        weights = opened.state_dict()
        kept = {name: tensor for name, tensor in model.state_dict().items() if "scorenet" not in name}
        assert weights.keys() == kept.keys() and all(torch.equal(weights[name], kept[name]) for name in kept)
        torch.testing.assert_close(opened.eval()(images).logits, model(images).logits, atol=1e-6, rtol=1e-6)
    ours, info = loading_info(type(model), tmp_path)
    assert info == CLEAN and ours.config.horizontal_layers == [1] and ours.config.horizontal_tau is None

    from PIL import Image

    classify = pipeline("image-classification", model=str(tmp_path))
    assert len(classify(Image.new("RGB", (40, 30), "red"))) == 5


def test_push_to_hub_uploads_base_model(build, monkeypatch):
    pushed = []
    model = build(**BOTH)
    plain_class, _ = plain_classes(model)
    monkeypatch.setattr(plain_class, "push_to_hub", lambda self, *a, **k: pushed.append((self, a, k)))
    model.push_to_hub("user/repo", private=True)
    ((model, args, kwargs),) = pushed
    assert type(model) is plain_class and args == ("user/repo",) and kwargs == {"private": True}
    assert not any("scorenet" in name for name in model.state_dict())
