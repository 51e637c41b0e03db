"""TokenMixupCallback in the Trainer of transformers, and MixingMetrics in a loop without a trainer."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from helpers.commands import HANG_S
from helpers.tiny_training import Images, plain_vit, tokenmixup_vit
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from hf_tokenmixup import TokenMixupCallback
from hf_tokenmixup.models import TokenMixupOutput
from hf_tokenmixup.training import MixingMetrics, TokenMixupTrainer, add_lora

# Some images are easy, and some of their tokens are replaced.
SETTINGS = {"horizontal_tau": 1.4, "horizontal_rho": 0.002, "initializer_range": 0.3}


class FakeTracker(TrainerCallback):
    """Reports the log records as they are when the Trainer calls it."""

    reported: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.reported.append(dict(logs))


class TwoReplicas(nn.DataParallel):
    """Computes two halves of a batch, and gathers the outputs as `DataParallel` does on two GPUs."""

    def forward(self, pixel_values, labels, **kwargs):
        if not self.training:
            return self.module(pixel_values=pixel_values, labels=labels)
        halves = [
            self.module(pixel_values=pixels, labels=part)
            for pixels, part in zip(pixel_values.chunk(2), labels.chunk(2), strict=True)
        ]
        names = halves[0].mixing_metrics
        return TokenMixupOutput(
            loss=torch.stack([half.loss for half in halves]).mean(),
            logits=torch.cat([half.logits for half in halves]),
            mixing_metrics={name: torch.stack([half.mixing_metrics[name] for half in halves]) for name in names},
        )


def stock_trainer(folder, model=None, images=16, callbacks=None, compute_loss_func=None, **settings) -> Trainer:
    """Create a Trainer of transformers with the callback."""
    settings = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1} | settings
    settings = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True} | settings
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0} | settings
    trainer = Trainer(
        tokenmixup_vit(**SETTINGS) if model is None else model,
        TrainingArguments(str(folder), **settings),
        train_dataset=Images(images),
        eval_dataset=Images(4),
        callbacks=callbacks,
        compute_loss_func=compute_loss_func,
    )
    trainer.add_callback(TokenMixupCallback(trainer))
    return trainer


def training_records(trainer: Trainer) -> list[dict]:
    return [record for record in trainer.state.log_history if "loss" in record]


def record_outputs(model: nn.Module) -> list[TokenMixupOutput]:
    """Return the list to which each training output of `model` is added."""
    outputs = []
    model.register_forward_hook(lambda module, inputs, output: outputs.append(output) if module.training else None)
    return outputs


def expected_metrics(outputs: list[TokenMixupOutput], steps: int) -> dict[str, float]:
    """Compute metrics from what the layers recorded."""
    replaced = torch.cat([output.horizontal[0].replaced for output in outputs])
    mixed = replaced.any(dim=1)
    easy = torch.cat([output.horizontal[0].easy for output in outputs])
    logits = torch.cat([output.logits for output in outputs])
    targets = torch.cat([output.targets for output in outputs])
    weights = torch.cat([output.horizontal[0].statistics.partner_weight for output in outputs])
    return {
        "classification_loss": F.cross_entropy(logits, targets).item(),
        "difficulty": torch.cat([output.horizontal[0].difficulty for output in outputs]).mean().item(),
        "easy_samples": easy.sum().item() / steps,
        "mixed_samples": mixed.sum().item() / steps,
        "replaced_tokens": replaced.sum().item() / steps,
        "easy_fraction": easy.float().mean().item(),
        "mixed_fraction": mixed.float().mean().item(),
        "replaced_fraction": replaced[mixed].float().mean().item(),
        "label_mass_moved": weights[mixed].mean().item(),
    }


@pytest.mark.parametrize("accumulation", [1, 2])
def test_callback_logged_values_equal_direct_computation(tmp_path, accumulation):
    model = tokenmixup_vit(**SETTINGS)
    outputs = record_outputs(model)
    trainer = stock_trainer(tmp_path, model, images=30, gradient_accumulation_steps=accumulation)
    trainer.train()
    first, second = training_records(trainer)
    assert len(outputs) == 4 * accumulation
    for record, forwards in ((first, outputs[: 2 * accumulation]), (second, outputs[2 * accumulation :])):
        expected = expected_metrics(forwards, steps=2)
        assert expected["mixed_samples"] > 0
        assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("logging_strategy", ["steps", "no"])
def test_callback_results_of_run_equal_direct_computation(tmp_path, logging_strategy):
    model = tokenmixup_vit(**SETTINGS)
    outputs = record_outputs(model)
    result = stock_trainer(tmp_path, model, max_steps=3, logging_strategy=logging_strategy).train()
    expected = expected_metrics(outputs, steps=3)
    names = ("mixed_fraction", "easy_fraction", "replaced_fraction", "label_mass_moved")
    assert {name: result.metrics[f"train_{name}"] for name in names} == pytest.approx(
        {name: expected[name] for name in names}, rel=1e-5
    )


def test_callback_warns_if_nothing_is_mixed(tmp_path, caplog):
    model = tokenmixup_vit(horizontal_rho=0.5)
    stock_trainer(tmp_path, model, max_steps=12, learning_rate=1e-3).train()
    (message,) = [record.getMessage() for record in caplog.records if "Nothing was mixed" in record.getMessage()]
    assert "Lower `horizontal_rho=0.5`" in message


def test_callback_logged_values_equal_those_of_tokenmixup_trainer(tmp_path, arguments):
    settings = {"num_train_epochs": 2, "max_steps": -1, "gradient_accumulation_steps": 2, "logging_steps": 3}
    trainer = stock_trainer(tmp_path, images=22, **settings)
    trainer.train()
    ours = TokenMixupTrainer(tokenmixup_vit(**SETTINGS), arguments(**settings), train_dataset=Images(22))
    ours.train()
    # The last step of an epoch has one micro-batch of two images.
    assert [record["step"] for record in training_records(trainer)] == [3, 6]
    for record, expected in zip(training_records(trainer), training_records(ours), strict=True):
        # Only our trainer measures it.
        del expected["vertical_attention"]
        assert record.keys() == expected.keys()
        assert record == pytest.approx(expected, rel=1e-4)


def test_callback_values_are_reported_to_trackers_and_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "fake", FakeTracker)
    monkeypatch.setattr(FakeTracker, "reported", [])
    user = FakeTracker()
    user.reported = []
    trainer = stock_trainer(tmp_path, report_to=["fake"], callbacks=[user], max_steps=2)
    # The tracker precedes the callback that was added last.
    names = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert names.index(FakeTracker) < names.index(TokenMixupCallback)
    trainer.train()
    (record,) = training_records(trainer)
    assert record["mixed_fraction"] > 0
    for reported in (FakeTracker.reported, user.reported):
        assert reported[0] == {name: value for name, value in record.items() if name != "step"}
        assert "train_loss" in reported[1] and "mixed_fraction" not in reported[1]
    assert f"'mixed_fraction': '{record['mixed_fraction']:.4g}'" in capsys.readouterr().out


def test_callback_logs_each_epoch_and_not_without_logging_strategy(tmp_path):
    trainer = stock_trainer(tmp_path, max_steps=-1, num_train_epochs=2, logging_steps=500)
    trainer.train()
    assert [(record["step"], "mixed_fraction" in record) for record in training_records(trainer)] == [
        (4, True),
        (8, True),
    ]
    silent = stock_trainer(tmp_path, logging_strategy="no")
    silent.train()
    assert training_records(silent) == []


def test_callback_evaluation_during_training_adds_nothing(tmp_path):
    settings = {"max_steps": 2, "logging_steps": 2}
    plain, evaluated = (
        stock_trainer(tmp_path, **settings),
        stock_trainer(tmp_path, eval_strategy="steps", eval_steps=1, **settings),
    )
    plain.train()
    evaluated.train()
    assert training_records(evaluated) == training_records(plain)
    assert all("mixed_fraction" not in r for r in evaluated.state.log_history if "eval_loss" in r)


def test_callback_leaves_no_state_on_model(tmp_path):
    model = tokenmixup_vit(**SETTINGS)
    before = {name: copy.copy(vars(module)) for name, module in model.named_modules()}
    hooks = []

    class CountHooks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            hooks.append(len(model._forward_hooks))

    trainer = stock_trainer(tmp_path, model, callbacks=[CountHooks()])
    trainer.train()
    trainer.train()
    # One hook in both runs.
    assert hooks == [1] * 8
    for name, module in model.named_modules():
        assert vars(module).keys() - {"_is_accelerate_prepared"} == before[name].keys()
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_callback_after_failed_run_does_not_count_twice(tmp_path):
    class Fail(TrainerCallback):
        active = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.active:
                raise RuntimeError("interrupted")

    trainer = stock_trainer(tmp_path, callbacks=[Fail()], max_steps=1, logging_steps=1)
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.train()
    Fail.active = False
    trainer.train()
    (record,) = training_records(trainer)
    assert record["vertical_tokens"] == 4 * 2 * 2  # 4 images, 2 tokens from each of 2 layers
    assert len(trainer.model._forward_hooks) == 0


def test_callback_copy_of_model_does_not_copy_trainer(tmp_path):
    copies = []

    class CopyModel(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            copies.append(copy.deepcopy(model))

    trainer = stock_trainer(tmp_path, callbacks=[CopyModel()], max_steps=1, logging_steps=1)
    # A lock cannot be copied.
    trainer.lock = threading.Lock()
    trainer.train()
    assert len(copies) == 1


@pytest.mark.parametrize("wrapper", ["DataParallel", "peft", "compile"])
def test_callback_wrapped_model_logs_values(tmp_path, wrapper):
    model = tokenmixup_vit(**SETTINGS)
    settings = {"max_steps": 1, "logging_steps": 1}
    if wrapper == "peft":
        pytest.importorskip("peft")
        model = add_lora(model, 2)
    if wrapper == "compile":
        settings |= {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = stock_trainer(tmp_path, model, **settings)
    if wrapper == "DataParallel":
        trainer.model_wrapped = TwoReplicas(model)
    trainer.train()
    (record,) = training_records(trainer)
    assert record["vertical_tokens"] == 4 * 2 * 2
    assert record["mixed_fraction"] == record["mixed_samples"] / 4


@pytest.mark.slow
def test_callback_two_processes_sum_images_of_both(tmp_path):
    code = f"""
import sys
import threading
sys.path.insert(0, {str(tmp_path)!r})
sys.path[:0] = {sys.path!r}
from training.test_mixing_callback import stock_trainer, training_records
trainer = stock_trainer({str(tmp_path)!r}, max_steps=1, logging_steps=1)
trainer.train()
assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
(record,) = training_records(trainer)
assert record["vertical_tokens"] == 2 * 4 * 2 * 2, record
assert record["mixed_fraction"] == record["mixed_samples"] / 8
"""
    script = tmp_path / "worker.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert result.returncode == 0, result.stderr


def test_callback_label_smoothing_raises(tmp_path):
    trainer = stock_trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="`label_smoothing_factor` is 0.1.*Set `label_smoothing_factor=0`, or"):
        trainer.train()
    # Without TokenMixup, nothing is turned off.
    baseline = tokenmixup_vit(horizontal_layers=[], vertical_layers=[])
    stock_trainer(tmp_path, baseline, label_smoothing_factor=0.1, max_steps=1).train()


def test_callback_compute_loss_func_raises(tmp_path):
    trainer = stock_trainer(tmp_path, compute_loss_func=lambda outputs, labels, **_: outputs.logits.sum())
    with pytest.raises(ValueError, match="with `compute_loss_func`, .* Remove it"):
        trainer.train()


def test_callback_plain_model_raises(tmp_path):
    with pytest.raises(ValueError, match="needs a TokenMixup model, got a ViTForImageClassification"):
        stock_trainer(tmp_path, plain_vit()).train()


def test_callback_in_tokenmixup_trainer_raises(arguments):
    trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(), train_dataset=Images(4))
    with pytest.raises(ValueError, match="TokenMixupTrainer logs the metrics of TokenMixup itself"):
        TokenMixupCallback(trainer)


def test_mixing_metrics_in_loop_without_trainer_equal_direct_computation():
    model = tokenmixup_vit(**SETTINGS).train()
    outputs = record_outputs(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = Images(14)
    metrics = MixingMetrics()
    for pixels, labels in zip(images.pixels.split(4), images.labels.split(4), strict=True):
        result = model(pixel_values=pixels, labels=labels)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics.update(result.mixing_metrics, num_images=len(result.logits))
        metrics.step()
    values, expected = metrics.compute(), expected_metrics(outputs, steps=4)
    assert expected["mixed_samples"] > 0
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_package_import_does_not_import_training():
    code = "import sys, hf_tokenmixup; assert 'hf_tokenmixup.training' not in sys.modules, 1; "
    code += "hf_tokenmixup.TokenMixupCallback; assert 'hf_tokenmixup.training' in sys.modules, 2"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
