"""Memory of vertical layers."""

import pytest
import torch

from hf_tokenmixup.functional import select_salient_tokens
from hf_tokenmixup.vertical import VerticalMemory

BATCH, TOKENS, HIDDEN, KAPPA = 3, 7, 4, 2


def layer_inputs(layers, prefix):
    """Tokens (B, N, D) with gradients and saliency (B, T) of `layers` layers."""
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(BATCH, TOKENS, HIDDEN, generator=generator).requires_grad_() for _ in range(layers)]
    saliency = [torch.rand(BATCH, TOKENS - prefix, generator=generator) for _ in range(layers)]
    return hidden, saliency


def collected(hidden, saliency, prefix, detach=False):
    memory = VerticalMemory(KAPPA, detach, prefix)
    for tokens, scores in zip(hidden, saliency, strict=True):
        memory.collect(tokens, scores)
    return memory


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_vertical_memory_tokens_are_salient_and_in_layer_order(prefix):
    hidden, saliency = layer_inputs(3, prefix)
    memory = collected(hidden, saliency, prefix)
    expected = torch.stack(
        [
            torch.stack(
                [
                    tokens[image, prefix + index]
                    for tokens, scores in zip(hidden, saliency, strict=True)
                    for index in sorted(range(TOKENS - prefix), key=lambda i: -scores[image, i].item())[:KAPPA]
                ]
            )
            for image in range(BATCH)
        ]
    )
    assert torch.equal(memory.tokens(), expected)
    assert memory.num_tokens == 3 * KAPPA


@pytest.mark.parametrize("detach", [False, True])
def test_vertical_memory_detach_stops_gradient(detach):
    hidden, saliency = layer_inputs(2, prefix=1)
    tokens = collected(hidden, saliency, prefix=1, detach=detach).tokens()
    assert tokens.requires_grad is not detach
    if detach:
        return
    tokens.sum().backward()
    for layer, scores in zip(hidden, saliency, strict=True):
        salient = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
        salient[:, 1:].scatter_(1, scores.topk(KAPPA, dim=1).indices, True)
        assert torch.equal(layer.grad, salient[:, :, None].expand_as(layer).float())


@pytest.mark.parametrize("prefix", [0, 2])
def test_vertical_memory_gradient_is_that_of_selection(prefix):
    (hidden,), (saliency,) = layer_inputs(1, prefix)
    weight = torch.randn(2, BATCH, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))

    def gradient(layer_tokens, selected):
        loss = (weight[0] * layer_tokens).sin().sum() + (weight[1, :, :KAPPA] * selected).sum()
        return torch.autograd.grad(loss, hidden)[0]

    memory = VerticalMemory(KAPPA, False, prefix)
    layer_tokens = memory.collect(hidden, saliency)
    assert torch.equal(layer_tokens, hidden)
    expected = gradient(hidden, select_salient_tokens(hidden, saliency, KAPPA, prefix))
    torch.testing.assert_close(gradient(layer_tokens, memory.tokens()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("detach", [False, True])
def test_vertical_memory_gradient_without_layer_tokens_is_that_of_selection(detach):
    (hidden,), (saliency,) = layer_inputs(1, prefix=1)
    memory = VerticalMemory(KAPPA, detach, 1)
    layer_tokens = memory.collect(hidden, saliency)
    (gradient,) = torch.autograd.grad(memory.tokens().sum() + 0 * layer_tokens.sum(), hidden)
    (expected,) = torch.autograd.grad(select_salient_tokens(hidden, saliency, KAPPA, 1).sum(), hidden)
    assert torch.equal(gradient, torch.zeros_like(expected) if detach else expected)


def test_vertical_memory_without_layers_is_empty():
    assert VerticalMemory(KAPPA, False, 1).num_tokens == 0


def test_vertical_memories_are_independent():
    hidden, saliency = layer_inputs(2, prefix=1)
    first, second = VerticalMemory(KAPPA, False, 1), VerticalMemory(KAPPA, False, 1)
    first.collect(hidden[0], saliency[0])
    second.collect(hidden[1], saliency[1])
    assert (first.num_tokens, second.num_tokens) == (KAPPA, KAPPA)
    assert not torch.equal(first.tokens(), second.tokens())
