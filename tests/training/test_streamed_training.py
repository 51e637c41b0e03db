"""TokenMixupTrainer on streams: resuming bit for bit, loaders of every process, evaluation of every image."""

import pytest
import torch
from helpers.streams import ReadNumber, load_stream, write_shards
from helpers.tiny_training import tokenmixup_vit
from transformers import TrainerCallback, ViTImageProcessor

from hf_tokenmixup.data import (
    ImageClassificationData,
    ImageClassificationIterableDataset,
    build_transforms,
    collate,
    load_image_dataset,
)
from hf_tokenmixup.data import (
    iterable_dataset as streaming,
)
from hf_tokenmixup.data.image_cache import decode_image
from hf_tokenmixup.metrics import compute_metrics, top_classes
from hf_tokenmixup.training import TokenMixupTrainer

AUGMENT, PREPARE = build_transforms(ViTImageProcessor(size={"height": 8, "width": 8}), random_erasing=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("streamed"), [7, 5, 9, 6])


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def trainer(folder, arguments, name, num_images=27, stop=None, **settings):
    data = ImageClassificationIterableDataset(
        load_stream(folder), AUGMENT, seed=3, shuffle_buffer=8, num_images=num_images
    )
    settings = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "mixup_alpha": 0.8} | settings
    args = arguments(output_dir=str(folder.parent / name), per_device_train_batch_size=3, **settings)
    model = tokenmixup_vit(hidden_dropout_prob=0.1)
    callbacks = [StopAt(stop)] if stop else None
    return TokenMixupTrainer(model, args, train_dataset=data, data_collator=collate, callbacks=callbacks)


@pytest.mark.parametrize(
    "workers, left, settings",
    [
        (0, 6, {}),
        (2, 6, {}),
        (2, 6, {"dataloader_persistent_workers": True}),
        (0, 7 + 4, {"gradient_accumulation_steps": 2}),
        (0, 6, {"num_images": None}),
    ],
)
def test_streamed_run_resumes_bit_for_bit(folder, arguments, tmp_path, workers, left, settings, monkeypatch):
    """27 images in batches of 3 are 9 batches; the checkpoint is that of step 6, with `left` batches to come."""
    settings = {"max_steps": 12, "dataloader_num_workers": workers} | settings
    expected = trainer(folder, arguments, tmp_path / "whole", **settings)
    expected.train()
    trainer(folder, arguments, tmp_path / "parts", stop=7, **settings).train()

    decoded = []
    monkeypatch.setattr(streaming, "decode_image", lambda *args: decoded.append(1) or decode_image(*args))
    resumed = trainer(folder, arguments, tmp_path / "parts", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == expected.state.global_step == settings["max_steps"]
    weights = resumed.model.state_dict()
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    losses = [[record["loss"] for record in one.state.log_history if "loss" in record] for one in (expected, resumed)]
    assert losses[0] == losses[1]
    if not workers:
        # Of what was trained on before, nothing is decoded; accelerate reads one batch ahead.
        assert 3 * left <= len(decoded) <= 3 * (left + 1)


def test_streamed_second_run_skips_no_batch(folder, arguments, tmp_path):
    trainer(folder, arguments, tmp_path / "out", stop=5, max_steps=6).train()
    resumed = trainer(folder, arguments, tmp_path / "out", max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    resumed.train()
    assert resumed.state.global_step == 6


def test_streamed_run_has_epochs_and_steps_of_its_length(folder, arguments, tmp_path, monkeypatch):
    one = trainer(folder, arguments, tmp_path / "out", max_steps=-1, num_train_epochs=2, save_strategy="no")
    loader = one.get_train_dataloader()
    assert len(loader) == 9 and one.num_examples(loader) == 27
    assert one.train().global_step == 18 and one.state.epoch == 2.0
    # As one of two processes: half of the batches, and the steps of all images.
    monkeypatch.setattr(type(one.args), "world_size", 2)
    monkeypatch.setattr(type(one.args), "process_index", 1)
    one._train_batch_size = 3
    loader = one.get_train_dataloader()
    assert loader.dataset.rank == 1 and len(loader) == 4 and one.num_examples(loader) == 24
    labels = torch.cat([batch["labels"] for batch in loader])
    assert len(labels) == 12


def test_streamed_run_of_unknown_length_without_max_steps_raises(folder, arguments, tmp_path):
    with pytest.raises(ValueError, match="number of images in split 'train' is unknown. Set `max_steps`"):
        trainer(folder, arguments, tmp_path / "out", num_images=None, max_steps=-1)


def test_streamed_run_has_at_most_one_worker_per_shard(folder, arguments, tmp_path, caplog):
    one = trainer(folder, arguments, tmp_path / "out", dataloader_num_workers=6)
    assert one.get_train_dataloader().num_workers == 4
    assert "Workers started for split 'train': 4 of 6, one for each shard" in caplog.text


@pytest.mark.parametrize("workers", [0, 3])
def test_streamed_evaluation_matches_stored_split(folder, arguments, tmp_path, workers):
    stored = load_image_dataset(str(folder), cache_dir=str(tmp_path / "cache"), do_train=False, eval_split="train")
    args = arguments(output_dir=str(tmp_path), per_device_eval_batch_size=4, dataloader_num_workers=workers)
    streamed = ImageClassificationIterableDataset(load_stream(folder), PREPARE)
    options = {"data_collator": collate, "compute_metrics": compute_metrics}
    options["preprocess_logits_for_metrics"] = top_classes
    one = TokenMixupTrainer(tokenmixup_vit(num_labels=4), args, **options)
    expected = one.evaluate(ImageClassificationData(stored.evaluation, PREPARE))
    found = one.evaluate(streamed)
    assert found["eval_samples"] == 27 and "eval_samples" not in expected
    assert found["eval_top1"] == expected["eval_top1"] and found["eval_top5"] == expected["eval_top5"]
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    labels = one.predict(streamed).label_ids
    assert sorted(labels) == sorted(stored.evaluation["label"])


def test_stream_labels_identify_images(folder):
    images = list(ImageClassificationIterableDataset(load_stream(folder), ReadNumber(draws=False)))
    assert [int(image["pixel_values"][0]) % 4 for image in images] == [image["labels"] for image in images]
