"""SIGTERM in the middle of a training: the step is finished, saved, and gone on from bit for bit."""

import os
import signal
import threading

import torch
from tiny_training import Images, tokenmixup_vit

from hf_tokenmixup.training import TokenMixupTrainer


class Terminating(Images):
    """Sends SIGTERM to this process when an image is read for the n-th time."""

    def __init__(self, size, after):
        super().__init__(size)
        self.after = after

    def __getitem__(self, index):
        self.after -= 1
        if self.after == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_it_saves_ends_and_goes_on_as_if_nothing_had_been(arguments, tmp_path):
    settings = {"max_steps": 8, "logging_steps": 1, "learning_rate": 0.01}
    whole = TokenMixupTrainer(tokenmixup_vit(), arguments(**settings), train_dataset=Images(16))
    whole.train()
    assert not whole.terminated

    before = signal.getsignal(signal.SIGTERM)
    args = arguments(**settings, output_dir=str(tmp_path / "parts"))
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Terminating(16, 4 * 2 + 2))
    trainer.train()
    assert trainer.terminated and signal.getsignal(signal.SIGTERM) is before
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint-*")
    assert int(checkpoint.name.rpartition("-")[2]) == trainer.state.global_step < 5

    resumed = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(16))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8 and not resumed.terminated
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_it_does_not_end_the_epoch_that_it_stops_in(arguments):
    """Neither an evaluation, for which there is no time, nor a line of the log that a resumed training had twice."""
    args = arguments(
        max_steps=-1, num_train_epochs=2, eval_strategy="epoch", logging_strategy="epoch", save_strategy="epoch"
    )
    settings = {"eval_dataset": torch.utils.data.Subset(Images(4), range(4))}
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Terminating(16, 4 * 2 + 2), **settings)
    trainer.train()
    assert trainer.terminated and trainer.state.global_step < 4
    assert not any("eval_loss" in line or "loss" in line for line in trainer.state.log_history)
    resumed = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(16), **settings)
    resumed.train(resume_from_checkpoint=True)
    steps = [line["step"] for line in resumed.state.log_history]
    assert steps == [4, 4, 8, 8, 8]


def test_a_training_in_another_thread_runs_too(arguments):
    trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(), train_dataset=Images(4))
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1 and not trainer.terminated
