"""Image folders: class folders, splits, ignored files and the cache."""

import errno
import os
import shutil
import sys
import unicodedata

import numpy as np
import pytest
from helpers.image_folders import list_examples, write_images
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from hf_tokenmixup.data import ImageClassificationData, image_folders, load_streaming_image_dataset


def test_image_folders_nested_images_get_first_level_class(tmp_path, load, caplog):
    root = write_images(tmp_path / "train", "cat/indoor", "cat/outdoor/day", "cat", "dog/indoor", "house")
    data = load(train_dir=root)
    assert data.label_names == ["cat", "dog", "house"] and len(data.train) == 10
    assert all(path.startswith(label + "/") for path, label in list_examples(data))
    assert (
        "6 images are in 3 folders inside class folders ('cat/indoor', 'cat/outdoor/day', 'dog/indoor')" in caplog.text
    )


def test_image_folders_ignored_files_are_listed_in_one_warning(tmp_path, load, caplog):
    root = write_images(
        tmp_path / "train", "cat", "dog", ".ipynb_checkpoints", "dog/.ipynb_checkpoints", "__MACOSX", "dog/@eaDir"
    )
    write_images(root, ".", count=7)
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
        "files without the extension of an image (3: 'annotations/0.xml', 'dog/notes.txt', 'dog/raw.heic')",
        "broken links (1: 'dog/lost.png')",
        "folders without images (1: 'annotations/')",
        "images next to the class folders (7: '0.png', '1.png', '2.png', '3.png', '4.png' and 2 more)",
        "files next to the class folders (1: 'classes.txt')",
    ):
        assert part in record.getMessage()
    assert "Thumbs" not in caplog.text and ".DS_Store" not in caplog.text


def test_image_folders_valid_folder_logs_no_warning(tmp_path, load, caplog):
    root = write_images(tmp_path / "train", "__background__", "[special] 100%", "cat, b", "übung", "test", "new\nline")
    for name, kind in (("A.JPG", "JPEG"), ("b.Jpeg", "JPEG"), ("c.webp", "WEBP"), ("d.jfif", "JPEG"), ("e.bmp", "BMP"),
                       ("f.tif", "TIFF"), ("g.TIFF", "TIFF"), ("h.gif", "GIF"), ("i.ppm", "PPM"),
                       ("a b #?.png", "PNG")):  # fmt: skip
        Image.new("RGB", (4, 4), (9, 9, 9)).save(root / "test" / name, kind)
    data = load(train_dir=root)
    assert data.label_names == sorted(["__background__", "[special] 100%", "cat, b", "übung", "test", "new\nline"])
    assert len(data.train) == 22 and not caplog.records
    images = ImageClassificationData(data.train, pil_to_tensor)
    assert {images[i]["pixel_values"].shape for i in range(22)} == {(3, 4, 4)}


def test_image_folders_follow_links(tmp_path, load, caplog):
    pool = write_images(tmp_path / "pool", "extra", "extra/more", count=3)
    root = write_images(tmp_path / "train", "good", count=3)
    (root / "ugly").symlink_to(pool / "extra", target_is_directory=True)
    (root / "good" / "link.png").symlink_to(pool / "extra" / "0.png")
    data = load(train_dir=root)
    assert data.label_names == ["good", "ugly"] and np.bincount(data.train["label"][:]).tolist() == [4, 6]
    # The folder of the split may be a link, too.
    (tmp_path / "linked").symlink_to(root, target_is_directory=True)
    assert list_examples(load(train_dir=tmp_path / "linked")) == list_examples(data)


def test_image_folders_links_to_known_folders_are_ignored(tmp_path, load, caplog):
    root = write_images(tmp_path / "data" / "train", "cat", "dog")
    write_images(tmp_path / "data", "val/cat")
    for name, target in (("cat/self", root / "cat"), ("cat/up", root), ("cat/dogs", root / "dog"), ("all", ".."),
                         ("cat/a", root / "cat" / "b"), ("cat/b", root / "cat" / "a")):  # fmt: skip
        (root / name).symlink_to(target, target_is_directory=True)
    data = load(train_dir=root)
    assert data.label_names == ["cat", "dog"] and len(data.train) == 4
    assert "links to a parent folder (1: 'all')" in caplog.text
    assert "links to a folder that is read elsewhere (3: 'cat/dogs', 'cat/self', 'cat/up')" in caplog.text
    assert "broken links (2: 'cat/a', 'cat/b')" in caplog.text


def test_image_folders_same_folder_for_two_classes_raises(tmp_path, load):
    root = write_images(tmp_path / "train", "cat", "dog")
    (root / "hound").symlink_to(root / "dog", target_is_directory=True)
    with pytest.raises(ValueError, match="Class folders 'dog' and 'hound' of train_dir .* are the same folder"):
        load(train_dir=root)


def test_image_folders_class_names_with_different_case_log_warning(tmp_path, load, caplog):
    root = write_images(tmp_path / "train", "A", "a", "big_b", "big b")
    if len(list(root.iterdir())) < 4:
        pytest.skip("This file system ignores case.")
    assert load(train_dir=root).label_names == ["A", "a", "big b", "big_b"]
    assert "are different classes: 'A' and 'a'; 'big b' and 'big_b'" in caplog.text


def test_image_folders_unicode_forms_are_one_class(tmp_path, load):
    train = write_images(tmp_path / "train", unicodedata.normalize("NFD", "café"), "thé")
    validation = write_images(tmp_path / "validation", "café", unicodedata.normalize("NFD", "thé"))
    data = load(train_dir=train, validation_dir=validation)
    assert data.label_names == ["café", "thé"] and len(data.evaluation) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="Other systems have Unicode names.")
def test_image_folders_names_without_utf8_are_ignored_or_raise(tmp_path, load, caplog):
    root = write_images(tmp_path / "train", "cat", "dog")
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
def test_image_folders_unreadable_folder_raises(tmp_path, load):
    root = write_images(tmp_path / "train", "cat", "dog")
    (root / "dog").chmod(0)
    with pytest.raises(ValueError, match="dog.* cannot be read: Permission denied"):
        load(train_dir=root)
    (root / "dog").chmod(0o700)


def test_image_folders_train_and_validation_at_different_depths(tmp_path, load, monkeypatch):
    write_images(tmp_path / "data" / "train", "cat", "dog")
    write_images(tmp_path / "mnt" / "x" / "y" / "val", "cat/deeper", "dog")
    monkeypatch.chdir(tmp_path)
    data = load(train_dir="data/train", validation_dir=tmp_path / "mnt" / "x" / "y" / "val")
    assert data.label_names == ["cat", "dog"] and (len(data.train), len(data.evaluation)) == (4, 4)
    # The working directory may change afterwards.
    monkeypatch.chdir("/")
    assert ImageClassificationData(data.train, pil_to_tensor)[1]["pixel_values"][0, 0, 0] == 1


def test_image_folders_validation_subset_uses_training_class_indices(tmp_path, load):
    train, validation = (
        write_images(tmp_path / "train", "cat", "dog", "eel"),
        write_images(tmp_path / "validation", "eel", "dog"),
    )
    (validation / "cat").mkdir()
    data = load(train_dir=train, validation_dir=validation)
    assert data.label_names == ["cat", "dog", "eel"] and sorted(data.evaluation["label"][:]) == [1, 1, 2, 2]
    alone = load(validation_dir=write_images(tmp_path / "one", "cat"), do_train=False)
    assert alone.label_names == ["cat"] and len(alone.evaluation) == 2


def test_image_folders_unused_validation_dir_is_not_read(tmp_path, load):
    train = write_images(tmp_path / "train", "cat", "dog")
    data = load(train_dir=train, validation_dir=write_images(tmp_path / "validation", "bee"), do_eval=False)
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
def test_image_folders_one_level_too_high_raises_with_correct_folders(tmp_path, load, folders, advice):
    root = write_images(tmp_path / "data", *folders)
    for option in ("train_dir", "validation_dir"):
        with pytest.raises(ValueError, match=f"{option} .* one level too high") as error:
            load(**{option: root}, do_train=option == "train_dir", do_eval=option != "train_dir")
        assert f"Pass {advice.format(root, root)}." in str(error.value)


@pytest.mark.parametrize("classes", [["train", "car", "bus"], ["test", "zebra"], ["train", "test", "control"]])
def test_image_folders_split_names_as_classes_are_valid(tmp_path, load, classes):
    assert load(train_dir=write_images(tmp_path / "data", *classes)).label_names == sorted(classes)


def test_image_folders_single_class_suggests_inner_folder(tmp_path, load):
    root = write_images(tmp_path / "data", "images/cat", "images/dog")
    with pytest.raises(
        ValueError, match=r"'images'.*If its subfolders 'cat', 'dog' are the classes, pass train_dir='.*"
    ):
        load(train_dir=root)


def test_image_folders_same_folder_for_both_splits_logs_warning(tmp_path, load, caplog):
    root = write_images(tmp_path / "data", "cat", "dog")
    data = load(train_dir=root, validation_dir=root)
    assert (len(data.train), len(data.evaluation)) == (4, 4) and "are the same folder" in caplog.text


def test_image_folders_order_and_fingerprint_depend_on_content_only(tmp_path, load):
    first = load(train_dir=write_images(tmp_path / "one" / "data", "b", "a/z", "a"), do_eval=True)
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    second = load(train_dir=tmp_path / "two" / "data", cache_dir=str(tmp_path / "other cache"), do_eval=True)
    assert first.eval_fingerprint == second.eval_fingerprint and list_examples(first) == list_examples(second)
    assert all(
        p["path"].startswith(str(tmp_path / "two")) for p in second.train.with_format("arrow")[:]["image"].to_pylist()
    )
    assert first.train._fingerprint == load(train_dir=tmp_path / "one" / "data", do_eval=True).train._fingerprint
    (tmp_path / "two/data/b/0.png").write_bytes(b"other content")
    assert load(train_dir=tmp_path / "two/data", do_eval=True).eval_fingerprint != first.eval_fingerprint
    (tmp_path / "one/data/b/0.png").rename(tmp_path / "one/data/a/9.png")
    third = load(train_dir=tmp_path / "one/data", do_eval=True)
    assert third.eval_fingerprint != first.eval_fingerprint and ("a/9.png", "a") in list_examples(
        load(train_dir=tmp_path / "one/data")
    )


def test_image_folders_as_dataset_name_have_splits(tmp_path, load, caplog):
    root = write_images(tmp_path / "data", "train/cat/a", "train/dog/a", "val/cat", "val/dog", "test")
    (root / "README.md").write_text("photos")
    data = load(dataset_name=root, do_eval=True)
    assert data.label_names == ["cat", "dog"] and (len(data.train), len(data.evaluation)) == (4, 4)
    assert data.eval_split == "validation" and "Split 'test' is not used: dataset_name" in caplog.text
    flat = load(dataset_name=write_images(tmp_path / "flat", "cat/a", "dog/a"))
    assert flat.label_names == ["cat", "dog"] and len(flat.train) == 4
    with pytest.raises(ValueError, match="image folders are read file by file"):
        load_streaming_image_dataset(str(root), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("place", ["", "tables/"])
@pytest.mark.parametrize("prefix", ["", "./", "../data/", "{root}/"])
def test_table_image_paths_are_relative_to_table(tmp_path, load, monkeypatch, place, prefix):
    root = tmp_path / "data"
    write_images(root / place, "images")
    prefix = prefix.replace("../data/", "../tables/" if place else "../data/").format(root=root / place)
    rows = "".join(f"{prefix}images/{i}.png,{'cat' if i else 'dog'}\n" for i in range(2))
    (root / place / "train.csv").write_text("path,label\n" + rows)
    data = load(dataset_name=root, image_column_name="path")
    images = ImageClassificationData(data.train, pil_to_tensor, image_column="path")
    assert [images[i]["pixel_values"][0, 0, 0].item() for i in range(2)] == [0, 1]
    assert data.label_names == ["cat", "dog"]


def test_image_folders_write_cache_file_once(tmp_path, load, monkeypatch):
    root = write_images(tmp_path / "train", "cat", "dog")
    load(train_dir=root)
    (written,) = (tmp_path / "cache" / "image_folders").iterdir()
    before = written.stat().st_mtime_ns
    monkeypatch.setattr(image_folders, "ROWS_PER_TABLE", 1)
    assert len(load(train_dir=root).train) == 4 and written.stat().st_mtime_ns == before
    written.unlink()
    assert list_examples(load(train_dir=root))[0] == ("cat/0.png", "cat")
    assert [path.name for path in (tmp_path / "cache" / "image_folders").iterdir()] == [written.name]
