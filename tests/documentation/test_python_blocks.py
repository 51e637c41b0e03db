"""Each Python block of the documentation runs, with small models and images in place of large ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.documents import Block, fenced_blocks
from helpers.image_folders import write_images
from helpers.tiny_training import Images, plain_vit, tokenmixup_cct, tokenmixup_vit
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTImageProcessor

from hf_tokenmixup import TokenMixupViTForImageClassification
from hf_tokenmixup.hub import upload_model_folder

BLOCKS = fenced_blocks("python", "py")
PRETRAINED = "google/vit-base-patch16-224"


def find_block(page: str, part: str) -> str:
    """Return the one block of a page that contains `part`."""
    (block,) = [block for block in BLOCKS if block.page == page and part in block.text]
    return block.text


def run_block(block: str, **names: object) -> dict[str, object]:
    """Run a block in one epoch and with these names, and return all of its names."""
    namespace = dict(names)
    exec(re.sub(r"num_train_epochs=\d+", "num_train_epochs=1", block), namespace)
    return namespace


def save_with_processor(model, folder: str) -> None:
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)


def train_on_tiny_images() -> dict[str, object]:
    """Names that the blocks of the training page use: model, datasets, loader and optimizer."""
    images, model = Images(16), tokenmixup_vit()
    return {
        "model": model,
        "train_dataset": images,
        "train_dataloader": [
            {"pixel_values": images.pixels[i : i + 4], "labels": images.labels[i : i + 4]} for i in (0, 4, 8)
        ],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }


def run_readme_loop(block: str, **fixtures):
    all_images, epochs = 'eval_split="test")', "range(20)"
    assert all_images in block and epochs in block
    block = block.replace(all_images, f"{all_images[:-1]}, max_train_samples=128)").replace(epochs, "range(1)")
    names = run_block(block)
    printed = fixtures["capsys"].readouterr().out
    assert "'mixed_fraction': " in printed and names["metrics"].compute()["mixed_fraction"] <= 1
    assert type(names["model"]) is ViTForImageClassification
    check_exported("outputs/loop", names["model"])


def run_loading_of_a_run(block: str, **fixtures):
    tokenmixup_vit().to_plain_model().save_pretrained("outputs/digits-quickstart")
    run_block(block)


def run_pipeline_of_a_folder(block: str, **fixtures):
    save_with_processor(plain_vit(), "outputs/mine")
    write_images(Path("images/validation"), "cat")
    run_block(block)
    assert "'score': " in fixtures["capsys"].readouterr().out


def run_first_training_in_python(block: str, **fixtures):
    write_images(Path("images/train"), "cat", "dog", count=4)
    write_images(Path("images/validation"), "cat", "dog")
    # Layer 3 needs a fourth layer.
    save_with_processor(plain_vit(num_hidden_layers=4), "pretrained")
    names = run_block(block.replace(PRETRAINED, "pretrained"))
    assert type(names["model"]) is TokenMixupViTForImageClassification
    assert names["model"].config.horizontal_layers == [3]
    assert names["trainer"].state.global_step == 1
    assert Path("outputs/python/model.safetensors").exists()


def run_pipelines_of_the_hub(block: str, **fixtures):
    hub = fixtures["hub"]
    for name, model in {"vit-digits": plain_vit(), "cct-cifar100": tokenmixup_cct().to_plain_model()}.items():
        save_with_processor(model, name)
        upload_model_folder(name, f"alice/{name}", token="hf_alice")
    # Code of a model is imported from a cache, which only a new process takes from the environment.
    subprocess.run(
        [sys.executable, "-c", block.replace("YOUR_NAME", "alice")],
        env=hub.environment("hf_alice", cache=fixtures["tmp_path"] / "cache"),
        check=True,
    )
    loaded = {request.path.split("/resolve/")[0] for request in hub.requests if "model.safetensors" in request.path}
    assert {"/alice/vit-digits", "/alice/cct-cifar100"} <= loaded


def check_exported(folder: str, model) -> None:
    plain, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(plain.classifier.weight, model.classifier.weight)


def run_stock_trainer(block: str, **fixtures):
    names = run_block(block, **train_on_tiny_images())
    assert "'mixed_fraction': " in fixtures["capsys"].readouterr().out
    assert names["trainer"].state.log_history[-2]["mixed_fraction"] == 1
    check_exported("outputs/stock/plain", names["model"])


def run_adding_in_place(block: str, **fixtures):
    model, steps = plain_vit(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch = fixtures["monkeypatch"]
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForImageClassification, "from_pretrained", lambda name, num_labels: model)
        model.register_forward_hook(lambda module, args, output: steps.append(output.mixing_metrics))
        run_block(block, **train_on_tiny_images() | {"torch": torch})
    assert len(steps) == 3 and all(metrics["vertical_tokens"] == 4 * 2 * 3 for metrics in steps)
    loaded, info = AutoModelForImageClassification.from_pretrained("outputs/added", output_loading_info=True)
    assert type(loaded) is type(model) is ViTForImageClassification
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights = loaded.state_dict()
    assert weights.keys() == before.keys()
    assert not any(torch.equal(weights[name], before[name]) for name in ("classifier.weight", "vit.layernorm.weight"))


def run_own_loop(block: str, **fixtures):
    names = run_block(block, **train_on_tiny_images())
    assert "'mixed_fraction': " in fixtures["capsys"].readouterr().out
    assert names["metrics"].compute()["mixed_samples"] == 4
    check_exported("outputs/loop", names["model"])


# Page, a part of the block that no other block of the page has, and the function that runs it.
RUNNERS = [
    ("README.md", "MixingMetrics()", run_readme_loop),
    ("README.md", "# with a new ScoreNet", run_loading_of_a_run),
    ("docs/index.md", "pipeline(", run_pipeline_of_a_folder),
    ("docs/index.md", "TokenMixupTrainer(", run_first_training_in_python),
    ("docs/sharing.md", "pipeline(", run_pipelines_of_the_hub),
    ("docs/training.md", "TokenMixupCallback(", run_stock_trainer),
    ("docs/training.md", "add_tokenmixup(", run_adding_in_place),
    ("docs/training.md", "MixingMetrics()", run_own_loop),
]


@pytest.mark.parametrize(("page", "part", "run"), RUNNERS, ids=[f"{page}: {part}" for page, part, _ in RUNNERS])
def test_python_block_runs(page, part, run, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(find_block(page, part), hub=hub, tmp_path=tmp_path, monkeypatch=monkeypatch, capsys=capsys)


def test_every_python_block_has_a_runner():
    def runners(block: Block) -> int:
        return sum(block.page == page and part in block.text for page, part, _ in RUNNERS)

    assert [(block.page, block.text[:80]) for block in BLOCKS if runners(block) != 1] == []
