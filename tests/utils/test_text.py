"""Formatting of messages."""

import pytest

from hf_tokenmixup.utils.text import format_list, replace_parameters_by_flags


@pytest.mark.parametrize(
    "items, expected", [([], ""), (["a", 1], "'a', 1"), ("abcdefg", "'a', 'b', 'c', 'd', 'e' and 2 more")]
)
def test_format_list_shows_first_items(items, expected):
    assert format_list(items) == expected


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
