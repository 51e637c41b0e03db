"""Description of hardware, versions and commands without private data."""

import shlex
from pathlib import Path

import pytest
import torch

from hf_tokenmixup.utils.environment import (
    describe_hardware,
    library_versions,
    public_dataset,
    redact_command,
    strip_local_path,
)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--token hf_abc --do_eval", "--do_eval"),
        ("--hub_token=hf_abc --do_eval", "--do_eval"),
        ("me/model --hub_token hf_abc", "me/model"),
        ("--push_to_hub --hub_model_id me/model --seed 3", "--seed 3"),
        ("--push_to_hub true --hub_private_repo=true --token hf_abc --seed 3 me/model", "--seed 3 me/model"),
        ("--output_dir /home/me/out --lr 1e-3", "--output_dir out --lr 1e-3"),
        ("--dataset_name ../shared/data/cifar10 --seed=3", "--dataset_name cifar10 --seed=3"),
        ("--train_dir=~/images/train", "--train_dir=train"),
        (r"'C:\Users\me\model' --do_eval", "model --do_eval"),
        ("C:/Users/me/model ~me/model outputs/../../model", "model model model"),
        ("outputs/run --dataset_name uoft-cs/cifar10", "outputs/run --dataset_name uoft-cs/cifar10"),
        ("""--config_overrides '{"hidden_size": 96}'""", """--config_overrides '{"hidden_size": 96}'"""),
        ("--hub-token hf_abc --api_key=abc --seed 3", "--seed 3"),
        (
            "--dataset_name https://me:pass@host.org/d --train_dir file:///home/me/x",
            "--dataset_name https://host.org/d --train_dir x",
        ),
        ("""--config_overrides '{"cache": "/home/me/x"}'""", """--config_overrides '{"cache": "x"}'"""),
        ("--train_dir '/home/my name/photos of cats'", "--train_dir 'photos of cats'"),
        ("KEY=abc --env NAME=abc --seed 3", "--env '***' --seed 3"),
        ("--horizontal_layers --crop_scale 0.8 1", "--horizontal_layers --crop_scale 0.8 1"),
    ],
)
def test_redact_command_removes_tokens_and_local_paths(arguments, told):
    assert redact_command("python scripts/x.py", shlex.split(arguments)) == f"python scripts/x.py {told}"


def test_strip_local_path_keeps_other_names():
    assert [strip_local_path(name) for name in ("user/repo", "digits", "/", "/data/cifar10/")] == [
        "user/repo", "digits", "", "cifar10",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/data/cats", "cats (local image folder)"),
        ("/data/cats/train", "cats (local image folder)"),
        ("/mnt/x/val/", "x (local image folder)"),
        ("/data/cats/../dogs/Validation", "dogs (local image folder)"),
        (r"C:\photos\cats\test", "cats (local image folder)"),
        ("/data/train", "a local image folder"),
        ("/cats/images/train", "a local image folder"),
        ("/home/alice/train", "a local image folder"),
        (r"C:\Users\alice\train", "a local image folder"),
        ("/home/alice", "a local image folder"),
        ("~/train", "a local image folder"),
        ("/", "a local image folder"),
    ],
)
def test_public_dataset_local_folder_is_no_hub_name(folder, name):
    assert public_dataset(folder, "image folder") == name == public_dataset(name)


def test_public_dataset_relative_folder_matches_absolute_folder(tmp_path, monkeypatch):
    (tmp_path / "cats" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cats")
    assert {public_dataset(name) for name in ("train", ".", "../cats/train/")} == {"cats (local folder)"}
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "cats")
    assert {public_dataset(name) for name in ("train", ".")} == {"a local folder"}


def test_public_dataset_keeps_hub_name():
    assert [public_dataset(name) for name in ("uoft-cs/cifar10", "digits")] == ["uoft-cs/cifar10", "digits"]
    assert public_dataset("https://me:s3cr3t@host.org/x.zip") == "https://host.org/x.zip"


def test_describe_hardware_and_library_versions(monkeypatch):
    for num_threads, text in ((1, "CPU, 1 thread"), (2, "CPU, 2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        assert describe_hardware(1, device="cpu") == text
    assert describe_hardware(2, device="cpu").startswith("2 x CPU")
    assert torch.__version__.startswith(library_versions()["torch"])
