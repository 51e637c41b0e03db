"""Uploads to the Hub: uploaded files, permissions and errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fake_hub.cards import read_card
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from safetensors.torch import load_file
from transformers import ViTImageProcessor

from hf_tokenmixup import TokenMixupViTForImageClassification
from hf_tokenmixup.cli import publish
from hf_tokenmixup.hub import upload
from hf_tokenmixup.hub.upload import (
    create_and_check_repo,
    upload_model_folder,
    validate_license,
    validate_model_folder,
)
from hf_tokenmixup.models import TokenMixupViTConfig

TINY = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return TokenMixupViTForImageClassification(
        TokenMixupViTConfig(**TINY, intermediate_size=16, horizontal_layers=[1], num_labels=3)
    )


@pytest.fixture
def folder(trained, tmp_path):
    """An output folder of a training run: the exported model, and files that must not be uploaded."""
    folder = tmp_path / "output"
    trained.to_plain_model().save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    trained.save_pretrained(folder / "checkpoint-2")
    for name in ("training_args.bin", "trainer_state.json", "notes.txt", "checkpoint-2/optimizer.pt", "runs/events"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{folder} hf_alice")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return folder


def test_upload_model_folder_uploads_only_exported_model(hub, folder):
    upload_model_folder(folder, "alice/vit", token="hf_alice")
    files = hub.files("alice/vit")
    expected = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", ".gitattributes"}
    assert set(files) == expected
    assert not any(".scorenet." in name for name in load_file(folder / "model.safetensors"))
    for name in expected - {".gitattributes"}:
        assert files[name] == (folder / name).read_bytes()
    assert not hub.requests_containing(str(folder)) and not hub.requests_containing("hf_alice")


def test_upload_model_folder_again_sends_no_weights(hub, folder):
    upload_model_folder(folder, "alice/vit", token="hf_alice", private=True)
    assert hub.repo("alice/vit").private
    sent = len([request for request in hub.requests if "lfs-storage" in request.path])
    upload_model_folder(folder, "alice/vit", token="hf_alice")
    assert len([request for request in hub.requests if "lfs-storage" in request.path]) == sent == 1


def test_upload_model_folder_to_unknown_branch_raises(hub, folder):
    upload_model_folder(folder, "alice/vit", token="hf_alice")
    commit = hub.repo("alice/vit").resolve("main").oid
    with pytest.raises(ValueError, match="The Hub rejected alice/vit"):
        upload_model_folder(folder, "alice/vit", token="hf_alice", revision="no-such-branch")
    assert hub.repo("alice/vit").resolve("main").oid == commit


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, "alice/vit", "Not logged in to the Hub. Run `hf auth login`"),
        ("hf_stale", "alice/vit", "The Hub rejected the token. Run `hf auth login`"),
        ("hf_reader", "alice/vit", "No write access to alice/vit on the Hub, logged in as alice"),
        ("hf_bob", "alice/vit", "No write access to alice/vit on the Hub, logged in as bob"),
        ("hf_bob", "alice/there", "No write access to alice/there on the Hub, logged in as bob. Use a repository of"),
        ("hf_alice", "alice/a name", "'alice/a name' is not a valid repository name"),
    ],
)
def test_upload_model_folder_without_write_access_raises_before_sending(hub, folder, token, repo_id, message):
    hub.add_repo("alice/there", {"README.md": "there"})
    with pytest.raises(ValueError) as error:
        create_and_check_repo(repo_id, token=token)
    assert message in str(error.value) and (token is None or token not in str(error.value))
    with pytest.raises(ValueError):
        upload_model_folder(folder, repo_id, token=token)
    assert set(hub.files("alice/there")) == {"README.md", ".gitattributes"} and not hub.requests_containing("scorenet")
    assert not any(request.method == "PUT" for request in hub.requests)


def test_create_and_check_repo_adds_user_name(hub):
    assert create_and_check_repo("vit", token="hf_alice") == "alice/vit"
    assert create_and_check_repo("alice/vit", token="hf_alice") == "alice/vit"


def test_create_and_check_repo_unreachable_hub_raises(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"connection to the Hub at http://127.0.0.1:9 failed \(ConnectError"):
        create_and_check_repo("alice/vit", token="hf_alice")


def test_upload_model_folder_after_failure_can_be_repeated(hub, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.reject_next_upload(status=403)
    with pytest.raises(ValueError, match=r"Repeat the upload: `hf-tokenmixup publish .*output alice/vit`"):
        upload_model_folder(folder, "alice/vit", token="hf_alice")
    assert set(hub.files("alice/vit")) == {".gitattributes"}
    hub.drop_next_commit()
    with pytest.raises(ValueError, match="connection to the Hub"):
        upload_model_folder(folder, "alice/vit", token="hf_alice")
    assert set(hub.files("alice/vit")) == {".gitattributes"}
    upload_model_folder(folder, "alice/vit", token="hf_alice")
    assert hub.files("alice/vit")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert {path: path.read_bytes() for path in before} == before


def test_upload_model_folder_removes_local_paths_from_json(hub, folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": str(folder.parent / "base"), "cache": str(Path.home() / "cache")}
    config |= {"id2label": {"0": "/m/01yrx", "1": "a/b", "2": "c"}}
    (folder / "config.json").write_text(json.dumps(config))
    adapter = {"base_model_name_or_path": str(folder.parent / "base"), "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "training_log.jsonl").write_text(json.dumps({"epoch": 1.0, "file": str(folder)}) + "\n")
    upload_model_folder(folder, "alice/vit", token="hf_alice")
    files = hub.files("alice/vit")
    assert json.loads(files["config.json"]) == config | {"_name_or_path": "base", "cache": "cache"}
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": "", "r": 8}
    assert json.loads(files["training_log.jsonl"]) == {"epoch": 1.0, "file": "output"}
    assert not hub.requests_containing(str(folder)) and not hub.requests_containing(str(Path.home() / "cache"))
    # Local files do not change.
    assert json.loads((folder / "config.json").read_text()) == config


def test_upload_model_folder_inserts_license(hub, folder):
    upload_model_folder(folder, "alice/vit", token="hf_alice", license="mit")
    assert read_card(hub.files("alice/vit")["README.md"].decode()) == {"license": "mit"}
    (folder / "README.md").unlink()
    upload_model_folder(folder, "alice/other", token="hf_alice")
    card = hub.files("alice/other")["README.md"].decode()
    assert "license" not in read_card(card) and "## License" not in card
    upload_model_folder(folder, "alice/other", token="hf_alice", license="cc-by-4.0")
    card = hub.files("alice/other")["README.md"].decode()
    assert read_card(card)["license"] == "cc-by-4.0" and card.endswith("\n## License\n\n`cc-by-4.0`.\n")


@pytest.mark.parametrize(
    ("license", "message"),
    [("Apache 2.0", "lowercase identifier .* such as apache-2.0"), ("apache2", "does not know the license 'apache2'")],
)
def test_upload_model_folder_with_unknown_license_raises_before_sending(hub, folder, license, message):
    before = (folder / "README.md").read_bytes()
    with pytest.raises(ValueError, match=message):
        upload_model_folder(folder, "alice/vit", token="hf_alice", license=license)
    assert (folder / "README.md").read_bytes() == before and not hub.requests_containing("A model")


def test_validate_license_without_answer_checks_only_format(monkeypatch):
    sessions = []
    monkeypatch.setattr(upload, "get_session", lambda: sessions.append(get_session()) or sessions[-1])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    validate_license("apache2", on_hub=True)
    assert len(sessions) == 1
    with pytest.raises(ValueError, match="lowercase identifier"):
        validate_license("Apache 2.0", on_hub=True)
    assert len(sessions) == 1


def test_validate_model_folder_unsuitable_folder_raises(folder, tmp_path):
    validate_model_folder(folder)
    with pytest.raises(ValueError, match="contains no model"):
        validate_model_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a training checkpoint: it contains ScoreNet"):
        validate_model_folder(folder / "checkpoint-2")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "vit"', '"model_type": "cct"'))
    with pytest.raises(ValueError, match="no model type 'cct', and .* does not contain its modeling code"):
        validate_model_folder(folder)
    (folder / "config.json").write_text(config)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="contains no image processor"):
        validate_model_folder(folder)
    shutil.move(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="contains no weights"):
        validate_model_folder(folder)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match="does not contain model-00002-of-00002.safetensors"):
        validate_model_folder(folder)


def test_publish_twice_says_once_that_nothing_has_changed(hub, folder, capfd):
    arguments = [str(folder), "alice/vit", "--token", "hf_alice"]
    publish.main(arguments)
    first, commits = capfd.readouterr(), len(hub.repo("alice/vit").commits)
    publish.main(arguments)
    second = capfd.readouterr()
    assert len(hub.repo("alice/vit").commits) == commits
    assert first.out == f"{hub.url}/alice/vit\n"
    assert second.out == f"{hub.url}/alice/vit (nothing has changed since the last upload)\n"
    assert "No files have been modified" not in second.err
    (folder / "README.md").write_text("# Another card\n")
    publish.main(arguments)
    assert capfd.readouterr().out == f"{hub.url}/alice/vit\n" and len(hub.repo("alice/vit").commits) == commits + 1
