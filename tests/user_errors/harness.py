"""What the tables of mistakes are provoked with: the scripts in this process, small data, models and recipes."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from helpers.commands import open_script
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY |= {"intermediate_size": 32}
COMMON = "--use_cpu --report_to none --disable_tqdm true --seed 3 --per_device_train_batch_size 16 --hflip 0".split()
DIGITS = "--dataset_name digits --eval_split test --max_train_samples 40 --max_eval_samples 20".split()
MIXING = "--horizontal_layers 1 --horizontal_tau none --horizontal_rho 0 --vertical_layers 2".split()


class Mistake(NamedTuple):
    """How to provoke it, what is raised, and what the message must hold: the expected, what came, the way out."""

    name: str
    provoke: Callable[["Bench"], Any]
    error: type[BaseException]
    told: tuple[str, ...]


class Bench:
    """A folder of one test, and a model trained beforehand.

    Args:
        folder: empty, of this test alone.
        trained: output folder of a training, with the checkpoints of its two steps.
    """

    def __init__(self, folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self.trained = trained
        self.monkeypatch = monkeypatch

    def prepare(self, *arguments: Any, output_dir: Path | None = None) -> Any:
        """What finetune.py does up to the first step."""
        words = [*COMMON, "--cache_dir", self.folder / "cache", "--output_dir", output_dir or self.folder / "out"]
        return open_script("finetune").build_trainer([*map(str, [*words, *arguments])])

    def train(self, *arguments: Any, **options: Any) -> Any:
        """All that finetune.py does."""
        trainer = self.prepare("--do_train", *arguments, **options)
        open_script("finetune").train_and_evaluate(trainer)
        return trainer

    def digits(self, *arguments: Any, **changes: Any) -> Any:
        """The start of a training of a small ViT on the digits; `changes` are those of its configuration."""
        return self.prepare(*DIGITS, "--do_train", *self.network(**changes), *arguments)

    @staticmethod
    def network(**changes: Any) -> list[str]:
        return ["--from_scratch", "--model_type", "vit", "--config_overrides", json.dumps(TINY | changes)]

    def parse(self, recipe: str | bytes) -> Any:
        """The options of a recipe."""
        path = self.folder / "mine.yaml"
        path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
        return open_script("finetune").parse_options(["--use_cpu", "--recipe", str(path)])

    def parquet(self, images: list, labels: list | None, label_type: Any = None, split: str = "train") -> Path:
        """A folder with a parquet file of images (of Pillow, or bytes) and labels."""
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

    def on(self, data: Path, *arguments: Any) -> Any:
        """The start of a training on a folder of parquet files."""
        return self.prepare("--dataset_name", data, "--do_train", *self.network(), *arguments)

    def class_folders(self, name: str, *classes: str, count: int = 2) -> Path:
        """A folder of images with these sub-folders."""
        for kind in classes:
            folder = self.folder / name / kind
            folder.mkdir(parents=True)
            for index in range(count):
                picture().save(folder / f"{index}.png")
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name

    def model_like(self, **changes: Any) -> Path:
        """The trained model in a folder of its own, with changes of its config.json (`...` removes a key)."""
        folder = self.folder / "model"
        shutil.copytree(self.trained, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
        return folder

    def model_of(self, *classes: str, first: int = 0) -> Path:
        """A folder with an untrained ViT of these classes, numbered from `first`."""
        folder = self.folder / "model"
        ViTForImageClassification(ViTConfig(**TINY, num_labels=len(classes))).save_pretrained(folder)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
        path = folder / "config.json"
        names = {"id2label": dict(enumerate(classes, first)), "label2id": {}}
        path.write_text(json.dumps(json.loads(path.read_text()) | names))
        return folder

    def holding(self, name: str, content: str | bytes) -> Path:
        """A folder with one file."""
        folder = self.folder / "holding"
        folder.mkdir()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    def resume(self, *arguments: Any) -> Any:
        """Go on with the trained model's last checkpoint, with other arguments."""
        folder = self.folder / "resumed"
        shutil.copytree(self.trained, folder)
        options = [*DIGITS, "--max_steps", 4, *arguments, "--resume_from_checkpoint", "last"]
        return self.train(*options, output_dir=folder)

    def main(self, name: str, *arguments: Any) -> Any:
        """Another script."""
        return open_script(name).main([*map(str, arguments)])

    def evaluate(self, model: Path, *arguments: Any) -> Any:
        options = "--dataset_name digits --eval_split test --max_eval_samples 8 --use_cpu".split()
        return self.main("evaluate", model, *options, *arguments)

    def visualize(self, command: str, *arguments: Any) -> Any:
        options = [*"--dataset_name digits --eval_split test --max_samples 2 --output".split(), self.folder / "it.png"]
        return self.main("visualize", command, self.trained, *options, *arguments)

    def publish(self, *arguments: Any) -> Any:
        return self.main("publish", *arguments)


def picture(mode: str = "RGB", size: tuple[int, int] = (16, 16), color: Any = 0) -> Image.Image:
    return Image.new(mode, size, color)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
