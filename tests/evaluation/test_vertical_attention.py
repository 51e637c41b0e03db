"""Attention of vertical layers to collected tokens, against attention written by hand."""

import pytest
import torch
from helpers.tiny_training import VIT

from hf_tokenmixup.evaluation.vertical_attention import vertical_attention
from hf_tokenmixup.models import TokenMixupViTConfig, TokenMixupViTForImageClassification

SIZE = VIT | {"image_size": 32, "patch_size": 8, "num_hidden_layers": 4}


def build(**settings):
    torch.manual_seed(0)
    model = TokenMixupViTForImageClassification(TokenMixupViTConfig(**SIZE | settings)).train()
    with torch.no_grad():
        for layer in model.get_transformer_layers():
            layer.attention.q_proj.weight.mul_(4000)
    return model


def test_vertical_attention_equals_attention_by_hand():
    model, images = build(vertical_layers=[2], vertical_kappa=3), torch.randn(2, 3, 32, 32)
    got = vertical_attention(model, images)
    assert model.training
    model.eval().set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(images, output_hidden_states=True, output_attentions=True)
        collected = []
        for hidden, attention in zip(outputs.hidden_states[:2], outputs.attentions[:2], strict=True):
            best = attention.mean(dim=1)[:, 0, 1:].topk(3).indices + 1
            collected.append(torch.stack([tokens[index] for tokens, index in zip(hidden, best, strict=True)]))
        layer, hidden = model.get_transformer_layers()[2], outputs.hidden_states[2]
        tokens = layer.layernorm_before(torch.cat([hidden, *collected], dim=1))
        query, key = layer.attention.q_proj(tokens[:, :17]), layer.attention.k_proj(tokens)
        heads = [part.unflatten(-1, (model.config.num_attention_heads, -1)) for part in (query, key)]
        scores = torch.einsum("bqhd,bkhd->bhqk", *heads) * layer.attention.scaling
        mass = scores.softmax(dim=-1)[..., 17:].sum(dim=-1).mean()
    assert mass.item() != pytest.approx(6 / 23, rel=0.01)
    torch.testing.assert_close(got, mass / (6 / 23), rtol=1e-5, atol=0)


def test_vertical_attention_of_uniform_attention_is_one():
    model = build(vertical_layers=[1, 3])
    with torch.no_grad():
        for layer in model.get_transformer_layers():
            layer.attention.q_proj.weight.zero_()
            layer.attention.q_proj.bias.zero_()
    assert vertical_attention(model, torch.randn(1, 3, 32, 32)).item() == pytest.approx(1)


@pytest.mark.parametrize("settings", [{}, {"vertical_layers": [1], "vertical_kappa": 0}, {"horizontal_layers": [1]}])
def test_vertical_attention_without_collected_tokens_is_none(settings):
    assert vertical_attention(build(**settings), torch.randn(1, 3, 32, 32)) is None
