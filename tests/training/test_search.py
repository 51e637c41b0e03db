"""Hyperparameter search: every trial has weights, arguments, counts, averages and files of its own."""

import json
import signal
from pathlib import Path

import pytest
import torch
import transformers.integrations
from accelerate.utils.memory import release_memory
from helpers.tiny_training import Images, tokenmixup_vit
from transformers import TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from hf_tokenmixup.training import JsonlLoggerCallback, TokenMixupTrainer, TrainingCurvesCallback
from hf_tokenmixup.training.checkpointing.integrity import find_checkpoint_error


class Trial:
    """What the Trainer reads of a trial of optuna."""

    def __init__(self, number, **params):
        self.number, self.params = number, params


@pytest.fixture(autouse=True)
def trials_without_optuna(monkeypatch):
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)


class Watching(TokenMixupTrainer):
    """Notes what each step has: its trial, the first weight, and the parts that are made of the arguments."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            average = None if self.ema_model is None else self.ema_model.updates
            weight = model.vit.layers[0].mlp.fc1.weight.detach().clone()
            part = (
                self.input_mixing.enabled,
                self.nonfinite.skip_limit,
                self.nonfinite.skipped,
                average,
                len(inputs["labels"]),
            )
            vars(self).setdefault("seen", {}).setdefault(self._trial.number, []).append((weight, part))
        return super().compute_loss(model, inputs, *args, **kwargs)


def search(trainer, trials):
    """Run the trials as the backend for optuna does."""
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    for trial in trials:
        trainer.train(trial=trial)
        trainer.model_wrapped, trainer.model = release_memory(trainer.model_wrapped, trainer.model)
        trainer.accelerator.clear()
    trainer.hp_search_backend = None


def make(args, **options):
    return Watching(model_init=lambda: tokenmixup_vit(), args=args, train_dataset=Images(12), **options)


def test_search_each_trial_has_own_state_and_files(arguments):
    args = arguments(max_steps=2, save_strategy="steps", save_steps=2)
    trainer = make(args, callbacks=[JsonlLoggerCallback(), TrainingCurvesCallback()])
    settings = [
        {"mixup_alpha": 0.8, "skip_nonfinite_steps": 2, "ema_decay": 0.5, "per_device_train_batch_size": 3},
        {"mixup_alpha": 0.0, "skip_nonfinite_steps": 0, "ema_decay": 0.0, "per_device_train_batch_size": 4},
        {"mixup_alpha": 0.8, "skip_nonfinite_steps": 1, "ema_decay": 0.9, "per_device_train_batch_size": 6},
    ]
    search(trainer, [Trial(number, **params) for number, params in enumerate(settings)])
    parts = {number: [part for _, part in steps] for number, steps in trainer.seen.items()}
    assert parts == {
        0: [(True, 2, 0, 0, 3), (True, 2, 0, 1, 3)],
        1: [(False, 0, 0, None, 4), (False, 0, 0, None, 4)],
        2: [(True, 1, 0, 0, 6), (True, 1, 0, 1, 6)],
    }
    assert all(torch.equal(steps[0][0], trainer.seen[0][0][0]) for steps in trainer.seen.values())
    assert not torch.equal(trainer.seen[0][0][0], trainer.seen[0][1][0])
    for number, params in enumerate(settings):
        run = Path(args.output_dir) / f"run-{number}"
        assert find_checkpoint_error(run / "checkpoint-2") is None
        assert (run / "checkpoint-2" / "average.safetensors").exists() == bool(params["ema_decay"])
        assert (run / "training_curves.png").exists()
        lines = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
        # Two steps of all images of this trial, and of no other.
        assert [line.get("easy_samples") for line in lines] == [params["per_device_train_batch_size"], None]
    assert not (Path(args.output_dir) / "training_log.jsonl").exists()


def test_search_trial_matches_separate_run(arguments):
    trainer = make(arguments(max_steps=3))
    weights = []
    trainer.add_callback(OnEnd(lambda model: weights.append({k: v.clone() for k, v in model.state_dict().items()})))
    search(trainer, [Trial(0, learning_rate=0.3), Trial(1, learning_rate=0.01)])
    for rate, found in zip((0.3, 0.01), weights, strict=True):
        alone = TokenMixupTrainer(
            model_init=lambda: tokenmixup_vit(),
            args=arguments(max_steps=3, learning_rate=rate),
            train_dataset=Images(12),
        )
        alone.train()
        assert all(torch.equal(tensor, found[name]) for name, tensor in alone.model.state_dict().items())


class OnEnd(TrainerCallback):
    def __init__(self, function):
        self.function = function

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.function(model)


def test_search_with_invalid_value_raises(arguments):
    with pytest.raises(ValueError, match="`mixup_prob` is a probability .* got 2"):
        search(make(arguments()), [Trial(0, mixup_prob=2.0)])


class Terminated(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGTERM)


def test_search_sigterm_ends_search(arguments):
    trainer = make(arguments(max_steps=5), callbacks=[Terminated()])
    with pytest.raises(SystemExit) as raised:
        search(trainer, [Trial(0), Trial(1)])
    assert raised.value.code == 128 + signal.SIGTERM
    assert {number: len(steps) for number, steps in trainer.seen.items()} == {0: 1}
    assert (Path(trainer.args.output_dir) / "run-0" / "checkpoint-1").is_dir()


def test_search_later_run_logs_to_output_folder(arguments):
    args = arguments()
    trainer = TokenMixupTrainer(
        model_init=lambda: tokenmixup_vit(), args=args, train_dataset=Images(12), callbacks=[JsonlLoggerCallback()]
    )
    search(trainer, [Trial(0)])
    assert not (Path(args.output_dir) / "training_log.jsonl").exists()
    trainer.train()
    assert (Path(args.output_dir) / "training_log.jsonl").exists()


def test_model_init_ddp_finds_no_unused_parameters(arguments):
    assert make(arguments()).accelerator.ddp_handler.find_unused_parameters is False


def test_search_with_optuna_returns_best_trial(arguments):
    pytest.importorskip("optuna", reason="optuna is not installed")
    args = arguments(max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = make(args, eval_dataset=Images(8))
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.01, 0.1)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=3,
        backend="optuna",
    )
    assert sorted(trainer.seen) == [0, 1, 2] and set(best.hyperparameters) == {"learning_rate"}
