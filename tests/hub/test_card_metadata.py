"""Evaluation results inserted into existing and new model cards, in folders and on the Hub."""

import re

import huggingface_hub
import pytest
import yaml
from fake_hub.cards import read_card, validate_card
from helpers.card_cases import (
    CARD_DATA,
    EVALUATION,
    MODEL_INDEX,
    MODEL_INDEX_RESULT,
    evaluation_result,
    tokenmixup_config,
)
from helpers.tiny_training import plain_vit, tokenmixup_vit
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError

from hf_tokenmixup.hub import build_eval_results, build_model_card, update_model_card
from hf_tokenmixup.hub.card_metadata import insert_license
from hf_tokenmixup.models import CctConfig, CctForImageClassification

FOREIGN = """---
# Handwritten
license: other
license_name: mine   # keep me
language: no
date: 2024-01-01
model-index:
- name: Somebody's
  results:
  - task: {type: image-classification}
    dataset: {type: uoft-cs/cifar10, name: Ten, config: plain_text, split: test}
    metrics:
    - {type: accuracy, value: 0.5}
    - {type: f1, value: 0.25}
  - task: {type: image-classification}
    dataset: {type: uoft-cs/cifar10, name: Ten, config: plain_text, split: train}
    metrics:
    - {type: accuracy, value: 0.75, verified: true}
  - task: {type: image-classification}

# The last word
widget: [{src: a.png}]
---

# Somebody's *model*

---
model-index: no metadata here
  and  two spaces at the end  """


def text_and_metadata(card: str) -> tuple[str, dict]:
    """Split a card without huggingface_hub."""
    block, text = re.fullmatch(r"\ufeff?---[\r\n]+(.*?[\r\n])---[\r\n]+(.*)", card, re.DOTALL).groups()
    return text, yaml.safe_load(block)


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_update_card_replaces_only_matching_results(tmp_path, line_break, bom):
    path = tmp_path / "README.md"
    old = bom + FOREIGN.replace("\n", line_break)
    path.write_bytes(old.encode())
    assert update_model_card(str(tmp_path), EVALUATION) == str(path)
    new = path.read_bytes().decode()
    assert new.startswith(bom) and set(re.findall(r"\r\n|\r|\n", new)) == {line_break}

    # All lines except those of the results are unchanged.
    start, end = old.index("model-index"), old.index("# The last word")
    assert new.startswith(old[:start]) and new.endswith(old[end - len(line_break) :])
    text, metadata = text_and_metadata(new)
    assert text == text_and_metadata(old)[0]
    before = text_and_metadata(old)[1]
    (model,) = metadata.pop("model-index")
    (model_before,) = before.pop("model-index")
    assert metadata == before and model["name"] == "Somebody's"
    f1 = {**model_before["results"][0], "metrics": [{"type": "f1", "value": 0.25}]}
    assert model["results"] == [f1, *model_before["results"][1:], MODEL_INDEX_RESULT]

    # A later evaluation replaces the earlier one, even for another revision of the dataset.
    update_model_card(str(tmp_path), evaluation_result(top1=0.5, dataset_revision="new"))
    later = text_and_metadata(path.read_bytes().decode())[1]["model-index"][0]["results"]
    assert later[:-1] == model["results"][:-1] and len(later) == len(model["results"])
    assert later[-1]["metrics"][0]["value"] == 0.5 and later[-1]["dataset"]["revision"] == "new"
    update_model_card(str(tmp_path), EVALUATION)
    assert path.read_bytes().decode() == new


@pytest.mark.parametrize("field", ["dataset", "dataset_config", "split"])
def test_update_card_preserves_results_for_other_data(tmp_path, field):
    build_model_card(tokenmixup_config(), "alice/vit", CARD_DATA, [EVALUATION]).save(tmp_path / "README.md")
    update_model_card(str(tmp_path), evaluation_result(**{field: "another"}))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results == build_eval_results(EVALUATION) + build_eval_results(
        evaluation_result(**{field: "another"})
    )
    assert card.text == build_model_card(tokenmixup_config(), "alice/vit", CARD_DATA, [EVALUATION]).text


def test_update_card_preserves_results_for_other_local_folders(tmp_path):
    (tmp_path / "README.md").write_text("# A model\n")
    for name in ("cats", "dogs", "cats"):
        update_model_card(str(tmp_path), evaluation_result(dataset=f"/data/{name}/val"))
    (model,) = read_card((tmp_path / "README.md").read_text())["model-index"]
    names = [result["dataset"]["name"] for result in model["results"]]
    assert sorted(names) == ["cats (local folder)", "dogs (local folder)"]


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_insert_license_changes_only_license(line_break):
    old = FOREIGN.replace("\n", line_break)
    new = insert_license(old, "mit")
    lines = {line for line in new.split(line_break)} ^ {line for line in old.split(line_break)}
    assert lines == {"license: other", "license: mit"} and text_and_metadata(new)[0] == text_and_metadata(old)[0]
    assert insert_license("# A model\n", "mit") == "---\nlicense: mit\n---\n# A model\n"


@pytest.mark.parametrize(
    "block, text, other_metadata",
    [
        ("", "", {}),
        ("", "# A model\n\n---\n", {}),
        ("", "# A model\r\n", {}),
        ("---\n---\n", "# A model\n\n---\nmore\n", {}),
        ("---\n# only a comment\n---\n", "# A model\n", {}),
        ("---\nlicense: mit\nmodel-index: []  # none yet\ntags: [a]\n---\n", "", {"license": "mit", "tags": ["a"]}),
        ('---\n{"license": "mit", "tags": ["a"]}\n---\n', "# A model\n", {"license": "mit", "tags": ["a"]}),
        ('---\n{"model-index": [], "license": "mit"}\n---\n', "# A model\n", {"license": "mit"}),
        ("---\n  license: mit\n  tags:\n  - a\n---\n", "# A model\n", {"license": "mit", "tags": ["a"]}),
        ("---\nlicense: mit\n---", "", {"license": "mit"}),
    ],
)
def test_update_card_without_results_adds_results(tmp_path, block, text, other_metadata):
    folder = tmp_path / "vit"
    folder.mkdir()
    (folder / "README.md").write_bytes((block + text).encode())
    update_model_card(str(folder), EVALUATION)
    new = (folder / "README.md").read_bytes().decode()
    assert validate_card(new) == ([], []) and ModelCard(new).data.eval_results == build_eval_results(EVALUATION)
    assert read_card(new.replace("\r\n", "\n")) == other_metadata | {"model-index": MODEL_INDEX}
    assert ModelCard(new).text == text and new.endswith(text) and new.count("\r\n") in (0, new.count("\n"))


@pytest.mark.parametrize(
    "old, message",
    [
        ("---\na: [1\n---\n", "not valid YAML"),
        ("---\n- a\n---\n", "must be a mapping, got list"),
        ("---\nmodel-index: {name: a}\n---\n", "must be a list of models"),
        ("---\nmodel-index: [a]\n---\n", "must be a list of models"),
        ("---\nmodel-index: [{name: a, results: [b]}]\n---\n", "must be a list of models"),
        ("---\nmodel-index: [{name: a, results: [{task: b, metrics: [{type: c}]}]}]\n---\n", "list of models"),
    ],
)
def test_update_card_invalid_metadata_raises_and_preserves_card(tmp_path, old, message):
    (tmp_path / "README.md").write_text(old)
    with pytest.raises(ValueError, match=message):
        update_model_card(str(tmp_path), EVALUATION)
    assert (tmp_path / "README.md").read_text() == old


@pytest.mark.parametrize(
    "model, expected_text",
    [
        (lambda: CctForImageClassification(CctConfig.cct_2_3x2(num_labels=10)), "CCT-2/3x2 with 0.28 M parameters"),
        (tokenmixup_vit, "Its configuration contains [TokenMixup]"),
    ],
)
def test_update_card_missing_card_is_created(tmp_path, monkeypatch, model, expected_text):
    folder = tmp_path / "converted"
    model().save_pretrained(folder)
    monkeypatch.chdir(folder)
    assert update_model_card(".", EVALUATION) == "README.md"
    card = ModelCard.load(folder / "README.md")
    assert validate_card(str(card)) == ([], []) and card.data.eval_results == build_eval_results(EVALUATION)
    assert (
        card.text.startswith("\n# converted\n") and expected_text in card.text and card.data.model_name == "converted"
    )
    assert str(tmp_path) not in str(card)


def test_update_card_invalid_target_raises(tmp_path):
    with pytest.raises(ValueError, match="neither a model card .* nor a model"):
        update_model_card(str(tmp_path), EVALUATION)
    with pytest.raises(ValueError, match="neither a folder nor a repository name"):
        update_model_card(str(tmp_path / "missing"), EVALUATION)


@pytest.fixture
def reachable(hub, monkeypatch, tmp_path):
    """The fake Hub, with downloads enabled."""
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


def test_update_card_on_hub_preserves_card_and_respects_permissions(reachable):
    foreign = FOREIGN.replace("language: no", "language: en").replace("\n", "\r\n")
    foreign = foreign.replace("  - task: {type: image-classification}\r\n\r\n", "\r\n")
    assert validate_card(foreign) == ([], [])
    reachable.add_repo("alice/vit", {"README.md": foreign})
    address = update_model_card(
        "alice/vit", evaluation_result(command="python scripts/evaluate.py /home/me/vit"), token="hf_alice"
    )
    repo = reachable.repo("alice/vit")
    commit = repo.branches["main"]
    assert address == f"{reachable.url}/alice/vit/commit/{commit.oid}"
    new = reachable.files("alice/vit")["README.md"].decode()
    assert text_and_metadata(new)[0] == text_and_metadata(foreign)[0]
    assert text_and_metadata(new)[1]["model-index"][0]["results"][-1] == MODEL_INDEX_RESULT
    assert "uoft-cs/cifar10, test" in commit.title and "python scripts/evaluate.py vit" in commit.message
    assert not reachable.requests_containing("/home/me") and not reachable.requests_containing("hf_alice")
    with pytest.raises(HfHubHTTPError):
        update_model_card("alice/vit", evaluation_result(top1=0.1), token="hf_bob")
    assert repo.branches["main"] == commit


def test_update_card_on_hub_branch_creates_card(reachable, tmp_path):
    plain_vit().config.save_pretrained(tmp_path)
    reachable.add_repo("alice/vit", {"config.json": (tmp_path / "config.json").read_bytes()})
    reachable.repo("alice/vit").branches["measured"] = reachable.repo("alice/vit").branches["main"]
    update_model_card("alice/vit", EVALUATION, token="hf_alice", revision="measured")
    card = ModelCard(reachable.files("alice/vit", "measured")["README.md"].decode())
    assert validate_card(str(card)) == ([], []) and card.data.eval_results == build_eval_results(EVALUATION)
    assert 'model="alice/vit")' in card.text and "README.md" not in reachable.files("alice/vit")
    if int(huggingface_hub.__version__.split(".")[0]) >= 2:  # earlier versions send requests to huggingface.co
        card.validate()


def test_update_card_on_hub_changed_since_read_raises(reachable, monkeypatch):
    reachable.add_repo("alice/vit", {"README.md": "# Before\n"})
    download = huggingface_hub.HfApi.hf_hub_download

    def download_and_change(*args, **kwargs):
        path = download(*args, **kwargs)
        reachable.add_commit("alice/vit", {"README.md": "# Somebody's change\n"})
        return path

    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", download_and_change)
    with pytest.raises(HfHubHTTPError):
        update_model_card("alice/vit", EVALUATION, token="hf_alice")
    assert reachable.files("alice/vit")["README.md"] == b"# Somebody's change\n"
