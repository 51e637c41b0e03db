"""Training and evaluation of all model families."""

import pytest
import torch
from helpers.families import BOTH, CASES, TESTED
from helpers.family_steps import DROPOUT, assert_same_step, plain_classes, step
from transformers import set_seed

from hf_tokenmixup.functional import horizontal_mix, select_salient_tokens, token_saliency
from hf_tokenmixup.models import FAMILIES
from hf_tokenmixup.models.layers import TokenMixupLayerMixin


def test_cases_cover_all_families():
    assert CASES.keys() == {config_class.model_type for config_class, _ in FAMILIES.values()}


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
