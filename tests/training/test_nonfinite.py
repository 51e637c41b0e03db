"""A loss that is not finite: noticed in time, told clearly, and left out where that was asked for."""

import pytest
import torch
from helpers.tiny_training import Images, plain_vit, resnet, tokenmixup_vit
from transformers import Trainer

from hf_tokenmixup.training import NonFiniteLossError, TokenMixupTrainer


class NonfiniteImages(Images):
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
def test_nonfinite_loss_raises_at_next_log_step(arguments, tmp_path, build):
    # Step 4 is bad. A line is due at step 5, a checkpoint was written at step 3.
    args = arguments(max_steps=8, logging_steps=5, save_strategy="steps", save_steps=3, learning_rate=0.01)
    trainer = in_order(TokenMixupTrainer(build(), args, train_dataset=NonfiniteImages(32, 13)))
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    raised = str(error.value)
    assert "The loss of step 4 is infinite or not a number; the learning rate is 0.01 now, at step 5." in raised
    good = tmp_path / "out" / "checkpoint-3"
    assert f"The last checkpoint before it is {good}: start from its weights (`model_name_or_path={good}`)" in raised
    assert not any("loss" in record for record in trainer.state.log_history)


def test_nonfinite_loss_raises_before_checkpoint(arguments, tmp_path):
    args = arguments(max_steps=8, logging_steps=100, save_strategy="steps", save_steps=2)
    trainer = in_order(TokenMixupTrainer(plain_vit(), args, train_dataset=NonfiniteImages(32, 9)))
    with pytest.raises(NonFiniteLossError, match="The loss of step 3 is .*checkpoint-2: start from"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_nonfinite_loss_raises_at_end_of_training(arguments):
    args = arguments(max_steps=3, logging_strategy="no")
    trainer = in_order(TokenMixupTrainer(plain_vit(), args, train_dataset=NonfiniteImages(16, 8)))
    with pytest.raises(NonFiniteLossError, match="step 3 is .* There is no checkpoint before it"):
        trainer.train()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nonfinite_skipped_step_leaves_weights_and_optimizer_unchanged(arguments, accumulation):
    """With momentum and weight decay on, a training with a bad step ends as one without it."""
    settings = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.01, "logging_steps": 1}
    settings |= {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    args = arguments(max_steps=4, skip_nonfinite_steps=1, **settings)
    # The third of four steps is bad, in its last image.
    trainer = in_order(TokenMixupTrainer(plain_vit(), args, train_dataset=NonfiniteImages(16, 11)))
    trainer.train()
    assert trainer.nonfinite.skipped == 1 and trainer.state.global_step == 4
    assert all(record["loss"] < 100 for record in trainer.state.log_history if "loss" in record)

    clean = Images(16)
    without = torch.utils.data.Subset(clean, [*range(8), *range(12, 16)])
    other = in_order(TokenMixupTrainer(plain_vit(), arguments(max_steps=3, **settings), train_dataset=without))
    clean.epoch = 0
    other.train()
    for (name, a), b in zip(trainer.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_nonfinite_more_steps_than_limit_raises(arguments):
    args = arguments(max_steps=4, skip_nonfinite_steps=1, logging_steps=100)
    trainer = in_order(TokenMixupTrainer(plain_vit(), args, train_dataset=NonfiniteImages(16, 5, 9)))
    with pytest.raises(NonFiniteLossError, match="loss or a gradient of step 3 .*, and 1 such steps were skipped"):
        trainer.train()
    with pytest.raises(ValueError, match="skip_nonfinite_steps. must be at least 0"):
        arguments(skip_nonfinite_steps=-1)


def spoil_a_gradient(model, step):
    """Makes an element of a gradient infinite in the step, where the loss is a usual one."""
    seen = []

    def spoil(gradient):
        seen.append(gradient)
        return gradient.index_fill(0, torch.tensor([0]), float("inf")) if len(seen) == step else gradient

    model.classifier.weight.register_hook(spoil)
    return model


def test_nonfinite_weights_raise_before_checkpoint(arguments, tmp_path):
    args = arguments(max_steps=8, logging_steps=100, save_strategy="steps", save_steps=2, max_grad_norm=1.0)
    trainer = in_order(TokenMixupTrainer(spoil_a_gradient(plain_vit(), 4), args, train_dataset=Images(32)))
    with pytest.raises(
        NonFiniteLossError, match="After step 4, a weight is infinite .*checkpoint before it is .*-2: "
    ) as e:
        trainer.train()
    assert "--max_grad_norm" not in str(e.value)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    trainer = in_order(
        TokenMixupTrainer(spoil_a_gradient(plain_vit(), 8), arguments(max_steps=8), train_dataset=Images(32))
    )
    with pytest.raises(NonFiniteLossError, match="After step 8, a weight is infinite"):
        trainer.train()


def test_nonfinite_gradient_skips_step(arguments):
    settings = {"max_grad_norm": 1.0, "learning_rate": 0.01}
    args = arguments(max_steps=4, skip_nonfinite_steps=1, **settings)
    trainer = in_order(TokenMixupTrainer(spoil_a_gradient(plain_vit(), 3), args, train_dataset=Images(16)))
    trainer.train()
    assert trainer.nonfinite.skipped == 1
    without = torch.utils.data.Subset(Images(16), [*range(8), *range(12, 16)])
    other = in_order(TokenMixupTrainer(plain_vit(), arguments(max_steps=3, **settings), train_dataset=without))
    other.train()
    for (name, a), b in zip(trainer.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nonfinite_skipped_step_leaves_batch_norm_statistics_unchanged(arguments, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    args = arguments(max_steps=4, skip_nonfinite_steps=1, learning_rate=0.0, **settings)
    trainer = in_order(TokenMixupTrainer(resnet(), args, train_dataset=NonfiniteImages(16, 11)))
    trainer.train()
    assert trainer.nonfinite.skipped == 1
    clean = torch.utils.data.Subset(Images(16), [*range(8), *range(12, 16)])
    args = arguments(max_steps=3, learning_rate=0.0, **settings)
    other = in_order(TokenMixupTrainer(resnet(), args, train_dataset=clean))
    other.train()
    for (name, a), b in zip(trainer.model.named_buffers(), other.model.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_nonfinite_skip_limit_with_deepspeed_raises(arguments, monkeypatch):
    prepare = Trainer.create_accelerator_and_postprocess

    def with_deepspeed(self):
        prepare(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_deepspeed)
    with pytest.raises(ValueError, match="`skip_nonfinite_steps` is not supported with DeepSpeed"):
        TokenMixupTrainer(plain_vit(), arguments(skip_nonfinite_steps=1), train_dataset=Images(4))
