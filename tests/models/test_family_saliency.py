"""Attention maps and saliency of all model families."""

import pytest
import torch
from helpers.families import BOTH, CASES, TESTED
from helpers.family_steps import step

from hf_tokenmixup.functional import token_saliency
from hf_tokenmixup.models.layer_inputs import layer_inputs
from hf_tokenmixup.saliency import attention_saliency

WITH_ATTENTIONS = [name for name in TESTED if CASES[name].output_attentions]


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
