"""scripts/visualize.py: models of both families, datasets, files, runs and errors."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.commands import SCRIPTS, import_command
from helpers.tiny_training import resnet, tokenmixup_vit
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_tokenmixup.data import load_digits_dataset
from hf_tokenmixup.models import CctConfig, CctForImageClassification

SCRIPT = SCRIPTS / "visualize.py"
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"image_size": (16, 24), "patch_size": 4, "num_labels": 10, "initializer_range": 0.3}
TOKENMIXUP = {"horizontal_layers": [1], "horizontal_rho": 0.0, "vertical_layers": [2], "vertical_kappa": 2}


@pytest.fixture(scope="module")
def script():
    return import_command("visualize")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a plain ViT, a CCT with settings of TokenMixup, and an unsupported model."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, model in {
        "vit": ViTForImageClassification(ViTConfig(**SIZES)),
        "cct": CctForImageClassification(CctConfig(**SIZES)),
        "resnet": resnet(),
    }.items():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == 10:
                nn.init.normal_(module.weight)
        if name == "cct":
            model.config.update(TOKENMIXUP)
            model.config.id2label = {number: f"digit {number}, or so" for number in range(10)}
        model.save_pretrained(folder / name)
        size = {"height": 16, "width": 24}
        mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
        ViTImageProcessor(size=size, image_mean=mean, image_std=std).save_pretrained(folder / name)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Nine images, some of them in a subfolder, and another file."""
    random = np.random.default_rng(0)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for number in range(9):
        folder = tmp_path / "photos" / ("more" if number > 5 else "")
        Image.fromarray(random.integers(256, size=(20, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "photos" / "notes.txt").write_text("none")
    return tmp_path / "photos"


@pytest.fixture
def run(script, tmp_path, monkeypatch, capsys):
    """Run a command and return the figure that it saved."""

    def run_command(*arguments, output="picture.png"):
        figures = []
        save = script.save_figure
        with monkeypatch.context() as patch:
            patch.setattr(script, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))
            script.main([*map(str, arguments), "--output", str(tmp_path / output)])
        assert (tmp_path / output).stat().st_size > 1000
        assert capsys.readouterr().out.strip() == str(tmp_path / output)
        return figures[0]

    return run_command


def headings(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def captions(figure):
    return [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]


def title(figure):
    return " ".join(figure.get_suptitle().split())


def test_visualize_saliency_of_dataset_shows_labels(run, models):
    figure = run("saliency", models / "cct", "--dataset_name", "digits")
    assert headings(figure)[1:] == [
        "Gradient\nof the loss",
        "Attention, 1-step\n(layer 1)",
        "Attention, full rollout\n(layers 1 to 2)",
    ]
    split = load_digits_dataset()["test"]
    chosen = np.sort(np.random.default_rng(42).permutation(len(split))[:5]).tolist()
    assert captions(figure) == [f"digit {split[index]['label']}" for index in chosen]
    assert "predictions" not in title(figure)
    # The image is what the model read, before normalization: resized, and not cropped.
    shown = np.asarray(figure.axes[0].images[0].get_array())
    expected = split[chosen[0]]["image"].convert("RGB").resize((24, 16), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(shown, np.asarray(expected) / 255, atol=0.01)


def test_visualize_files_shows_predicted_labels(run, models, photos):
    files = [photos / "3.png", photos / "0.png", photos / "more" / "7.png"]
    figure = run("saliency", models / "vit", "--images", *files)
    model = ViTForImageClassification.from_pretrained(models / "vit").eval()
    processor = ViTImageProcessor.from_pretrained(models / "vit")
    with torch.no_grad():
        logits = model(**processor([Image.open(file) for file in files], return_tensors="pt")).logits
    assert captions(figure) == [f"LABEL_{number}" for number in logits.argmax(dim=1)]
    assert title(figure).endswith("Classes are the model's predictions.")
    # A plain ViT of three layers has no layer 3, so the last one is used.
    assert "before layer 2" in title(figure)
    rows = np.array([axes for axes in figure.axes if axes.get_label() != "<colorbar>"]).reshape(3, 4)
    expected = Image.open(files[0]).resize((24, 16), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(np.asarray(rows[0, 0].images[0].get_array()), np.asarray(expected) / 255, atol=0.01)


def test_visualize_folder_samples_images(run, script, models, photos):
    assert len(captions(run("saliency", models / "vit", "--images", photos))) == 5
    assert len(captions(run("saliency", models / "vit", "--images", photos, "--max_samples", 7))) == 7
    found = [script.find_images([str(photos)], 4, 5, seed) for seed in (1, 1, 2, 3, 4)]
    assert found[0] == found[1] == sorted(found[0]) and found.count(found[0]) < 5
    assert len(script.find_images([str(photos)], 50, 5, 1)) == 9
    assert len(script.find_images([str(photos / f"{number}.png") for number in range(6)], None, 5, 1)) == 6


def test_visualize_horizontal_shows_mixed_images(run, models):
    figure = run("horizontal", models / "cct", "--dataset_name", "digits", output="a.pdf")
    assert "before layer 1: 6 of 6 images" in title(figure) and "rho = 0." in title(figure)
    assert len(figure.axes) == 6 * 7 + 1
    figure = run("horizontal", models / "vit", "--dataset_name", "digits", "--layer", 0, "--rho", 1e-4)
    assert "before layer 0" in title(figure) and "rho = 0.0001" in title(figure)
    # The dataset has class names and the model has none.
    assert set(captions(figure)) & set("0123456789") and not any("LABEL" in caption for caption in captions(figure))


def test_visualize_horizontal_with_tau_mixes_easy_images(run, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    model = tokenmixup_vit(num_labels=10, initializer_range=0.3)
    with torch.no_grad():
        scorenet = model.vit.layers[1].scorenet.classifier
        scorenet.weight.zero_()
        scorenet.bias.copy_(torch.tensor(5 * [9.0] + 5 * [0.0]))
    model.save_pretrained(checkpoint)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(checkpoint)
    options = ["--dataset_name", "digits", "--max_samples", 10]
    figure = run("horizontal", checkpoint, *options, "--tau", 2.0)
    mixed = [axes.get_xlabel() for axes in np.array(figure.axes[:-1]).reshape(-1, 7)[:, 0]]
    assert set(mixed) <= set("01234") and 1 < len(mixed) < 10 and f"{len(mixed)} of 10 images" in title(figure)
    figure = run("horizontal", checkpoint, *options, "--tau", "none")
    assert "10 of 10 images" in title(figure)
    with pytest.raises(ValueError, match="layer 0 has none .*Omit tau"):
        run("horizontal", checkpoint, *options, "--tau", 1.0, "--layer", 0)


def test_visualize_vertical_shows_tokens_of_earlier_layers(run, models, photos):
    figure = run("vertical", models / "cct", "--images", photos)
    assert headings(figure) == ["Image", "From layer 0", "From layer 1"]
    assert "tokens that layer 2 also attends to" in title(figure) and "the 2 most salient" in title(figure)
    figure = run("vertical", models / "vit", "--images", photos, "--layer", 1, "--kappa", 4)
    assert headings(figure) == ["Image", "From layer 0"] and "4 more keys" in title(figure)


def test_visualize_with_other_classes_needs_label_mapping(run, models, photos, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models / "cct", other)
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {number: f"animal {number}" for number in range(10)}
    (other / "config.json").write_text(json.dumps(config))
    for number, photo in enumerate(sorted(photos.glob("*.png"))):
        folder = tmp_path / "classes" / f"plant {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        photo.rename(folder / photo.name)
    options = ["--dataset_name", tmp_path / "classes", "--eval_split", "train", "--cache_dir", tmp_path / "cache"]
    with pytest.raises(ValueError, match="2 of 2 classes have different names.*--predicted_labels"):
        run("saliency", other, *options)
    figure = run("saliency", other, *options, "--predicted_labels")
    assert all(caption.startswith("animal") for caption in captions(figure)) and "predictions" in title(figure)
    figure = run("saliency", other, *options, "--label_mapping", "number")
    assert set(captions(figure)) == {"animal 0", "animal 1"} and "predictions" not in title(figure)


def log(folder, *records):
    folder.mkdir(parents=True)
    (folder / "training_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_visualize_curves_shows_each_run(run, tmp_path):
    one = log(tmp_path / "one", {"epoch": 1, "eval_top1": 0.5, "replaced_tokens": 3.0})
    two = log(tmp_path / "deep" / "two", {"epoch": 1, "eval_top1": 0.25}, {"epoch": 2, "eval_top1": None})
    figure = run("curves", one, two)
    assert [[line.get_label() for line in axes.lines] for axes in figure.axes] == [["one", "two"], ["one"]]
    same = log(tmp_path / "deep" / "one", {"epoch": 1, "eval_top1": 0.25})
    names = [line.get_label() for line in run("curves", one, same, two, output="a.pdf").axes[0].lines]
    assert names == [str(one), str(same), "two"]
    figure = run("curves", one / "training_log.jsonl", two)
    assert [line.get_label() for line in figure.axes[0].lines] == ["one", "two"]
    with pytest.raises(ValueError, match="named once"):
        run("curves", one, two, one)
    with pytest.raises(ValueError, match="nothing.* does not exist"):
        run("curves", one, tmp_path / "nothing")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("saliency {cct} --output a.png", "either --images or --dataset_name, got neither"),
        ("saliency {cct} --images a --dataset_name digits --output a.png", "got both"),
        ("saliency {cct} --images {empty} --output a.png", "no image found in "),
        ("saliency {cct} --images {empty}/a.png --output a.png", "there is no file or folder"),
        ("saliency {cct} --images {cct}/config.json --output a.png", "config.json cannot be decoded"),
        ("saliency {cct} --dataset_name digits --output a.jpg", "must end in .png or .pdf, got 'a.jpg'"),
        ("saliency {cct} --dataset_name digits --max_samples 0 --output a.png", "at least 1, got 0"),
        ("saliency {cct} --dataset_name digits --layer 3 --output a.png", "between 0 and 2, got 3"),
        ("vertical {cct} --dataset_name digits --layer 0 --output a.png", "layer 0 has no earlier layers"),
        ("vertical {cct} --dataset_name digits --kappa 97 --output a.png", "patch tokens, 96, got 97"),
        ("horizontal {cct} --dataset_name digits --rho 2 --output a.png", "use a much lower rho"),
        ("horizontal {cct} --dataset_name digits --rho -1 --output a.png", "rho must be at least 0"),
        ("horizontal {cct} --dataset_name digits --max_samples 1 --rho 0 --output a.png", "more images"),
        ("saliency {resnet} --dataset_name digits --output a.png", "types .*cct, .*vit.*, got 'resnet'"),
        ("saliency {cct} --dataset_name digits --kappa 3 --output a.png", "unrecognized arguments: --kappa"),
        ("curves {empty}", "required: --output"),
        ("draw {cct}", "invalid choice: 'draw'"),
    ],
)  # fmt: skip
def test_visualize_with_wrong_option_raises(script, models, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    folders = {"cct": models / "cct", "resnet": models / "resnet", "empty": tmp_path / "empty"}
    with pytest.raises(ValueError, match=message):
        script.main(arguments.format(**folders).split())
    assert not (tmp_path / "a.png").exists()


def test_visualize_error_is_one_line_with_status_1(models, tmp_path):
    command = [sys.executable, SCRIPT, "curves", tmp_path, "--output", tmp_path / "a.png"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert (
        result.stderr.startswith("visualize.py: ")
        and "does not exist" in result.stderr
        and result.stderr.count("\n") == 1
    )
