"""Throughput of data loader, model and complete training, with a simulated clock."""

import pytest
import torch
from helpers.tiny_training import Images, resnet
from transformers import TrainerCallback

from hf_tokenmixup.benchmarks import throughput
from hf_tokenmixup.benchmarks.throughput import measure_throughput
from hf_tokenmixup.data import collate
from hf_tokenmixup.training import TokenMixupTrainer, TokenMixupTrainingArguments

READ, STEP, BATCH = 1.0, 12.0, 4


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A trainer for which an image takes `READ` seconds and a step of the model `STEP`."""
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)

    class Slow(Images):
        def __getitem__(self, index):
            clock.now += READ
            return super().__getitem__(index)

    class SlowStep(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.now += STEP

    args = TokenMixupTrainingArguments(
        tmp_path, max_steps=7, per_device_train_batch_size=BATCH, dataloader_drop_last=True, save_strategy="no",
        logging_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    return TokenMixupTrainer(resnet(), args, train_dataset=Slow(14), data_collator=collate, callbacks=[SlowStep()])


def test_measure_throughput_times_loader_and_model_separately(trainer):
    callbacks = list(trainer.callback_handler.callbacks)
    results = measure_throughput(trainer, warmup=2, steps=5, repeats=2)
    # In training the loader prefetches one batch, during warm-up too, and restarts each epoch of three batches.
    assert results["loader"] == pytest.approx([1 / READ] * 3)
    assert results["model"] == pytest.approx([BATCH / STEP] * 3)
    assert results["end_to_end"][1] == pytest.approx(BATCH / (STEP + READ * BATCH), rel=0.1)
    assert "get_train_dataloader" not in vars(trainer) and trainer.callback_handler.callbacks == callbacks
    assert torch.is_tensor(next(iter(trainer.get_train_dataloader()))["labels"])


@pytest.mark.parametrize("numbers", [(2, 4, 1), (0, 7, 1), (7, 0, 1), (2, 5, 0)])
def test_measure_throughput_invalid_numbers_raise(trainer, numbers):
    warmup, steps, repeats = numbers
    with pytest.raises(ValueError, match="max_steps=7"):
        measure_throughput(trainer, warmup=warmup, steps=steps, repeats=repeats)
