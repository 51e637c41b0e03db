"""The rules of the tests' Hub for cards."""

import json

import pytest
from fake_hub.cards import check_card, read_card


def card(**data):
    return f"---\n{json.dumps(data)}\n---\n# A model\n"


def model_index(**changed):
    parts = {"task": {"type": "image-classification"}, "dataset": {"type": "cifar10", "name": "CIFAR-10"}}
    parts |= {"metrics": [{"type": "accuracy", "value": 0.5}]} | changed
    return [{"name": "model", "results": [{key: part for key, part in parts.items() if part is not None}]}]


@pytest.mark.parametrize(
    "text, message",
    [
        ("---\na: [1\n---\n", "YAML metadata error"),
        ("---\n- a\n---\n", "the metadata must be a mapping"),
        (card(license=2), '"license" must be a string'),
        (card(license="Apache 2.0"), '"license" must be one of [apache-2.0, mit'),
        (card(license=["mit", "none"]), '"license[1]" must be one of'),
        ("---\nlanguage: no\n---\n", '"language" must be a string'),
        (card(tags=["a", 1]), '"tags[1]" must be a string'),
        (card(base_model=""), '"base_model" is not allowed to be empty'),
        (card(base_model="/home/me/vit"), '"base_model" with value "/home/me/vit" is not valid'),
        (card(base_model="./vit"), '"base_model" with value "./vit" is not valid'),
        (card(datasets=["/data/images"]), '"datasets[0]" with value "/data/images" is not valid'),
        (card(pipeline_tag=["a"]), '"pipeline_tag" must be a string'),
        (card(**{"model-index": {"name": "model"}}), '"model-index" must be an array'),
        (card(**{"model-index": ["model"]}), '"model-index[0]" must be of type object'),
        (card(**{"model-index": [{"name": "model"}]}), '"model-index[0].results" is required'),
        (card(**{"model-index": [{"results": []}]}), '"model-index[0].name" is required'),
        (card(**{"model-index": model_index(task=None)}), '"model-index[0].results[0].task" is required'),
        (card(**{"model-index": model_index(dataset={"type": "a"})}), 'results[0].dataset.name" is required'),
        (card(**{"model-index": model_index(metrics=None)}), 'results[0].metrics" is required'),
        (card(**{"model-index": model_index(metrics=[])}), 'results[0].metrics" must be an array of 1 or more'),
        (card(**{"model-index": model_index(metrics=[{"type": "a"}])}), 'metrics[0].value" is required'),
    ],
)
def test_wrong_metadata_is_an_error(text, message):
    for each in (text, text.replace("\n", "\r\n")):
        errors, warnings = check_card(each)
        assert [message in error for error in errors] == [True] and warnings == []


@pytest.mark.parametrize("text", ["", "# No metadata", "---\n---\n# A model", "Before\n---\na: [1\n---\n"])
def test_missing_metadata_is_a_warning(text):
    assert check_card(text) == ([], ["empty or missing yaml metadata in repo card"])
    assert read_card(text) == {}


def test_metadata_in_order():
    data = {"license": "apache-2.0", "language": ["en"], "tags": ["vision"], "datasets": "cifar10", "metrics": ["f1"]}
    data |= {"base_model": "google/vit-base", "library_name": "transformers", "pipeline_tag": "image-classification"}
    for index in (model_index(), [{"name": "model", "results": []}]):
        text = card(**data, **{"model-index": index})
        assert check_card(text) == ([], [])
        assert read_card(text) == data | {"model-index": index}
