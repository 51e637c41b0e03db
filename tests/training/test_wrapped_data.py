"""Augmentation in training: it depends on seed, epoch and index also where the dataset is wrapped, and on resuming."""

import pytest
import torch
from helpers.tiny_training import Images, tokenmixup_vit
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, random_split
from transformers import TrainerCallback, ViTImageProcessor

from hf_tokenmixup.data import ImageClassificationData, build_transforms, collate, load_digits_dataset
from hf_tokenmixup.training import TokenMixupTrainer

AUGMENT, _ = build_transforms(ViTImageProcessor(size={"height": 8, "width": 8}), random_erasing=0.5)
WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}


class Wrapper(Dataset):
    def __init__(self, data):
        self.parts = {"all": [data]}

    def __len__(self):
        return len(self.parts["all"][0])

    def __getitem__(self, index):
        return self.parts["all"][0][index]


class Stream(IterableDataset):
    """Of no known length."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[index] for index in range(len(self.data)))


WRAPPERS = {
    "Subset": lambda data: Subset(data, range(12)),
    "random_split": lambda data: random_split(data, [1.0])[0],
    "ConcatDataset": lambda data: ConcatDataset([Subset(data, range(6)), Subset(data, range(6, 12))]),
    "a user's own": Wrapper,
    "a stream": Stream,
}


@pytest.fixture(scope="module")
def digits():
    return load_digits_dataset()["train"].select(range(12))


class Watching(TokenMixupTrainer):
    """Notes the images that it trains on."""

    def training_step(self, model, inputs, *args, **kwargs):
        vars(self).setdefault("seen", []).append(inputs["pixel_values"])
        return super().training_step(model, inputs, *args, **kwargs)

    def sums(self):
        """Of each image's pixels, for every epoch of 12 images, whatever their order."""
        epochs = torch.cat(self.seen).split(12)
        return [sorted(images.double().sum((1, 2, 3)).tolist()) for images in epochs]


def trainer(digits, args, wrap, evaluate=False, callbacks=None):
    data = ImageClassificationData(digits, AUGMENT, seed=1)
    model = tokenmixup_vit(num_labels=10, hidden_dropout_prob=0.1)
    eval_dataset = data if evaluate else None
    return Watching(
        model, args, train_dataset=wrap(data), eval_dataset=eval_dataset, data_collator=collate, callbacks=callbacks
    )


@pytest.mark.parametrize(
    "wrap, settings", [*((wrap, {}) for wrap in WRAPPERS.values()), (WRAPPERS["Subset"], WORKERS)]
)
def test_wrapped_data_augmentation_matches_plain_dataset(digits, arguments, wrap, settings):
    args = arguments(max_steps=9, **settings)
    expected = trainer(digits, args, lambda data: data)
    expected.train()
    wrapped = trainer(digits, args, wrap)
    wrapped.train()
    assert wrapped.sums() == expected.sums()
    assert len({tuple(sums) for sums in wrapped.sums()}) == 3


def test_wrapped_data_evaluation_keeps_epoch_of_its_dataset(digits, arguments):
    """accelerate gives the dataset of an evaluation's loader the number of times that this was read."""
    expected = trainer(digits, arguments(max_steps=6), lambda data: data)
    expected.train()
    evaluating = trainer(
        digits, arguments(max_steps=6, eval_strategy="steps", eval_steps=1), lambda data: data, evaluate=True
    )
    evaluating.train()
    assert evaluating.sums() == expected.sums()


class KeepsNoEpoch(Images):
    """A user's dataset whose epoch cannot be read."""

    def set_epoch(self, epoch):
        self.number = epoch

    def __getitem__(self, index):
        return super().__getitem__(index) | {"pixel_values": torch.full((3, 8, 8), float(self.number))}


def test_wrapped_data_evaluation_restores_epoch_of_user_dataset(arguments):
    data = KeepsNoEpoch(8)
    args = arguments(max_steps=6, eval_strategy="steps", eval_steps=1)
    watching = Watching(tokenmixup_vit(), args, train_dataset=data, eval_dataset=data)
    watching.train()
    assert [float(batch.mean()) for batch in watching.seen] == [0, 0, 1, 1, 2, 2]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("name, step", [("ConcatDataset", 4), ("a user's own", 5), ("a stream", 3), ("a stream", 5)])
def test_wrapped_data_resumes_within_epoch_exactly(digits, arguments, tmp_path, name, step):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "mixup_alpha": 0.8}
    expected = trainer(digits, arguments(output_dir=str(tmp_path / "whole"), **settings), WRAPPERS[name])
    expected.train()
    args = arguments(output_dir=str(tmp_path / "parts"), **settings)
    trainer(digits, args, WRAPPERS[name], callbacks=[StopAt(step)]).train()
    resumed = trainer(digits, args, WRAPPERS[name])
    resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-{step}")
    losses = [[line["loss"] for line in one.state.log_history if "loss" in line] for one in (expected, resumed)]
    assert len(losses[0]) == 8 and losses[0] == losses[1]
    weights = resumed.model.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in expected.model.state_dict().items())
