"""Epoch of a dataset: wrappers, workers and copies."""

import copy
import functools
import pickle

import pytest
import torch
from helpers.epochs import EpochDataset
from torch.utils.data import (
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    random_split,
)

from hf_tokenmixup.data import ImageClassificationData, load_digits_dataset
from hf_tokenmixup.data.epochs import MAX_ITEMS, epoch_followers


class Wrapper(Dataset):
    """A user's own, without `set_epoch`."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.data[index]


class Slotted:
    __slots__ = ("data",)

    def __init__(self, data):
        self.data = data


class Stream(IterableDataset):
    def __init__(self, data):
        self.read = lambda: (data[index] for index in range(len(data)))

    def __iter__(self):
        return self.read()


class Forwarding(Wrapper):
    """Makes up attributes, as wrappers that forward do."""

    def __getattr__(self, name):
        return getattr(self.__dict__["data"], name)


WRAPPERS = {
    "the dataset itself": lambda data: data,
    "Subset": lambda data: Subset(data, range(2)),
    "random_split": lambda data: random_split(data, [0.5, 0.5])[1],
    "ConcatDataset": lambda data: ConcatDataset([EpochDataset(), data]),
    "StackDataset of a tuple": lambda data: StackDataset(EpochDataset(), data),
    "StackDataset of a dict": lambda data: StackDataset(a=EpochDataset(), b=data),
    "ChainDataset": lambda data: ChainDataset([Stream(data)]),
    "a user's own": Wrapper,
    "a dict of a user's own": lambda data: Wrapper({"a": [EpochDataset(), data]}),
    "slots": lambda data: Wrapper(Slotted(data)),
    "partial": lambda data: Wrapper(functools.partial(lambda data, index: data[index], data)),
    "a bound method": lambda data: Wrapper(data.__getitem__),
    "forwarding": Forwarding,
    "behind many items": lambda data: Wrapper([list(range(3 * MAX_ITEMS)), Subset(data, list(range(3 * MAX_ITEMS)))]),
    "nested": lambda data: ConcatDataset([Subset(Wrapper(random_split(data, [1.0])[0]), [0])]),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_epoch_followers_wrapper_includes_dataset(wrap):
    data = EpochDataset()
    for follower in epoch_followers(wrap(data)):
        follower.set_epoch(7)
    assert data.epoch == 7


def test_epoch_followers_without_set_epoch_is_empty():
    looped = [1, "two", torch.zeros(3), torch.nn.Linear(2, 2), None]
    looped.append(looped)
    assert epoch_followers(Wrapper(looped)) == []


def test_epoch_followers_inner_dataset_is_first():
    class Shifted(Wrapper):
        def set_epoch(self, epoch):
            self.data.set_epoch(epoch + 100)

    data = EpochDataset()
    for follower in epoch_followers(Subset(Shifted(data), [0])):
        follower.set_epoch(7)
    assert data.epoch == 107


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_shared_epoch_copy_is_independent(copied):
    data = EpochDataset()
    data.set_epoch(3)
    other = copied(Wrapper(data))
    assert other.data.epoch == 3
    loader = DataLoader(other, batch_size=4, num_workers=1, persistent_workers=True)
    assert next(iter(loader)).tolist() == [3] * 4
    other.data.set_epoch(5)
    assert next(iter(loader)).tolist() == [5] * 4
    assert data.epoch == 3


def test_shared_epoch_reaches_spawned_workers():
    data = EpochDataset()
    loader = DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True, multiprocessing_context="spawn")
    for epoch in (1, 2):
        data.set_epoch(epoch)
        assert next(iter(loader)).tolist() == [epoch] * 4


def test_dataset_without_label_column_has_no_labels():
    digits = load_digits_dataset()["test"].select(range(3)).remove_columns("label")
    data = ImageClassificationData(digits, lambda image: torch.zeros(3, 2, 2), label_column=None)
    assert [list(data[index]) for index in range(3)] == [["pixel_values"]] * 3
