"""Mixup, CutMix and label smoothing for all modes and batch sizes."""

import numpy as np
import pytest
import torch

from hf_tokenmixup.data import InputMixup

CLASSES = 12


def batch(size, dtype=torch.float32):
    """Image i is constant with value i + 1 and has class i, so that its mean tells what was mixed in."""
    values = torch.arange(1, size + 1, dtype=dtype)
    return values.view(size, 1, 1, 1).expand(size, 3, 16, 16).clone(), torch.arange(size)


def seed(number):
    np.random.seed(number)  # noqa: NPY002 (timm draws there)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixup_targets_match_lambda(mode, size, alphas):
    mixing = InputMixup(CLASSES, *alphas, mode=mode)
    values = torch.arange(1, CLASSES + 1, dtype=torch.float32)
    mixed = 0
    for number in range(8):
        seed(number)
        images, labels = batch(size)
        out, targets = mixing(images, labels)
        assert out.shape == images.shape and targets.shape == (size, CLASSES) and targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(size))
        torch.testing.assert_close(out.mean((1, 2, 3)), targets @ values, rtol=1e-4, atol=1e-4)
        # Image i meets only its opposite; with the last image doubled, that is B - i, and image 0 meets the last.
        opposite = (size - labels).clamp(max=size - 1) if size % 2 else size - 1 - labels
        others = targets.clone()
        others[labels, labels] = 0
        others[labels, opposite] = 0
        assert others.abs().max() < 1e-6
        mixed += int((targets[labels, labels] < 0.999).sum())
    assert mixed > 0 or size == 1


def test_cutmix_and_mixup_images():
    seed(0)
    images, labels = batch(4)
    cut, _ = InputMixup(CLASSES, cutmix_alpha=1.0)(images, labels)
    assert set(cut[0].unique().tolist()) == {1.0, 4.0}
    rows, columns = torch.where(cut[0, 0] == 4)
    assert (cut[0, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == 4).all()
    blend, _ = InputMixup(CLASSES, mixup_alpha=1.0)(images, labels)
    assert all(image.max() - image.min() < 1e-6 for image in blend) and 1 < blend[0].mean() < 4


def test_mixup_does_not_change_arguments():
    for size in (4, 5):
        images, labels = batch(size)
        copies = images.clone(), labels.clone()
        seed(0)
        out, _ = InputMixup(CLASSES, 0.8, 1.0)(images, labels)
        assert torch.equal(images, copies[0]) and torch.equal(labels, copies[1])
        assert not torch.equal(out, images)


def test_label_smoothing_only_keeps_images():
    images, labels = batch(3)
    seed(5)
    before = np.random.get_state()[1:3]  # noqa: NPY002
    mixing = InputMixup(4, label_smoothing=0.1)
    out, targets = mixing(images, torch.tensor([2, 0, 3]))
    after = np.random.get_state()[1:3]  # noqa: NPY002
    assert mixing.enabled and np.array_equal(before[0], after[0]) and before[1] == after[1]
    assert torch.equal(out, images)
    torch.testing.assert_close(targets[0], torch.tensor([0.025, 0.025, 0.925, 0.025]))


def test_label_smoothing_with_mixup():
    seed(3)
    images, labels = batch(2)
    plain = InputMixup(CLASSES, mixup_alpha=1.0)(images, labels)[1]
    seed(3)
    smooth = InputMixup(CLASSES, mixup_alpha=1.0, label_smoothing=0.1)(images, labels)[1]
    torch.testing.assert_close(smooth, plain * 0.9 + 0.1 / CLASSES)


def test_mixup_off_gives_one_hot_targets():
    images, labels = batch(3)
    for mixing in (InputMixup(CLASSES), InputMixup(CLASSES, 0.8, 1.0, prob=0.0)):
        out, targets = mixing(images, labels)
        assert not mixing.enabled and torch.equal(out, images)
        assert torch.equal(targets, torch.nn.functional.one_hot(labels, CLASSES).float())


def test_mixup_probabilities():
    images, labels = batch(2)
    seed(0)
    often = InputMixup(CLASSES, mixup_alpha=1.0, prob=0.3)
    share = np.mean([not torch.equal(often(images, labels)[0], images) for _ in range(400)])
    assert 0.22 < share < 0.38
    switch = InputMixup(CLASSES, 1.0, 1.0, switch_prob=0.8)
    cut = np.mean([switch(images, labels)[0][0].unique().numel() <= 2 for _ in range(20)])
    blended = InputMixup(CLASSES, 1.0, 1.0, switch_prob=0.0)(images, labels)[0]
    assert cut > 0.5 and float(blended[0].mean()) != round(float(blended[0].mean()))


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_mixup_half_precision_images(mode):
    seed(0)
    images, labels = batch(5, torch.bfloat16)
    out, targets = InputMixup(CLASSES, 0.8, 1.0, mode=mode)(images, labels)
    assert out.dtype == torch.bfloat16 and targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(5), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"mixup_alpha": -0.1}, ["mixup_alpha", "-0.1"]),
        ({"cutmix_alpha": float("nan")}, ["cutmix_alpha", "nan"]),
        ({"cutmix_alpha": float("inf")}, ["cutmix_alpha", "inf"]),
        ({"prob": 1.5}, ["prob", "1.5"]),
        ({"switch_prob": -1}, ["switch_prob", "-1"]),
        ({"label_smoothing": 1.0}, ["label_smoothing", "1.0"]),
        ({"mode": "image"}, ["mode", "'image'", "'pair'"]),
        ({"num_classes": 0}, ["num_classes", "0"]),
    ],
)
def test_mixup_invalid_settings_raise(settings, parts):
    with pytest.raises(ValueError) as error:
        InputMixup(**{"num_classes": 3} | settings)
    for part in parts:
        assert part in str(error.value)


def test_mixup_invalid_shapes_raise():
    images, labels = batch(4)
    with pytest.raises(ValueError, match=r"\(4, 3, 16, 16\) and \(3,\)"):
        InputMixup(CLASSES, 0.8)(images, labels[:3])


@pytest.mark.gpu
def test_mixup_has_no_device_sync():
    images, labels = (tensor.cuda() for tensor in batch(5))
    mixing = InputMixup(CLASSES, 0.8, 1.0, label_smoothing=0.1)
    mixing(images, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, targets = mixing(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.is_cuda and targets.is_cuda
