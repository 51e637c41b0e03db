"""Optimizers that update all weights in one call of the device train as those that do not."""

import pytest
import torch
from helpers.tiny_training import Images, plain_vit, tokenmixup_vit

from hf_tokenmixup.training import TokenMixupTrainer

# With the usual epsilon, Adam makes large what is rounding alone, such as the gradient of the keys' bias.
ADAM = {"weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-3, "learning_rate": 0.01}


def trained(make_model, args, **options):
    trainer = TokenMixupTrainer(make_model(), args, train_dataset=Images(20), **options)
    trainer.train()
    (optimizer,) = trainer.accelerator._optimizers
    return trainer.model.state_dict(), optimizer.param_groups[0]


def assert_close(got, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("make_model", [plain_vit, tokenmixup_vit])
@pytest.mark.parametrize("settings", [{}, {"mixup_alpha": 0.8, "gradient_accumulation_steps": 2, "ema_decay": 0.9}])
def test_fused_adamw_trains_same_weights(arguments, make_model, settings):
    settings = ADAM | {"max_steps": 10} | settings
    expected, group = trained(make_model, arguments(**settings, optim="adamw_torch"))
    assert not group["fused"]
    got, group = trained(make_model, arguments(**settings, optim="adamw_torch_fused"))
    assert group["fused"] and group["betas"] == (0.9, 0.95)
    assert_close(got, expected)
    start = make_model().state_dict()
    assert all((got[name] - start[name]).abs().max() > 1e-4 for name in start if not name.endswith("k_proj.bias"))


def test_fused_sgd_trains_same_weights(arguments):
    # The host's optim_args know no "fused": the class itself has to be handed over.
    args = {"max_steps": 10, "learning_rate": 0.02}
    expected, _ = trained(tokenmixup_vit, arguments(**args, optim_args="momentum=0.9"))
    sgd = (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "fused": True})
    got, group = trained(tokenmixup_vit, arguments(**args), optimizer_cls_and_kwargs=sgd)
    assert group["fused"]
    assert_close(got, expected)


@pytest.mark.parametrize("optim", ["adafactor", "rmsprop"])
def test_optimizer_state_resumes(arguments, optim):
    """torch adds options to the defaults of an optimizer when it loads a state."""
    args = arguments(optim=optim, max_steps=3, save_strategy="steps", save_steps=2, learning_rate=0.01)
    expected, _ = trained(tokenmixup_vit, args)
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(20))
    trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.model.state_dict().items())
