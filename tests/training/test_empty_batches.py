"""Batches of no images: the functions return as many results, models, metrics and the trainer raise one sentence."""

import pytest
import torch
from accelerate import Accelerator
from helpers.tiny_training import CLASSES, plain_vit, tokenmixup_cct, tokenmixup_vit

from hf_tokenmixup.data import InputMixup
from hf_tokenmixup.functional import (
    attention_rollout,
    difficulty,
    horizontal_mix,
    manifold_mix,
    select_salient_tokens,
    token_saliency,
)
from hf_tokenmixup.saliency import received_attention
from hf_tokenmixup.training import TokenMixupTrainer, TokenMixupTrainingArguments
from hf_tokenmixup.training.metrics import MixingMetrics

HIDDEN, TARGETS, SALIENCY = torch.zeros(0, 5, 8), torch.zeros(0, CLASSES), torch.zeros(0, 4)
EASY, INDICES, IMAGES = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, 8, 8)


@pytest.mark.parametrize("assignment", ["optimal", "random"])
@pytest.mark.parametrize("token_selection", ["saliency", "random"])
@pytest.mark.parametrize("relabel", ["saliency", "count"])
def test_horizontal_mix_of_no_images_is_empty(assignment, token_selection, relabel):
    choices = {"assignment": assignment, "token_selection": token_selection, "relabel": relabel}
    mix = horizontal_mix(HIDDEN, TARGETS, SALIENCY, EASY, 0.0, 1, **choices)
    assert [tuple(part.shape) for part in mix] == [(0, 5, 8), (0, CLASSES), (0,), (0, 4)]


def test_functions_of_no_images_are_empty():
    assert difficulty(TARGETS, TARGETS).shape == (0,)
    rollout = attention_rollout([torch.zeros(0, 2, 5, 5)] * 2)
    assert token_saliency(rollout, 1).shape == token_saliency(rollout, 1, "mean").shape == (0, 4)
    assert received_attention(torch.zeros(0, 2, 5, 8), torch.zeros(0, 2, 5, 8), 1.0).shape == (0, 5)
    assert select_salient_tokens(HIDDEN, SALIENCY, 2, 1).shape == (0, 2, 8)
    assert [len(part) for part in manifold_mix(HIDDEN, TARGETS, INDICES, 0.5)] == [0, 0]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_input_mixing_of_no_images_is_empty(mode):
    images, targets = InputMixup(CLASSES, mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode)(IMAGES, INDICES)
    assert images.shape == IMAGES.shape and targets.shape == (0, CLASSES)


@pytest.mark.parametrize("make", [tokenmixup_vit, tokenmixup_cct])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("labels", [INDICES, TARGETS, None], ids=["indices", "distributions", "none"])
def test_model_forward_without_images_raises(make, training, labels):
    with pytest.raises(ValueError, match=r"at least one image, got shape \(0, 3, 8, 8\)"):
        make().train(training)(pixel_values=IMAGES, labels=labels)


@pytest.mark.parametrize("make", [plain_vit, tokenmixup_vit])
@pytest.mark.parametrize("training", [True, False])
def test_compute_loss_without_images_raises(make, training, tmp_path):
    args = TokenMixupTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", mixup_alpha=0.8)
    trainer = TokenMixupTrainer(make(), args)
    with pytest.raises(ValueError, match="at least one image, got none"):
        trainer.compute_loss(trainer.model.train(training), {"pixel_values": IMAGES, "labels": INDICES})


def test_mixing_metrics_of_steps_without_images_are_finite():
    counts, accelerator = MixingMetrics(), Accelerator(cpu=True)
    counts.update({"difficulty": torch.tensor(float("nan")), "mixed_samples": torch.tensor(0)}, num_images=0)
    counts.step()
    assert counts.compute(accelerator) == {}
    counts.update({"difficulty": torch.tensor(2.0), "mixed_samples": torch.tensor(4)}, num_images=4)
    counts.step()
    assert counts.compute(accelerator) == {"difficulty": 2.0, "mixed_samples": 2.0, "mixed_fraction": 1.0}
