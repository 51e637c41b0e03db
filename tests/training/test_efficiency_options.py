"""Trainings that save memory or time: the same weights as without, checkpoints too."""

import copy
import pickle

import pytest
import torch
from helpers.tiny_training import CLASSES, Images, plain_vit, resnet, tokenmixup_vit
from transformers import set_seed

from hf_tokenmixup.models import TokenMixupCctConfig, TokenMixupCctForImageClassification
from hf_tokenmixup.models.gradient_checkpointing import is_checkpointed
from hf_tokenmixup.training import TokenMixupTrainer


def tokenmixup_cct():
    torch.manual_seed(1)
    config = TokenMixupCctConfig(
        image_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        num_labels=CLASSES, horizontal_layers=[1], horizontal_tau=None, horizontal_rho=0.0, vertical_layers=[2],
        vertical_kappa=2, conv_channels=8,
    )  # fmt: skip
    return TokenMixupCctForImageClassification(config)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train(model, args, **kwargs):
    set_seed(0)
    trainer = TokenMixupTrainer(model, args, train_dataset=Images(10), eval_dataset=Images(6))
    trainer.train(**kwargs)
    return trainer


MODELS = {"vit": tokenmixup_vit, "cct": tokenmixup_cct, "plain": plain_vit, "resnet": resnet}


@pytest.mark.parametrize(
    "make_model, reentrant, precision",
    [(tokenmixup_vit, None, {}), (tokenmixup_vit, True, {"bf16": True}), (tokenmixup_cct, False, {"bf16": True})],
)
def test_gradient_checkpointing_trains_same_weights(arguments, make_model, reentrant, precision):
    kwargs = {} if reentrant is None else {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    settings = {"max_steps": 3, "mixup_alpha": 0.5, "label_smoothing_factor": 0.1, **precision}
    model = make_model()
    expected = train(copy.deepcopy(model), arguments(**settings))
    train(model, arguments(**settings, activation_checkpointing=True, **kwargs))
    assert is_checkpointed(model) and not is_checkpointed(expected.model)
    for name, tensor in weights(expected.model).items():
        assert torch.equal(model.state_dict()[name], tensor), name


def plain_cct():
    return tokenmixup_cct().to_plain_model()


@pytest.mark.usefixtures("separate_projections")
@pytest.mark.parametrize("make_model", [tokenmixup_vit, tokenmixup_cct, plain_vit, plain_cct])
@pytest.mark.parametrize("frozen", [("embeddings",), ("embeddings", ".layers.0.", ".layers.1.")])
def test_gradient_checkpointing_reentrant_with_frozen_weights_trains_other_weights(arguments, make_model, frozen):
    ends = []
    for reentrant in (None, False, True):
        model = make_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        settings = {"max_steps": 2, "logging_steps": 1, "max_grad_norm": 1.0}
        if reentrant is not None:
            settings |= {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
            }
        before = weights(model)
        trainer = train(model, arguments(**settings))
        # A second run on the same model: the layers are set up for it again.
        trainer.train()
        norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
        ends.append((weights(model), norms))
        moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
        assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        pickle.dumps(model)
    for other, norms in ends[1:]:
        assert norms == ends[0][1]
        assert all(torch.equal(other[name], tensor) for name, tensor in ends[0][0].items())


@pytest.mark.parametrize("make_model", [tokenmixup_vit, tokenmixup_cct], ids=["vit", "cct"])
def test_bf16_trains_nearly_same_weights(arguments, make_model):
    before, settings = weights(make_model()), {"max_steps": 3, "logging_steps": 1, "learning_rate": 0.01}
    full, half = (train(make_model(), arguments(**settings, bf16=bf16)) for bf16 in (False, True))
    losses, others = ([line["loss"] for line in one.state.log_history[:3]] for one in (full, half))
    assert others == pytest.approx(losses, rel=0.05) and others != losses
    moved, expected = (
        torch.cat([(tensor - before[name]).flatten() for name, tensor in model.named_parameters()])
        for model in (half.model, full.model)
    )
    assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.99
    assert all(tensor.dtype == torch.float32 for tensor in half.model.parameters())


@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
def test_channels_last_trains_same_weights(arguments, make_model):
    settings = {"max_steps": 3, "mixup_alpha": 0.5, "mixup_mode": "elem", "per_device_train_batch_size": 3}
    expected = train(make_model(), arguments(**settings))
    model, seen = make_model(), []
    convolution = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    convolution.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer = train(model, arguments(**settings, channels_last=True))
    trainer.evaluate()
    last = {"memory_format": torch.channels_last}
    assert len(seen) >= 4 and all(images.is_contiguous(**last) and not images.is_contiguous() for images in seen)
    assert all(tensor.is_contiguous(**last) for tensor in model.parameters() if tensor.dim() == 4)
    assert not convolution.weight.is_contiguous() or convolution.weight.shape[2:] == (1, 1)
    for name, tensor in weights(expected.model).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_model, optim", [(tokenmixup_cct, "adamw_torch"), (resnet, "adamw_torch_fused")])
def test_channels_last_resumes_bit_for_bit(arguments, tmp_path, make_model, optim):
    settings = {"optim": optim, "channels_last": True, "learning_rate": 1e-3, "max_steps": 4}
    complete = train(make_model(), arguments(**settings, save_strategy="steps", save_steps=2))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    resumed = train(make_model(), arguments(**settings), resume_from_checkpoint=str(checkpoint))
    for name, tensor in weights(complete.model).items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    states = [trainer.optimizer.state_dict()["state"] for trainer in (complete, resumed)]
    for index, state in states[0].items():
        assert torch.equal(state["exp_avg"], states[1][index]["exp_avg"])
        assert state["exp_avg"].stride() == states[1][index]["exp_avg"].stride()


@pytest.mark.parametrize("first", [True, False])
def test_memory_format_may_change_on_resume(arguments, tmp_path, first):
    """A fused optimizer goes through weights and moments in the order of memory."""
    settings = {"optim": "adamw_torch_fused", "learning_rate": 1e-3, "max_steps": 4}
    complete = train(resnet(), arguments(**settings, channels_last=first, save_strategy="steps", save_steps=2))
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    other = train(resnet(), arguments(**settings, channels_last=not first), resume_from_checkpoint=checkpoint)
    for name, tensor in weights(complete.model).items():
        torch.testing.assert_close(other.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_channels_last_applies_to_model_init(arguments):
    args = arguments(channels_last=True)
    trainer = TokenMixupTrainer(None, args, model_init=resnet, train_dataset=Images(8))
    trainer.train()
    weight = trainer.model.resnet.embedder.embedder.convolution.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
