"""Example images in model cards."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

from hf_tokenmixup.cli import publish
from hf_tokenmixup.hub.card_metadata import read_card
from hf_tokenmixup.hub.example_image import add_example_image, open_example_image
from hf_tokenmixup.hub.upload import update_card_repo_id
from hf_tokenmixup.models import load_classifier

ORIENTATION, GPS = 0x0112, 0x8825


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = load_classifier(
        from_scratch=True,
        model_type="vit",
        config_overrides={
            **{"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "intermediate_size": 16, "num_labels": 4},
            "id2label": {0: "a_b", 1: "dog", 2: "cat", 3: "cow"},
        },
        plain=True,
    )
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    update_card_repo_id(tmp_path / "model", "alice/vit")
    return tmp_path / "model"


@pytest.fixture
def photo(tmp_path):
    """A JPEG of 800 x 600 pixels, lying on its side, with a place."""
    pixels = np.random.default_rng(0).integers(256, size=(6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((800, 600), Image.Resampling.NEAREST)
    exif = image.getexif()
    exif[ORIENTATION] = 6
    exif.get_ifd(GPS)[1] = "N"
    image.save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


def test_add_example_image_shows_the_predictions_of_the_model(folder, photo):
    image = open_example_image(photo)
    add_example_image(folder, image)
    model = ViTForImageClassification.from_pretrained(folder)
    pixels = ViTImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    probabilities = model(**pixels).logits.softmax(dim=1)[0]
    best = probabilities.argsort(descending=True)[:3].tolist()
    names = {0: r"a\_b", 1: "dog", 2: "cat", 3: "cow"}
    expected = ", ".join(f"{names[index]} {probabilities[index].item():.0%}" for index in best)
    card = read_card(folder / "README.md")
    text = card[card.index("# vit") : card.index("\n## ")]
    assert text.endswith(f"![Example image](example.jpg)\n\nPrediction for this image: {expected}.\n")


def test_add_example_image_stores_it_upright_smaller_and_without_metadata(folder, photo):
    add_example_image(folder, open_example_image(photo))
    with Image.open(folder / "example.jpg") as stored:
        assert stored.size == (384, 512) and len(stored.getexif()) == 0
        before = np.asarray(open_example_image(photo).resize((6, 8), Image.Resampling.BOX), dtype=int)
        after = np.asarray(stored.resize((6, 8), Image.Resampling.BOX), dtype=int)
    assert abs(before - after).mean() < 5


def test_add_example_image_again_replaces_the_first_one(folder, photo):
    before = read_card(folder / "README.md")
    add_example_image(folder, open_example_image(photo))
    first = read_card(folder / "README.md")
    add_example_image(folder, Image.new("RGB", (4, 3), "red"))
    second = read_card(folder / "README.md")
    assert second.count("example.jpg") == 1
    section = second[second.index("![Example") : second.index("\n## ") + 1]
    assert second.replace(section, "") == before and first.count("\n") == second.count("\n")
    with Image.open(folder / "example.jpg") as stored:
        assert stored.size == (132, 99)


def test_publish_uploads_the_example_image(hub, folder, photo, monkeypatch):
    arguments = [str(folder), "alice/vit", "--token", "hf_alice", "--example_image", str(photo)]
    publish.main(arguments)
    files = hub.files("alice/vit")
    assert files["example.jpg"] == (folder / "example.jpg").read_bytes()
    assert b"](example.jpg)" in files["README.md"]
    # Without the option, the image is retained.
    publish.main(arguments[:4])
    assert b"](example.jpg)" in hub.files("alice/vit")["README.md"]


@pytest.mark.parametrize("content", [None, b"no image"])
def test_publish_with_unreadable_example_image_raises_before_the_upload(hub, folder, tmp_path, content):
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="The example image .*photo.jpg cannot be read: .* Pass a JPEG or PNG file"):
        publish.main([str(folder), "alice/vit", "--token", "hf_alice", "--example_image", str(path)])
    assert not (folder / "example.jpg").exists() and {request.method for request in hub.requests} == {"GET"}
