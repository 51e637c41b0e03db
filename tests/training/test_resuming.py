"""Checkpoints cut short: each file of one, at several places; the one before is taken, and said."""

import logging
import shutil

import pytest
import torch
from tiny_training import Images, tokenmixup_vit

from hf_tokenmixup.training import TokenMixupTrainer, TokenMixupTrainingArguments
from hf_tokenmixup.training.resuming import check_unused, fault_in, last_complete_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An output folder with two checkpoints, and the weights at its end."""
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
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_every_file_cut_anywhere_is_noticed(folder, caplog, name, share):
    assert last_complete_checkpoint(folder).name == "checkpoint-4"
    file = folder / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert name in fault_in(folder / "checkpoint-4")
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(folder).name == "checkpoint-3"
    assert "checkpoint-4 is not complete" in caplog.text and name in caplog.text


def test_a_training_goes_on_from_the_one_before(trained, folder):
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


def test_a_folder_of_an_earlier_training(folder, tmp_path):
    with pytest.raises(ValueError, match="holds checkpoint-4 of an earlier training. Go on with it by --resume_from"):
        check_unused(folder)
    for number in (3, 4):
        (folder / f"checkpoint-{number}" / "trainer_state.json").unlink()
    check_unused(folder)
    check_unused(tmp_path / "nowhere")


def test_nothing_to_resume_from(folder, tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint in .*auto to start from the beginning"):
        last_complete_checkpoint(tmp_path / "nowhere")
    (folder / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(folder).name == "checkpoint-4"
    for number in (3, 4):
        (folder / f"checkpoint-{number}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        last_complete_checkpoint(folder)
