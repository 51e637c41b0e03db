"""Functional API compared with brute force and float64 references."""

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from hf_tokenmixup import functional as f


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def plot_saliency(batch, tokens, generator):
    return torch.rand(batch, tokens, generator=generator).mul(3).softmax(dim=1)


def broadcast_gain(saliency, rho):
    saliency = saliency.double()
    return (saliency[None] - saliency[:, None] - rho).clamp(min=0).sum(dim=2)


def test_difficulty_is_cross_entropy_in_nats():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    targets = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]])
    by_hand = -(targets * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(f.difficulty(logits, targets), by_hand)
    assert f.difficulty(logits, targets)[1].item() == pytest.approx(1.0986123)
    half = f.difficulty(logits.half(), targets.half())
    assert half.dtype == torch.float32


def test_attention_rollout_multiplies_later_layers_from_left(generator):
    maps = [torch.rand(2, 3, 5, 5, generator=generator).softmax(dim=-1) for _ in range(3)]
    means = [m.mean(dim=1) for m in maps]
    torch.testing.assert_close(f.attention_rollout(maps), means[2] @ means[1] @ means[0])
    torch.testing.assert_close(f.attention_rollout(maps).sum(dim=2), torch.ones(2, 5))
    with pytest.raises(ValueError, match="at least one"):
        f.attention_rollout([])


def test_token_saliency_cls_or_mean_matches_reference(generator):
    rollout = torch.rand(2, 4, 4, generator=generator)
    assert torch.equal(f.token_saliency(rollout, 1, "cls"), rollout[:, 0, 1:])
    torch.testing.assert_close(f.token_saliency(rollout, 0, "mean"), rollout.sum(dim=1) / 4)
    with pytest.raises(ValueError, match="num_prefix_tokens is 0"):
        f.token_saliency(rollout, 0, "cls")
    with pytest.raises(ValueError, match="'cls', 'mean', got 'clz'"):
        f.token_saliency(rollout, 1, "clz")


@pytest.mark.parametrize("rho", [0.0, 0.003, 0.1])
@pytest.mark.parametrize("batch, tokens", [(1, 4), (2, 1), (7, 9), (64, 196)])
def test_saliency_gain_matches_float64_broadcast(batch, tokens, rho, generator):
    saliency = plot_saliency(batch, tokens, generator)
    torch.testing.assert_close(f.saliency_gain(saliency, rho), broadcast_gain(saliency, rho), atol=1e-14, rtol=0)


@pytest.mark.parametrize("rho", [1.0, 1e12, float("inf")])
def test_saliency_gain_below_rho_is_zero(rho, generator):
    assert f.saliency_gain(plot_saliency(6, 5, generator), rho).max() < 1e-15


def test_optimal_assignment_matches_float64_reference(generator):
    # Saliencies that differ in their last bits alone: float32 sums could not tell the partners apart.
    saliency = plot_saliency(1, 64, generator) + 1e-7 * torch.randn(24, 64, generator=generator)
    easy = torch.ones(24, dtype=torch.bool)
    exact = f.optimal_assignment(broadcast_gain(saliency, 0.0), easy)
    assert torch.equal(f.optimal_assignment(f.saliency_gain(saliency, 0.0), easy), exact)


@pytest.mark.parametrize("batch", range(1, 7))
def test_optimal_assignment_matches_brute_force(batch, generator):
    for _ in range(4):
        gain = torch.rand(batch, batch, generator=generator, dtype=torch.float64)
        easy = torch.rand(batch, generator=generator) < 0.7
        rows = easy.nonzero().squeeze(1).tolist()
        best = max(
            sum(gain[row, column].item() for row, column in zip(rows, columns, strict=True))
            for columns in itertools.permutations(range(batch), len(rows))
        )
        partner = f.optimal_assignment(gain, easy)
        assert gain[rows, partner[rows]].sum().item() == pytest.approx(best, abs=1e-12)
        assert len(set(partner[rows].tolist())) == len(rows)
        assert torch.equal(partner[~easy], torch.arange(batch)[~easy])


@pytest.mark.parametrize("rho", [0.0, 0.01])
@pytest.mark.parametrize("num_easy", [64, 60, 55, 54, 20])
def test_optimal_assignment_has_total_gain_of_scipy(rho, num_easy, generator):
    gain = f.saliency_gain(torch.randn(64, 49, generator=generator).softmax(dim=1), rho)
    easy = torch.randperm(64, generator=generator) < num_easy
    rows = easy.nonzero().squeeze(1)
    _, columns = linear_sum_assignment(gain[rows].numpy(), maximize=True)
    partner = f.optimal_assignment(gain, easy)[rows]
    assert len(partner.unique()) == num_easy
    assert gain[rows, partner].sum().item() == pytest.approx(gain[rows, columns].sum().item(), rel=1e-12)


@pytest.mark.parametrize(("batch", "size"), [(7, 3), (8, 4), (5, 2), (6, 1), (4, 9)])
def test_optimal_assignment_groups_are_independent(batch, size, generator):
    gain = torch.rand(batch, batch, generator=generator, dtype=torch.float64)
    easy = torch.rand(batch, generator=generator) < 0.8
    partner = f.optimal_assignment(gain, easy, size)
    groups = torch.arange(batch).tensor_split(-(-batch // size))
    assert max(map(len, groups)) <= size
    for group in groups:
        block = f.optimal_assignment(gain[group][:, group], easy[group])
        assert torch.equal(partner[group], group[block])
    complete = f.optimal_assignment(gain, easy)
    rows = easy.nonzero().squeeze(1)
    assert gain[rows, partner[rows]].sum() <= gain[rows, complete[rows]].sum() + 1e-12
    assert size < batch or torch.equal(partner, complete)
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        f.optimal_assignment(gain, easy, 0)


def test_manifold_mix_matches_reference(generator):
    hidden, targets = torch.randn(4, 5, 3, generator=generator), torch.eye(4)
    partner = torch.tensor([2, 0, 3, 1])
    mixed, mixed_targets = f.manifold_mix(hidden, targets, partner, 0.3)
    torch.testing.assert_close(mixed, 0.3 * hidden + 0.7 * hidden[partner])
    torch.testing.assert_close(mixed_targets, 0.3 * targets + 0.7 * targets[partner])


def test_random_assignment_easy_images_have_different_partners(generator):
    easy = torch.rand(50, generator=generator) < 0.5
    partner = f.random_assignment(easy, generator)
    assert torch.equal(partner[~easy], torch.arange(50)[~easy])
    assert partner[easy].unique().numel() == easy.sum()
    assert (partner != torch.arange(50)).sum() > easy.sum() / 2
    again = f.random_assignment(easy, torch.Generator().manual_seed(3))
    assert torch.equal(again, f.random_assignment(easy, torch.Generator().manual_seed(3)))


def test_replace_mask_rows_are_independent(generator):
    saliency = plot_saliency(6, 8, generator)
    partner = torch.tensor([3, 0, 1, 5, 4, 2])
    replaced = f.replace_mask(saliency, partner, 0.01)
    for i, j in enumerate(partner.tolist()):
        for t in range(8):
            assert replaced[i, t] == (saliency[j, t] - saliency[i, t] > 0.01)
    other = saliency.clone()
    other[1] = other[1].flip(0)
    changed = (f.replace_mask(other, partner, 0.01) != replaced).any(dim=1)
    assert changed.tolist() == [False, True, True, False, False, False]


def test_mix_tokens_copies_patch_tokens_and_keeps_prefix_tokens(generator):
    hidden = torch.randn(3, 6, 4, generator=generator, requires_grad=True)
    partner = torch.tensor([2, 1, 0])
    replaced = torch.zeros(3, 4, dtype=torch.bool)
    replaced[0, 1] = replaced[2, 3] = True
    mixed = f.mix_tokens(hidden, partner, replaced, 2)
    expected = hidden.detach().clone()
    expected[0, 3], expected[2, 5] = hidden[2, 3].detach(), hidden[0, 5].detach()
    assert torch.equal(mixed, expected)
    mixed.sum().backward()
    uses = torch.ones(3, 6)
    uses[0, 3] = uses[2, 5] = 0
    uses[2, 3] = uses[0, 5] = 2
    assert torch.equal(hidden.grad, uses[..., None].expand(3, 6, 4))


def test_mix_targets_matches_reference():
    targets = torch.eye(3)
    saliency = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    partner = torch.tensor([1, 0, 2])
    replaced = torch.tensor([[True, False, False], [False, False, True], [False, False, False]])
    mixed = f.mix_targets(targets, saliency, partner, replaced)
    own, received = 0.2 + 0.7, 0.5
    torch.testing.assert_close(mixed[0], torch.tensor([own, received, 0.0]) / (own + received))
    own, received = 0.5 + 0.3, 0.7
    torch.testing.assert_close(mixed[1], torch.tensor([received, own, 0.0]) / (own + received))
    assert torch.equal(mixed[2], targets[2])


def test_mix_targets_degenerate_ratio_keeps_label():
    targets, partner = torch.eye(2), torch.tensor([1, 0])
    replaced = torch.tensor([[True, False], [False, False]])
    assert torch.equal(f.mix_targets(targets, torch.zeros(2, 2), partner, replaced), targets)
    infinite = torch.tensor([[0.0, 1.0], [float("inf"), 0.0]])
    assert torch.equal(f.mix_targets(targets, infinite, partner, replaced), targets)


@pytest.mark.parametrize("batch, tokens, prefix", [(1, 5, 1), (2, 1, 0), (7, 9, 1), (8, 16, 2)])
@pytest.mark.parametrize("rho", [0.0, 0.01, float("inf")])
@pytest.mark.parametrize("easy", ["none", "some", "all"])
def test_horizontal_mix_edge_cases(batch, tokens, prefix, rho, easy, generator):
    hidden = torch.randn(batch, prefix + tokens, 3, generator=generator)
    targets = torch.rand(batch, 5, generator=generator).softmax(dim=1)
    saliency = plot_saliency(batch, tokens, generator)
    chosen = {"none": torch.zeros(batch), "some": torch.arange(batch) % 2, "all": torch.ones(batch)}[easy].bool()
    mix = f.horizontal_mix(hidden, targets, saliency, chosen, rho, prefix)

    torch.testing.assert_close(mix.targets.sum(dim=1), torch.ones(batch))
    assert not mix.replaced[~chosen].any()
    assert not mix.replaced[mix.partner == torch.arange(batch)].any()
    untouched = ~mix.replaced.any(dim=1)
    assert torch.equal(mix.hidden[untouched], hidden[untouched])
    assert torch.equal(mix.targets[untouched], targets[untouched])
    assert torch.equal(mix.hidden[:, :prefix], hidden[:, :prefix])
    if batch == 1 or rho == float("inf") or easy == "none":
        assert untouched.all()
    if batch == 8 and rho == 0.0 and easy == "all":
        raised = torch.where(mix.replaced, saliency[mix.partner], saliency).sum() - saliency.sum()
        assert raised == pytest.approx(broadcast_gain(saliency, 0.0)[range(8), mix.partner].sum().item(), abs=1e-5)
        assert raised > 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_tokens_do_not_spread(bad, generator):
    hidden = torch.randn(5, 7, 3, generator=generator)
    saliency = plot_saliency(5, 6, generator)
    hidden[2, 4] = bad
    saliency[2] = float("nan")  # what an attention over such a token yields
    hidden.requires_grad_()
    mix = f.horizontal_mix(hidden, torch.eye(5), saliency, torch.ones(5, dtype=torch.bool), 0.0, 1)
    others = [0, 1, 3, 4]
    assert mix.hidden[others].isfinite().all() and mix.targets.isfinite().all()
    assert not mix.replaced[2].any() and mix.replaced[others].any()
    mix.hidden[others].sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_mix_tokens_gathers_instead_of_masking(bad):
    """Neither the partner's tokens that were left nor the own ones that went reach the mixed image or its gradient."""
    hidden = torch.ones(2, 3, 2)
    hidden[1, 2] = bad  # offered and left
    hidden[0, 0] = bad  # replaced
    hidden.requires_grad_()
    replaced = torch.tensor([[True, True, False], [False, False, False]])
    mixed = f.mix_tokens(hidden, torch.tensor([1, 1]), replaced, 0)
    assert torch.equal(mixed[0], torch.ones(3, 2))
    mixed[0].square().sum().backward()
    assert torch.equal(hidden.grad[0], torch.tensor([[0.0, 0], [0, 0], [2, 2]]))
    assert torch.equal(hidden.grad[1], torch.tensor([[2.0, 2], [2, 2], [0, 0]]))


def test_mix_tokens_nonfinite_token_stays_in_place():
    hidden = torch.zeros(3, 2, 1)
    hidden[1, 0] = float("inf")
    saliency = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]])
    mix = f.horizontal_mix(hidden, torch.eye(3), saliency, torch.tensor([True, False, False]), 0.0, 0)
    assert mix.partner.tolist() == [1, 1, 2]
    assert mix.hidden.isfinite().flatten(1).all(dim=1).tolist() == [False, False, True]
    assert mix.hidden[0, 1].isfinite()


def test_horizontal_mix_ablations_change_one_step(generator):
    hidden, targets = torch.randn(16, 10, 3, generator=generator), torch.eye(16)
    saliency, easy = plot_saliency(16, 9, generator), torch.arange(16) < 10

    def mix(**choices):
        return f.horizontal_mix(
            hidden, targets, saliency, easy, 0.01, 1, generator=torch.Generator().manual_seed(1), **choices
        )

    plain = mix()
    random_partners = mix(assignment="random")
    gain = broadcast_gain(saliency, 0.01)
    rows = range(10)
    assert gain[rows, random_partners.partner[:10]].sum() < gain[rows, plain.partner[:10]].sum()
    assert torch.equal(random_partners.replaced, f.replace_mask(saliency, random_partners.partner, 0.01))

    random_tokens = mix(token_selection="random")
    assert torch.equal(random_tokens.partner, plain.partner)
    assert torch.equal(random_tokens.replaced.sum(dim=1), plain.replaced.sum(dim=1))
    assert not torch.equal(random_tokens.replaced, plain.replaced)

    counted = mix(relabel="count")
    assert torch.equal(counted.hidden, plain.hidden)
    share = plain.replaced.sum(dim=1) / 9
    changed = plain.replaced.any(dim=1)
    expected = (1 - share[:, None]) * targets + share[:, None] * targets[plain.partner]
    torch.testing.assert_close(counted.targets[changed], expected[changed])

    for name in ("assignment", "token_selection", "relabel"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            mix(**{name: "best"})


def test_select_salient_tokens_skips_prefix_tokens(generator):
    hidden, saliency = torch.randn(3, 8, 2, generator=generator), plot_saliency(3, 6, generator)
    chosen = f.select_salient_tokens(hidden, saliency, 2, 2)
    for image in range(3):
        order = sorted(range(6), key=lambda t: -saliency[image, t].item())  # noqa: B023
        assert torch.equal(chosen[image], hidden[image, [2 + order[0], 2 + order[1]]])
    assert f.select_salient_tokens(hidden, saliency, 0, 2).shape == (3, 0, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda h, s: f.select_salient_tokens(h, s, 7, 2), r"between 0 and the number of patch tokens \(6\), got 7"),
        (lambda h, s: f.select_salient_tokens(h, s, 2, 1), r"\(3, 7\), got \(3, 6\)"),
        (lambda h, s: f.horizontal_mix(h, s, s, s[:, 0] > 0, 0.0, 0), r"\(3, 8\), got \(3, 6\)"),
        (lambda h, s: f.horizontal_mix(h, s, s, s[:, 0] > 0, -0.1, 2), "rho must be at least 0, got -0.1"),
        (lambda h, s: f.horizontal_mix(h, s, s, s[:, 0] > 0, float("nan"), 2), "rho must be at least 0, got nan"),
    ],
)
def test_functional_invalid_arguments_raise(call, message, generator):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 8, 2, generator=generator), plot_saliency(3, 6, generator))


def test_horizontal_mix_empty_batch():
    assert f.saliency_gain(torch.zeros(0, 4), 0.0).shape == (0, 0)
    assert torch.equal(f.saliency_gain(torch.zeros(3, 0), 0.0), torch.zeros(3, 3))
    mix = f.horizontal_mix(torch.zeros(0, 4, 2), torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0).bool(), 0.0, 0)
    assert mix.hidden.shape == (0, 4, 2)


def test_saliency_is_float32_under_autocast_and_half_precision(generator):
    maps = [torch.rand(2, 3, 5, 5, generator=generator).softmax(dim=-1) for _ in range(3)]
    expected = f.attention_rollout(maps)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(f.attention_rollout(maps), expected)
    narrow = expected.bfloat16()
    assert torch.equal(f.token_saliency(narrow, 1, "mean"), f.token_saliency(narrow.float(), 1, "mean"))
    saliency = torch.tensor([[0.5, 0.5], [0.501, 0.499]], dtype=torch.float16)
    partner = torch.tensor([1, 0])
    assert torch.equal(f.replace_mask(saliency, partner, 4.8e-4), f.replace_mask(saliency.float(), partner, 4.8e-4))
    one_hot = f.mix_targets(torch.eye(2).long(), saliency, partner, torch.tensor([[True, False], [False, True]]))
    torch.testing.assert_close(one_hot.sum(dim=1), torch.ones(2))
    assert 0.4 < one_hot[0, 0] < 0.6


def test_horizontal_mix_half_precision_decides_in_float32(generator):
    saliency = plot_saliency(9, 7, generator).half()
    hidden = torch.randn(9, 7, 2, generator=generator).half()
    easy = torch.ones(9, dtype=torch.bool)
    low = f.horizontal_mix(hidden, torch.eye(9), saliency, easy, 0.003, 0)
    high = f.horizontal_mix(hidden.float(), torch.eye(9), saliency.float(), easy, 0.003, 0)
    assert torch.equal(low.partner, high.partner) and torch.equal(low.replaced, high.replaced)
    assert torch.equal(low.hidden.float(), high.hidden) and torch.equal(low.targets, high.targets)
