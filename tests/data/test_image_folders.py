"""Folders of images: the first-level folders are the classes, and all that is ignored is named."""

import errno
import os
import shutil
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from hf_tokenmixup.data import ImageClassificationData, image_folders, load_image_dataset, load_streaming_image_dataset


@pytest.fixture
def load(tmp_path):
    def load(**options):
        options = {"cache_dir": str(tmp_path / "cache"), "do_eval": "validation_dir" in options} | options
        return load_image_dataset(**{name: str(v) if isinstance(v, os.PathLike) else v for name, v in options.items()})

    return load


def write(root, *folders, count=2, first=0):
    """Images of one color each in these folders; returns `root`."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(first, first + count):
            Image.new("RGB", (4, 4), (index, 0, 0)).save(root / folder / f"{index}.png")
    return root


def pairs(data, split="train"):
    """Path, from the split's folder on, and class of each image."""
    dataset = getattr(data, split)
    paths = [value["path"] for value in dataset.with_format("arrow")[:]["image"].to_pylist()]
    common = os.path.commonpath(paths)
    return [
        (os.path.relpath(p, common), data.label_names[n])
        for p, n in zip(paths, dataset[data.label_column], strict=True)
    ]


def test_images_in_deeper_folders_belong_to_the_first_level_folder(tmp_path, load, caplog):
    root = write(tmp_path / "train", "cat/indoor", "cat/outdoor/day", "cat", "dog/indoor", "house")
    data = load(train_dir=root)
    assert data.label_names == ["cat", "dog", "house"] and len(data.train) == 10
    assert all(path.startswith(label + "/") for path, label in pairs(data))
    assert (
        "6 images are in 3 folders inside class folders ('cat/indoor', 'cat/outdoor/day', 'dog/indoor')" in caplog.text
    )


def test_loose_hidden_and_other_files_are_ignored_and_counted_in_one_warning(tmp_path, load, caplog):
    root = write(
        tmp_path / "train", "cat", "dog", ".ipynb_checkpoints", "dog/.ipynb_checkpoints", "__MACOSX", "dog/@eaDir"
    )
    write(root, ".", count=7)
    for name in ("cat/.DS_Store", "cat/._0.png", "dog/Thumbs.db", "dog/notes.txt", "classes.txt", "dog/raw.heic"):
        (root / name).write_bytes(b"\0")
    (root / "annotations").mkdir()
    (root / "annotations" / "0.xml").write_text("<a/>")
    (root / "dog" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    data = load(train_dir=root)
    assert data.label_names == ["cat", "dog"] and len(data.train) == 4
    (record,) = caplog.records
    for part in (
        "hidden and system folders (4: '.ipynb_checkpoints/', '__MACOSX/', 'dog/.ipynb_checkpoints/', 'dog/@eaDir/')",
        "hidden files (1: 'cat/._0.png')",
        "files that are no images by their ending (3: 'annotations/0.xml', 'dog/notes.txt', 'dog/raw.heic')",
        "links without a target (1: 'dog/lost.png')",
        "folders without an image (1: 'annotations/')",
        "images next to the class folders (7: '0.png', '1.png', '2.png', '3.png', '4.png', ...)",
        "files next to the class folders (1: 'classes.txt')",
    ):
        assert part in record.getMessage()
    assert "Thumbs" not in caplog.text and ".DS_Store" not in caplog.text


def test_a_tidy_folder_is_read_without_a_warning(tmp_path, load, caplog):
    root = write(tmp_path / "train", "__background__", "[special] 100%", "cat, b", "übung", "test", "new\nline")
    for name, kind in (("A.JPG", "JPEG"), ("b.Jpeg", "JPEG"), ("c.webp", "WEBP"), ("d.jfif", "JPEG"), ("e.bmp", "BMP"),
                       ("f.tif", "TIFF"), ("g.TIFF", "TIFF"), ("h.gif", "GIF"), ("i.ppm", "PPM"),
                       ("a b #?.png", "PNG")):  # fmt: skip
        Image.new("RGB", (4, 4), (9, 9, 9)).save(root / "test" / name, kind)
    data = load(train_dir=root)
    assert data.label_names == sorted(["__background__", "[special] 100%", "cat, b", "übung", "test", "new\nline"])
    assert len(data.train) == 22 and not caplog.records
    images = ImageClassificationData(data.train, pil_to_tensor)
    assert {images[i]["pixel_values"].shape for i in range(22)} == {(3, 4, 4)}


def test_linked_class_folders_and_files_are_followed(tmp_path, load, caplog):
    pool = write(tmp_path / "pool", "extra", "extra/more", count=3)
    root = write(tmp_path / "train", "good", count=3)
    (root / "ugly").symlink_to(pool / "extra", target_is_directory=True)
    (root / "good" / "link.png").symlink_to(pool / "extra" / "0.png")
    data = load(train_dir=root)
    assert data.label_names == ["good", "ugly"] and np.bincount(data.train["label"][:]).tolist() == [4, 6]
    # The folder itself may be a link.
    (tmp_path / "linked").symlink_to(root, target_is_directory=True)
    assert pairs(load(train_dir=tmp_path / "linked")) == pairs(data)


def test_links_in_circles_and_to_other_classes_are_ignored_and_named(tmp_path, load, caplog):
    root = write(tmp_path / "data" / "train", "cat", "dog")
    write(tmp_path / "data", "val/cat")
    for name, target in (("cat/self", root / "cat"), ("cat/up", root), ("cat/dogs", root / "dog"), ("all", ".."),
                         ("cat/a", root / "cat" / "b"), ("cat/b", root / "cat" / "a")):  # fmt: skip
        (root / name).symlink_to(target, target_is_directory=True)
    data = load(train_dir=root)
    assert data.label_names == ["cat", "dog"] and len(data.train) == 4
    assert "links to a folder around this one (1: 'all')" in caplog.text
    assert "links to a folder that is read elsewhere (3: 'cat/dogs', 'cat/self', 'cat/up')" in caplog.text
    assert "links without a target (2: 'cat/a', 'cat/b')" in caplog.text


def test_one_folder_under_two_class_names_is_an_error(tmp_path, load):
    root = write(tmp_path / "train", "cat", "dog")
    (root / "hound").symlink_to(root / "dog", target_is_directory=True)
    with pytest.raises(ValueError, match="Class folders 'dog' and 'hound' of train_dir .* are the same folder"):
        load(train_dir=root)


def test_class_names_of_two_cases_are_two_classes_and_logged(tmp_path, load, caplog):
    root = write(tmp_path / "train", "A", "a", "big_b", "big b")
    if len(list(root.iterdir())) < 4:
        pytest.skip("This file system ignores case.")
    assert load(train_dir=root).label_names == ["A", "a", "big b", "big_b"]
    assert "are different classes: 'A' and 'a'; 'big b' and 'big_b'" in caplog.text


def test_accents_of_macos_are_the_same_class(tmp_path, load):
    train = write(tmp_path / "train", unicodedata.normalize("NFD", "café"), "thé")
    validation = write(tmp_path / "validation", "café", unicodedata.normalize("NFD", "thé"))
    data = load(train_dir=train, validation_dir=validation)
    assert data.label_names == ["café", "thé"] and len(data.evaluation) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="Other systems have Unicode names.")
def test_names_that_are_no_utf_8_are_named(tmp_path, load, caplog):
    root = write(tmp_path / "train", "cat", "dog")
    try:
        shutil.copy(root / "cat/0.png", os.fsencode(root / "cat") + b"/\xe9.png")
    except OSError as error:
        assert error.errno == errno.EILSEQ
        pytest.skip("This file system has Unicode names.")
    assert len(load(train_dir=root).train) == 4
    assert r"files with a name that is not UTF-8 (1: 'cat/\udce9.png')" in caplog.text
    os.rename(root / "dog", os.fsencode(root) + b"/\xe9")
    with pytest.raises(ValueError, match=r"folder name '\\udce9' of train_dir .* is not valid UTF-8"):
        load(train_dir=root)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="This user may read everything.")
def test_a_folder_that_may_not_be_read_is_named(tmp_path, load):
    root = write(tmp_path / "train", "cat", "dog")
    (root / "dog").chmod(0)
    with pytest.raises(ValueError, match="dog.* cannot be read: Permission denied"):
        load(train_dir=root)
    (root / "dog").chmod(0o700)


def test_train_and_validation_folders_at_different_depths(tmp_path, load, monkeypatch):
    write(tmp_path / "data" / "train", "cat", "dog")
    write(tmp_path / "mnt" / "x" / "y" / "val", "cat/deeper", "dog")
    monkeypatch.chdir(tmp_path)
    data = load(train_dir="data/train", validation_dir=tmp_path / "mnt" / "x" / "y" / "val")
    assert data.label_names == ["cat", "dog"] and (len(data.train), len(data.evaluation)) == (4, 4)
    # A relative path is opened from elsewhere too.
    monkeypatch.chdir("/")
    assert ImageClassificationData(data.train, pil_to_tensor)[1]["pixel_values"][0, 0, 0] == 1


def test_a_validation_folder_with_a_part_of_the_classes_is_numbered_as_training(tmp_path, load):
    train, validation = write(tmp_path / "train", "cat", "dog", "eel"), write(tmp_path / "validation", "eel", "dog")
    (validation / "cat").mkdir()
    data = load(train_dir=train, validation_dir=validation)
    assert data.label_names == ["cat", "dog", "eel"] and sorted(data.evaluation["label"][:]) == [1, 1, 2, 2]
    alone = load(validation_dir=write(tmp_path / "one", "cat"), do_train=False)
    assert alone.label_names == ["cat"] and len(alone.evaluation) == 2


def test_a_validation_folder_that_is_not_used_is_not_read(tmp_path, load):
    train = write(tmp_path / "train", "cat", "dog")
    data = load(train_dir=train, validation_dir=write(tmp_path / "validation", "bee"), do_eval=False)
    assert data.label_names == ["cat", "dog"]


@pytest.mark.parametrize(
    "folders, advice",
    [
        (["train/cat", "train/dog", "val/cat", "val/dog"], "train_dir='{}/train' and validation_dir='{}/val'"),
        (["Training/cat", "Test/cat", "extra"], "train_dir='{}/Training' and validation_dir='{}/Test'"),
        (["train", "test1"], "train_dir='{}/train' and validation_dir='{}/test1'"),
        (["train2017/a", "val2017/a", "test2017/a"], "train_dir='{}/train2017' and validation_dir='{}/val2017'"),
        (["train/cat", "train/dog"], "train_dir='{}/train'"),
        (["test_images/cat", "test_images/dog"], "validation_dir='{}/test_images'"),
    ],
)
def test_a_folder_one_level_too_high_names_the_right_one(tmp_path, load, folders, advice):
    root = write(tmp_path / "data", *folders)
    for option in ("train_dir", "validation_dir"):
        with pytest.raises(ValueError, match=f"{option} .* one level too high") as error:
            load(**{option: root}, do_train=option == "train_dir", do_eval=option != "train_dir")
        assert f"Pass {advice.format(root, root)}." in str(error.value)


@pytest.mark.parametrize("classes", [["train", "car", "bus"], ["test", "zebra"], ["train", "test", "control"]])
def test_class_folders_may_have_the_names_of_splits(tmp_path, load, classes):
    assert load(train_dir=write(tmp_path / "data", *classes)).label_names == sorted(classes)


def test_a_single_folder_with_class_folders_in_it_is_named(tmp_path, load):
    root = write(tmp_path / "data", "images/cat", "images/dog")
    with pytest.raises(
        ValueError, match=r"'images'.*If its subfolders 'cat', 'dog' are the classes, pass train_dir='.*"
    ):
        load(train_dir=root)


def test_the_same_folder_for_both_is_logged(tmp_path, load, caplog):
    root = write(tmp_path / "data", "cat", "dog")
    data = load(train_dir=root, validation_dir=root)
    assert (len(data.train), len(data.evaluation)) == (4, 4) and "are the same folder" in caplog.text


def test_order_and_fingerprint_depend_on_the_content_alone(tmp_path, load):
    first = load(train_dir=write(tmp_path / "one" / "data", "b", "a/z", "a"), do_eval=True)
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    second = load(train_dir=tmp_path / "two" / "data", cache_dir=str(tmp_path / "other cache"), do_eval=True)
    assert first.eval_fingerprint == second.eval_fingerprint and pairs(first) == pairs(second)
    assert all(
        p["path"].startswith(str(tmp_path / "two")) for p in second.train.with_format("arrow")[:]["image"].to_pylist()
    )
    assert first.train._fingerprint == load(train_dir=tmp_path / "one" / "data", do_eval=True).train._fingerprint
    (tmp_path / "two/data/b/0.png").write_bytes(b"other content")
    assert load(train_dir=tmp_path / "two/data", do_eval=True).eval_fingerprint != first.eval_fingerprint
    (tmp_path / "one/data/b/0.png").rename(tmp_path / "one/data/a/9.png")
    third = load(train_dir=tmp_path / "one/data", do_eval=True)
    assert third.eval_fingerprint != first.eval_fingerprint and ("a/9.png", "a") in pairs(
        load(train_dir=tmp_path / "one/data")
    )


def write_metadata(root, text, name="metadata.csv"):
    write(root, ".", count=4)
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
def test_a_metadata_file_has_the_labels_where_there_are_no_class_folders(tmp_path, load, caplog, name, text):
    data = load(train_dir=write_metadata(tmp_path / "train", text, name))
    assert data.label_names == ["NA", "cat", "dog"]
    assert pairs(data) == [("0.png", "cat"), ("1.png", "dog"), ("3.png", "NA")]
    assert f"images that {name} does not list (1: '2.png')" in caplog.text
    images = ImageClassificationData(data.train, pil_to_tensor, label_column=data.label_column)
    assert [images[i]["pixel_values"][0, 0, 0].item() for i in range(3)] == [0, 1, 3]


def test_a_metadata_file_names_images_in_one_subfolder(tmp_path, load):
    root = write(tmp_path / "train", "images")
    (root / "metadata.csv").write_text("file_name,label\nimages/0.png,cat\nimages\\1.png,dog\n")
    assert pairs(load(train_dir=root)) == [("0.png", "cat"), ("1.png", "dog")]


def test_a_metadata_file_next_to_class_folders_is_ignored_unless_its_column_is_asked_for(tmp_path, load, caplog):
    root = write(tmp_path / "train", "cat", "dog")
    (root / "metadata.csv").write_text("file_name,author\ncat/0.png,x\ncat/1.png,y\n")
    assert load(train_dir=root).label_names == ["cat", "dog"]
    assert "files next to the class folders (1: 'metadata.csv')" in caplog.text
    assert pairs(load(train_dir=root, label_column_name="author")) == [("0.png", "x"), ("1.png", "y")]


def test_metadata_for_training_and_class_folders_for_evaluation_go_together(tmp_path, load):
    train = write_metadata(tmp_path / "train", "file_name,label\n0.png,dog\n1.png,cat\n")
    data = load(train_dir=train, validation_dir=write(tmp_path / "validation", "dog"))
    assert data.label_names == ["cat", "dog"] and data.evaluation["label"][:] == [1, 1]
    other = write(tmp_path / "other", "bee")
    with pytest.raises(ValueError, match="'validation' has the label 'bee'"):
        load(train_dir=train, validation_dir=other)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "file_name,label\n0.png,a\n7.png,b\n8.png,b\n",
            "lists 2 images that are not there: 7.png .row 1., 8.png .row 2.",
        ),
        ("name,label\n0.png,a\n", "must have a column 'file_name'.*'name', 'label'"),
        ("file_name,author\n0.png,a\n", "one label column.*'author'.*--label_column_name"),
        ("file_name,label\n", "no row"),
        ("file_name,label\n0.png,a\n1.png,\n", "no label at index 1"),
        ("", "metadata.csv of train_dir .* cannot be read"),
    ],
)
def test_mistakes_in_a_metadata_file_are_named(tmp_path, load, text, message):
    with pytest.raises(ValueError, match=message):
        load(train_dir=write_metadata(tmp_path / "train", text))


def test_a_table_of_another_name_is_named(tmp_path, load):
    root = write_metadata(tmp_path / "train", "path,label\n0.png,a\n", "labels.csv")
    with pytest.raises(ValueError, match="4 images .*no class folders.*metadata.csv.*Found the table 'labels.csv'"):
        load(train_dir=root)


def test_a_local_folder_of_images_as_dataset_name_has_its_splits(tmp_path, load, caplog):
    root = write(tmp_path / "data", "train/cat/a", "train/dog/a", "val/cat", "val/dog", "test")
    (root / "README.md").write_text("photos")
    data = load(dataset_name=root, do_eval=True)
    assert data.label_names == ["cat", "dog"] and (len(data.train), len(data.evaluation)) == (4, 4)
    assert data.eval_split == "validation" and "Split 'test' is not used: dataset_name" in caplog.text
    flat = load(dataset_name=write(tmp_path / "flat", "cat/a", "dog/a"))
    assert flat.label_names == ["cat", "dog"] and len(flat.train) == 4
    with pytest.raises(ValueError, match="image folders are read file by file"):
        load_streaming_image_dataset(str(root), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("place", ["", "tables/"])
@pytest.mark.parametrize("prefix", ["", "./", "../data/", "{root}/"])
def test_paths_in_a_table_are_relative_to_it(tmp_path, load, monkeypatch, place, prefix):
    root = tmp_path / "data"
    write(root / place, "images")
    prefix = prefix.replace("../data/", "../tables/" if place else "../data/").format(root=root / place)
    rows = "".join(f"{prefix}images/{i}.png,{'cat' if i else 'dog'}\n" for i in range(2))
    (root / place / "train.csv").write_text("path,label\n" + rows)
    data = load(dataset_name=root, image_column_name="path")
    images = ImageClassificationData(data.train, pil_to_tensor, image_column="path")
    assert [images[i]["pixel_values"][0, 0, 0].item() for i in range(2)] == [0, 1]
    assert data.label_names == ["cat", "dog"]


def test_the_list_of_files_is_written_once(tmp_path, load, monkeypatch):
    root = write(tmp_path / "train", "cat", "dog")
    load(train_dir=root)
    (written,) = (tmp_path / "cache" / "image_folders").iterdir()
    before = written.stat().st_mtime_ns
    monkeypatch.setattr(image_folders, "ROWS_AT_ONCE", 1)
    assert len(load(train_dir=root).train) == 4 and written.stat().st_mtime_ns == before
    written.unlink()
    assert pairs(load(train_dir=root))[0] == ("cat/0.png", "cat")
    assert [path.name for path in (tmp_path / "cache" / "image_folders").iterdir()] == [written.name]
