"""Loading of streams: columns, classes, lengths and errors."""

import pickle

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from helpers.streams import CLASSES, numbered_images, write_shards
from torchvision.transforms.functional import pil_to_tensor

from hf_tokenmixup.data import ImageClassificationData, load_image_dataset, load_streaming_image_dataset


@pytest.fixture
def load(tmp_path):
    def load(**options):
        return load_streaming_image_dataset(str(tmp_path / "source"), cache_dir=str(tmp_path / "cache"), **options)

    load.folder = tmp_path / "source"
    return load


def test_stream_splits_columns_classes_and_lengths(load, caplog):
    write_shards(load.folder, [3, 4])
    write_shards(load.folder, [2], "test")
    data = load()
    assert isinstance(data.train, IterableDataset) and data.train.num_shards == 2
    assert (data.train_split, data.eval_split, data.num_train_examples, data.num_eval_examples) == (
        "train",
        "test",
        7,
        2,
    )
    assert (data.image_column, data.label_column, data.label_names) == ("image", "label", CLASSES)
    assert [row["label"] for row in data.evaluation] == [0, 1] and "Evaluating on 'test'" in caplog.text
    alone = load(do_train=False, eval_split="train")
    assert (alone.train, alone.num_train_examples, alone.num_eval_examples, alone.eval_split) == (
        None,
        None,
        7,
        "train",
    )
    assert load(do_eval=False).evaluation is None


def test_stream_columns_match_stored_dataset(load):
    load.folder.mkdir()
    features = Features({"coarse_label": ClassLabel(names=["x", "y"]), "fine_label": ClassLabel(names=CLASSES)})
    labels = Dataset.from_dict({"coarse_label": [0, 1], "fine_label": [2, 3]}, features=features)
    pictures = numbered_images([0, 1]).remove_columns("label").rename_column("image", "img")
    rows = {"img": pictures["img"], "coarse_label": labels["coarse_label"], "fine_label": labels["fine_label"]}
    split = Dataset.from_dict(rows, features=Features(pictures.features | features))
    split.to_parquet(load.folder / "train.parquet")
    data = load(do_eval=False)
    assert (data.image_column, data.label_column, data.label_names) == ("img", "fine_label", CLASSES)
    assert load(do_eval=False, label_column_name="coarse_label").label_names == ["x", "y"]
    uninterrupted = load_image_dataset(str(load.folder), cache_dir=str(load.folder.parent / "cache"), do_eval=False)
    assert (uninterrupted.image_column, uninterrupted.label_column, uninterrupted.label_names) == (
        "img",
        "fine_label",
        CLASSES,
    )


@pytest.mark.parametrize("feature, labels", [(Value("string"), ["ant", "bee"]), (Value("int64"), [0, 1])])
def test_stream_unknown_classes_raise(load, feature, labels):
    load.folder.mkdir()
    rows = numbered_images([0, 1]).remove_columns("label").add_column("label", labels, feature=feature)
    rows.to_parquet(load.folder / "train.parquet")
    with pytest.raises(ValueError, match=f"'label' of split 'train' has {feature.dtype}.*remove `streaming`"):
        load(do_eval=False)


def test_stream_unknown_columns_raise(load):
    load.folder.mkdir()
    (load.folder / "train.csv").write_text("image,label\n0.png,0\n1.png,1\n")
    with pytest.raises(ValueError, match="columns of split 'train' are unknown before it is read.*parquet"):
        load(do_eval=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eval_split": "dev"}, r"There is no split 'dev'. The splits are \['train'\]. Choose one with `eval_split`"),
        ({"train_split": "trian", "do_eval": False}, "There is no split 'trian'.*train_split"),
        ({}, "a stream cannot be split. Name the evaluation split"),
        ({"max_train_samples": 5}, "`max_train_samples` selects images of the complete split.*max_steps"),
        ({"max_eval_samples": 5}, "`max_eval_samples` selects images of the complete split.*eval_split"),
        ({"classes": ["cat"]}, "`classes` selects images of the complete split.*dataset of their own"),
        ({"image_column_name": "picture", "do_eval": False}, "no column 'picture'. The columns are 'image' .Image."),
        ({"label_column_name": "image", "do_eval": False}, "must have one ClassLabel"),
        ({"do_train": False, "do_eval": False}, "do_train and do_eval are both False"),
        ({"train_dir": "folder"}, "Remove `streaming`: image folders are read file by file"),
    ],
)
def test_stream_invalid_arguments_raise(load, options, message):
    write_shards(load.folder, [3])
    with pytest.raises(ValueError, match=message):
        load(**options)


def test_stream_missing_dataset_or_digits_raises(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Remove `streaming`.*digits is in memory"):
        load_streaming_image_dataset("digits")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="Dataset '.*nowhere' not found"):
        load_streaming_image_dataset(str(tmp_path / "nowhere"), cache_dir=str(tmp_path / "cache"))


def test_pickled_stream_has_no_paths(tmp_path):
    """What a spawned worker receives grows by labels and row numbers, not by file names."""
    sizes = {}
    for count in (100, 1100):
        for label in "ab":
            (tmp_path / str(count) / label).mkdir(parents=True)
        numbered_images([0])[0]["image"].save(tmp_path / "one.png")
        for number in range(count):
            name = tmp_path / str(count) / "ab"[number % 2] / f"{number:0100}.png"
            name.hardlink_to(tmp_path / "one.png")
        data = load_image_dataset(train_dir=str(tmp_path / str(count)), cache_dir=str(tmp_path / "cache"))
        images = ImageClassificationData(data.train, pil_to_tensor)
        sizes[len(images)] = len(pickle.dumps(images))
    # 8 bytes for a label, 8 (datasets 4: 16) for the row that was not held out; a name would be more than 100.
    (few, small), (many, large) = sizes.items()
    assert large - small < 30 * (many - few)
