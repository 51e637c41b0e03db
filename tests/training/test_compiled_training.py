"""Trainings with torch.compile: one graph whatever the batch, and what comes out is what comes out without."""

import copy

import pytest
import torch
from helpers.tiny_training import Images, resnet, tokenmixup_vit
from torch import _dynamo as dynamo
from torch._dynamo.utils import counters

from hf_tokenmixup.training import TokenMixupTrainer

pytestmark = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="plain ViT does not compile either")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"mixup_alpha": 0.5, "label_smoothing_factor": 0.1, "bf16": True}, marks=pytest.mark.slow),
        pytest.param({"gradient_accumulation_steps": 2, "channels_last": True}, marks=pytest.mark.slow),
        pytest.param({"torch_compile_backend": "inductor"}, marks=pytest.mark.slow),
        pytest.param(
            {"activation_checkpointing": True, "torch_compile_backend": "aot_eager"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_compiled_training_with_evaluations_uses_one_graph(arguments, settings):
    """Ten images in batches of four: the last is shorter; trained, evaluated and trained on."""
    model = tokenmixup_vit(horizontal_tau=1.5)
    models, trainers = [model, copy.deepcopy(model)], []
    for one, backend in zip(models, (None, settings.get("torch_compile_backend", "eager")), strict=True):
        args = arguments(
            **{"num_train_epochs": 2, "max_steps": -1, "eval_strategy": "epoch", "logging_steps": 1, "seed": 3}
            | {"per_device_eval_batch_size": 4}
            | settings
            | {"torch_compile_backend": backend}
        )
        trainer = TokenMixupTrainer(one, args, train_dataset=Images(10), eval_dataset=Images(10))
        with dynamo.config.patch(error_on_recompile=True):
            trainer.train()
            trainer.evaluate()
            trainer.train()
        trainers.append(trainer)
    plain, compiled = trainers
    assert not sum(counters["graph_break"].values())
    assert counters["stats"]["unique_graphs"] >= 1
    tolerance = 1e-2 if settings.get("bf16") else 1e-4
    assert losses(compiled) == pytest.approx(losses(plain), rel=tolerance) and len(losses(plain)) >= 4
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], tensor, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("make_model", [lambda: tokenmixup_vit(horizontal_layers=[], vertical_layers=[]), resnet])
def test_compiled_training_of_baseline_uses_one_graph(arguments, make_model):
    args = arguments(num_train_epochs=2, max_steps=-1, torch_compile_backend="eager", eval_strategy="epoch")
    trainer = TokenMixupTrainer(make_model(), args, train_dataset=Images(10), eval_dataset=Images(10))
    with dynamo.config.patch(error_on_recompile=True):
        trainer.train()
    assert counters["stats"]["unique_graphs"] >= 1


def test_compile_with_drop_last_marks_no_dynamic_batch(arguments, monkeypatch):
    """With `dataloader_drop_last` the sizes stay numbers, which makes the faster code."""
    marked = []
    monkeypatch.setattr("hf_tokenmixup.training.batches.mark_dynamic_batch_size", lambda *t: marked.append(len(t)))
    for drop_last in (False, True):
        args = arguments(torch_compile_backend="eager", dataloader_drop_last=drop_last)
        trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(6))
        trainer.compute_loss(trainer.model, trainer.data_collator([Images(2)[0], Images(2)[1]]))
    assert marked == [2]
