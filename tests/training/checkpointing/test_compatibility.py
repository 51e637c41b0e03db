"""Check that resuming with changed settings raises or warns."""

import logging
from pathlib import Path

import pytest
import torch
from helpers.tiny_training import Images, plain_vit, tokenmixup_vit

from hf_tokenmixup.training import TokenMixupTrainer
from hf_tokenmixup.training.checkpointing.compatibility import check_resume_compatibility, training_fingerprint

SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 0.01, "weight_decay": 0.1}


@pytest.fixture
def resume(arguments):
    """Train six steps with checkpoints and return a function that resumes from one of them."""
    TokenMixupTrainer(tokenmixup_vit(), arguments(**SETTINGS), train_dataset=Images(32)).train()

    def resume_from(checkpoint=3, model=None, **changes):
        args = arguments(**SETTINGS | changes)
        trainer = TokenMixupTrainer(model or tokenmixup_vit(), args, train_dataset=Images(32))
        given = checkpoint if isinstance(checkpoint, str) else f"{args.output_dir}/checkpoint-{checkpoint}"
        trainer.train(resume_from_checkpoint=given)
        return trainer

    return resume_from


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"per_device_train_batch_size": 2}, "from steps of 4 images, and this run has 2"),
        ({"gradient_accumulation_steps": 2}, "from steps of 4 images, and this run has 8"),
        (
            {"learning_rate": 0.001},
            "`learning_rate` cannot change on resume: the optimizer of step 3 has 0.01, this run has 0.001",
        ),
        (
            {"weight_decay": 0.0},
            "`weight_decay` cannot change on resume: the optimizer of step 3 has 0.1, this run has 0",
        ),
        (
            {"layer_decay": 0.5},
            "`layer_decay` cannot change on resume: the optimizer of step 3 has 1, this run has 0.5. Resume with 1.",
        ),
        ({"max_steps": 2}, "is at step 3, and this run has 2 steps"),
    ],
)
def test_resume_incompatible_setting_raises_and_removes_no_checkpoint(resume, changes, message):
    with pytest.raises(ValueError, match=message):
        resume(**changes)
    assert resume(checkpoint="last").state.global_step == 6


def test_resume_same_images_per_step_in_another_split_warns(resume, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = resume(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert trainer.state.global_step == 6 and "From step 3 on" not in caplog.text
    split = (
        "The 4 images of a step were split into 1 processes x 4 images x 1 micro-batches and are now split into 1 x 2"
    )
    assert f"{split} x 2." in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
def test_check_resume_compatibility_other_process_count_warns(arguments, caplog, streamed):
    now = training_fingerprint(TokenMixupTrainer(plain_vit(), arguments(**SETTINGS), train_dataset=Images(8)))
    then = now | {"step_split": [2, 2, 1]}
    with caplog.at_level(logging.WARNING):
        check_resume_compatibility(now, now, 3, streamed)
        check_resume_compatibility({name: now[name] for name in now if name != "step_split"}, now, 3, streamed)
        assert not caplog.text
        check_resume_compatibility(then, now, 3, streamed)
    assert "split into 2 processes x 2 images x 1 micro-batches and are now split into 1 x 4 x 1" in caplog.text


def test_resume_other_tokenmixup_settings_warns(resume, caplog):
    with caplog.at_level(logging.WARNING):
        resume(model=tokenmixup_vit(horizontal_tau=2.0, horizontal_rho=0.5))
    assert "From step 3 on, the run has other settings" in caplog.text
    assert "horizontal_rho 0.5 (was 0.0), horizontal_tau 2.0 (was None)" in caplog.text


def test_resume_auto_without_checkpoint_starts_and_last_raises(resume, arguments, tmp_path):
    assert resume(checkpoint="auto", max_steps=7).state.global_step == 7
    args = arguments(output_dir=str(tmp_path / "empty"))
    trainer = TokenMixupTrainer(plain_vit(), args, train_dataset=Images(8))
    with pytest.raises(ValueError, match="checkpoint"):
        trainer.train(resume_from_checkpoint="last")
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 1


def test_resume_model_only_checkpoint_raises(arguments):
    args = arguments(**SETTINGS, save_only_model=True)
    trainer = TokenMixupTrainer(plain_vit(), args, train_dataset=Images(32))
    trainer.train()
    with pytest.raises(ValueError, match="contains the model alone .`save_only_model`."):
        trainer.train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-3"))


def test_evaluate_with_dataloader_drop_last_counts_all_images(arguments):
    args = arguments(dataloader_drop_last=True, per_device_eval_batch_size=4)
    images = Images(11)
    seen = []
    trainer = TokenMixupTrainer(
        plain_vit(), args, train_dataset=Images(7), eval_dataset=images,
        compute_metrics=lambda prediction: seen.append(len(prediction.label_ids)) or {},
    )  # fmt: skip
    assert len(trainer.get_train_dataloader()) == 1
    loss = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        logits = trainer.model.eval()(images.pixels).logits
    assert seen == [11] and loss == pytest.approx(torch.nn.functional.cross_entropy(logits, images.labels).item())
    assert args.dataloader_drop_last
    trainer.predict(images)
    assert seen == [11, 11]


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_evaluate_in_half_precision_changes_no_weight(arguments, tmp_path, ema_decay):
    args = arguments(bf16_full_eval=True, ema_decay=ema_decay)
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(8), eval_dataset=Images(8))
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    rounded = trainer.evaluate()["eval_loss"]
    for name, tensor in trainer.model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    args.bf16_full_eval = False
    exact = trainer.evaluate()["eval_loss"]
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.05)


def test_hyperparameter_search_each_trial_uses_current_settings(arguments):
    """Trainer creates the model of each trial again after changing the arguments."""
    models = iter([plain_vit(), tokenmixup_vit()])
    trainer = TokenMixupTrainer(
        args=arguments(logging_steps=1, max_steps=2), train_dataset=Images(8), model_init=lambda: next(models)
    )
    trainer.args.mixup_alpha, trainer.args.ema_decay = 0.8, 0.5
    trainer.train()
    assert trainer.input_mixing.enabled and trainer.ema_model.updates == 2
    assert any(line.get("mixed_samples") for line in trainer.state.log_history)
