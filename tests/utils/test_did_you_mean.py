"""Suggestions for unknown names."""

import pytest

from hf_tokenmixup.utils.text import did_you_mean


@pytest.mark.parametrize(
    "name, expected", [("sed", ": did you mean --seed?"), ("seed", ": did you mean --seed?"), ("zzz", ".")]
)
def test_did_you_mean_suggests_similar_name(name, expected):
    assert did_you_mean(name, {"seed", "learning_rate"}, "--") == expected
