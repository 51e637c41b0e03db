"""The Trainer's ways to evaluate and predict, through this package's collate, metrics and trainer."""

import math

import pytest
import torch
from helpers.streams import load_stream, write_shards
from helpers.tiny_training import CLASSES, Images, tokenmixup_vit
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback, ViTImageProcessor

from hf_tokenmixup.data import ImageClassificationIterableDataset, build_transforms, collate
from hf_tokenmixup.metrics import compute_metrics, top_classes
from hf_tokenmixup.training import TokenMixupTrainer

OURS = {
    "data_collator": collate,
    "compute_metrics": compute_metrics,
    "preprocess_logits_for_metrics": top_classes,
}
RESULTS = ("eval_top1", "eval_top5", "eval_loss")


class Unlabelled(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index]["pixel_values"]}


def results(arguments, images=None, **settings):
    settings = {"per_device_eval_batch_size": 4} | settings
    trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(**settings), eval_dataset=images or Images(16), **OURS)
    metrics = trainer.evaluate()
    return {name: metrics[name] for name in RESULTS}


# 16 images in batches of 4 are as many batches as images in one; 16 in batches of 5 end with a smaller one.
@pytest.mark.parametrize("size", [4, 5, 1, 32])
@pytest.mark.parametrize(
    "settings",
    [
        {"eval_do_concat_batches": False},
        {"batch_eval_metrics": True},
        {"include_for_metrics": ["inputs", "loss"]},
        {"eval_accumulation_steps": 1},
        {"eval_do_concat_batches": False, "eval_accumulation_steps": 2},
        {"batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"]},
        {"eval_use_gather_object": True},
        {"dataloader_drop_last": True},
        {"remove_unused_columns": True},
        {"label_names": ["labels"]},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_evaluation_option_changes_no_result(arguments, size, settings):
    expected = results(arguments, per_device_eval_batch_size=size)
    assert results(arguments, per_device_eval_batch_size=size, **settings) == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["eval_top1"] < 1


@pytest.mark.parametrize(
    "settings", [{}, {"eval_do_concat_batches": False}, {"batch_eval_metrics": True}, {"prediction_loss_only": True}]
)
def test_evaluation_of_a_stream_counts_its_images(arguments, tmp_path, settings):
    images = ImageClassificationIterableDataset(
        load_stream(write_shards(tmp_path / "shards", [7, 5])),
        build_transforms(ViTImageProcessor(size={"height": 8, "width": 8}))[1],
    )
    args = arguments(per_device_eval_batch_size=4, **settings)
    metrics = TokenMixupTrainer(tokenmixup_vit(), args, eval_dataset=images, **OURS).evaluate()
    assert metrics["eval_samples"] == 12 and math.isfinite(metrics["eval_loss"])


def test_evaluation_in_batches_does_not_mix_results(arguments):
    args = arguments(batch_eval_metrics=True, per_device_eval_batch_size=4)
    one, two = (TokenMixupTrainer(tokenmixup_vit(), args, eval_dataset=Images(16), **OURS) for _ in range(2))
    assert one.compute_metrics is not two.compute_metrics
    expected = one.evaluate()["eval_top1"]

    class Interrupt(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    one.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        one.evaluate()
    one.pop_callback(Interrupt)
    assert one.evaluate()["eval_top1"] == expected == two.evaluate()["eval_top1"]


@pytest.mark.parametrize("settings", [{}, {"batch_eval_metrics": True}, {"eval_do_concat_batches": False}])
def test_predict_without_labels_returns_predictions(arguments, settings):
    images = Images(5)
    args = arguments(per_device_eval_batch_size=2, **settings)
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, **OURS)
    output = trainer.predict(Unlabelled(images))
    with torch.no_grad():
        expected = top_classes(trainer.model.eval()(pixel_values=images.pixels).logits)
    predictions = output.predictions if isinstance(output.predictions, list) else [output.predictions]
    assert torch.equal(torch.cat([torch.as_tensor(batch) for batch in predictions]), expected)
    assert output.label_ids is None and not any("top1" in name for name in output.metrics)


def test_evaluate_without_labels_raises(arguments):
    trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(), eval_dataset=Unlabelled(Images(5)), **OURS)
    with pytest.raises(ValueError, match="Evaluation needs batches with `labels`, .* Use `predict`"):
        trainer.evaluate()


def test_evaluate_without_images_raises(arguments):
    trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(), **OURS)
    with pytest.raises(ValueError, match="Evaluation: the dataset has no images"):
        trainer.evaluate(Subset(Images(5), []))


def test_evaluate_single_image_and_dict_of_datasets(arguments):
    datasets = {"one": Subset(Images(16), [3]), "all": Images(16)}
    args = arguments(eval_strategy="steps", eval_steps=1)
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(8), eval_dataset=datasets, **OURS)
    before = trainer.evaluate()
    assert before["eval_one_top1"] in (0, 1) and before["eval_all_top5"] == 1
    trainer.train()
    assert trainer.evaluate()["eval_all_loss"] != before["eval_all_loss"]


def test_train_drop_last_with_fewer_images_than_batch_raises(arguments):
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 64}
    for steps in ({"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 2}):
        trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(**settings, **steps), train_dataset=Images(20))
        with pytest.raises(ValueError, match="has 20 images, and a batch 64. Lower `per_device_train_batch_size`"):
            trainer.train()
        assert trainer.state.global_step == 0


def test_train_without_images_raises(arguments):
    trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(), train_dataset=Subset(Images(5), []))
    with pytest.raises(ValueError, match="`train_dataset` has no images"):
        trainer.train()


@pytest.mark.parametrize("drop_last, images", [(False, 10), (True, 8)])
def test_train_with_more_accumulation_steps_than_batches_uses_all_batches(arguments, drop_last, images, caplog):
    args = arguments(gradient_accumulation_steps=16, dataloader_drop_last=drop_last, max_steps=-1, num_train_epochs=2)
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(10))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["mixed_samples"] for line in lines] == [images, images]
    assert lines[0]["loss"] < 2 * math.log(CLASSES) + 1
    assert f"`gradient_accumulation_steps` is 16, but an epoch has {-(-images // 4)} batches" in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` must be random or sequential"),
        ({"label_names": ["targets"]}, r"`label_names` must contain 'labels', got \['targets'\]"),
        (
            {"prediction_loss_only": True, "metric_for_best_model": "top1"},
            "`metric_for_best_model` is 'top1', but with `prediction_loss_only`",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_evaluation_option_without_metrics_raises(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(**settings)


class RunsOutOfMemory(TokenMixupTrainer):
    """Has memory for batches of 4 images."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and len(inputs["labels"]) > 4 and self.state.global_step:
            raise RuntimeError("CUDA out of memory.")
        return loss


def test_auto_find_batch_size_counts_last_attempt_only(arguments):
    args = arguments(
        auto_find_batch_size=True, per_device_train_batch_size=5, max_steps=3, save_strategy="steps", save_steps=3
    )
    trainer = RunsOutOfMemory(tokenmixup_vit(), args, train_dataset=Images(12))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [(line["step"], line["mixed_samples"]) for line in lines] == [(3, 4)]
    resumed = TokenMixupTrainer(
        tokenmixup_vit(), arguments(max_steps=4, per_device_train_batch_size=5), train_dataset=Images(12)
    )
    with pytest.raises(ValueError, match="is from steps of 4 images, and this run has 5"):
        resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-3")


class Epochs(TrainerCallback):
    """A user's own, which logs nothing in the first epoch."""

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log = state.epoch > 1


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({}, [2, 4, 6]),
        ({"logging_steps": 4}, [2, 4, 6]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 2, 3, 4, 6]),
        ({"logging_strategy": "epoch"}, [2, 4, 6]),
        ({"logging_strategy": "no"}, []),
        ({"max_steps": 5}, [2, 4, 5]),
        pytest.param({"callbacks": [Epochs()]}, [4, 6], id="callback"),
    ],
    ids=str,
)
def test_log_has_line_at_end_of_each_epoch_and_run(arguments, settings, steps):
    settings = {"max_steps": 6} | settings
    callbacks = settings.pop("callbacks", None)
    trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(**settings), train_dataset=Images(8), callbacks=callbacks)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == steps
    assert all(line["mixed_samples"] == 4 for line in lines)
