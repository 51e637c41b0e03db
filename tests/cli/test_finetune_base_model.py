"""scripts/finetune.py with a base model of another task, other classes or another image size."""

import json
import logging

import pytest
import torch
from helpers.commands import import_command
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY |= {"intermediate_size": 32}
COMMON = "--use_cpu --report_to none --disable_tqdm true --seed 3 --per_device_train_batch_size 16".split()
COMMON += "--dataset_name digits --eval_split test --max_train_samples 72 --max_eval_samples 40 --hflip 0".split()
COMMON += "--max_steps 1 --save_strategy no --logging_steps 1 --learning_rate 1e-12".split()
MIXING = "--horizontal_layers 1 --horizontal_tau none --horizontal_rho 0 --vertical_layers 2".split()


def finetune(*arguments):
    script = import_command("finetune")
    trainer = script.build_trainer([*COMMON, *map(str, arguments)])
    script.train_and_evaluate(trainer)
    return trainer


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**TINY, num_labels=5, problem_type="multi_label_classification"))
    torch.nn.init.constant_(model.vit.embeddings.position_embeddings, 0.5)
    model.save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_finetune_multi_label_model_at_other_size_saves_single_label_model(base, tmp_path):
    options = ["--model_name_or_path", base, "--ignore_mismatched_sizes", "--image_size", 24, "--do_train"]
    trainer = finetune(*MIXING, *options, "--output_dir", tmp_path / "out")
    assert trainer.state.log_history[0]["mixed_samples"] > 0
    model = ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == "single_label_classification" and model.config.image_size == 24
    positions = model.vit.embeddings.position_embeddings
    assert positions.shape == (1, 37, 16) and torch.allclose(positions, torch.tensor(0.5))
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 24
    scores = pipeline("image-classification", str(tmp_path / "out"))(Image.new("RGB", (24, 24)), top_k=10)
    assert sum(score["score"] for score in scores) == pytest.approx(1)


def test_finetune_image_size_not_divisible_by_patch_size_warns(tmp_path, caplog):
    network = ["--from_scratch", "--model_type", "vit", "--config_overrides", json.dumps(TINY | {"image_size": 19})]
    with caplog.at_level(logging.WARNING):
        import_command("finetune").build_trainer(
            [*COMMON, *network, "--do_train", "--output_dir", str(tmp_path / "out")]
        )
    assert "Images of 19x19 pixels" in caplog.text and "last 3 rows and 3 columns" in caplog.text
    assert "image_size 16 or 20" in caplog.text
