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


def test_a_training_in_another_thread_runs_too(arguments):
    trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(), train_dataset=Images(4))
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1 and not trainer.terminated
