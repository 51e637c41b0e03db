"""Every known user error raises a message that says what is expected, what was found, and what to do."""

import pytest
from datasets import config as datasets_config
from huggingface_hub import constants as hub_constants
from user_errors.command_cases import COMMAND_CASES, VERSION_CASES
from user_errors.data_cases import DATA_CASES, IMAGE_CASES
from user_errors.harness import DIGITS, TOKENMIXUP, Harness
from user_errors.model_cases import CHECKPOINT_CASES, MODEL_CASES
from user_errors.settings_cases import PARSER_CASES, RECIPE_CASES, SETTINGS_CASES

from hf_tokenmixup.data import load_digits_dataset, loading

CASES = [
    *PARSER_CASES,
    *SETTINGS_CASES,
    *RECIPE_CASES,
    *DATA_CASES,
    *IMAGE_CASES,
    *MODEL_CASES,
    *CHECKPOINT_CASES,
    *COMMAND_CASES,
    *VERSION_CASES,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the output folder of a run of two steps, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("trained")
    output_dir = folder / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        harness = Harness(folder, folder, monkeypatch)
        flags = [*DIGITS, *harness.vit_flags(), *TOKENMIXUP, "--max_steps", 2, "--save_steps", 1]
        harness.train(*flags, output_dir=output_dir)
    return output_dir


@pytest.fixture(scope="module")
def digits():
    return load_digits_dataset()


@pytest.fixture
def harness(tmp_path, trained, digits, monkeypatch):
    monkeypatch.setattr(loading, "load_digits_dataset", lambda: digits)
    # The libraries read the environment variables at import, so setting them here has no effect.
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    return Harness(tmp_path, trained, monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_user_error_message(case, harness):
    with pytest.raises(case.exception) as raised:
        case.trigger(harness)
    message = str(raised.value)
    missing_fragments = [fragment for fragment in case.expected_fragments if fragment not in message]
    assert not missing_fragments, message


def test_case_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
