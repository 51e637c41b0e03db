"""The attention to collected tokens in the log, and its warning."""

import logging

import pytest
import torch
from helpers.tiny_training import Images, tokenmixup_vit

from hf_tokenmixup.evaluation.vertical_attention import vertical_attention
from hf_tokenmixup.training import TokenMixupTrainer, vertical_probe


def test_trainer_logs_vertical_attention_of_the_logged_step(arguments):
    seen = []

    class Watching(TokenMixupTrainer):
        def compute_loss(self, model, inputs, *rest, **kwargs):
            seen.append(inputs["pixel_values"][:2].clone())
            return super().compute_loss(model, inputs, *rest, **kwargs)

    trainer = Watching(tokenmixup_vit(), arguments(max_steps=3, logging_steps=3), train_dataset=Images(12))
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["step"] == 3
    assert line["vertical_attention"] == pytest.approx(vertical_attention(trainer.model, seen[-1]).item(), rel=1e-5)


def test_trainer_without_vertical_layers_logs_no_vertical_attention(arguments):
    trainer = TokenMixupTrainer(tokenmixup_vit(vertical_layers=[]), arguments(), train_dataset=Images(4))
    trainer.train()
    assert "vertical_attention" not in trainer.state.log_history[0]


def test_trainer_warns_once_if_collected_tokens_get_no_attention(arguments, caplog, monkeypatch):
    values = iter([0.04, 0.01, 0.5])
    monkeypatch.setattr(vertical_probe, "vertical_attention", lambda model, images: torch.tensor(next(values)))
    trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(max_steps=3, logging_steps=1), train_dataset=Images(12))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = [record.getMessage() for record in caplog.records if "next to no attention" in record.getMessage()]
    assert len(found) == 1 and "0.04 times what uniform attention would" in found[0]
    logged = [line["vertical_attention"] for line in trainer.state.log_history if "loss" in line]
    assert logged == pytest.approx([0.04, 0.01, 0.5])
