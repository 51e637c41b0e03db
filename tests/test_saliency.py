"""Attention, gradient and random saliency."""

import copy

import pytest
import torch

from hf_tokenmixup.benchmarks.timing import peak_memory
from hf_tokenmixup.functional import attention_rollout, soft_cross_entropy, token_saliency
from hf_tokenmixup.models import TokenMixupViTConfig, TokenMixupViTForImageClassification
from hf_tokenmixup.saliency import (
    attention_saliency,
    eval_mode,
    gradient_saliency,
    project_queries_to_inputs,
    random_saliency,
    received_attention,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = TokenMixupViTConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=32,
        image_size=20,
        patch_size=5,
        num_labels=5,
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.3,
        initializer_range=0.3,
    )
    return TokenMixupViTForImageClassification(config)


@pytest.fixture(scope="module")
def outputs(model):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model.eval()(torch.randn(6, 3, 20, 20), output_attentions=True, output_hidden_states=True)


# Of 3 images with 2 heads and 11 tokens: a query, two queries, then by the number of threads one head of one to three
# images or all heads of an image, all.
@pytest.mark.parametrize("elements", [1, 50, 130, 250, 400, 500, 2**24])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("queries", [1, 11])
def test_received_attention_chunks_match_full_map(queries, threads, elements, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query, key = torch.randn(3, 2, 11, 4), torch.randn(3, 2, 11, 4)
    attention = (query @ key.transpose(2, 3) * 0.5).softmax(dim=-1)
    received = received_attention(query[:, :, :queries], key, 0.5, max_elements=elements)
    torch.testing.assert_close(received, attention[:, :, :queries].mean(dim=(1, 2)), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("elements", [130, 250, 400, 500])
def test_received_attention_keeps_to_its_limit(threads, elements, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query, key, product, sizes = torch.randn(9, 2, 11, 4), torch.randn(9, 2, 11, 4), torch.baddbmm, []

    def baddbmm(*args, **kwargs):
        result = product(*args, **kwargs)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "baddbmm", baddbmm)
    received_attention(query, key, 0.5, max_elements=elements)
    assert sum(sizes) == 9 * 2 * 11 * 11 and max(sizes) <= elements


def test_received_attention_single_query_in_chunks_compiles_as_one_graph():
    query, key = torch.randn(5, 2, 1, 4), torch.randn(5, 2, 11, 4)
    compiled = torch.compile(received_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, 0.5, None, 50), received_attention(query, key, 0.5))


def test_received_attention_on_cpu_computes_maps_of_few_images_at_a_time(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    query, key = torch.randn(64, 4, 128, 8), torch.randn(64, 4, 128, 8)
    complete = 64 * 4 * 128 * 128 * 4  # bytes of the map of all images
    small = peak_memory(lambda: received_attention(query, key, 0.5))
    assert small < complete < peak_memory(lambda: received_attention(query, key, 0.5, max_elements=2**24))


@pytest.mark.parametrize("elements", [1, 2**24])
@pytest.mark.parametrize("queries", [1, 3])
def test_received_attention_shared_keys_match_projected_keys(queries, elements):
    query, inputs, projection = torch.randn(2, 3, queries, 4), torch.randn(2, 7, 12), torch.nn.Linear(12, 12)
    keys = projection(inputs).unflatten(-1, (3, 4)).transpose(1, 2)
    expected = (query @ keys.transpose(2, 3) * 0.5).softmax(dim=-1).mean(dim=(1, 2))
    moved = project_queries_to_inputs(query, projection.weight)
    received = received_attention(moved, inputs[:, None], 0.5, max_elements=elements)
    torch.testing.assert_close(received, expected, atol=1e-6, rtol=1e-5)


def test_attention_saliency_wrapped_key_projection_is_called(model, outputs):
    """A hook stands for adapters and other wrappers, whose keys are not those of the weight."""
    layer, hidden = copy.deepcopy(model.vit.layers[1]), outputs.hidden_states[1]
    plain = attention_saliency([layer], hidden, 1)
    hook = layer.attention.k_proj.register_forward_hook(lambda module, inputs, output: output)
    torch.testing.assert_close(attention_saliency([layer], hidden, 1), plain, atol=1e-7, rtol=1e-6)
    hook.remove()
    layer.attention.k_proj.register_forward_hook(lambda module, inputs, output: 0 * output)
    torch.testing.assert_close(attention_saliency([layer], hidden, 1), torch.full_like(plain, 1 / hidden.shape[1]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("route", ["auto", "output_attentions"])
@pytest.mark.parametrize("query", ["cls", "mean"])
@pytest.mark.parametrize("layer", [0, 2])
def test_attention_saliency_matches_output_attentions(model, outputs, layer, query, route, training):
    model.train(training)
    saliency = attention_saliency([model.vit.layers[layer]], outputs.hidden_states[layer], 1, query, route)
    expected = token_saliency(attention_rollout([outputs.attentions[layer]]), 1, query)
    torch.testing.assert_close(saliency, expected, atol=1e-6, rtol=1e-5)
    assert not saliency.requires_grad


@pytest.mark.parametrize("query", ["cls", "mean"])
def test_attention_saliency_rollout_has_no_dropout(model, outputs, query):
    model.train()
    maps = [attention.mean(dim=1) for attention in outputs.attentions[1:4]]
    expected = token_saliency(maps[2] @ maps[1] @ maps[0], 1, query)
    layers = model.vit.layers[1:4]
    saliency = attention_saliency(layers, outputs.hidden_states[1], 1, query)
    torch.testing.assert_close(saliency, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("route", ["auto", "output_attentions"])
def test_attention_saliency_autocast_is_bit_identical(model, outputs, route):
    layer, hidden = [model.vit.layers[1]], outputs.hidden_states[1]
    plain = attention_saliency(layer, hidden, 1, route=route)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(attention_saliency(layer, hidden, 1, route=route), plain)


def test_attention_saliency_half_precision_weights_give_float32(model, outputs):
    layer = TokenMixupViTForImageClassification(model.config).to(torch.bfloat16).vit.layers[1]
    saliency = attention_saliency([layer], outputs.hidden_states[1], 1)
    assert saliency.dtype == torch.float32
    assert saliency.sum(dim=1).max() <= 1


def test_gradient_saliency_matches_finite_differences(model):
    """Every pixel of one image nudged up and down, in float64."""
    model = copy.deepcopy(model).double().eval()
    # Eager attention takes its softmax in float32.
    model.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(0)
    image, target = torch.randn(1, 3, 20, 20, generator=generator, dtype=torch.float64), torch.rand(1, 5).double()
    nudges = 1e-5 * torch.eye(1200, dtype=torch.float64).view(1200, 3, 20, 20)
    with torch.no_grad():
        up, down = (
            soft_cross_entropy(model(image + sign * nudges).logits, target.expand(1200, 5)) for sign in (1, -1)
        )
    gradient = ((up - down) / 2e-5).view(3, 20, 20)
    tokens = gradient.square().mean(dim=0).sqrt().view(4, 5, 4, 5).mean(dim=(1, 3)).flatten()
    saliency = gradient_saliency(lambda pixels: model(pixels).logits, image, target, (4, 4))
    torch.testing.assert_close(saliency[0], tokens / tokens.sum(), rtol=1e-5, atol=1e-8)


def test_gradient_saliency_images_are_independent_and_zero_gradient_is_uniform(model):
    model.eval()
    images = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    targets = torch.eye(5)[[0, 3, 2]]

    def classify(pixels):
        return model(pixels).logits

    together = gradient_saliency(classify, images, targets, (4, 4))
    alone = gradient_saliency(classify, images[1:2], targets[1:2], (4, 4))
    torch.testing.assert_close(together[1:2], alone)
    torch.testing.assert_close(together.sum(dim=1), torch.ones(3))
    even = gradient_saliency(lambda pixels: 0 * classify(pixels), images, targets, (4, 4))
    assert torch.equal(even, torch.full((3, 16), 1 / 16))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_random_saliency_sums_to_one_and_uses_generator():
    first, again, other = (random_saliency(4, 9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(first.sum(dim=1), torch.ones(4))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first[0], first[1])
    torch.manual_seed(5)
    drawn = random_saliency(4, 9)
    torch.manual_seed(5)
    assert torch.equal(drawn, random_saliency(4, 9))


def test_eval_mode_restores_mode_of_each_module(model):
    model.train()
    frozen = model.vit.layers[1].eval()
    with pytest.raises(RuntimeError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert model.training and model.vit.layers[0].training and not any(m.training for m in frozen.modules())
    frozen.train()


@pytest.mark.parametrize("elements", [1, 50, 200, 2**24])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("bias_shape", [(1, 3), (2, 3), (2, 1)])
def test_received_attention_adds_bias(bias_shape, queries, elements):
    query, inputs, projection = torch.randn(2, 3, queries, 4), torch.randn(2, 7, 12), torch.nn.Linear(12, 12)
    keys = projection(inputs).unflatten(-1, (3, 4)).transpose(1, 2)
    bias = 2 * torch.randn(*bias_shape, queries, 7)
    expected = (query @ keys.transpose(2, 3) * 0.5 + bias).softmax(dim=-1).mean(dim=(1, 2))
    assert not torch.allclose(expected, (query @ keys.transpose(2, 3) * 0.5).softmax(dim=-1).mean(dim=(1, 2)))
    moved = project_queries_to_inputs(query, projection.weight)
    for queries_and_keys in ((query, keys), (moved, inputs[:, None])):
        received = received_attention(*queries_and_keys, 0.5, bias, max_elements=elements)
        torch.testing.assert_close(received, expected, atol=1e-6, rtol=1e-5)
