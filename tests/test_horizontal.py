"""ScoreNet and horizontal mixing."""

from types import SimpleNamespace

import pytest
import torch

from hf_tokenmixup.configuration import TokenMixupConfigMixin
from hf_tokenmixup.functional import difficulty, horizontal_mix
from hf_tokenmixup.horizontal import ScoreNet, apply_horizontal_mixup


@pytest.fixture
def hidden():
    return torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(0))


def reference_forward(scorenet, hidden):
    patches = hidden[:, 2:]
    if scorenet.pooling == "cls":
        pooled = hidden[:, 0]
    elif scorenet.pooling == "mean":
        pooled = patches.mean(dim=1)
    else:
        score = torch.einsum("bnd,d->bn", patches, scorenet.attention.weight[0]) + scorenet.attention.bias
        pooled = torch.einsum("bn,bnd->bd", score.softmax(dim=1), patches)
    return pooled @ scorenet.classifier.weight.T + scorenet.classifier.bias


@pytest.mark.parametrize("pooling, parameters", [("cls", 15), ("mean", 15), ("attention", 20)])
def test_scorenet_matches_reference_with_and_without_autocast(pooling, parameters, hidden):
    scorenet = ScoreNet(4, 3, pooling=pooling, num_prefix_tokens=2)
    assert sum(parameter.numel() for parameter in scorenet.parameters()) == parameters
    torch.testing.assert_close(scorenet(hidden), reference_forward(scorenet, hidden))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorenet(hidden), scorenet(hidden.float()))
        assert scorenet(hidden).dtype == torch.float32


def test_scorenet_of_cct_has_released_number_of_parameters():
    scorenet = ScoreNet(256, 100, pooling="attention", num_prefix_tokens=0)
    assert sum(parameter.numel() for parameter in scorenet.parameters()) == 25_957


def test_scorenet_invalid_pooling_raises():
    with pytest.raises(ValueError, match="scorenet_pooling must be one of"):
        ScoreNet(4, 3, pooling="max", num_prefix_tokens=1)
    with pytest.raises(ValueError, match="needs a CLS token"):
        ScoreNet(4, 3, pooling="cls", num_prefix_tokens=0)


def apply(scorenet, hidden, targets, saliency, **changes):
    config = TokenMixupConfigMixin(**{"horizontal_tau": None, "horizontal_rho": 0.0} | changes)
    config.network = SimpleNamespace(num_prefix_tokens=2)
    return apply_horizontal_mixup(scorenet, hidden, targets, lambda tokens: saliency, config)


def test_apply_horizontal_mixup_selects_easy_images_below_tau(hidden):
    scorenet = ScoreNet(4, 3, pooling="cls", num_prefix_tokens=2)
    targets, saliency = torch.eye(3)[[0, 1, 2, 0, 1, 2]], torch.rand(6, 6)
    scores = difficulty(scorenet(hidden), targets).detach()
    tau = scores.sort().values[3].item()
    *_, record = apply(scorenet, hidden, targets, saliency, horizontal_tau=tau)
    assert torch.equal(record.easy, scores < tau) and record.easy.sum() == 3
    assert torch.equal(record.difficulty, scores)
    assert apply(scorenet, hidden, targets, saliency)[-1].easy.all()
    assert not apply(scorenet, hidden, targets, saliency, horizontal_tau=1e-9)[-1].easy.any()


def test_apply_horizontal_mixup_matches_functional(hidden):
    scorenet = ScoreNet(4, 3, pooling="mean", num_prefix_tokens=2)
    targets, saliency = torch.rand(6, 3).softmax(dim=1), torch.rand(6, 6).softmax(dim=1)
    mixed, new_targets, loss, record = apply(scorenet, hidden, targets, saliency, horizontal_rho=0.01, relabel="count")
    easy = torch.ones(6, dtype=torch.bool)
    expected = horizontal_mix(hidden, targets, saliency, easy, 0.01, 2, relabel="count")
    assert torch.equal(mixed, expected.hidden) and torch.equal(new_targets, expected.targets)
    assert torch.equal(record.partner, expected.partner) and torch.equal(record.replaced, expected.replaced)
    torch.testing.assert_close(loss, difficulty(scorenet(hidden), targets))


@pytest.mark.parametrize("detach", [True, False])
def test_apply_horizontal_mixup_scorenet_detach_stops_gradient(detach, hidden):
    scorenet = ScoreNet(4, 3, pooling="attention", num_prefix_tokens=2)
    hidden.requires_grad_()
    *_, loss, record = apply(
        scorenet, hidden, torch.eye(3)[[0, 1, 2, 0, 1, 2]], torch.rand(6, 6), scorenet_detach=detach
    )
    loss.sum().backward()
    assert (hidden.grad is None) == detach
    assert all(parameter.grad.abs().sum() > 0 for parameter in scorenet.classifier.parameters())
    assert not record.difficulty.requires_grad
