"""scripts/finetune.py with LoRA: training from a pretrained model, resuming, and evaluation without peft."""

import json
import sys

import pytest
import torch
from helpers.commands import import_command
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

pytest.importorskip("peft")

COMMON = "--use_cpu --report_to none --disable_tqdm true --seed 3 --per_device_train_batch_size 16".split()
COMMON += "--dataset_name digits --eval_split test --max_train_samples 72 --max_eval_samples 40 --hflip 0".split()
MIXING = "--horizontal_layers 1 --horizontal_tau none --horizontal_rho 0 --vertical_layers 2".split()
LORA = "--lora_rank 2 --lora_dropout 0.1 --learning_rate 0.01 --ignore_mismatched_sizes".split()


@pytest.fixture(scope="module")
def finetune():
    return import_command("finetune")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A plain ViT of other classes, as from the Hub."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    size = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(intermediate_size=32, num_labels=3, **size)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def prepare(finetune, *arguments):
    return finetune.build_trainer([*COMMON, *map(str, arguments)])


def run(finetune, *arguments):
    trainer = prepare(finetune, *arguments)
    finetune.train_and_evaluate(trainer)
    return trainer


def metrics(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_finetune_with_lora_resumes_and_saves_merged_model(finetune, base, tmp_path, monkeypatch, capsys):
    options = ["--model_name_or_path", base, *MIXING, *LORA, "--do_train", "--do_eval", "--num_train_epochs", 2]
    options += ["--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 4]
    uninterrupted, parts = tmp_path / "uninterrupted", tmp_path / "parts"
    run(finetune, *options, "--output_dir", uninterrupted)
    assert "trainable params: 724 " in capsys.readouterr().out
    card = (uninterrupted / "README.md").read_text()
    assert "`lora_rank` | 2" in card and "--lora_rank 2" in card
    records = [json.loads(line) for line in (uninterrupted / "training_log.jsonl").read_text().splitlines()]
    assert max(record.get("mixed_samples", 0) for record in records) > 0

    resumed = run(
        finetune, *options, "--output_dir", parts, "--resume_from_checkpoint", uninterrupted / "checkpoint-4"
    )
    assert resumed.state.global_step == 10
    first, second, before = (load_file(folder / "model.safetensors") for folder in (uninterrupted, parts, base))
    assert first.keys() == before.keys() and all(torch.equal(first[name], second[name]) for name in first)
    moved = {name for name in first if not torch.equal(first[name], before[name])}
    # The names in the adapter files, as on the Hub: queries, values and the classifier.
    assert {name.split(".")[-2] for name in moved} == {"query", "value", "classifier"}
    assert not any(name.endswith("bias") for name in moved if not name.startswith("classifier"))

    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    run(finetune, "--model_name_or_path", uninterrupted, "--do_eval", "--output_dir", tmp_path / "evaluated")
    got, expected = metrics(tmp_path / "evaluated"), metrics(uninterrupted)
    assert got["eval_top1"] == expected["eval_top1"]
    assert got["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--lora_rank -1", "`lora_rank` must be at least 1, or 0"),
        ("--lora_alpha 4", "`lora_alpha` requires `lora_rank`, such as 8"),
        ("--lora_rank 2 --from_scratch", "--lora_rank adapts a pretrained model"),
        ("--lora_rank 2 --output_dir BASE", "checkpoints contain only the adapters and need the unchanged model in"),
        ("--lora_rank 2 --lora_target_modules query", "query is not a layer of TokenMixupViT"),
    ],
)
def test_build_trainer_with_wrong_lora_option_raises(finetune, base, options, message, tmp_path):
    options = options.replace("BASE", str(base)).split()
    with pytest.raises(ValueError, match=message):
        where = ["--model_name_or_path", base, "--ignore_mismatched_sizes", "--output_dir", tmp_path / "out"]
        prepare(finetune, *where, "--do_train", *options)
