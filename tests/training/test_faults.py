"""A loss that is not finite: noticed in time, told clearly, and left out where that was asked for."""

import pytest
import torch
from tiny_training import Images, plain_vit, tokenmixup_vit

from hf_tokenmixup.training import NonFiniteLossError, TokenMixupTrainer


class Spoilt(Images):
    """Images of which some are not numbers."""

    def __init__(self, size, *bad):
        super().__init__(size)
        self.bad = set(bad)

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {"pixel_values": item["pixel_values"] * float("nan")} if index in self.bad else item


def in_order(trainer):
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


@pytest.mark.parametrize("build", [plain_vit, tokenmixup_vit])
def test_it_stops_at_the_next_log_line_with_the_last_good_checkpoint_named(arguments, tmp_path, build):
    # Step 4 is bad. A line is due at step 5, a checkpoint was written at step 3.
    args = arguments(max_steps=8, logging_steps=5, save_strategy="steps", save_steps=3, learning_rate=0.01)
    trainer = in_order(TokenMixupTrainer(build(), args, train_dataset=Spoilt(32, 13)))
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    told = str(error.value)
    assert "The loss of step 4 is infinite or not a number; the learning rate is 0.01 now, at step 5." in told
    assert f"The last good checkpoint is {tmp_path / 'out' / 'checkpoint-3'}. Go on from there" in told
    assert not any("loss" in record for record in trainer.state.log_history)


def test_no_checkpoint_holds_spoilt_weights(arguments, tmp_path):
    args = arguments(max_steps=8, logging_steps=100, save_strategy="steps", save_steps=2)
    trainer = in_order(TokenMixupTrainer(plain_vit(), args, train_dataset=Spoilt(32, 9)))
    with pytest.raises(NonFiniteLossError, match="The loss of step 3 is .*checkpoint-2. Go on"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_end_of_a_training_is_looked_at_too(arguments):
    args = arguments(max_steps=3, logging_strategy="no")
    trainer = in_order(TokenMixupTrainer(plain_vit(), args, train_dataset=Spoilt(16, 8)))
    with pytest.raises(NonFiniteLossError, match="step 3 is .* There is no checkpoint before it"):
        trainer.train()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_skipped_step_moves_nothing(arguments, accumulation):
    """With momentum and weight decay on, a training with a bad step ends as one without it."""
    settings = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.01, "logging_steps": 1}
    settings |= {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    args = arguments(max_steps=4, skip_nonfinite_steps=1, **settings)
    # The third of four steps is bad, in its last image.
    trainer = in_order(TokenMixupTrainer(plain_vit(), args, train_dataset=Spoilt(16, 11)))
    trainer.train()
    assert trainer._guard.skipped == 1 and trainer.state.global_step == 4
    assert all(record["loss"] < 100 for record in trainer.state.log_history if "loss" in record)

    clean = Images(16)
    without = torch.utils.data.Subset(clean, [*range(8), *range(12, 16)])
    other = in_order(TokenMixupTrainer(plain_vit(), arguments(max_steps=3, **settings), train_dataset=without))
    clean.epoch = 0
    other.train()
    for (name, a), b in zip(trainer.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_more_bad_steps_than_allowed_stop_the_training(arguments):
    args = arguments(max_steps=4, skip_nonfinite_steps=1, logging_steps=100)
    trainer = in_order(TokenMixupTrainer(plain_vit(), args, train_dataset=Spoilt(16, 5, 9)))
    with pytest.raises(NonFiniteLossError, match="loss of step 3 .*, and 1 such steps were left out already"):
        trainer.train()
    with pytest.raises(ValueError, match="skip_nonfinite_steps. must be at least 0"):
        arguments(skip_nonfinite_steps=-1)
