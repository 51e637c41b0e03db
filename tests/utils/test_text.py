"""Formatting of messages."""

import pytest

from hf_tokenmixup.utils.text import did_you_mean, format_list, replace_parameters_by_flags


@pytest.mark.parametrize(
    "items, expected", [([], ""), (["a", 1], "'a', 1"), ("abcdefg", "'a', 'b', 'c', 'd', 'e' and 2 more")]
)
def test_format_list_shows_first_items(items, expected):
    assert format_list(items) == expected


def test_format_list_formats_only_shown_items():
    assert format_list([1, 2, None], 2, "{:.1f}".format) == "1.0, 2.0 and 1 more"


@pytest.mark.parametrize(
    "name, expected", [("sed", ": did you mean --seed?"), ("seed", ": did you mean --seed?"), ("zzz", ".")]
)
def test_did_you_mean_suggests_similar_name(name, expected):
    assert did_you_mean(name, {"seed", "learning_rate"}, "--{}".format) == expected


def test_did_you_mean_without_similar_name_returns_otherwise():
    assert did_you_mean("zzz", ["seed"], otherwise=". Options: seed.") == ". Options: seed."
    assert did_you_mean("sed", ["seed"], repr, otherwise=". Options: seed.") == ": did you mean 'seed'?"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Choose one with `eval_split`.", "Choose one with `--eval_split`."),
        ("Set `bf16=True` or `fp16`.", "Set `--bf16 True` or `fp16`."),
        ("Set `label_names`, not eval_split.", "Set `label_names`, not eval_split."),
    ],
)
def test_replace_parameters_by_flags_replaces_known_options(text, expected):
    assert replace_parameters_by_flags(text, {"eval_split": "--eval_split", "bf16": "--bf16"}) == expected
