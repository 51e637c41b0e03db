"""Check that truncated and incomplete checkpoints are detected and the previous complete one is used."""

import dataclasses
import logging
import shutil

import pytest
import torch
from helpers.tiny_training import Images, tokenmixup_vit

from hf_tokenmixup.training import TokenMixupTrainer, TokenMixupTrainingArguments
from hf_tokenmixup.training.checkpointing.integrity import (
    find_checkpoint_error,
    get_last_complete_checkpoint,
    list_checkpoints,
    remove_checkpoint,
)
from hf_tokenmixup.training.checkpointing.resuming import (
    check_no_existing_checkpoints,
    require_last_complete_checkpoint,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return an output folder with two checkpoints, the final weights and the training arguments."""
    # Sums over threads differ in their last bits; the fixture for one thread comes after one of a module.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    args = TokenMixupTrainingArguments(
        folder, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2, report_to="none", use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=4, seed=1,
    )  # fmt: skip
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(16))
    trainer.train()
    torch.set_num_threads(threads)
    return folder, trainer.model.state_dict(), args


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "out")


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.95])
def test_find_checkpoint_error_truncated_file_names_file(folder, caplog, name, fraction):
    assert require_last_complete_checkpoint(folder).name == "checkpoint-4"
    file = folder / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: int(fraction * file.stat().st_size)])
    assert name in find_checkpoint_error(folder / "checkpoint-4")
    with caplog.at_level(logging.WARNING):
        assert require_last_complete_checkpoint(folder).name == "checkpoint-3"
    assert f"Skipping incomplete checkpoint {folder / 'checkpoint-4'}" in caplog.text and name in caplog.text


def test_resume_incomplete_checkpoint_continues_from_previous(trained, folder):
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "checkpoint-4").mkdir()
    shutil.copy(folder / "checkpoint-3" / "model.safetensors", folder / "checkpoint-4")
    args = trained[2]
    args.output_dir = str(folder)
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(16))
    with pytest.raises(ValueError, match=r"checkpoint-4 cannot be resumed from: it has no trainer_state.json. Resume"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    trainer.train(resume_from_checkpoint=True)
    for name, tensor in trained[1].items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


def test_check_no_existing_checkpoints_complete_checkpoint_raises(folder, tmp_path):
    with pytest.raises(ValueError, match="contains checkpoint-4 of an earlier run. Resume it with `resume_from"):
        check_no_existing_checkpoints(folder)
    for number in (3, 4):
        (folder / f"checkpoint-{number}" / "trainer_state.json").unlink()
    check_no_existing_checkpoints(folder)
    check_no_existing_checkpoints(tmp_path / "nowhere")


def test_require_last_complete_checkpoint_without_checkpoint_raises(folder, tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint in .*auto` to start from scratch"):
        require_last_complete_checkpoint(tmp_path / "nowhere")
    (folder / "checkpoint-best").mkdir()
    assert require_last_complete_checkpoint(folder).name == "checkpoint-4"
    for number in (3, 4):
        (folder / f"checkpoint-{number}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        require_last_complete_checkpoint(folder)


@pytest.mark.parametrize("name", [*FILES, "config.json", "training_args.bin"])
def test_find_checkpoint_error_missing_file_names_file(folder, name):
    (folder / "checkpoint-4" / name).unlink()
    assert name in find_checkpoint_error(folder / "checkpoint-4")
    assert require_last_complete_checkpoint(folder).name == "checkpoint-3"


def test_find_checkpoint_error_replaced_file_is_reported(folder):
    file = folder / "checkpoint-4" / "optimizer.pt"
    file.write_bytes(file.read_bytes() + b"more")
    assert find_checkpoint_error(folder / "checkpoint-4") == "optimizer.pt is not the one that was written"


def test_remove_checkpoint_killed_early_leaves_incomplete_checkpoint(folder, monkeypatch):
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # killed before
    remove_checkpoint(folder / "checkpoint-4")
    assert find_checkpoint_error(folder / "checkpoint-4") == "it has no trainer_state.json"


def test_get_last_complete_checkpoint_without_checkpoint_is_none(folder, tmp_path, caplog):
    assert get_last_complete_checkpoint(tmp_path / "nowhere") is None
    for number in (3, 4):
        (folder / f"checkpoint-{number}" / "trainer_state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert get_last_complete_checkpoint(folder) is None
    assert f"Skipping incomplete checkpoint {folder / 'checkpoint-4'}" in caplog.text
    assert f"Skipping incomplete checkpoint {folder / 'checkpoint-3'}" in caplog.text


def resume(folder, args, **settings):
    args = dataclasses.replace(args, output_dir=str(folder), **settings)
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(16))
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_save_total_limit_incomplete_checkpoint_is_not_counted(trained, folder, monkeypatch):
    """Trainer counts it, as the newest one where modification times are missing, and would remove the new one."""
    monkeypatch.setattr("os.path.getmtime", lambda path: 0.0)
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / "model.safetensors").write_bytes(b"cut")
    resume(folder, trained[2], max_steps=6)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-6", "checkpoint-5"]


def test_save_without_total_limit_removes_no_checkpoint(trained, folder):
    (folder / "checkpoint-9").mkdir()
    resume(folder, trained[2], max_steps=6, save_total_limit=None)
    assert [path.name[-1] for path in list_checkpoints(folder)] == ["9", "6", "5", "4", "3"]


def test_save_checkpoint_killed_over_existing_one_is_incomplete(trained, folder, monkeypatch):
    """A new checkpoint replaces one of another run, and the process is killed while saving."""
    args = dataclasses.replace(trained[2], output_dir=str(folder))
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(16))

    class Killed(BaseException):
        pass

    def kill(folder):
        raise Killed

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", kill)
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert (folder / "checkpoint-4" / "model.safetensors").is_file()
    assert find_checkpoint_error(folder / "checkpoint-4") == "it has no trainer_state.json"
    assert require_last_complete_checkpoint(folder).name == "checkpoint-3"
