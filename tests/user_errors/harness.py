"""Trigger user errors in this process: run the commands on small datasets, models and recipes."""

import io
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from helpers.commands import import_command
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

TINY_VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
COMMON = shlex.split(
    "--use_cpu --report_to none --disable_tqdm true --seed 3 --per_device_train_batch_size 16 --hflip 0"
)
DIGITS = shlex.split("--dataset_name digits --eval_split test --max_train_samples 40 --max_eval_samples 20")
TOKENMIXUP = shlex.split("--horizontal_layers 1 --horizontal_tau none --horizontal_rho 0 --vertical_layers 2")


class ErrorCase(NamedTuple):
    """One user error and the message that it must raise.

    Args:
        name: Short description. The test uses it as its id.
        trigger: Function of a `Harness` that makes the error.
        exception: Type of the exception that is raised.
        expected_fragments: Parts of its message: what is expected, what was found, and what to do.
    """

    name: str
    trigger: Callable[["Harness"], Any]
    exception: type[BaseException]
    expected_fragments: tuple[str, ...]


class Harness:
    """Methods that run the commands, and write the datasets and models for them.

    Args:
        folder: Empty folder of one test.
        trained: Output folder of a run of two steps, with a checkpoint of each step. All tests share it.
        monkeypatch: The fixture of the test.
    """

    def __init__(self, folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self.trained = trained
        self.monkeypatch = monkeypatch

    def prepare(self, *arguments: Any, output_dir: Path | None = None) -> Any:
        """Run finetune.py up to its first step."""
        flags = [
            *COMMON,
            "--cache_dir",
            self.folder / "cache",
            "--output_dir",
            output_dir or self.folder / "out",
        ]
        return import_command("finetune").build_trainer([*map(str, [*flags, *arguments])])

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Run finetune.py to its end."""
        trainer = self.prepare("--do_train", *arguments, **options)
        import_command("finetune").train_and_evaluate(trainer)
        return trainer

    def resume(self, *arguments: Any) -> Any:
        """Resume a copy of the shared run from its last checkpoint, with other arguments."""
        folder = self.folder / "resumed"
        shutil.copytree(self.trained, folder)
        flags = [*DIGITS, "--max_steps", 4, *arguments, "--resume_from_checkpoint", "last"]
        return self.train(*flags, output_dir=folder)

    def prepare_digits(self, *arguments: Any, **config_changes: Any) -> Any:
        """Start to train a small ViT on the digits."""
        return self.prepare(*DIGITS, "--do_train", *self.vit_flags(**config_changes), *arguments)

    def prepare_data(self, data: Path | str, *arguments: Any) -> Any:
        """Start to train a small ViT on a folder of data files or a named dataset."""
        return self.prepare("--dataset_name", data, "--do_train", *self.vit_flags(), *arguments)

    @staticmethod
    def vit_flags(**config_changes: Any) -> list[str]:
        """Return the flags that build a small ViT from scratch."""
        overrides = json.dumps(TINY_VIT | config_changes)
        return ["--from_scratch", "--model_type", "vit", "--config_overrides", overrides]

    def parse_recipe(self, recipe: str | bytes) -> Any:
        """Parse the options of a recipe with this content."""
        path = self.folder / "mine.yaml"
        path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
        finetune = import_command("finetune")
        return finetune.parse_options(["--use_cpu", "--recipe", str(path)])

    def run_command(self, name: str, *arguments: Any) -> Any:
        """Run the command of this name."""
        return import_command(name).main([*map(str, arguments)])

    def evaluate(self, model: Path, *arguments: Any) -> Any:
        """Run evaluate.py on eight of the digits."""
        flags = shlex.split("--dataset_name digits --eval_split test --max_eval_samples 8 --use_cpu")
        return self.run_command("evaluate", model, *flags, *arguments)

    def visualize(self, figure: str, *arguments: Any) -> Any:
        """Run visualize.py with the trained model on two of the digits."""
        flags = shlex.split("--dataset_name digits --eval_split test --max_samples 2 --output")
        return self.run_command("visualize", figure, self.trained, *flags, self.folder / "figure.png", *arguments)

    def write_parquet(self, images: list, labels: list | None, label_type: Any = None, split: str = "train") -> Path:
        """Write a parquet file of images (of Pillow, or bytes) and labels, and return its folder."""
        stored = [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in images]
        columns = {"image": stored} | ({} if labels is None else {"label": labels})
        features = {"image": ImageFeature()} | ({} if label_type is None else {"label": label_type})
        features = Features(features) if len(features) == len(columns) else None
        folder = self.folder / "data"
        folder.mkdir(exist_ok=True)
        dataset = Dataset.from_dict(columns, features=features)
        if features is None:
            dataset = dataset.cast_column("image", ImageFeature())
        dataset.to_parquet(folder / f"{split}.parquet")
        return folder

    def write_class_folders(self, name: str, *classes: str, count: int = 2) -> Path:
        """Write a folder with one subfolder of `count` images per class."""
        root = self.folder / name
        root.mkdir()
        for class_name in classes:
            folder = root / class_name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                solid_image().save(folder / f"{index}.png")
        return root

    def write_folder(self, file_name: str, content: str | bytes) -> Path:
        """Write a folder with one file, and return the folder."""
        folder = self.folder / "one_file"
        folder.mkdir()
        (folder / file_name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    def copy_trained_model(self, **config_changes: Any) -> Path:
        """Copy the trained model, and change its config.json. The value `...` removes a key."""
        folder = self.folder / "model"
        shutil.copytree(self.trained, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
        path = folder / "config.json"
        config = json.loads(path.read_text()) | config_changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
        return folder

    def write_untrained_vit(self, *class_names: str, first_index: int = 0) -> Path:
        """Write a folder with an untrained ViT whose `id2label` counts from `first_index`."""
        folder = self.folder / "model"
        ViTForImageClassification(ViTConfig(**TINY_VIT, num_labels=len(class_names))).save_pretrained(folder)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
        path = folder / "config.json"
        labels = {"id2label": dict(enumerate(class_names, first_index)), "label2id": {}}
        path.write_text(json.dumps(json.loads(path.read_text()) | labels))
        return folder


def solid_image(mode: str = "RGB", size: tuple[int, int] = (16, 16), color: Any = 0) -> Image.Image:
    """Create an image of one color, by default black."""
    return Image.new(mode, size, color)


def encode_image(image: Image.Image, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()
