"""Check that a resumed run logs, averages and evaluates as an uninterrupted one and repeats nothing."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_training import Images, plain_vit, tokenmixup_vit
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, speed_metrics

from hf_tokenmixup.training import TokenMixupTrainer
from hf_tokenmixup.training.checkpointing.integrity import CALLBACK_STATE_KEY

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


def without_times(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.endswith(("_runtime", "_per_second"))} for line in history]


def train(args, checkpoint=None, images=Images, model=tokenmixup_vit):
    """Train on 20 images, five steps an epoch, and evaluate on 8."""
    # A persistent loader calls set_epoch before each evaluation. Evaluation images have no epoch, so Subset hides it.
    evaluation = torch.utils.data.Subset(Images(8), range(8))
    trainer = TokenMixupTrainer(model(**DROPOUT), args, train_dataset=images(20), eval_dataset=evaluation)
    result = trainer.train(resume_from_checkpoint=checkpoint and f"{args.output_dir}/checkpoint-{checkpoint}")
    return trainer, result


def assert_same_result(resumed, expected) -> None:
    (trainer, result), (uninterrupted, expected_result) = resumed, expected
    assert without_times(trainer.state.log_history) == without_times(uninterrupted.state.log_history)
    assert result.training_loss == expected_result.training_loss == result.metrics["train_loss"]
    for name, tensor in uninterrupted.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("step", [3, 5, 6])
def test_resume_between_log_steps_logs_complete_intervals(arguments, step):
    args = arguments(max_steps=10, logging_steps=4, save_strategy="steps", save_steps=1, mixup_alpha=0.8)
    expected = train(args)
    lines = [line for line in expected[0].state.log_history if "mixed_samples" in line]
    assert [line["step"] for line in lines] == [4, 5, 8, 10] and lines[0]["loss"] != lines[1]["loss"]
    resumed = train(args, step)
    assert_same_result(resumed, expected)
    for name in ("train_mixed_fraction", "train_replaced_fraction", "train_label_mass_moved"):
        uninterrupted = expected[1].metrics[name]
        assert uninterrupted > 0 and resumed[1].metrics[name] == pytest.approx(uninterrupted, rel=1e-6)


@pytest.mark.parametrize("step, save", [(5, "steps"), (10, "steps"), (10, "epoch")])
def test_resume_at_epoch_end_logs_and_evaluates_epoch(arguments, step, save):
    """The checkpoint of an epoch's last step is written before the evaluation at the epoch's end."""
    args = arguments(
        max_steps=-1, num_train_epochs=2, logging_strategy="epoch", eval_strategy="epoch", save_strategy=save,
        save_steps=5, max_grad_norm=1.0, lr_scheduler_type="linear",
    )  # fmt: skip
    expected = train(args)
    lines = expected[0].state.log_history
    assert ["loss" in line or "eval_loss" in line for line in lines] == [True, True, True, True, False]
    assert all("grad_norm" in line for line in lines if "loss" in line)
    assert_same_result(train(args, step), expected)


def test_save_checkpoint_again_at_epoch_end_writes_only_state(arguments, monkeypatch):
    """A checkpoint is saved after the last step of an epoch (as on SIGTERM) and due again at the end of the epoch."""
    args = arguments(max_steps=-1, num_train_epochs=1, save_strategy="epoch", eval_strategy="epoch")

    class Twice(TokenMixupTrainer):
        def _maybe_log_save_evaluate(self, *args, **kwargs):
            self.control.should_save = self.state.global_step == 2
            super()._maybe_log_save_evaluate(*args, **kwargs)

    trainer = Twice(tokenmixup_vit(), args, train_dataset=Images(8), eval_dataset=Images(8))
    written = []
    monkeypatch.setattr(
        trainer, "save_model", lambda *args, **kw: written.append(args) or Twice.save_model(trainer, *args)
    )
    trainer.train()
    assert len(written) == 1
    state = json.loads((Path(args.output_dir) / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("eval_loss" in line for line in state["log_history"])
    assert state["stateful_callbacks"][CALLBACK_STATE_KEY]["kept"]["epoch_ended"]


@pytest.mark.parametrize("steps", [7, 10])
def test_resume_finished_run_trains_no_step(arguments, steps):
    args = arguments(max_steps=steps, save_strategy="steps", save_steps=steps, eval_strategy="epoch", logging_steps=3)
    expected = train(args)
    resumed = train(args, steps)
    assert resumed[0].state.global_step == steps
    assert_same_result(resumed, expected)


def test_resume_with_eval_on_start_skips_first_evaluation(arguments):
    args = arguments(max_steps=4, save_strategy="steps", save_steps=2, eval_on_start=True)
    expected = train(args)
    assert "eval_loss" in expected[0].state.log_history[0]
    assert_same_result(train(args, 2), expected)


class SharedEpoch(Images):
    """Images with an epoch in shared memory, which persistent workers read."""

    def __init__(self, size):
        super().__init__(size)
        self.shared = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch):
        self.shared.fill_(epoch)

    def __getitem__(self, index):
        self.epoch = int(self.shared)
        return super().__getitem__(index)


def test_resume_with_persistent_workers_equals_uninterrupted(arguments):
    """Workers start once in a run and again after resuming. Each start draws a random number."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "mixup_alpha": 0.8}
    settings |= {"eval_strategy": "steps", "eval_steps": 4}
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    args = arguments(**settings, **workers)
    expected = train(args, images=SharedEpoch)
    assert_same_result(train(args, 3, SharedEpoch), expected)
    no_workers = arguments(**settings, output_dir=f"{args.output_dir}-no-workers")
    assert_same_result(train(no_workers, images=SharedEpoch), expected)


def test_resume_moved_folder_loads_best_checkpoint(arguments, tmp_path):
    args = arguments(
        max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, learning_rate=0.01,
    )  # fmt: skip
    expected = train(args)
    best = Path(expected[0].state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    moved = tmp_path / "moved"
    shutil.move(args.output_dir, moved)
    args.output_dir = str(moved)
    # The run is finished, so that no new checkpoint records the best one.
    trainer, _ = train(args, 6)
    assert trainer.state.best_model_checkpoint == str(moved / best.name)
    for name, tensor in expected[0].model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name


def test_resume_restores_number_of_skipped_steps(arguments):
    args = arguments(max_steps=2, save_strategy="steps", save_steps=1, skip_nonfinite_steps=3)
    trainer = TokenMixupTrainer(plain_vit(), args, train_dataset=Images(8))
    state_dict = trainer.state_dict
    trainer.state_dict = lambda: state_dict() | {"skipped_steps": 2}
    trainer.train()
    resumed = TokenMixupTrainer(plain_vit(), args, train_dataset=Images(8))
    resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-1")
    assert resumed.nonfinite.skipped == 2


def test_resume_checkpoint_of_stock_trainer_averages_new_steps(arguments):
    """Without the state of this package, the mean loss is that of the steps after resuming."""
    args = arguments(max_steps=4, save_strategy="steps", save_steps=2, logging_steps=1)
    train(args)
    state = Path(args.output_dir) / "checkpoint-2" / "trainer_state.json"
    content = json.loads(state.read_text())
    del content["stateful_callbacks"][CALLBACK_STATE_KEY]
    state.write_text(json.dumps(content))
    trainer, result = train(args, 2)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 4 and result.training_loss == pytest.approx(sum(losses[2:]) / 2)


def test_resume_with_later_checkpoints_warns_with_names(arguments, caplog):
    args = arguments(max_steps=3, save_strategy="steps", save_steps=1)
    train(args)
    with caplog.at_level(logging.WARNING):
        train(args, 1)
    assert f"After checkpoint-1, {args.output_dir} contains checkpoint-3, checkpoint-2." in caplog.text


def test_resume_other_intervals_uses_new_intervals(arguments):
    """The stock Trainer uses the intervals in `trainer_state.json` of the checkpoint."""
    settings = {"max_steps": 8, "save_strategy": "steps", "eval_strategy": "steps"}
    train(arguments(logging_steps=4, eval_steps=4, save_steps=2, **settings))
    trainer, _ = train(arguments(logging_steps=1, eval_steps=3, save_steps=7, **settings), 2)
    lines = trainer.state.log_history
    assert [line["step"] for line in lines if "loss" in line] == [3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in lines if "eval_loss" in line][:2] == [3, 6]
    # Old intervals in the state would be wrong for the next run, too.
    state = json.loads((Path(trainer.args.output_dir) / "checkpoint-7" / "trainer_state.json").read_text())
    assert (state["logging_steps"], state["eval_steps"], state["save_steps"]) == (1, 3, 7)
    # A fraction counts from the steps of the resumed run. Step 5 is the end of an epoch.
    trainer, _ = train(arguments(logging_steps=0.5, **settings | {"save_strategy": "no", "eval_strategy": "no"}), 2)
    assert {line["step"] for line in trainer.state.log_history if "loss" in line} - {5} == {4, 8}


@pytest.mark.parametrize("counts_own_steps", [True, False], ids=["newer transformers", "older transformers"])
def test_resume_speed_metrics_count_steps_of_this_process(arguments, monkeypatch, counts_own_steps):
    args = arguments(max_steps=10, save_strategy="steps", save_steps=8)
    train(args)
    if not counts_own_steps:
        # As in transformers 5.9, which takes all steps of the schedule for those of this call.
        def finalize(trainer, trial, num_train_samples, start_time):
            metrics = speed_metrics("train", start_time, num_samples=num_train_samples, num_steps=10)
            metrics["train_loss"] = 0.0
            trainer.log(metrics)
            return TrainOutput(10, 0.0, metrics)

        monkeypatch.setattr(Trainer, "_finalize_training", finalize)
    trainer, _ = train(args, 8)
    line = trainer.state.log_history[-1]
    assert line["train_steps_per_second"] * line["train_runtime"] == pytest.approx(2, rel=0.02)
    assert line["train_samples_per_second"] * line["train_runtime"] == pytest.approx(8, rel=0.02)


def test_checkpoint_format_names_equal_those_of_earlier_versions(arguments):
    """Checkpoints of earlier versions resume only if these names stay."""
    args = arguments(max_steps=2, save_strategy="steps", save_steps=2, ema_decay=0.5)
    TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(8)).train()
    checkpoint = Path(args.output_dir) / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["hf_tokenmixup"]
    saved = ("loss", "total_loss", "first_step", "last_logged_step", "grad_norm", "learning_rate")
    saved += ("epoch_ended", "evaluation_due", "counts", "mixing_totals", "vertical_probe", "skipped_steps", "plan")
    assert state["kept"].keys() == set(saved)
    assert state["kept"]["counts"].keys() == {"sums", "images", "steps"}
    plan = ("images_per_step", "learning_rate", "weight_decay", "layer_decay", "settings", "step_split", "readers")
    assert state["kept"]["plan"].keys() == set(plan)
    assert "average.safetensors" in state["files"] and (checkpoint / "average.safetensors").is_file()
