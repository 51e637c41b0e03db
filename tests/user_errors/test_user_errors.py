"""Everything that a user can get wrong, and the message each gets; and what looks wrong and works."""

import pytest
from datasets import config as datasets_config
from huggingface_hub import constants as hub_constants
from user_errors.command_cases import SCRIPTS, VERSIONS
from user_errors.data_cases import DATA, IMAGES
from user_errors.harness import DIGITS, MIXING, Bench
from user_errors.model_cases import CHECKPOINTS, MODELS
from user_errors.settings_cases import NOT_PARSED, RECIPES, SETTINGS

from hf_tokenmixup.data import load_digits_dataset, loading

MISTAKES = [*NOT_PARSED, *SETTINGS, *RECIPES, *DATA, *IMAGES, *MODELS, *CHECKPOINTS, *SCRIPTS, *VERSIONS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output folder of a training of two steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        bench = Bench(folder, folder, patch)
        bench.train(*DIGITS, *bench.network(), *MIXING, "--max_steps", 2, "--save_steps", 1, output_dir=folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def digits():
    return load_digits_dataset()


@pytest.fixture
def bench(tmp_path, trained, digits, monkeypatch):
    monkeypatch.setattr(loading, "load_digits_dataset", lambda: digits)
    # Read when the libraries are imported, so the environment would be too late.
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    return Bench(tmp_path, trained, monkeypatch)


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_a_mistake_is_told(mistake, bench):
    with pytest.raises(mistake.error) as raised:
        mistake.provoke(bench)
    message = str(raised.value)
    missing = [part for part in mistake.told if part not in message]
    assert not missing, message


def test_the_table_names_each_mistake_once():
    names = [mistake.name for mistake in MISTAKES]
    assert len(set(names)) == len(names)
