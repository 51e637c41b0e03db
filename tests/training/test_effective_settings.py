"""Records hold the settings that a run trained with, whoever decided them."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_training import Images, plain_vit, tokenmixup_cct, tokenmixup_vit

from hf_tokenmixup.data import collate
from hf_tokenmixup.metrics import compute_metrics, top_classes
from hf_tokenmixup.training import TokenMixupTrainer
from hf_tokenmixup.training.nonfinite import _format_nonfinite_error

EVALUATION = {
    "dataset": "alice/pictures", "dataset_config": None, "dataset_revision": None, "dataset_fingerprint": None,
    "split": "test", "command": "python scripts/evaluate.py {model}",
}  # fmt: skip


def trainer_of(args, model=None, images=12, **options):
    return TokenMixupTrainer(
        model=model or tokenmixup_vit(),
        args=args,
        train_dataset=Images(images),
        eval_dataset=Images(10),
        data_collator=collate,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=top_classes,
        eval_card_data=EVALUATION,
        **options,
    )


def hyperparameters(trainer):
    """Those on the card, as its readers see them."""
    table = str(trainer.model_card("alice/vit")).partition("| hyperparameter | value |")[2]
    table = table.partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {name.strip("`"): value for name, value in rows}


def test_effective_precision_of_launcher_is_recorded(arguments, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = trainer_of(arguments())
    trainer.train()
    trainer.evaluate()
    assert hyperparameters(trainer)["mixed_precision"] == "bf16"
    assert trainer.run_record.evaluation_result("alice/vit").dtype == "bf16"
    assert "float32 instead of half precision" in _format_nonfinite_error(trainer, 1, "")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    trainer = trainer_of(arguments())
    trainer.train()
    trainer.evaluate()
    assert (
        "mixed_precision" not in hyperparameters(trainer)
        and trainer.run_record.evaluation_result("alice/vit").dtype == "fp32"
    )
    assert "half precision" not in _format_nonfinite_error(trainer, 1, "")


@pytest.mark.parametrize("make_model", [tokenmixup_vit, tokenmixup_cct, plain_vit])
def test_effective_precision_of_weights_is_recorded(arguments, make_model):
    trainer = trainer_of(arguments(), make_model().to(torch.bfloat16))
    trainer.train()
    trainer.evaluate()
    assert hyperparameters(trainer)["weights_dtype"] == "bfloat16"
    assert trainer.run_record.evaluation_result("alice/vit").dtype == "bf16 weights"


def test_effective_precision_of_full_eval_is_recorded(arguments):
    trainer = trainer_of(arguments(bf16_full_eval=True))
    trainer.train()
    trainer.evaluate()
    assert trainer.run_record.evaluation_result("alice/vit").dtype == "bf16 weights"
    assert "weights_dtype" not in hyperparameters(trainer)


def test_effective_compiler_of_launcher_is_in_card(arguments, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    trainer = trainer_of(arguments())
    assert hyperparameters(trainer)["torch_compile"] == "true"
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    assert "torch_compile" not in hyperparameters(trainer_of(arguments()))


def test_effective_optimizer_of_user_is_in_card(arguments):
    model = tokenmixup_vit()
    groups = [{"params": model.classifier.parameters(), "lr": 0.3}, {"params": model.vit.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.5, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1)
    trainer = trainer_of(arguments(optim="adamw_torch", warmup_steps=5), model, optimizers=(optimizer, schedule))
    trainer.train()
    recorded = hyperparameters(trainer)
    assert (recorded["optim"], recorded["learning_rate"], recorded["momentum"]) == ("SGD", "0.3, 0.02", "0.5")
    assert (recorded["weight_decay"], recorded["lr_scheduler_type"]) == (
        "0.01",
        "LinearLR",
    ) and "warmup_steps" not in recorded

    made = (torch.optim.RMSprop, {"lr": 0.004})
    trainer = trainer_of(arguments(), optimizer_cls_and_kwargs=made)
    trainer.train()
    recorded = hyperparameters(trainer)
    assert (recorded["optim"], recorded["learning_rate"], recorded["lr_scheduler_type"]) == (
        "RMSprop",
        "0.004",
        "constant",
    )
    assert (
        hyperparameters(trainer_of(arguments(optim="sgd", optim_args="momentum=0.9")))["optim_args"] == "momentum=0.9"
    )


def test_effective_learning_rate_of_user_optimizer_changed_on_resume_raises(arguments):
    def train(rate, checkpoint=None):
        model = tokenmixup_vit()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        args = arguments(max_steps=2, save_strategy="steps", save_steps=1)
        trainer = trainer_of(args, model, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=checkpoint and f"{args.output_dir}/checkpoint-{checkpoint}")

    train(0.1)
    with pytest.raises(ValueError, match="the optimizer of step 1 has 0.1, this run has 0.2"):
        train(0.2, 1)
    train(0.1, 1)


def test_effective_batch_size_of_auto_find_is_in_card(arguments, monkeypatch):
    class Small(TokenMixupTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training and len(inputs["labels"]) > 3:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Small(tokenmixup_vit(), arguments(auto_find_batch_size=True, max_steps=2), train_dataset=Images(12))
    trainer.train()
    size = trainer.get_train_dataloader().total_batch_size
    assert size <= 3 and hyperparameters(trainer)["per_device_train_batch_size"] == str(size)
    assert trainer.state_dict()["plan"]["images_per_step"] == size


def test_effective_length_is_max_steps_or_epochs(arguments):
    recorded = hyperparameters(trainer_of(arguments(max_steps=2, num_train_epochs=7)))
    assert recorded["max_steps"] == "2" and "num_train_epochs" not in recorded
    recorded = hyperparameters(trainer_of(arguments(max_steps=-1, num_train_epochs=2)))
    assert recorded["num_train_epochs"] == "2" and "max_steps" not in recorded


def test_effective_trainable_parameters_with_frozen_weights_are_in_card(arguments):
    model = tokenmixup_vit()
    assert "trainable_parameters" not in hyperparameters(trainer_of(arguments(), model))
    model.vit.requires_grad_(False)
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert hyperparameters(trainer_of(arguments(), model))["trainable_parameters"] == f"{head:,} of {total:,}"


def test_effective_skipped_steps_are_in_card(arguments):
    images = Images(12)
    images.pixels[2] = torch.nan
    trainer = trainer_of(arguments(skip_nonfinite_steps=2, max_steps=3))
    trainer.train_dataset = images
    trainer.train()
    assert hyperparameters(trainer)["skipped_steps"] == "1"


def test_effective_results_in_card_match_current_weights(arguments):
    trainer = trainer_of(arguments(max_steps=2))
    trainer.evaluate()
    assert trainer.run_record.evaluation_result("alice/vit") is not None
    trainer.train()
    assert trainer.run_record.evaluation_result("alice/vit") is None
    trainer.evaluate(Images(3))
    assert trainer.run_record.evaluation_result("alice/vit") is None
    metrics = trainer.evaluate()
    evaluation = trainer.run_record.evaluation_result("alice/vit")
    assert (evaluation.num_images, evaluation.loss) == (10, metrics["eval_loss"])


def test_effective_results_of_best_model_match_its_step(arguments):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = arguments(max_steps=4, load_best_model_at_end=True, learning_rate=3.0, **settings)
    trainer = trainer_of(args)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert min(losses) < losses[-1]
    assert (
        trainer.run_record.evaluation_result("alice/vit").loss
        == min(losses)
        == pytest.approx(trainer.evaluate()["eval_loss"])
    )


def test_effective_resumed_flag_is_in_card(arguments):
    args = arguments(max_steps=2, save_strategy="steps", save_steps=1)
    trainer = trainer_of(args)
    trainer.train("auto")
    assert not trainer.run_record.card_data().resumed and "of the last part alone" not in str(trainer.model_card("x"))
    trainer = trainer_of(args)
    trainer.train(f"{args.output_dir}/checkpoint-1")
    assert trainer.run_record.card_data().resumed
    state = json.loads((Path(args.output_dir) / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
