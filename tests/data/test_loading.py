"""Loading: sources, splits, columns and labels."""

import logging

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from hf_tokenmixup.data import load_image_dataset

NAMES = ["ant", "bee", "cat"]


def picture(value=0):
    return PILImage.new("RGB", (4, 4), (value % 256, 0, 0))


def split_of(labels, label_feature=None, image="image", label="label", **more):
    label_feature = label_feature or ClassLabel(names=NAMES)
    features = {image: Image(), label: label_feature} | {name: feature for name, (feature, _) in more.items()}
    columns = {image: [picture(i) for i in range(len(labels))], label: labels}
    columns |= {name: values for name, (_, values) in more.items()}
    return Dataset.from_dict(columns, features=Features(features))


@pytest.fixture
def load(tmp_path):
    """Write splits as parquet files and load them as the user does."""

    def write_and_load(splits, **arguments):
        folder = tmp_path / "source"
        folder.mkdir()
        for name, dataset in splits.items():
            dataset.to_parquet(folder / f"{name}-00000-of-00001.parquet")
        return load_image_dataset(str(folder), cache_dir=str(tmp_path / "cache"), **arguments)

    return write_and_load


def test_load_digits(caplog):
    with caplog.at_level(logging.WARNING):
        data = load_image_dataset("digits")
    assert (len(data.train), len(data.evaluation), data.eval_split) == (1437, 360, "test")
    assert data.label_names == [str(i) for i in range(10)]
    assert "Evaluating on 'test'" in caplog.text


def test_load_cifar100_columns(load):
    coarse = (ClassLabel(names=["x", "y"]), [0, 1, 0])
    split = split_of([0, 1, 2], image="img", label="fine_label", coarse_label=coarse)
    data = load({"train": split, "test": split})
    assert (data.image_column, data.label_column, data.label_names) == ("img", "fine_label", NAMES)


def test_load_several_candidate_columns_logs_choice(load, caplog):
    more = {"coarse_label": (ClassLabel(names=["x", "y"]), [0, 1, 0]), "mask": (Image(), [picture()] * 3)}
    split = split_of([0, 1, 2], image="img", label="fine_label", **more)
    load({"train": split, "test": split})
    logged = [record.getMessage() for record in caplog.records if "are read from" in record.getMessage()]
    assert logged == [
        "Images of split 'train' are read from column 'img'. Other candidates are 'mask'. Choose one with "
        "`image_column_name`.",
        "Labels of split 'train' are read from column 'fine_label'. Other candidates are 'coarse_label'. Choose one "
        "with `label_column_name`.",
    ]


def test_load_label_column_name_takes_precedence(load):
    coarse = (ClassLabel(names=["x", "y"]), [0, 1, 0])
    split = split_of([0, 1, 2], image="img", label="fine_label", coarse_label=coarse)
    assert load({"train": split, "test": split}, label_column_name="coarse_label").label_names == ["x", "y"]


def test_load_single_columns_with_other_names(load):
    split = split_of([0, 1, 2], image="scan", label="species", note=(Value("string"), ["a", "b", "c"]))
    data = load({"train": split, "validation": split})
    assert (data.image_column, data.label_column) == ("scan", "species")


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ({"image_column_name": "picture"}, ["'picture'", "'image' (Image)", "image_column_name"]),
        ({"label_column_name": "klass"}, ["'klass'", "'label' (ClassLabel)", "label_column_name"]),
        ({"image_column_name": "label"}, ["'label'", "has no images"]),
        ({"label_column_name": "image"}, ["'image'", "must have one ClassLabel"]),
        ({"train_split": "trian"}, ["'trian'", "['test', 'train']", "train_split"]),
        ({"eval_split": "dev"}, ["'dev'", "['test', 'train']", "eval_split"]),
        ({"max_train_samples": 0}, ["max_train_samples", "at least 1", "got 0"]),
        ({"max_eval_samples": -3}, ["max_eval_samples", "got -3"]),
        ({"validation_fraction": 1.0}, ["validation_fraction", "got 1.0"]),
        ({"train_dir": "somewhere"}, ["dataset_name", "train_dir"]),
        ({"do_train": False, "do_eval": False}, ["do_train", "do_eval"]),
    ],
)
def test_load_invalid_arguments_raise(load, arguments, parts):
    split = split_of([0, 1, 2])
    with pytest.raises(ValueError) as error:
        load({"train": split, "test": split}, **arguments)
    for part in parts:
        assert part in str(error.value)


def test_load_without_source_raises(tmp_path):
    with pytest.raises(ValueError, match="dataset_name"):
        load_image_dataset()
    with pytest.raises(ValueError, match="train_dir must be a folder"):
        load_image_dataset(train_dir=str(tmp_path / "nowhere"))


def test_load_ambiguous_columns_raise(load):
    split = split_of([0, 1, 2], image="left", label="a", right=(Image(), [picture()] * 3))
    with pytest.raises(ValueError, match=r"found 2. The columns are 'left' \(Image\), 'a' \(ClassLabel\), 'right'"):
        load({"train": split, "test": split})


def test_load_validation_precedes_test(load, caplog):
    with caplog.at_level(logging.WARNING):
        data = load({"train": split_of([0, 1]), "test": split_of([0] * 3), "validation": split_of([1] * 4)})
    assert data.eval_split == "validation" and len(data.evaluation) == 4
    assert caplog.text == ""


def test_load_fraction_of_train_is_stratified_and_seeded(load, caplog):
    labels = [0] * 60 + [1] * 30 + [2] * 10
    rows = (Value("int64"), list(range(100)))
    with caplog.at_level(logging.WARNING):
        data = load({"train": split_of(labels, row=rows)}, validation_fraction=0.2)
    assert np.bincount(data.evaluation["label"][:]).tolist() == [12, 6, 2]
    train, held_out = set(data.train["row"][:]), set(data.evaluation["row"][:])
    assert not train & held_out and train | held_out == set(range(100))
    assert "80 are for training and 20 for evaluation (a fraction of 0.2, drawn with seed 42)" in caplog.text
    assert data.eval_split.startswith("train (held out: 0.2")


def test_load_fraction_of_train_is_same_without_training(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    split_of([0, 1] * 20, row=(Value("int64"), list(range(40)))).to_parquet(folder / "train.parquet")
    cache = str(tmp_path / "cache")
    both = load_image_dataset(str(folder), cache_dir=cache)
    alone = load_image_dataset(str(folder), cache_dir=cache, do_train=False)
    other = load_image_dataset(str(folder), cache_dir=cache, seed=1)
    train_only = load_image_dataset(str(folder), cache_dir=cache, do_eval=False)
    assert alone.train is None and alone.evaluation["row"][:] == both.evaluation["row"][:]
    assert other.evaluation["row"][:] != both.evaluation["row"][:]
    assert len(train_only.train) == 40 and train_only.evaluation is None and train_only.eval_split is None


def test_load_fraction_of_single_image_class_is_random(load):
    data = load({"train": split_of([0] * 18 + [1, 2])}, validation_fraction=0.25)
    assert (len(data.train), len(data.evaluation)) == (15, 5)


def test_load_evaluation_without_train_split(load):
    data = load({"validation": split_of([0, 1, 2])}, do_train=False)
    assert data.train is None and data.train_split is None and len(data.evaluation) == 3


def test_load_training_without_train_split_raises(load):
    with pytest.raises(ValueError, match=r"There is no split 'train'. The splits are \['validation'\]"):
        load({"validation": split_of([0, 1, 2])})


def test_load_subsets_are_seeded(load):
    rows = (Value("int64"), list(range(90)))
    sorted_by_class = split_of([0] * 30 + [1] * 30 + [2] * 30, row=rows)
    data = load({"train": sorted_by_class, "test": sorted_by_class}, max_train_samples=30, max_eval_samples=1000)
    assert len(data.train) == 30 and len(data.evaluation) == 90
    assert np.bincount(data.train["label"][:], minlength=3).min() >= 5
    assert data.train["row"][:] == sorted(np.random.default_rng(42).permutation(90)[:30].tolist())


def test_load_classes_keeps_their_images_in_the_order_of_the_dataset(load):
    rows = (Value("int64"), list(range(6)))
    train, test = split_of([2, 0, 1, 2, 1, 0], row=rows), split_of([1, 2, 0])
    data = load({"train": train, "test": test}, classes=["cat", "ant"])
    assert data.label_names == ["ant", "cat"] and data.train.features["label"].names == ["ant", "cat"]
    assert data.train["row"][:] == [0, 1, 3, 5] and data.train["label"][:] == [1, 0, 1, 0]
    # The images stay with their labels.
    assert [image.getpixel((0, 0))[0] for image in data.evaluation["image"][:]] == [1, 2]
    assert data.evaluation["label"][:] == [1, 0]


def test_load_classes_of_digits_keeps_all_images_of_each_class():
    data = load_image_dataset("digits", classes=["7", "3"], max_train_samples=20)
    assert data.label_names == ["3", "7"] and set(data.evaluation["label"][:]) == {0, 1} and len(data.train) == 20
    complete = load_image_dataset("digits")
    counts = np.bincount(complete.evaluation["label"][:])
    assert np.bincount(data.evaluation["label"][:]).tolist() == [counts[3], counts[7]]


@pytest.mark.parametrize(
    "classes, message",
    [
        (
            ["ant", "bea"],
            "`classes` has 'bea', which the dataset does not have: did you mean 'bee'.*Its 3 classes are",
        ),
        (["ant", "ant"], "`classes` must be different names, got 'ant' more than once"),
        ([], "`classes` must name at least one class"),
        (["bee", "cat"], "Split 'test' has no image of the classes 'bee', 'cat'"),
        (["ant"], "at least two classes.*Choose more `classes`"),
    ],
)
def test_load_invalid_classes_raise(load, classes, message):
    with pytest.raises(ValueError, match=message):
        load({"train": split_of([0, 1, 2]), "test": split_of([0, 0])}, classes=classes)


def test_load_integer_labels_have_index_names(load):
    data = load({"train": split_of([0, 2, 1], Value("int32")), "test": split_of([3], Value("int32"))})
    assert data.label_names == ["0", "1", "2", "3"]
    assert data.evaluation["label"][:] == [3] and data.train.features["label"].names == data.label_names


def test_load_string_labels_have_training_order(load):
    train, test = split_of(["cat", "ant", "bee"], Value("string")), split_of(["cat", "bee"], Value("string"))
    data = load({"train": train, "test": test}, do_train=False)
    assert data.label_names == NAMES and data.evaluation["label"][:] == [2, 1]
    # The images stay with their labels.
    assert [image.getpixel((0, 0))[0] for image in data.evaluation["image"][:]] == [0, 1]


def test_load_unknown_string_labels_raise(load):
    train, test = split_of(["cat", "ant"], Value("string")), split_of(["ant", "dog"], Value("string"))
    with pytest.raises(ValueError, match="Split 'test' has the label 'dog' at index 1"):
        load({"train": train, "test": test})


def test_load_other_classes_in_eval_split_raise():
    from hf_tokenmixup.data.columns import encode_labels

    other = split_of([0, 1, 2], ClassLabel(names=["bee", "ant", "cat"]))
    with pytest.raises(ValueError, match="'train' and 'test' must share the label names"):
        encode_labels({"train": split_of([0]), "test": other}, "label")
    # Told which names count, the labels are numbered by them.
    splits, names = encode_labels({"test": other}, "label", NAMES)
    assert names == NAMES and splits["test"]["label"][:] == [1, 0, 2]


@pytest.mark.parametrize(
    "labels, feature, message",
    [
        ([0, 1, None, 2], None, r"Split 'train' has no label at index 2"),
        ([0, 1, 2, -1], None, r"Split 'train' has the label -1 at index 3"),
        ([0, -7, 2, -1], Value("int64"), r"Split 'train' has the label -7 at index 1"),
        ([0.5, 1.0], Value("float32"), r"must have one ClassLabel, integer or string"),
        (["ant", None], Value("string"), r"Split 'train' has no label at index 1"),
    ],
)
def test_load_invalid_labels_raise_with_index(load, labels, feature, message):
    with pytest.raises(ValueError, match=message):
        load({"train": split_of(labels, feature)})


def test_load_unused_split_is_not_validated(load):
    data = load({"train": split_of([0, 1, 2]), "test": split_of([-1, -1])}, do_eval=False)
    assert len(data.train) == 3


def test_image_folders(tmp_path):
    for split in ("training [1]", "held out"):
        for number, name in enumerate(["test", "zebra"]):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                picture(number * 100 + i).save(folder / f"{i}.png")
    cache = str(tmp_path / "cache")
    data = load_image_dataset(
        train_dir=str(tmp_path / "training [1]"), validation_dir=str(tmp_path / "held out"), cache_dir=cache
    )
    assert data.label_names == ["test", "zebra"] and data.eval_split == "validation"
    assert (len(data.train), len(data.evaluation)) == (6, 6)
    for example in data.train:
        assert example["image"].getpixel((0, 0))[0] // 100 == example["label"]
    held_out = load_image_dataset(train_dir=str(tmp_path / "held out"), cache_dir=cache, validation_fraction=0.34)
    assert (len(held_out.train), len(held_out.evaluation)) == (4, 2)


def test_load_two_label_types_raise():
    from hf_tokenmixup.data.columns import encode_labels

    splits = DatasetDict({"train": split_of([0]), "test": split_of(["ant"], Value("string"))})
    with pytest.raises(ValueError, match="one type in all splits"):
        encode_labels(splits, "label")


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint64"])
def test_labels_of_a_narrow_or_unsigned_type_are_numbered(load, kind):
    data = load({"train": split_of([0, 1, 2, 0], Value(kind)), "test": split_of([2, 1], Value(kind))})
    assert (data.label_names, data.evaluation["label"][:]) == (["0", "1", "2"], [2, 1])


def test_numbers_of_classes_with_gaps_are_logged(load, caplog):
    load({"train": split_of([3, 7, 3], Value("int64")), "test": split_of([7], Value("int64"))})
    assert "2 different labels up to 7" in caplog.text and "6 of the 8 classes have no images" in caplog.text
