"""Metadata files of image folders."""

import pytest
from helpers.image_folders import list_examples, write_images
from torchvision.transforms.functional import pil_to_tensor

from hf_tokenmixup.data import ImageClassificationData


def write_metadata(root, text, name="metadata.csv"):
    write_images(root, ".", count=4)
    (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "name, text",
    [
        ("metadata.csv", "file_name,label\n0.png,cat\n1.png,dog\n3.png,NA\n"),
        ("metadata.csv", "\ufefffile_name,label,when\r\n./0.png,cat,\r\n1.png,dog,x\r\n3.png,NA,\r\n"),
        ("metadata.jsonl", '{"file_name": "0.png", "labels": "cat"}\n{"file_name": "1.png", "labels": "dog"}\n'
         '{"file_name": "3.png", "labels": "NA"}\n'),
    ],
)  # fmt: skip
def test_metadata_file_without_class_folders_gives_labels(tmp_path, load, caplog, name, text):
    data = load(train_dir=write_metadata(tmp_path / "train", text, name))
    assert data.label_names == ["NA", "cat", "dog"]
    assert list_examples(data) == [("0.png", "cat"), ("1.png", "dog"), ("3.png", "NA")]
    assert "images that the metadata file does not list (1: '2.png')" in caplog.text
    images = ImageClassificationData(data.train, pil_to_tensor, label_column=data.label_column)
    assert [images[i]["pixel_values"][0, 0, 0].item() for i in range(3)] == [0, 1, 3]


def test_metadata_file_lists_images_of_subfolder(tmp_path, load):
    root = write_images(tmp_path / "train", "images")
    (root / "metadata.csv").write_text("file_name,label\nimages/0.png,cat\nimages\\1.png,dog\n")
    assert list_examples(load(train_dir=root)) == [("0.png", "cat"), ("1.png", "dog")]


def test_metadata_file_next_to_class_folders_needs_label_column(tmp_path, load, caplog):
    root = write_images(tmp_path / "train", "cat", "dog")
    (root / "metadata.csv").write_text("file_name,author\ncat/0.png,x\ncat/1.png,y\n")
    assert load(train_dir=root).label_names == ["cat", "dog"]
    assert "files next to the class folders (1: 'metadata.csv')" in caplog.text
    assert list_examples(load(train_dir=root, label_column_name="author")) == [("0.png", "x"), ("1.png", "y")]


def test_metadata_file_for_training_with_class_folders_for_evaluation(tmp_path, load):
    train = write_metadata(tmp_path / "train", "file_name,label\n0.png,dog\n1.png,cat\n")
    data = load(train_dir=train, validation_dir=write_images(tmp_path / "validation", "dog"))
    assert data.label_names == ["cat", "dog"] and data.evaluation["label"][:] == [1, 1]
    other = write_images(tmp_path / "other", "bee")
    with pytest.raises(ValueError, match="'validation' has the label 'bee'"):
        load(train_dir=train, validation_dir=other)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "file_name,label\n0.png,a\n7.png,b\n8.png,b\n",
            "lists 2 images that do not exist: 7.png .row 1., 8.png .row 2.",
        ),
        ("name,label\n0.png,a\n", "must have a column 'file_name'.*'name', 'label'"),
        ("file_name,author\n0.png,a\n", "one label column.*'author'.*label_column_name"),
        ("file_name,label\n", "no rows"),
        ("file_name,label\n0.png,a\n1.png,\n", "no label at index 1"),
        ("", "metadata.csv of train_dir .* cannot be read"),
    ],
)
def test_metadata_file_invalid_content_raises(tmp_path, load, text, message):
    with pytest.raises(ValueError, match=message):
        load(train_dir=write_metadata(tmp_path / "train", text))


def test_metadata_file_with_other_name_raises(tmp_path, load):
    root = write_metadata(tmp_path / "train", "path,label\n0.png,a\n", "labels.csv")
    with pytest.raises(ValueError, match="4 images .*no class folders.*metadata.csv.*Found the table 'labels.csv'"):
        load(train_dir=root)
