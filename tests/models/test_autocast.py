"""Training steps in bf16 and fp16 compared with float32."""

import pytest
import torch
from helpers.families import CASES, WITH_MAPS, build_tiny
from transformers import set_seed

from hf_tokenmixup.models.gradient_checkpointing import enable_checkpointing

BOTH = {"horizontal_layers": [1], "horizontal_tau": None, "vertical_layers": [2, 3], "scorenet_detach": False}
# Relative: 8 and 11 bits of mantissa, rounded in every layer.
TOLERANCE = {torch.bfloat16: 0.15, torch.float16: 0.02}


@pytest.fixture(params=WITH_MAPS)
def build(request):
    def build_model(**changes):
        return build_tiny(request.param, **BOTH | {"initializer_range": 0.15} | changes)

    build_model.case = CASES[request.param]
    return build_model


@pytest.fixture
def images():
    return torch.randn(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def separated_rho(saliency, partner):
    """A threshold in the middle of the widest gap between the gains of tokens: rounding moves none across it."""
    gains = (saliency[partner] - saliency).flatten().sort().values
    middle = gains[(gains > 0.0005)]
    gaps = middle.diff()
    widest = gaps.argmax()
    return float((middle[widest] + middle[widest + 1]) / 2), float(gaps[widest] / 2)


def step(model, images, dtype=None, scale=1.0):
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = model(images, labels=LABELS)
    (output.loss * scale).backward()
    return output, {name: p.grad.clone() / scale for name, p in model.named_parameters() if p.grad is not None}


def assert_near(gradients, expected, tolerance):
    """By the norm of each tensor's gradient; some, such as a key's bias, have none but rounding."""
    assert gradients.keys() == expected.keys()
    least = 0.05 * max(gradient.norm() for gradient in expected.values())
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
        assert (gradient - expected[name]).norm() <= tolerance * max(expected[name].norm(), least), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_step_autocast_matches_float32(build, dtype, images):
    """Partners and tokens the same, saliency, loss and gradients near."""
    first = build(horizontal_rho=0.0)(images, labels=LABELS).horizontal[0]
    rho, room = separated_rho(first.saliency, first.partner)
    model = build(horizontal_rho=rho)
    output, expected = step(model, images)
    mixed = output.horizontal[0]
    assert 0 < mixed.replaced.sum() < mixed.replaced.numel()
    half, gradients = step(model, images, dtype, scale=1024.0 if dtype == torch.float16 else 1.0)
    got = half.horizontal[0]
    assert got.saliency.dtype == torch.float32 and (got.saliency - mixed.saliency).abs().max() < room
    assert torch.equal(got.partner, mixed.partner) and torch.equal(got.replaced, mixed.replaced)
    tolerance = TOLERANCE[dtype] / 2
    torch.testing.assert_close(half.targets, output.targets, rtol=0, atol=tolerance)
    torch.testing.assert_close(half.loss, output.loss, rtol=tolerance, atol=0)
    assert half.logits.dtype == dtype and half.loss.dtype == torch.float32
    assert_near(gradients, expected, TOLERANCE[dtype])


def test_training_step_fp16_with_loss_scale(build, images):
    """Three steps as a Trainer takes them in fp16; a scale that overflows leaves its step out and shrinks."""
    model, plain = build(horizontal_rho=0.0), build(horizontal_rho=0.0)
    optimizer, other = (torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-50)
    before = [parameter.clone() for parameter in model.parameters()]
    for number in range(4):
        with torch.autocast("cpu", torch.float16):
            loss = model(images, labels=LABELS).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if number == 0:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            continue
        plain(images, labels=LABELS).loss.backward()
        other.step()
        other.zero_grad()
    assert scaler.get_scale() == 2.0**10
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)])
    expected = torch.cat([(a - b).flatten() for a, b in zip(plain.parameters(), before, strict=True)])
    assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_step_half_precision_weights(build, dtype, images):
    expected = build(horizontal_rho=0.0)(images, labels=LABELS)
    model = build(horizontal_rho=0.0, manifold_mixup_layers=[0]).to(dtype)
    output = build(horizontal_rho=0.0).to(dtype)(images.to(dtype), labels=LABELS)
    assert output.horizontal[0].saliency.dtype == output.targets.dtype == output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.1, atol=0)
    model(images.to(dtype), labels=LABELS).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("detector", ["gradient", "attention"])
def test_autocast_detectors_and_manifold_mixup(build, detector, images):
    settings = {"horizontal_rho": 0.0, "saliency_detector": detector, "manifold_mixup_layers": [0]}
    model = build(**settings)
    set_seed(4)
    expected = model(images, labels=LABELS)
    set_seed(4)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, labels=LABELS)
    torch.testing.assert_close(output.horizontal[0].saliency, expected.horizontal[0].saliency, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.05, atol=0)
    output.loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gradient_checkpointing_is_exact(build, reentrant, dtype, images):
    model = build(horizontal_rho=0.0, attn_implementation=build.case.reproducible_attention)
    output, expected = step(model, images, dtype)
    enable_checkpointing(model, {"use_reentrant": reentrant})
    again, gradients = step(model, images, dtype)
    assert torch.equal(again.loss, output.loss) and torch.equal(again.targets, output.targets)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
