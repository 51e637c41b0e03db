"""Iterable dataset: sharding, shuffling, augmentation, resuming and errors."""

import pickle
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from helpers.streams import CLASSES, ReadNumber, load_stream, numbered_images, write_shards
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from hf_tokenmixup.data import ImageClassificationIterableDataset, build_transforms, collate
from hf_tokenmixup.data import iterable_dataset as streaming
from hf_tokenmixup.data.image_cache import decode_image
from hf_tokenmixup.data.iterable_dataset import RebatchedDataset, batches_per_worker, global_batch_index


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("even"), [6] * 12)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("uneven"), [7, 5, 9, 4])


def streamed(folder, transform=None, **options):
    options = {"seed": 5, "shuffle_buffer": 16, "num_images": 72} | options
    return ImageClassificationIterableDataset(load_stream(folder), transform or ReadNumber(), **options)


def batches(data, workers=0, **options):
    """(B, 2) of each batch: the number in the image, and the augmentation's draw."""
    loader = DataLoader(data, data.batch_size, num_workers=workers, collate_fn=collate, **options)
    return [batch["pixel_values"].flatten(1)[:, :2] for batch in loader]


def numbers(parts):
    return torch.cat(parts)[:, 0].int().tolist()


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_epoch_yields_each_image_once(even, processes, workers):
    shares = [batches(streamed(even).shard(rank, processes, 3), workers) for rank in range(processes)]
    assert [len(share) for share in shares] == [24 // processes] * processes
    assert sorted(number for share in shares for number in numbers(share)) == list(range(72))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_uneven_shards_give_same_number_of_batches(uneven, processes, workers):
    for rank in range(processes):
        data = streamed(uneven, num_images=25).shard(rank, processes, 4)
        share = batches(data, workers)
        assert len(share) == len(data) // 4 == 25 // (4 * processes) and all(len(batch) == 4 for batch in share)


def test_short_shard_repeats_in_another_order(uneven):
    data = streamed(uneven, num_images=100).shard(0, 1, 5)
    order = numbers(batches(data))
    assert Counter(order) == Counter(4 * list(range(25))) and order[:25] != order[25:50]
    # Of a share of no image at all there is no more to come.
    with pytest.raises(ValueError, match="There are no images of split 'train' for process 30, worker 0"):
        batches(streamed(uneven).shard(30, 31, 5))


def test_order_depends_on_seed_and_epoch(even):
    data = streamed(even).shard(0, 1, 3)
    orders = []
    for epoch in (0, 1, 2, 0):
        data.set_epoch(epoch)
        orders.append(numbers(batches(data)))
    assert orders[3] == orders[0] and len(set(map(tuple, orders))) == 3
    assert numbers(batches(streamed(even).shard(0, 1, 3))) == orders[0] != sorted(orders[0])
    assert numbers(batches(streamed(even, seed=6).shard(0, 1, 3))) != orders[0]


def test_shuffle_buffer_size_limits_shuffling(tmp_path):
    folder = write_shards(tmp_path / "one", [24])
    one, all_of_them = (
        numbers(batches(streamed(folder, shuffle_buffer=size).shard(0, 1, 3)))[:24] for size in (1, 24)
    )
    assert one == list(range(24)) == sorted(all_of_them) != all_of_them


def test_augmentation_is_reproducible(even):
    data = streamed(even).shard(0, 2, 3)
    first = torch.cat(batches(data, 2))
    random.seed(9), torch.manual_seed(9), np.random.seed(9)  # noqa: NPY002
    assert torch.equal(torch.cat(batches(data, 2)), first)
    draws = [first[:, 1], torch.cat(batches(streamed(even).shard(1, 2, 3), 2))[:, 1]]
    data.set_epoch(1)
    draws.append(torch.cat(batches(data, 2))[:, 1])
    # Over images, processes, workers and epochs.
    assert len(torch.cat(draws).unique()) == 3 * 36


def test_batch_transform_matches_single_images(even):
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    transform, _ = build_transforms(processor, auto_augment="rand-m9-mstd0.5-inc1")
    sizes = []

    class Watched(type(transform)):
        def batch(self, images, seed_fn=None):
            sizes.append(len(images))
            return super().batch(images, seed_fn)

    before = torch.get_rng_state()
    together = streamed(even, Watched(transform.augment, transform.device_transform)).shard(0, 1, 6)
    alone = streamed(even, lambda image: transform(image)).shard(0, 1, 6)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and one["labels"] == other["labels"]
    assert sizes == [6] * 12 and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers, passed", [(0, 5), (2, 1), (2, 8), (5, 11)])
def test_skipped_batches_are_not_decoded(uneven, workers, passed, monkeypatch):
    data = streamed(uneven, num_images=48).shard(0, 1, 4)
    data.set_epoch(2)
    expected = batches(data, workers)
    data.skip_batches(2, passed)
    decoded = []
    monkeypatch.setattr(streaming, "decode_image", lambda *args: decoded.append(1) or decode_image(*args))
    loader = DataLoader(data, 4, num_workers=workers, collate_fn=collate)
    found = [batch["pixel_values"] for batch in loader]
    assert [len(batch.flatten(1)[0]) for batch in found] == passed * [0] + (12 - passed) * [3]
    for one, other in zip(found[passed:], expected[passed:], strict=True):
        assert torch.equal(one.flatten(1)[:, :2], other)
    assert workers or len(decoded) == 4 * (12 - passed)
    # The next epoch is whole.
    data.set_epoch(3)
    assert all(batch.shape == (4, 2) for batch in batches(data, workers))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_set_epoch_reaches_persistent_workers(even, context):
    data, expected = streamed(even).shard(0, 1, 3), streamed(even).shard(0, 1, 3)
    options = {"num_workers": 2, "collate_fn": collate, "persistent_workers": True, "multiprocessing_context": context}
    loader = DataLoader(data, 3, **options)
    for epoch in (0, 1, 7):
        data.set_epoch(epoch)
        expected.set_epoch(epoch)
        found = torch.cat([batch["pixel_values"].flatten(1)[:, :2] for batch in loader])
        assert torch.equal(found, torch.cat(batches(expected, 2)))


def test_pickled_dataset_yields_same_images(even):
    data = streamed(even).shard(1, 2, 3)
    data.set_epoch(4)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.epoch == 4 and torch.equal(torch.cat(batches(copy)), torch.cat(batches(data)))


def test_unknown_length_does_not_end(uneven):
    data = streamed(uneven, num_images=None).shard(0, 1, 4)
    with pytest.raises(TypeError, match="length of this stream is unknown"):
        len(data)
    for workers in (0, 2, 5):
        loader = iter(DataLoader(data, 4, num_workers=workers, collate_fn=collate))
        assert sum(len(next(loader)["labels"]) for _ in range(20)) == 80


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_evaluation_yields_each_image_once(uneven, workers):
    data = streamed(uneven, ReadNumber(draws=False), seed=None, label_map=[1, 2, 3, 0])
    loader = DataLoader(data, 4, num_workers=workers, collate_fn=collate)
    read = [(batch["pixel_values"][:, 0, 0, 0].int(), batch["labels"]) for batch in RebatchedDataset(loader, 4)]
    assert [len(labels) for _, labels in read] == [4] * 6 + [1]
    images, labels = (torch.cat(part) for part in zip(*read, strict=True))
    assert sorted(images.tolist()) == list(range(25)) and torch.equal(labels, (images + 1) % 4)
    if not workers:
        assert images.tolist() == list(range(25))
    with pytest.raises(TypeError, match="length of this stream is unknown"):
        len(data)
    shares = [[int(one["pixel_values"][0]) for one in data.shard(rank, 3, 4)] for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(25))


def test_batches_per_worker_and_global_batch_index():
    assert batches_per_worker(7, 5, 2) == [4, 3] and batches_per_worker(7, 1, 3) == [7, 0, 0]
    assert sum(batches_per_worker(1001, 37, 8)) == 1001
    assert batches_per_worker(None, 2, 3) == [np.inf, np.inf, 0]
    # Worker 0 has three batches, worker 1 one, worker 2 two: 0 1 2 0 2 0.
    places = [[global_batch_index([3, 1, 2], worker, number) for number in range(count)]
              for worker, count in enumerate([3, 1, 2])]  # fmt: skip
    assert places == [[0, 3, 5], [1], [2, 4]]


def test_string_column_with_paths_is_read(tmp_path):
    for number, image in enumerate(numbered_images(range(3))["image"]):
        image.save(tmp_path / f"{number}.png")
    rows = {"file": [str(tmp_path / f"{number}.png") for number in range(3)], "label": [0, 1, 2]}
    features = Features({"file": Value("string"), "label": ClassLabel(names=CLASSES)})
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    data = streamed(tmp_path / "data", image_column="file", num_images=3).shard(0, 1, 1)
    assert sorted(numbers(batches(data))) == [0, 1, 2]


@pytest.mark.parametrize("seed, place", [(None, "process 0, worker 0"), (1, "process 0, worker 0, epoch 2")])
def test_invalid_images_and_labels_raise(tmp_path, seed, place):
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    good = {
        "bytes": numbered_images([1]).with_format(None).cast_column("image", Image(decode=False))[0]["image"]["bytes"]
    }

    def read(image, label):
        rows = {"image": [image], "label": [label]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
        data = streamed(tmp_path, seed=seed, num_images=1)
        data.set_epoch(2)
        list(data.shard(0, 1, 1))

    read(good | {"path": None}, 0)
    where = f"Image 0 of the stream of split 'train' .{place}."
    with pytest.raises(ValueError, match=f"{where} .cut.png. cannot be decoded"):
        read({"bytes": good["bytes"][:20], "path": "cut.png"}, 0)
    with pytest.raises(ValueError, match=f"{where} cannot be decoded: .*None"):
        read(None, 0)
    with pytest.raises(ValueError, match=f"{where} .a.png. has the label -1; expected 0 to 3.*choose another split"):
        read(good | {"path": "a.png"}, -1)
    with pytest.raises(ValueError, match=f"{where} has the label None"):
        read(good | {"path": None}, None)


def test_shuffle_buffer_above_arrow_limit_raises(even, monkeypatch):
    def overflow(rows, rank, world_size):
        raise pa.ArrowInvalid("offset overflow while concatenating arrays")
        yield

    data = streamed(even)
    shards = data.num_shards
    monkeypatch.setattr(ImageClassificationIterableDataset, "num_shards", shards)
    monkeypatch.setattr(streaming, "split_dataset_by_node", overflow)
    with pytest.raises(ValueError, match="16 encoded images of .* take more than 2 GiB.*shuffle_buffer"):
        list(data)


def test_invalid_arguments_raise(even):
    for message, options in (("`shuffle_buffer` must be at least 1", {"shuffle_buffer": 0}),
                             ("at least one image in split 'train', got 0", {"num_images": 0})):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            streamed(even, **options)
    for share in ((2, 2, 4), (-1, 2, 4), (0, 1, 0)):
        with pytest.raises(ValueError, match="rank < world_size"):
            streamed(even).shard(*share)
