"""Image transforms for training and evaluation."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, to_tensor
from transformers import (
    ConvNextImageProcessor,
    DeiTImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from hf_tokenmixup.data import build_transforms
from hf_tokenmixup.data.transforms import infer_image_processor_config, resize_image_processor

SQUARE_40 = {"height": 40, "width": 40}
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def processor(size=32, **more):
    more = {"image_mean": CIFAR_MEAN, "image_std": CIFAR_STD} | more
    return ViTImageProcessor(size={"height": size, "width": size}, **more)


def picture(width, height, seed=0):
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def plain(image_processor, **more):
    """Training transform without any randomness."""
    return build_transforms(image_processor, crop_scale=(1.0, 1.0), hflip=0.0, **more)[0]


@pytest.mark.parametrize(
    "image_processor, size, mean, std",
    [
        (processor(), (32, 32), CIFAR_MEAN, CIFAR_STD),
        (ViTImageProcessor(size={"height": 24, "width": 40}), (24, 40), (0.5,) * 3, (0.5,) * 3),
        (processor(do_normalize=False), (32, 32), (0.0,) * 3, (1.0,) * 3),
        (processor(do_rescale=False, do_normalize=False), (32, 32), (0.0,) * 3, (1 / 255,) * 3),
        (DeiTImageProcessor(size=SQUARE_40, crop_size={"height": 32, "width": 32}), (32, 32), None, None),
        (ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=0.875), (48, 48), None, None),
    ],
)
def test_infer_image_processor_config(image_processor, size, mean, std):
    found_size, found_mean, found_std = infer_image_processor_config(image_processor)
    assert found_size == size
    assert found_mean == pytest.approx(mean or image_processor.image_mean, abs=1e-6)
    assert found_std == pytest.approx(std or image_processor.image_std, abs=1e-6)


def test_image_processor_with_varying_size_raises():
    with pytest.raises(ValueError, match=r"the same size \(3, H, W\).*do_resize=True"):
        build_transforms(ViTImageProcessor(do_resize=False))


def test_eval_transform_matches_pipeline():
    image_processor = processor()
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    classify = pipeline("image-classification", ViTForImageClassification(config), image_processor=image_processor)
    _, evaluate = build_transforms(image_processor)
    for size in ((32, 32), (8, 8), (500, 375)):
        image = picture(*size)
        assert torch.equal(evaluate(image), classify.preprocess(image)["pixel_values"][0])


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (150, 90), (90, 400)])
def test_train_transform_without_augmentation_resizes_and_normalizes(size):
    image_processor = processor()
    _, evaluate = build_transforms(image_processor)
    image = picture(*size)
    out = plain(image_processor)(image)
    assert out.shape == (3, 32, 32) and out.dtype == torch.float32
    # One grey level is 0.016 after normalisation; the two resize routes may differ by one.
    torch.testing.assert_close(out, evaluate(image), rtol=0, atol=0.017 * 1.01)


def test_train_transform_uses_normalization_of_image_processor():
    white = plain(processor())(Image.new("RGB", (32, 32), "white"))
    expected = [(1 - mean) / std for mean, std in zip(CIFAR_MEAN, CIFAR_STD, strict=True)]
    assert white.mean((1, 2)).tolist() == pytest.approx(expected, abs=1e-4)


def test_train_transform_uses_interpolation_of_image_processor():
    image, nearest = picture(7, 7), processor(resample=Image.Resampling.NEAREST)
    assert torch.equal(plain(nearest)(image)[0].unique(), plain(nearest)(image.resize((32, 32), 0))[0].unique())
    assert plain(processor())(image)[0].unique().numel() > plain(nearest)(image)[0].unique().numel()


def test_train_transform_flip_crop_and_jitter():
    image_processor, image = processor(), picture(64, 64)
    still = plain(image_processor)(image)
    flipped = build_transforms(image_processor, crop_scale=(1, 1), hflip=1.0)[0](image)
    assert torch.equal(flipped, plain(image_processor)(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    assert not torch.equal(flipped, still)
    # A crop of a horizontal ramp spans its share of the ramp.
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB")
    random.seed(0)
    crop = build_transforms(processor(image_mean=(0,) * 3, image_std=(1,) * 3), crop_scale=(0.25, 0.25),
                            crop_ratio=(1, 1), hflip=0.0)[0]  # fmt: skip
    for _ in range(5):
        out = crop(ramp)[0]
        assert float(out.max() - out.min()) == pytest.approx(0.5, abs=0.03)
    torch.manual_seed(0)
    assert not torch.equal(plain(image_processor, color_jitter=0.4)(image), still)


def test_random_erasing_modes():
    image_processor, white = processor(), Image.new("RGB", (32, 32), "white")
    value = plain(image_processor)(white)[0, 0, 0]
    distinct = {}
    for mode in ("const", "pixel"):
        random.seed(1)
        torch.manual_seed(1)
        out = plain(image_processor, random_erasing=1.0, erasing_mode=mode)(white)[0]
        erased = out[out != value]
        assert 0.01 < erased.numel() / out.numel() < 0.4
        distinct[mode] = erased.unique().numel() / erased.numel()
        assert mode != "const" or (erased == 0).all()
    assert distinct["pixel"] > 0.9


def posterize_ops(transform):
    augment = next(t for t in transform.augment.transforms if hasattr(t, "ops"))
    return [op for op in augment.ops if op.name.startswith("Posterize")]


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "augmix-m5", "rand-m15-mmax20-inc1"])
def test_posterize_keeps_at_least_one_bit(policy):
    train, _ = build_transforms(processor(), auto_augment=policy)
    (op,) = posterize_ops(train)
    op.prob, op.magnitude_std, image = 1.0, 0, picture(32, 32)
    for magnitude in (0, 1, 5, 9, 10, 20):
        op.magnitude = magnitude
        levels = np.unique(np.asarray(op(image))[..., 0])
        assert len(levels) > 1


def test_posterize_otherwise_matches_timm():
    train, _ = build_transforms(processor(), auto_augment="rand-m9-mstd0.5-inc1")
    (op,) = posterize_ops(train)
    for magnitude in (0.0, 3.0, 6.0, 8.0):
        theirs = AugmentOp(op.name, prob=1.0, magnitude=magnitude, hparams={})
        op.prob, op.magnitude, op.magnitude_std = 1.0, magnitude, 0
        assert np.array_equal(np.asarray(op(picture(32, 32))), np.asarray(theirs(picture(32, 32))))
    augment = next(t for t in train.augment.transforms if hasattr(t, "ops"))
    for other in augment.ops:
        if other is not op:
            assert other.aug_fn is AugmentOp(other.name, hparams={}).aug_fn and other.magnitude_max is None


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m5-w2", "original", "v0", "3a", None])
@pytest.mark.parametrize("size", [(8, 8), (200, 120)])
def test_policies_on_small_and_large_images_are_picklable(policy, size):
    transforms = build_transforms(processor(), auto_augment=policy, random_erasing=0.5)
    train, evaluate = pickle.loads(pickle.dumps(transforms))
    for _ in range(10):
        out = train(picture(*size))
        assert out.shape == (3, 32, 32) and out.isfinite().all()
    assert evaluate(picture(*size)).shape == (3, 32, 32)


def test_only_policies_draw_from_numpy():
    """ImageClassificationData leaves numpy's generator alone where a transform says that it does not use it."""
    for settings in ({"random_erasing": 1.0, "color_jitter": 0.4}, {"auto_augment": "rand-m9-mstd0.5-inc1"}):
        train, _ = build_transforms(processor(), **settings)
        before = np.random.get_state()[1:3]  # noqa: NPY002
        train(picture(40, 50))
        after = np.random.get_state()[1:3]  # noqa: NPY002
        drew = not np.array_equal(before[0], after[0]) or before[1] != after[1]
        assert drew == train.uses_numpy_rng


def test_color_jitter_with_policy_logs_warning(caplog):
    build_transforms(processor(), auto_augment="rand-m9", color_jitter=0.4)
    assert "color_jitter=0.4 is ignored" in caplog.text


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"crop_scale": (0.0, 1.0)}, ["crop_scale", "(0.0, 1.0)"]),
        ({"crop_scale": (0.9, 0.8)}, ["crop_scale", "(0.9, 0.8)"]),
        ({"crop_scale": (0.5, 1.2)}, ["crop_scale"]),
        ({"crop_ratio": (2.0, 1.0)}, ["crop_ratio"]),
        ({"hflip": 1.1}, ["hflip", "1.1"]),
        ({"random_erasing": -0.1}, ["random_erasing", "-0.1"]),
        ({"erasing_mode": "noise"}, ["erasing_mode", "'noise'", "'pixel'"]),
        ({"train_interpolation": "cubic"}, ["train_interpolation", "'cubic'", "random, nearest, bilinear"]),
        ({"color_jitter": -1.0}, ["color_jitter", "-1.0"]),
        ({"color_jitter": (0.1, 0.1)}, ["color_jitter", "three or four"]),
        ({"color_jitter": (0.1, 0.1, 0.1, 0.7)}, ["hue", "0.7"]),
        ({"auto_augment": "rand-z3"}, ["auto_augment", "'rand-z3'", "rand-m9"]),
        ({"auto_augment": "rand-m9.5"}, ["auto_augment", "'rand-m9.5'"]),
        ({"auto_augment": "trivial"}, ["auto_augment", "'trivial'"]),
    ],
)
def test_build_transforms_invalid_settings_raise(settings, parts):
    with pytest.raises(ValueError) as error:
        build_transforms(processor(), **settings)
    for part in parts:
        assert part in str(error.value)


def test_batch_transform_matches_single_images():
    """Images of mixed sizes, bit for bit, against the steps that timm and the image processor take for one image."""
    images = [picture(*size) for size in ((40, 50), (32, 32), (20, 64), (32, 32))]
    train, evaluate = build_transforms(processor(), auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
    assert torch.equal(evaluate.batch(images), torch.stack([evaluate(image) for image in images]))

    def seed_fn(position, stream):
        random.seed(10 * position + stream), torch.manual_seed(10 * position + stream)
        np.random.seed(10 * position + stream)  # noqa: NPY002

    batch, expected, erased = train.batch(images, seed_fn), [], 0
    for position, image in enumerate(images):
        seed_fn(position, 0)
        tensor = normalize(to_tensor(train.augment(image)), train.device_transform.mean, train.device_transform.std)
        seed_fn(position, 1)
        expected.append(train.random_erasing(tensor.clone()))
        erased += not torch.equal(expected[-1], tensor)
    assert torch.equal(batch, torch.stack(expected)) and erased


def test_train_transform_normalize_on_device_is_exact():
    images = [picture(40, 50), picture(32, 32)]
    for settings in ({}, {"random_erasing": 1.0, "erase_after_mixing": True}):
        transform = plain(processor(), normalize_on_device=True, **settings)
        batch = transform.batch(images)
        assert batch.dtype == torch.uint8 and batch.shape == (2, 3, 32, 32)
        assert torch.equal(transform.device_transform.normalize(batch), plain(processor()).batch(images))
    # Erasing needs normalized images.
    assert plain(processor(), normalize_on_device=True, random_erasing=1.0).batch(images).dtype == torch.float32


def test_device_transform_erases_copy_of_batch():
    transform = plain(processor(), random_erasing=0.5, erasing_mode="const", erase_after_mixing=True)
    images = transform.batch([Image.new("RGB", (32, 32), "white")] * 8)
    assert torch.equal(images, plain(processor()).batch([Image.new("RGB", (32, 32), "white")] * 8))
    before = images.clone()
    random.seed(3)
    erased = transform.device_transform.erase(images)
    assert torch.equal(images, before)
    is_erased = (erased != images).flatten(1).any(dim=1)
    assert is_erased.any() and not is_erased.all()
    assert not erased[erased != images].any()
    random.seed(3)
    assert torch.equal(transform.device_transform.erase(images), erased)
    assert plain(processor()).device_transform.erase(images) is images


def test_train_interpolation_selects_filter():
    image, nearest = picture(7, 9), processor(resample=Image.Resampling.NEAREST)
    by_filter = {
        name: plain(processor(resample=Image.Resampling[name.upper()]))(image) for name in ("bilinear", "bicubic")
    }
    for name, expected in by_filter.items():
        assert torch.equal(plain(nearest, train_interpolation=name)(image), expected)
    crop = build_transforms(nearest, crop_scale=(0.99, 1.0), hflip=0.0, train_interpolation="random")[0]
    assert crop.augment.transforms[0].interpolation == (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
    drawn = set()
    for seed in range(20):
        random.seed(seed), torch.manual_seed(seed)
        out = plain(nearest, train_interpolation="random")(image)
        drawn |= {name for name, expected in by_filter.items() if torch.equal(out, expected)}
    assert drawn == set(by_filter)


@pytest.mark.parametrize(
    "image_processor, size, stored",
    [
        (processor(), (48, 48), {"size": {"height": 48, "width": 48}}),
        (processor(), (24, 40), {"size": {"height": 24, "width": 40}}),
        (ConvNextImageProcessor(size={"shortest_edge": 48}), (64, 64), {"size": {"shortest_edge": 64}}),
        (
            DeiTImageProcessor(size=SQUARE_40, crop_size={"height": 32, "width": 32}),
            (64, 64),
            {"size": {"height": 80, "width": 80}, "crop_size": {"height": 64, "width": 64}},
        ),
    ],
)
def test_resize_image_processor_changes_and_saves_size(image_processor, size, stored, tmp_path):
    resize_image_processor(image_processor, *size)
    image_processor.save_pretrained(tmp_path)
    loaded = type(image_processor).from_pretrained(tmp_path)
    assert infer_image_processor_config(loaded)[0] == size
    for name, value in stored.items():
        assert {key: pixels for key, pixels in dict(loaded.to_dict()[name]).items() if pixels} == value


def test_resize_image_processor_unsupported_size_raises():
    with pytest.raises(ValueError, match="ConvNextImageProcessor cannot be set to 48x32 pixels"):
        resize_image_processor(ConvNextImageProcessor(size={"shortest_edge": 48}), 48, 32)
