"""EMA in a run: its values, evaluation, export, checkpoints, and a run that it does not change."""

import copy
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import HANG_S
from helpers.state_dicts import assert_same, copied
from helpers.tiny_training import Images, plain_vit, resnet, tokenmixup_vit
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback

from hf_tokenmixup.training import TokenMixupTrainer
from hf_tokenmixup.training.checkpointing.integrity import find_checkpoint_error
from hf_tokenmixup.training.ema import ModelEma

MODELS = [tokenmixup_vit, resnet]
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
EACH_STEP = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


class Record(TrainerCallback):
    """Record the weights and the EMA after each step."""

    def __init__(self):
        self.weights, self.averages = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(copied(model.state_dict()))
        if self.trainer.ema_model is not None:
            self.averages.append(copied(self.trainer.ema_model.tensors()))


def trainer_of(make_model, args, images=12, **options):
    record = Record()
    options = {"train_dataset": Images(images), "eval_dataset": Images(8)} | options
    model = make_model if isinstance(make_model, torch.nn.Module) else make_model()
    record.trainer = TokenMixupTrainer(model, args, callbacks=[record], **options)
    return record.trainer, record


def by_hand(weights, decay, warmup=False):
    """The average of weights over the steps, in float64; of integers the last."""
    average = {name: tensor.double() for name, tensor in weights[0].items()}
    for step, now in enumerate(weights[1:], start=2):
        d = min(decay, 1 - step ** (-2 / 3)) if warmup else decay
        average = {name: d * average[name] + (1 - d) * now[name].double() for name in average}
    return {name: average[name] if now.is_floating_point() else now for name, now in weights[-1].items()}


def assert_average(trainer, weights, decay, warmup=False):
    expected = by_hand(weights, decay, warmup)
    got = trainer.ema_model.tensors()
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == weights[0][name].dtype
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("make_model", MODELS)
@pytest.mark.parametrize("warmup, accumulation", [(False, 1), (True, 1), (False, 2)])
def test_ema_matches_reference_and_does_not_change_training(arguments, tmp_path, make_model, warmup, accumulation):
    settings = {"max_steps": 5, "gradient_accumulation_steps": accumulation, "eval_on_start": True}
    settings |= {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"optim": "adamw_torch", "learning_rate": 0.01, "mixup_alpha": 0.8}
    trainer, record = trainer_of(make_model, arguments(ema_decay=0.8, ema_warmup=warmup, **settings))
    trainer.train()
    assert trainer.ema_model.updates == len(record.weights) == 5
    assert_average(trainer, record.weights, 0.8, warmup)
    names = trainer.ema_model.tensors().keys()
    assert any("scorenet" in name or "num_batches_tracked" in name for name in names)

    args = arguments(output_dir=str(tmp_path / "without"), **settings)
    without, other = trainer_of(make_model, args)
    without.train()
    assert without.ema_model is None and not list((tmp_path / "without").glob("*/average.safetensors"))
    for now, plain in zip(record.weights, other.weights, strict=True):
        assert_same(now, plain)
    # Before the first step the average is the model.
    first, plain_first = (
        next(line["eval_loss"] for line in each.state.log_history if "eval_loss" in line)
        for each in (trainer, without)
    )
    assert first == plain_first


class NonfiniteImages(Images):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {"pixel_values": item["pixel_values"] * float("nan")} if index == 9 else item


def test_ema_ignores_skipped_step(arguments):
    args = arguments(max_steps=4, skip_nonfinite_steps=1, ema_decay=0.5)
    trainer, record = trainer_of(plain_vit, args, train_dataset=NonfiniteImages(16))
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    assert_same(record.averages[2], record.averages[1])
    assert trainer.ema_model.updates == 3
    assert_average(trainer, [record.weights[step] for step in (0, 1, 3)], 0.5)


def test_ema_ignores_step_skipped_by_grad_scaler(arguments):
    trainer, record = trainer_of(tokenmixup_vit, arguments(max_steps=3, ema_decay=0.5))
    # The first step overflows, and the next scale is a usual one.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    before = copied(trainer.model.state_dict())
    trainer.train()
    assert_same(record.weights[0], before)
    assert trainer.ema_model.updates == 2
    assert_average(trainer, record.weights[1:], 0.5)


@pytest.mark.parametrize("make_model", MODELS)
def test_ema_is_used_for_evaluation_and_prediction(arguments, make_model):
    trainer, record = trainer_of(make_model, arguments(max_steps=4, ema_decay=0.7))
    trainer.train()
    averaged, images = copy.deepcopy(trainer.model).eval(), trainer.eval_dataset
    averaged.load_state_dict(trainer.ema_model.tensors())
    with torch.no_grad():
        logits = averaged(pixel_values=images.pixels).logits
        plain = trainer.model.eval()(pixel_values=images.pixels).logits
    predictions = torch.tensor(trainer.predict(images).predictions)
    torch.testing.assert_close(predictions, logits)
    assert (predictions - plain).abs().max() > 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    assert_same(copied(trainer.model.state_dict()), record.weights[-1])


class Broken(Images):
    def __getitem__(self, index):
        if index == 6:
            raise OSError("cannot be decoded")
        return super().__getitem__(index)


@pytest.mark.parametrize("make_model", MODELS)
def test_ema_applied_restores_raw_weights_after_error(arguments, make_model):
    args = arguments(max_steps=2, ema_decay=0.7, per_device_eval_batch_size=4)
    trainer, record = trainer_of(make_model, args)
    trainer.train()
    places = [parameter.data_ptr() for parameter in trainer.model.parameters()]
    average = copied(trainer.ema_model.tensors())
    with pytest.raises(OSError):
        trainer.evaluate(Broken(8))
    with pytest.raises(KeyError), trainer.ema.applied():
        assert_same(trainer.model.state_dict(), average)
        raise KeyError
    assert_same(trainer.model.state_dict(), record.weights[-1])
    assert_same(trainer.ema_model.tensors(), average)
    assert places == [parameter.data_ptr() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("make_model", MODELS)
def test_ema_is_exported_and_checkpoint_contains_both(arguments, make_model):
    args = arguments(max_steps=3, save_strategy="steps", save_steps=3, ema_decay=0.7)
    trainer, record = trainer_of(make_model, args)
    trainer.train()
    trainer.save_model()
    average = trainer.ema_model.tensors()
    model, report = AutoModelForImageClassification.from_pretrained(args.output_dir, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same(model.state_dict(), {name: t for name, t in average.items() if "scorenet" not in name})

    checkpoint = Path(args.output_dir) / "checkpoint-3"
    assert_same(type(trainer.model).from_pretrained(checkpoint).state_dict(), record.weights[-1])
    assert_same(load_file(checkpoint / "average.safetensors"), average)


@pytest.mark.parametrize("make_model", [lambda: tokenmixup_vit(**DROPOUT), resnet])
@pytest.mark.parametrize("step", [1, 4])
def test_ema_resumed_run_matches_uninterrupted_run(arguments, tmp_path, make_model, step):
    settings = EACH_STEP | {"max_steps": 6, "ema_decay": 0.9, "ema_warmup": True, "optim": "adamw_torch"}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.01}
    uninterrupted, record = trainer_of(make_model, arguments(**settings))
    uninterrupted.train()
    uninterrupted.save_model()

    other = make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.uniform_(-1, 1)
    parts, resumed = trainer_of(other, arguments(**settings))
    parts.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
    parts.save_model(str(tmp_path / "parts"))
    assert len(resumed.averages) == 6 - step
    for got, expected in zip(resumed.averages, record.averages[step:], strict=True):
        assert_same(got, expected)
    assert parts.ema_model.updates == uninterrupted.ema_model.updates == uninterrupted.state.best_global_step
    assert parts.state.best_metric == uninterrupted.state.best_metric
    assert_same(parts.ema_model.tensors(), uninterrupted.ema_model.tensors())
    assert_same(load_file(tmp_path / "parts/model.safetensors"), load_file(tmp_path / "out/model.safetensors"))


def test_ema_of_best_checkpoint_is_exported(arguments):
    class Worsening(TokenMixupTrainer):
        def evaluate(self, *args, **kwargs):
            return {"eval_top1": 0.9 if self.state.global_step == 2 else 0.5}

    args = arguments(
        **EACH_STEP, max_steps=4, load_best_model_at_end=True, metric_for_best_model="top1", ema_decay=0.7
    )
    record = Record()
    record.trainer = trainer = Worsening(
        tokenmixup_vit(), args, train_dataset=Images(12), eval_dataset=Images(4), callbacks=[record]
    )
    trainer.train()
    trainer.save_model()
    assert_same(trainer.ema_model.tensors(), record.averages[1])
    assert_same(trainer.model.state_dict(), record.weights[1])
    exported = AutoModelForImageClassification.from_pretrained(args.output_dir).state_dict()
    assert_same(exported, {name: t for name, t in record.averages[1].items() if "scorenet" not in name})
    assert any(not torch.equal(record.averages[1][name], record.weights[1][name]) for name in exported)


def test_ema_truncated_file_raises(arguments):
    args = arguments(max_steps=2, save_strategy="steps", save_steps=1, ema_decay=0.7)
    trainer, _ = trainer_of(tokenmixup_vit, args)
    trainer.train()
    file = Path(args.output_dir) / "checkpoint-2" / "average.safetensors"
    content = file.read_bytes()
    for share in (0.0, 0.5, 0.95):
        file.write_bytes(content[: int(share * len(content))])
        assert find_checkpoint_error(file.parent) == "average.safetensors is truncated"
    before = copied(trainer.model.state_dict())
    with pytest.raises(ValueError, match="average.safetensors is truncated. Resume from .*checkpoint-1"):
        trainer.train(resume_from_checkpoint=str(file.parent))
    with pytest.raises(ValueError, match="average.safetensors cannot be read as EMA weights"):
        trainer._load_from_checkpoint(str(file.parent))
    other = ModelEma(resnet(), 0.5)
    other.save(file)
    with pytest.raises(ValueError, match="has the EMA weights of another model: .* tensors differ"):
        trainer._load_from_checkpoint(str(file.parent))
    assert_same(trainer.model.state_dict(), before)


def test_ema_turned_on_or_off_on_resume_warns(arguments, caplog):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    args = arguments(**settings)
    trainer_of(tokenmixup_vit, args)[0].train()
    out = Path(args.output_dir)

    # Switched on: it starts from the weights behind the next step.
    trainer, record = trainer_of(tokenmixup_vit, arguments(**settings, ema_decay=0.6))
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert "checkpoint-2 has no EMA weights: a new EMA starts from its raw weights." in caplog.text
    assert_average(trainer, record.weights, 0.6)
    assert trainer.ema_model.updates == 2
    # A best checkpoint without an average stands for its own weights.
    trainer.state.best_model_checkpoint = str(out / "checkpoint-1")
    trainer._load_best_model()
    assert_same(trainer.ema_model.tensors(), trainer.model.state_dict())

    # Switched off: its file neither counts nor stays where other weights are saved.
    caplog.clear()
    trainer, _ = trainer_of(tokenmixup_vit, args)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-3"))
    assert "average.safetensors because `ema_decay` is not set" in caplog.text
    assert trainer.ema_model is None
    assert [path.parent.name for path in out.glob("*/average.safetensors")] == ["checkpoint-3"]


def test_ema_second_run_starts_new_ema(arguments):
    trainer, record = trainer_of(tokenmixup_vit, arguments(max_steps=3, ema_decay=0.6))
    for _ in range(2):
        record.weights.clear()
        trainer.train()
        assert_average(trainer, record.weights, 0.6)


def test_ema_logs_its_use_and_warns_about_short_runs(arguments, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_tokenmixup"):
        trainer_of(plain_vit, arguments(max_steps=3, ema_decay=0.9999, ema_warmup=True))[0].train()
        assert caplog.text.count("EMA enabled (`ema_decay=0.9999` with warm-up)") == 1
        assert "of the first step" not in caplog.text
        trainer_of(plain_vit, arguments(max_steps=3, ema_decay=0.9))[0].train()
    assert "After 3 steps, the weights of the first step still contribute 81 % of the EMA. Use a lower" in caplog.text


def test_ema_settings_are_in_card(arguments, monkeypatch):
    monkeypatch.setattr("hf_tokenmixup.training.hub.library_versions", dict)
    trainer, _ = trainer_of(plain_vit, arguments(ema_decay=0.99, ema_warmup=True))
    recorded = trainer.run_record.card_data().hyperparameters
    assert recorded["ema_decay"] == 0.99 and recorded["ema_warmup"] is True
    assert not any(
        "ema" in name for name in trainer_of(plain_vit, arguments())[0].run_record.card_data().hyperparameters
    )


# Under torch 2.6, dynamo stumbles over a decorator of transformers: its own ViT does not compile there.
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="plain ViT does not compile either")
def test_ema_compiled_model_evaluates_ema_weights(arguments):
    trainer, _ = trainer_of(plain_vit, arguments(max_steps=2, ema_decay=0.7))
    trainer.train()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled, pixels = torch.compile(trainer.model.eval(), backend=backend), trainer.eval_dataset.pixels
    with torch.no_grad():
        plain = compiled(pixels).logits.clone()
        count = len(graphs)
        assert count > 0
        for _ in range(2):
            with trainer.ema.applied():
                averaged, expected = compiled(pixels).logits, trainer.model(pixels).logits
            torch.testing.assert_close(averaged, expected)
            assert not torch.allclose(averaged, plain)
        assert torch.equal(compiled(pixels).logits, plain)
    assert len(graphs) == count


@pytest.mark.parametrize("what, flag", [("FSDP", "is_fsdp_enabled"), ("DeepSpeed", "is_deepspeed_enabled")])
def test_ema_with_sharded_weights_raises(arguments, monkeypatch, what, flag):
    prepare = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        prepare(self)
        setattr(self, flag, True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match=f"is not supported with {what}, .*emove `ema_decay`"):
        trainer_of(plain_vit, arguments(ema_decay=0.9))


def test_ema_invalid_settings_raise(arguments):
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="`ema_decay` must be at least 0 .off. and less than 1, got"):
            arguments(ema_decay=decay)
    with pytest.raises(ValueError, match="Pass `ema_decay` too"):
        arguments(ema_warmup=True)
    with pytest.raises(ValueError, match="`optim=schedule_free_adamw`, which averages the weights itself"):
        trainer_of(plain_vit, arguments(ema_decay=0.9, optim="schedule_free_adamw"))
    trainer, _ = trainer_of(plain_vit, arguments(ema_decay=0.0))
    trainer.train()
    assert trainer.ema_model is None


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from helpers import tiny_training
from hf_tokenmixup.training import TokenMixupTrainer, TokenMixupTrainingArguments

out = Path(sys.argv[2])
args = TokenMixupTrainingArguments(
    str(out / "out"), max_steps=4, per_device_train_batch_size=3, ema_decay=0.7, report_to="none", use_cpu=True,
    disable_tqdm=True, save_strategy="no", learning_rate=0.01, eval_strategy="steps", eval_steps=2,
)
model = getattr(tiny_training, sys.argv[1])()
images = tiny_training.Images
trainer = TokenMixupTrainer(model, args, train_dataset=images(12), eval_dataset=images(16))
trainer.train()
loss = trainer.evaluate()["eval_loss"]
assert trainer.args.world_size == 2
trainer.ema_model.save(out / f"average-{args.process_index}.safetensors")
(out / f"loss-{args.process_index}.json").write_text(json.dumps(loss))
trainer.save_model()
"""


@pytest.mark.slow
@pytest.mark.parametrize("make_model", [tokenmixup_vit, resnet])
def test_ema_two_processes_have_and_export_same_weights(tmp_path, make_model):
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    paths = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(tmp_path / "train.py"), make_model.__name__, str(tmp_path)]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=HANG_S)
    first, second = (load_file(tmp_path / f"average-{rank}.safetensors") for rank in (0, 1))
    assert_same(second, first)
    assert (tmp_path / "loss-0.json").read_text() == (tmp_path / "loss-1.json").read_text()
    exported = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert_same(exported.state_dict(), {name: t for name, t in first.items() if "scorenet" not in name})
    images = Images(16)
    with torch.no_grad():
        loss = F.cross_entropy(exported(pixel_values=images.pixels).logits, images.labels)
    assert json.loads((tmp_path / "loss-0.json").read_text()) == pytest.approx(loss.item(), rel=1e-5)
