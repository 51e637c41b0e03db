"""The relative position bias of BEiT that all layers share, which comes to them as attention mask."""

import copy

import pytest
import torch
from helpers.families import BOTH, build_tiny
from helpers.families.beit import score_bias
from transformers import set_seed

from hf_tokenmixup.functional import token_saliency
from hf_tokenmixup.models import load_classifier
from hf_tokenmixup.models.gradient_checkpointing import enable_checkpointing

IMAGES = torch.randn(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
SHARED = {
    "use_shared_relative_position_bias": True,
    "use_absolute_position_embeddings": True,
    "use_mask_token": True,
    "use_mean_pooling": False,
}


@pytest.fixture(params=[False, True], ids=["shared", "both"])
def model(request):
    settings = SHARED | {"use_relative_position_bias": request.param}
    return build_tiny("beit", **BOTH, **settings, attn_implementation="eager")


@pytest.mark.parametrize("route", ["auto", "output_attentions"])
@pytest.mark.parametrize("query", ["cls", "mean"])
def test_saliency_matches_attention_maps_of_base_model(model, query, route):
    assert model.config.effective_saliency_query == "cls"
    model.config.saliency_query, model.config.saliency_route = query, route
    saliency = model(IMAGES, labels=LABELS).horizontal[0].saliency
    model.config.rollout_steps = 1
    rollout = model(IMAGES, labels=LABELS).horizontal[0].saliency
    maps = [a.mean(dim=1) for a in model.to_plain_model().eval()(IMAGES, output_attentions=True).attentions]
    torch.testing.assert_close(saliency, token_saliency(maps[1], 1, query))
    torch.testing.assert_close(rollout, token_saliency(maps[2] @ maps[1], 1, query))


def test_vertical_attention_has_no_bias_for_memory(model):
    layer, seen = model.get_transformer_layers()[3], []
    original = layer.base_forward

    def base_forward(hidden_states, attention_mask, memory, **kwargs):
        seen.append((hidden_states, memory))
        return original(hidden_states, attention_mask, memory, **kwargs)

    layer.base_forward = base_forward
    weights = model(IMAGES, labels=LABELS, output_attentions=True).attentions[3]
    ((hidden, memory),) = seen
    bias = score_bias(model.beit.shared_position_bias.relative_position_bias_table)
    if layer.relative_position_bias is not None:
        bias = bias + score_bias(layer.relative_position_bias.relative_position_bias_table)
    attention, normed = layer.attention, layer.layernorm_before(torch.cat([hidden, memory], dim=1))
    query, key = (
        projection(states).unflatten(-1, (3, 8)).transpose(1, 2)
        for projection, states in ((attention.q_proj, normed[:, :17]), (attention.k_proj, normed))
    )
    scores = query @ key.transpose(2, 3) / 8**0.5 + torch.nn.functional.pad(bias, (0, 9))
    assert weights.shape == (6, 3, 17, 26)
    torch.testing.assert_close(weights, scores.softmax(dim=-1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_trains_shared_bias(model, reentrant):
    gradients = []
    for checkpointed in (False, True):
        copied = copy.deepcopy(model)
        if checkpointed:
            enable_checkpointing(copied, {"use_reentrant": reentrant})
        set_seed(0)
        copied(IMAGES, labels=LABELS).loss.backward()
        gradients.append({name: p.grad for name, p in copied.named_parameters() if p.grad is not None})
    unused = dict(model.named_parameters()).keys() - gradients[0].keys()
    assert unused == {"beit.embeddings.mask_token"} and model.has_unused_parameters
    assert gradients[0]["beit.shared_position_bias.relative_position_bias_table"].any()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("plain", [False, True])
def test_load_classifier_at_another_size_interpolates_relative_positions(model, plain, tmp_path):
    exported = model.to_plain_model().eval()
    exported.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(2))
    # BEiT interpolates the tables in each forward pass.
    expected = exported(images).logits
    loaded = load_classifier(str(tmp_path), image_size=30, plain=plain)
    table = loaded.beit.shared_position_bias.relative_position_bias_table
    assert table.shape == (11 * 11 + 3, 3) and loaded.config.image_size == 30
    torch.testing.assert_close(loaded.eval()(images).logits, expected)
    loaded.train()(images, labels=torch.tensor([0, 1])).loss.backward()
    assert table.grad.any()
