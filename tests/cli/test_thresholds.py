"""The two forms of a threshold on the command line and in recipes."""

import pytest

from hf_tokenmixup.cli.arguments import format_recipe, parse_options
from hf_tokenmixup.cli.recipes import load_recipe

FAMILY = ["--output_dir", "unused"]


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.fixture
def recipe(tmp_path):
    write(tmp_path / "base.yaml", "horizontal_layers: [1]\nhorizontal_rho: 0.02\nhorizontal_tau: 1.0\n")
    return write(tmp_path / "own.yaml", "base: base.yaml\nhorizontal_rho_relative: 1.5\n")


def test_recipe_one_form_replaces_the_other_form_of_its_base(recipe):
    assert load_recipe(recipe) == {
        "horizontal_layers": [1],
        "horizontal_tau": 1.0,
        "horizontal_rho_relative": 1.5,
    }


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--horizontal_rho", "0.5"], {"horizontal_rho": 0.5, "horizontal_tau": 1.0}),
        (["--horizontal-tau-relative", "0.2"], {"horizontal_rho_relative": 1.5, "horizontal_tau_relative": 0.2}),
        (["--horizontal_tau=none"], {"horizontal_rho_relative": 1.5, "horizontal_tau": None}),
    ],
)
def test_flag_one_form_replaces_the_other_form_of_the_recipe(flags, expected, recipe):
    settings = parse_options(["--recipe", recipe, *flags, *FAMILY]).tokenmixup
    assert settings == {"horizontal_layers": [1], **expected}


def test_print_recipe_with_flag_prints_one_form(recipe):
    text = format_recipe(recipe, ["--horizontal_rho", "0.5"])
    assert "horizontal_rho: 0.5" in text and "horizontal_rho_relative" not in text
