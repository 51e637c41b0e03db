"""Label mapping between model and dataset."""

import logging

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import to_tensor

from hf_tokenmixup.data import ImageClassificationData, build_label_mapping, has_class_names, load_digits_dataset

ANIMALS = ["tench", "great white shark", "Sea_snake"]
INVENTED = ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_strict_same_classes_in_order(caplog):
    assert build_label_mapping(ANIMALS, ["Tench", "great_white_shark ", "sea  snake"]) == [0, 1, 2]
    assert build_label_mapping(["0", "1"], ["0", "1"]) == [0, 1]
    assert caplog.text == ""


def test_strict_other_order_raises():
    names = [f"n{number:03}" for number in range(1000)]
    with pytest.raises(ValueError) as error:
        build_label_mapping(names, names[:7] + names[:6:-1])
    for part in (
        "992 of 1000 classes",
        "7 ('n007' and 'n999'), 8 ('n008' and 'n998'), 9 (",
        "label_mapping=name",
        "label_mapping=number",
    ):
        assert part in str(error.value)
    assert "n010" not in str(error.value)


def test_strict_one_different_class_raises():
    with pytest.raises(ValueError, match=r"^1 of 3 classes have different names: 1 \('great .*' and 'shark'\)\."):
        build_label_mapping(ANIMALS, ["tench", "shark", "sea snake"])


def test_strict_other_number_of_classes_raises():
    with pytest.raises(ValueError, match="^The model has 3 classes and the dataset has 2; 1 of 2 classes"):
        build_label_mapping(ANIMALS, ["tench", "sea snake"])
    with pytest.raises(ValueError, match=r"^The model has 3 classes and the dataset has 2\. "):
        build_label_mapping(ANIMALS, ["tench", "great white shark"])
    with pytest.raises(ValueError, match=r"^The model has 3 classes and the dataset has 4\. "):
        build_label_mapping(INVENTED, ["ant", "bee", "cat", "dog"])


@pytest.mark.parametrize(
    "model, dataset, nameless",
    [
        (INVENTED, ANIMALS, "model"),
        (ANIMALS, ["0", "1", "2"], "dataset"),
        (INVENTED, ["0", "1", "2"], "model and the dataset"),
    ],
)
def test_strict_without_names_logs_warning(model, dataset, nameless, caplog):
    with caplog.at_level(logging.WARNING):
        assert build_label_mapping(model, dataset) == [0, 1, 2]
    assert f"no class names in the {nameless}. Classes are matched by index" in caplog.text


def test_has_class_names():
    assert not has_class_names(INVENTED) and not has_class_names(["0", "1"])
    assert has_class_names(["1", "0"]) and has_class_names(["0", "1", "ten"])


def test_strict_numbers_sorted_as_strings_raise():
    numbers = [str(number) for number in range(12)]
    for pair in ((numbers, sorted(numbers)), (sorted(numbers), numbers)):
        with pytest.raises(ValueError, match=r"10 of 12 classes have different names: 2 \('(2|10)' and '(10|2)'\)"):
            build_label_mapping(*pair)
    assert build_label_mapping(numbers, sorted(numbers), "name") == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


def test_name_other_order_and_subset():
    assert build_label_mapping(ANIMALS, ["sea snake", "TENCH"], "name") == [2, 0]
    assert build_label_mapping(ANIMALS, ANIMALS[::-1], "name") == [2, 1, 0]


@pytest.mark.parametrize(
    "model, dataset, message",
    [
        (
            ANIMALS,
            ["tench", "cat", "dog"],
            "2 of the 3 classes of the dataset are not in the model: 'cat', 'dog'. The",
        ),
        (INVENTED, ["ant"], "1 of the 1 classes of the dataset are not in the model: 'ant'"),
        (["crane", "tench", "crane"], ["tench", "crane"], "occur more than once in the model: 'crane'"),
        (ANIMALS, ["sea snake", "sea_snake"], "occur more than once in the dataset: 'sea snake', 'sea_snake'"),
    ],
)
def test_name_missing_or_ambiguous_class_raises(model, dataset, message):
    with pytest.raises(ValueError, match=message) as error:
        build_label_mapping(model, dataset, "name")
    assert "label_mapping=number" in str(error.value)


def test_name_unused_duplicate_is_ignored():
    assert build_label_mapping(["crane", "tench", "crane"], ["tench"], "name") == [1]


def test_number_ignores_names():
    assert build_label_mapping(ANIMALS, ["x", "y"], "number") == [0, 1]
    with pytest.raises(ValueError, match="has 3 classes and the dataset has 4. With .*, the dataset must not"):
        build_label_mapping(ANIMALS, list("abcd"), "number")


def test_unknown_mode_raises():
    with pytest.raises(ValueError, match="must be one of strict, name, number, got 'fuzzy'"):
        build_label_mapping(ANIMALS, ANIMALS, "fuzzy")


def test_label_map_applies_in_dataset():
    digits = load_digits_dataset()["test"].select(range(30))
    backwards = build_label_mapping([str(number) for number in range(9, -1, -1)], [str(n) for n in range(10)], "name")
    data = ImageClassificationData(digits, to_tensor, label_map=backwards)
    assert [data[index]["labels"] for index in range(30)] == [9 - label for label in digits["label"]]
    assert data.__getitems__([3, 1])[0]["labels"] == 9 - digits[3]["label"]
    image: Image.Image = digits[3]["image"]
    assert np.array_equal(np.rint(data[3]["pixel_values"][0].numpy() * 255), np.asarray(image))
