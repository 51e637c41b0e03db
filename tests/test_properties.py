"""Properties of the functional API for random shapes, dtypes and saliency."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hf_tokenmixup import functional as f

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RHOS = (0.0, 1e-3, 0.05, 0.5, float("inf"))
# No limit of time, which a busy machine would exceed.
quick = settings(
    derandomize=True, deadline=None, max_examples=60, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saliency_of(kind: str, batch: int, tokens: int, draw: torch.Generator) -> torch.Tensor:
    """(B, T) float64: what detectors give, and what they give when something is odd."""
    uniform = torch.rand(batch, tokens, generator=draw, dtype=torch.float64)
    if kind == "equal":
        return torch.full_like(uniform, 1 / tokens)
    if kind == "zero":
        return torch.zeros_like(uniform)
    if kind == "one-hot":
        return torch.nn.functional.one_hot(uniform.argmax(dim=1), tokens).double()
    if kind == "ties":
        return (uniform * 4).round() / 4
    if kind == "huge":
        return uniform * 1e4
    if kind == "tiny":
        return uniform * 1e-6
    if kind == "not finite":
        bad = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0], dtype=torch.float64)
        uniform[torch.arange(batch), uniform.argmax(dim=1)] = bad[torch.randint(4, (batch,), generator=draw)]
        return uniform
    return uniform / uniform.sum(dim=1, keepdim=True)


FINITE = ("softmax", "equal", "zero", "one-hot", "ties", "huge", "tiny")


@st.composite
def batches(draw, kinds=(*FINITE, "not finite"), most: int = 6):
    """Everything that `horizontal_mix` takes. Each patch token is told from every other by its content."""
    batch, tokens, prefix = draw(st.integers(1, most)), draw(st.integers(1, 20)), draw(st.integers(0, 3))
    size, classes = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    dtype, noise = draw(st.sampled_from(DTYPES)), generator(draw(st.integers(0, 2**16)))
    hidden = torch.arange(batch * (prefix + tokens) * size).view(batch, prefix + tokens, size).to(dtype)
    targets = torch.rand(batch, classes, generator=noise, dtype=torch.float64) + 1e-3
    saliency = saliency_of(draw(st.sampled_from(kinds)), batch, tokens, noise)
    return {
        "hidden": hidden,
        "targets": (targets / targets.sum(dim=1, keepdim=True)).float(),
        "saliency": saliency.to(draw(st.sampled_from(DTYPES))),
        "easy": torch.tensor(draw(st.lists(st.booleans(), min_size=batch, max_size=batch))),
        "rho": draw(st.sampled_from(RHOS)),
        "num_prefix_tokens": prefix,
    }


def choices():
    return st.fixed_dictionaries(
        {
            "assignment": st.sampled_from(f.ASSIGNMENTS),
            "group_size": st.sampled_from([None, 1, 2, 3]),
            "token_selection": st.sampled_from(f.TOKEN_SELECTIONS),
            "relabel": st.sampled_from(f.RELABELS),
        }
    )


def mixed(batch: dict, seed: int = 0, **chosen) -> f.HorizontalMix:
    return f.horizontal_mix(**batch, **chosen, generator=generator(seed))


def best_partners(gain: torch.Tensor, easy: torch.Tensor) -> tuple[float, set[tuple[int, ...]]]:
    """The largest sum that partners of the easy images can gain, and who gains from whom where it is reached."""
    rows, table = easy.nonzero().flatten().tolist(), gain.tolist()
    sums = {
        columns: sum(table[row][column] for row, column in zip(rows, columns, strict=True))
        for columns in itertools.permutations(range(len(easy)), len(rows))
    }
    best = max(sums.values())
    reach = [columns for columns, total in sums.items() if total >= best - 1e-9]
    # Which partner gives nothing is no difference.
    gainful = {
        tuple(c if table[row][c] > 0 else row for row, c in zip(rows, columns, strict=True)) for columns in reach
    }
    return best, gainful


@quick
@given(batches(), choices())
def test_mix_tokens_changes_only_replaced_tokens(batch, chosen):
    hidden, prefix, result = batch["hidden"], batch["num_prefix_tokens"], mixed(batch, **chosen)
    assert result.hidden.dtype == hidden.dtype and result.replaced.shape == batch["saliency"].shape
    assert torch.equal(result.hidden[:, :prefix], hidden[:, :prefix])
    for image, partner in enumerate(result.partner.tolist()):
        for token, replaced in enumerate(result.replaced[image].tolist()):
            source = partner if replaced else image
            assert torch.equal(result.hidden[image, prefix + token], hidden[source, prefix + token])


@quick
@given(batches(), choices())
def test_mix_targets_are_distributions_over_classes_of_pair(batch, chosen):
    targets, result = batch["targets"], mixed(batch, **chosen)
    assert (result.targets >= 0).all()
    torch.testing.assert_close(result.targets.sum(dim=1), torch.ones(len(targets)), atol=1e-5, rtol=0)
    least = torch.minimum(targets, targets[result.partner])
    most = torch.maximum(targets, targets[result.partner])
    assert (result.targets >= least - 1e-6).all() and (result.targets <= most + 1e-6).all()
    unchanged = ~result.replaced.any(dim=1)
    assert torch.equal(result.targets[unchanged], targets[unchanged])


@quick
@given(batches(), choices(), st.integers(0, 2**16))
def test_horizontal_mix_only_easy_images_have_different_partners(batch, chosen, seed):
    easy, result = batch["easy"], mixed(batch, seed, **chosen)
    own = torch.arange(len(easy))
    assert torch.equal(result.partner[~easy], own[~easy]) and not result.replaced[~easy].any()
    assert torch.equal(result.hidden[~easy], batch["hidden"][~easy])
    partners = result.partner[easy].tolist()
    assert len(set(partners)) == len(partners) and all(0 <= partner < len(easy) for partner in partners)


@quick
@given(batches(), choices())
def test_saliency_gain_nonfinite_image_is_zero(batch, chosen):
    finite = batch["saliency"].double().isfinite().all(dim=1)
    gain = f.saliency_gain(batch["saliency"], batch["rho"])
    assert not gain[~finite].any() and not gain[:, ~finite].any() and gain.isfinite().all()
    result = mixed(batch, **chosen)
    assert result.targets.isfinite().all() and result.hidden.isfinite().all()


@quick
@given(batches(kinds=FINITE))
def test_saliency_gain_matches_definition(batch):
    saliency, rho = batch["saliency"].double(), batch["rho"]
    gain = f.saliency_gain(batch["saliency"], rho)
    expected = (saliency[None] - saliency[:, None] - rho).clamp(min=0).sum(dim=2)
    rounding = 1e-13 * max(1.0, saliency.abs().max().item())
    torch.testing.assert_close(gain.double(), expected, atol=rounding, rtol=1e-12)
    assert (gain >= 0).all() and (gain.diagonal() <= rounding).all()


@quick
@given(batches(kinds=FINITE), st.sampled_from(f.ASSIGNMENTS))
def test_replace_mask_gain_matches_saliency_gain(batch, assignment):
    saliency = batch["saliency"].double()
    result = mixed(batch, assignment=assignment)
    rise = saliency[result.partner] - saliency - batch["rho"]
    rounding = 1e-5 * max(1.0, saliency.abs().max().item())
    assert (rise[result.replaced] > -rounding).all() and (rise[~result.replaced] < rounding).all()
    made_up = torch.where(result.replaced, rise, 0.0).sum(dim=1)
    gain = f.saliency_gain(batch["saliency"], batch["rho"]).double()
    reached = gain.gather(1, result.partner[:, None])[:, 0]
    torch.testing.assert_close(made_up, reached, atol=20 * rounding, rtol=1e-5)


@quick
@given(batches(kinds=FINITE, most=5))
def test_optimal_assignment_has_maximum_gain(batch):
    easy = batch["easy"]
    gain = f.saliency_gain(batch["saliency"], batch["rho"])
    partner = f.optimal_assignment(gain, easy)
    best, _ = best_partners(gain, easy)
    reached = gain[easy, partner[easy]].sum().item()
    assert reached == pytest.approx(best, rel=1e-9, abs=1e-12)


@quick
@given(batches(kinds=FINITE), st.sampled_from([1, 2, 3, 4]))
def test_optimal_assignment_groups_have_consecutive_images(batch, size):
    easy = batch["easy"]
    gain = f.saliency_gain(batch["saliency"], batch["rho"])
    grouped, whole = f.optimal_assignment(gain, easy, size), f.optimal_assignment(gain, easy)
    own = torch.arange(len(easy))
    assert ((grouped - own).abs() < size).all()

    def reached(partner):
        return gain[own, partner][easy].sum().item()

    rounding = 1e-9 * max(1.0, gain.abs().max().item())
    assert 0 <= reached(own) <= reached(grouped) + rounding <= reached(whole) + 2 * rounding


@quick
@given(batches(kinds=("softmax",), most=5), st.sampled_from([0.01, 0.1, 0.3]), st.integers(0, 2**16))
def test_horizontal_mix_is_permutation_equivariant(batch, rho, seed):
    """Where the best partners are unique; with a rho of 0, giving and receiving can be turned round at no cost."""
    noise = torch.rand(batch["saliency"].shape, generator=generator(seed), dtype=torch.float64)
    batch = batch | {"saliency": batch["saliency"].double() + noise, "rho": rho}
    assume(len(best_partners(f.saliency_gain(batch["saliency"], rho), batch["easy"])[1]) == 1)
    order = torch.randperm(len(batch["easy"]), generator=generator(seed))
    per_image = ("hidden", "targets", "saliency", "easy")
    shuffled = batch | {name: batch[name][order] for name in per_image}
    straight, result = mixed(batch), mixed(shuffled)
    assert torch.equal(result.hidden, straight.hidden[order])
    assert torch.equal(result.replaced, straight.replaced[order])
    torch.testing.assert_close(result.targets, straight.targets[order], atol=1e-7, rtol=1e-6)


@quick
@given(batches(kinds=FINITE), st.integers(0, 2**16))
def test_random_replace_mask_keeps_row_sums(batch, seed):
    replaced = f.replace_mask(batch["saliency"], batch["easy"].long().argsort(), batch["rho"])
    drawn = f.random_replace_mask(replaced, generator(seed))
    assert torch.equal(drawn.sum(dim=1), replaced.sum(dim=1))


@quick
@given(st.integers(1, 20), st.sampled_from(FINITE), st.integers(0, 2**16))
def test_mix_targets_partner_weight_grows_with_replaced_tokens(tokens, kind, seed):
    saliency = saliency_of(kind, 2, tokens, generator(seed)) + 1e-3
    targets, partner = torch.eye(2), torch.tensor([1, 0])
    shares = []
    for count in range(tokens + 1):
        replaced = (torch.arange(tokens) < count).expand(2, -1)
        shares.append(f.mix_targets(targets, saliency, partner, replaced)[0, 1].item())
    assert shares[0] == 0 and shares[-1] == pytest.approx(1) and all(a < b for a, b in itertools.pairwise(shares))


@quick
@given(batches(kinds=("softmax", "ties", "one-hot", "equal")), st.sampled_from(f.TOKEN_SELECTIONS))
def test_mix_tokens_nonfinite_token_does_not_spread(batch, selection):
    hidden, prefix = batch["hidden"].clone(), batch["num_prefix_tokens"]
    poisoned = len(hidden) // 2
    hidden[poisoned, -1] = float("nan")
    hidden[poisoned, 0] = float("inf")
    result = mixed(batch | {"hidden": hidden}, token_selection=selection)
    assert result.targets.isfinite().all()
    for image, partner in enumerate(result.partner.tolist()):
        bad = ~result.hidden[image].isfinite().all(dim=-1)
        expected = torch.zeros_like(bad)
        for token in {0, len(bad) - 1}:
            taken = token >= prefix and result.replaced[image, token - prefix]
            expected[token] = (partner if taken else image) == poisoned
        assert torch.equal(bad, expected)


@quick
@given(batches(kinds=FINITE), st.data())
def test_select_salient_tokens_selects_maximum(batch, data):
    hidden, saliency, prefix = batch["hidden"], batch["saliency"], batch["num_prefix_tokens"]
    kappa = data.draw(st.integers(0, saliency.shape[1]))
    selected = f.select_salient_tokens(hidden, saliency, kappa, prefix)
    assert selected.shape == (len(hidden), kappa, hidden.shape[2]) and selected.dtype == hidden.dtype
    # Position, which half precision would round in the tokens' content, travels as a token of its own.
    position = torch.arange(-prefix, saliency.shape[1], dtype=torch.float64).expand(len(hidden), -1)[..., None]
    chosen = f.select_salient_tokens(position, saliency, kappa, prefix)[..., 0].long()
    assert (chosen >= 0).all()
    values = saliency.gather(1, chosen)
    assert torch.equal(values, saliency.sort(dim=1, descending=True).values[:, :kappa])
    assert all(len(set(row)) == kappa for row in chosen.tolist())
    assert torch.equal(selected, hidden.gather(1, (chosen + prefix)[..., None].expand_as(selected)))


@quick
@given(batches(kinds=("softmax",)), st.floats(0, 1), st.integers(0, 2**16))
def test_manifold_mix_uses_one_lambda(batch, share, seed):
    hidden, targets = batch["hidden"].double(), batch["targets"].double()
    partner = torch.randperm(len(hidden), generator=generator(seed))
    blended, labels = f.manifold_mix(hidden, targets, partner, share)
    torch.testing.assert_close(blended, share * hidden + (1 - share) * hidden[partner], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(labels, share * targets + (1 - share) * targets[partner], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(len(labels), dtype=torch.float64), atol=1e-6, rtol=0)
    kept, _ = f.manifold_mix(hidden, targets, partner, 1.0)
    assert torch.equal(kept, hidden)


@st.composite
def attention_maps(draw):
    """One to four stochastic (B, H, N, N) maps."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 12)))
    noise, dtype = generator(draw(st.integers(0, 2**16))), draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([0.0, 1.0, 50.0]))
    scores = torch.randn(draw(st.integers(1, 4)), *shape, shape[-1], generator=noise) * scale
    return list(scores.softmax(dim=-1).to(dtype))


@quick
@given(attention_maps())
def test_attention_rollout_rows_sum_to_one(maps):
    rollout = f.attention_rollout(maps)
    assert rollout.dtype == (torch.float64 if maps[0].dtype == torch.float64 else torch.float32)
    rounding = len(maps) * torch.finfo(maps[0].dtype).eps * maps[0].shape[-1] + 1e-5
    assert (rollout >= 0).all()
    torch.testing.assert_close(rollout.sum(dim=-1), torch.ones_like(rollout[..., 0]), atol=rounding, rtol=0)
    expected = maps[0].double().mean(dim=1)
    for attention in maps[1:]:
        expected = torch.einsum("bqk,bkt->bqt", attention.double().mean(dim=1), expected)
    torch.testing.assert_close(rollout.double(), expected, atol=1e-5, rtol=1e-4)


@quick
@given(attention_maps(), st.data())
def test_token_saliency_matches_received_attention(maps, data):
    rollout = f.attention_rollout(maps)
    prefix = data.draw(st.integers(0, min(3, rollout.shape[-1])))
    mean = f.token_saliency(rollout, prefix, "mean")
    torch.testing.assert_close(mean, rollout.mean(dim=1)[:, prefix:])
    if prefix:
        assert torch.equal(f.token_saliency(rollout, prefix, "cls"), rollout[:, 0, prefix:])
    whole = f.token_saliency(rollout, 0, "mean").sum(dim=1)
    torch.testing.assert_close(whole, torch.ones_like(whole), atol=0.2, rtol=0)


@quick
@given(st.integers(1, 6), st.integers(1, 7), st.sampled_from(DTYPES), st.floats(0, 60), st.integers(0, 2**16))
def test_soft_cross_entropy_matches_formula(batch, classes, dtype, scale, seed):
    noise = generator(seed)
    logits = (torch.randn(batch, classes, generator=noise, dtype=torch.float64) * scale).to(dtype)
    targets = torch.rand(batch, classes, generator=noise, dtype=torch.float64) + 1e-6
    targets = targets / targets.sum(dim=1, keepdim=True)
    loss = f.soft_cross_entropy(logits, targets)
    assert loss.shape == (batch,) and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = logits.double()
    shifted = exact - exact.amax(dim=1, keepdim=True)
    expected = -(targets * (shifted - shifted.exp().sum(dim=1, keepdim=True).log())).sum(dim=1)
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-4)
    entropy = -(targets * targets.log()).sum(dim=1)
    assert (loss.double() >= entropy - 1e-4).all()
    assert torch.equal(f.difficulty(logits, targets), loss)
