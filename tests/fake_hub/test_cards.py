"""Tests of the validation of cards."""

import json

import pytest
from fake_hub.cards import read_card, validate_card


def card_text(**data):
    return f"---\n{json.dumps(data)}\n---\n# A model\n"


def model_index(**changes):
    """Return a model index with one result. The value None removes a key of the result."""
    result = {"task": {"type": "image-classification"}, "dataset": {"type": "cifar10", "name": "CIFAR-10"}}
    result |= {"metrics": [{"type": "accuracy", "value": 0.5}]} | changes
    return [{"name": "model", "results": [{key: value for key, value in result.items() if value is not None}]}]


@pytest.mark.parametrize(
    "text, message",
    [
        ("---\na: [1\n---\n", "YAML metadata error"),
        ("---\n- a\n---\n", "the metadata must be a mapping"),
        (card_text(license=2), '"license" must be a string'),
        (card_text(license="Apache 2.0"), '"license" must be one of [apache-2.0, mit'),
        (card_text(license=["mit", "none"]), '"license[1]" must be one of'),
        ("---\nlanguage: no\n---\n", '"language" must be a string'),
        (card_text(tags=["a", 1]), '"tags[1]" must be a string'),
        (card_text(base_model=""), '"base_model" is not allowed to be empty'),
        (card_text(base_model="/home/me/vit"), '"base_model" with value "/home/me/vit" is not valid'),
        (card_text(base_model="./vit"), '"base_model" with value "./vit" is not valid'),
        (card_text(datasets=["/data/images"]), '"datasets[0]" with value "/data/images" is not valid'),
        (card_text(pipeline_tag=["a"]), '"pipeline_tag" must be a string'),
        (card_text(**{"model-index": {"name": "model"}}), '"model-index" must be an array'),
        (card_text(**{"model-index": ["model"]}), '"model-index[0]" must be of type object'),
        (card_text(**{"model-index": [{"name": "model"}]}), '"model-index[0].results" is required'),
        (card_text(**{"model-index": [{"results": []}]}), '"model-index[0].name" is required'),
        (card_text(**{"model-index": model_index(task=None)}), '"model-index[0].results[0].task" is required'),
        (card_text(**{"model-index": model_index(dataset={"type": "a"})}), 'results[0].dataset.name" is required'),
        (card_text(**{"model-index": model_index(metrics=None)}), 'results[0].metrics" is required'),
        (card_text(**{"model-index": model_index(metrics=[])}), 'results[0].metrics" must be an array of 1 or more'),
        (card_text(**{"model-index": model_index(metrics=[{"type": "a"}])}), 'metrics[0].value" is required'),
    ],
)
def test_validate_card_invalid_metadata_is_error(text, message):
    for card in (text, text.replace("\n", "\r\n")):
        errors, warnings = validate_card(card)
        assert [message in error for error in errors] == [True] and warnings == []


@pytest.mark.parametrize("text", ["", "# No metadata", "---\n---\n# A model", "Before\n---\na: [1\n---\n"])
def test_validate_card_missing_metadata_is_warning(text):
    assert validate_card(text) == ([], ["empty or missing yaml metadata in repo card"])
    assert read_card(text) == {}


def test_validate_card_valid_metadata_passes():
    data = {"license": "apache-2.0", "language": ["en"], "tags": ["vision"], "datasets": "cifar10", "metrics": ["f1"]}
    data |= {"base_model": "google/vit-base", "library_name": "transformers", "pipeline_tag": "image-classification"}
    for index in (model_index(), [{"name": "model", "results": []}]):
        text = card_text(**data, **{"model-index": index})
        assert validate_card(text) == ([], [])
        assert read_card(text) == data | {"model-index": index}
