"""Check full disks and folders that are not writable: raised before training if possible, no checkpoint is lost."""

import errno
import json
import logging
import os
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers.commands import HANG_S
from helpers.tiny_training import Images, tokenmixup_vit

from hf_tokenmixup.training import (
    JsonlLoggerCallback,
    OutputDirError,
    SaveError,
    TokenMixupTrainer,
    TrainingCurvesCallback,
)
from hf_tokenmixup.training.checkpointing.disk_space import check_writable, estimate_checkpoint_sizes, is_write_error
from hf_tokenmixup.training.checkpointing.integrity import find_checkpoint_error, list_checkpoints, list_file_sizes

Usage = namedtuple("Usage", "total used free")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def trainer_of(args, model=tokenmixup_vit, **kwargs):
    return TokenMixupTrainer(model(), args, train_dataset=Images(16), **kwargs)


def leave_free(monkeypatch, free: float) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(10**9, 10**9 - int(free), int(free)))


def test_check_writable_path_of_file_raises(arguments, tmp_path):
    (tmp_path / "file").write_text("")
    args = arguments(output_dir=str(tmp_path / "file" / "out"))
    message = "`output_dir` .*file/out is not writable .Not a directory.. Check"
    with pytest.raises(OutputDirError, match=message):
        trainer_of(args).train()
    with pytest.raises(OutputDirError, match="Not a directory"):
        check_writable(tmp_path / "file")


def test_check_writable_read_only_folder_raises(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    check_writable(tmp_path / "new" / "out")
    # A run that is refused afterwards leaves no folder.
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputDirError, match="Read-only file system"):
        check_writable(tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "sgd"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adamw_torch"},
        {"optim": "rmsprop"},
        {"optim": "adagrad"},
        {"optim": "adafactor"},
        {"optim": "adamw_torch", "save_only_model": True},
        {"optim": "adamw_torch", "ema_decay": 0.5},
    ],
)
def test_estimate_checkpoint_sizes_matches_written_sizes(arguments, settings):
    """The model is so large that small files next to the tensors do not matter."""
    args = arguments(save_strategy="steps", save_steps=1, **settings)

    def large():
        return tokenmixup_vit(hidden_size=128, intermediate_size=512, num_attention_heads=4)

    trainer = trainer_of(args, large)
    expected = estimate_checkpoint_sizes(trainer.model, args)
    trainer.train()
    trainer.save_model()
    written = sum(list_file_sizes(Path(args.output_dir) / "checkpoint-1").values())
    weights = sum(tensor.nbytes for tensor in trainer.model.state_dict().values())
    assert 0 <= expected.checkpoint - written < 0.12 * weights + 256 * 1024
    exported = (Path(args.output_dir) / "model.safetensors").stat().st_size
    assert 0 <= expected.exported - exported < 0.1 * weights + 256 * 1024


def test_disk_space_too_small_raises_or_warns_before_training(arguments, monkeypatch, caplog):
    args = arguments(max_steps=6, save_strategy="steps", save_steps=1)
    trainer = trainer_of(args)
    one = estimate_checkpoint_sizes(trainer.model, args).checkpoint
    leave_free(monkeypatch, one - 1)
    with pytest.raises(OutputDirError, match="A checkpoint needs about .*: not enough. Free disk space there, choose"):
        trainer.train()
    assert trainer.state.global_step == 0 and not list_checkpoints(args.output_dir)

    leave_free(monkeypatch, 6.5 * one)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "6 checkpoints more and the model, " in caplog.text and "do not fit" in caplog.text
    caplog.clear()
    # Existing checkpoints may stay. With a limit, up to two new ones and the model exist at once.
    args.save_total_limit = 1
    leave_free(monkeypatch, 2.9 * one)
    trainer_of(arguments(max_steps=6, save_strategy="steps", save_steps=1, output_dir=f"{args.output_dir}-new",
                         save_total_limit=1)).train()  # fmt: skip
    assert "do not fit" in caplog.text
    caplog.clear()
    leave_free(monkeypatch, 3.1 * one)
    trainer_of(arguments(max_steps=6, save_strategy="steps", save_steps=1, output_dir=f"{args.output_dir}-other",
                         save_total_limit=1)).train()  # fmt: skip
    assert "do not fit" not in caplog.text


def test_disk_space_check_ignores_files_that_are_not_written(arguments, monkeypatch):
    args = arguments(max_steps=2, save_strategy="steps", save_steps=1)
    trainer_of(args).train()
    sizes = estimate_checkpoint_sizes(tokenmixup_vit(), args)
    leave_free(monkeypatch, sizes.exported)
    # A finished run writes no further checkpoint.
    trainer_of(args).train(resume_from_checkpoint=True)
    # An incomplete checkpoint is removed, which frees its space.
    (Path(args.output_dir) / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(OutputDirError):
        leave_free(monkeypatch, 1000)
        trainer_of(args).train(resume_from_checkpoint=True)
    (Path(args.output_dir) / "checkpoint-2" / "large").write_bytes(bytes(sizes.checkpoint))
    args.save_total_limit = 2
    trainer_of(args).train(resume_from_checkpoint=True)
    assert not (Path(args.output_dir) / "checkpoint-2" / "large").exists()


@pytest.mark.parametrize(
    "place",
    ["safetensors.torch.serialize_file", "torch.save", "transformers.trainer_callback.TrainerState.save_to_json"],
)
def test_save_checkpoint_full_disk_raises_and_resume_equals_uninterrupted(arguments, monkeypatch, tmp_path, place):
    """The disk is full at the third checkpoint. The first two remain and the run resumes."""
    args = arguments(max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    uninterrupted = trainer_of(arguments(max_steps=4, output_dir=str(tmp_path / "uninterrupted")))
    uninterrupted.train()
    trainer = trainer_of(args)
    with monkeypatch.context() as patched:
        owner, name = place.rsplit(".", 1)
        original = _resolve(owner).__dict__[name]

        def fail(*args, **kwargs):
            if trainer.state.global_step == 3:
                raise FULL
            return original(*args, **kwargs)

        patched.setattr(place, fail)
        with pytest.raises(SaveError) as raised:
            trainer.train()
    out = Path(args.output_dir)
    assert f"checkpoint-3 could not be written to {out} (No space left on device, " in str(raised.value)
    assert f"The latest complete checkpoint is {out / 'checkpoint-2'}. Free disk space there, and resume with" in str(
        raised.value
    )
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2", "checkpoint-1"]
    resumed = trainer_of(args)
    resumed.train(resume_from_checkpoint=True)
    for tensor, expected in zip(resumed.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(tensor, expected)


def _resolve(path: str):
    import importlib

    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, name = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


def test_is_write_error_other_error_is_false(arguments, monkeypatch):
    assert not is_write_error(RuntimeError("CUDA error")) and not is_write_error(OSError("no number"))
    assert not is_write_error(OSError(errno.ECONNRESET, "the Hub"))
    trainer = trainer_of(arguments(save_strategy="steps", save_steps=1))
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()


LIMITED = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from helpers.tiny_training import Images, tokenmixup_vit
from hf_tokenmixup.training import SaveError, TokenMixupTrainer, TokenMixupTrainingArguments
from hf_tokenmixup.training.checkpointing.integrity import list_checkpoints

torch.set_num_threads(1)
for limit in map(int, sys.argv[3:]):
    args = TokenMixupTrainingArguments(f"{sys.argv[2]}-{limit}", max_steps=2, save_strategy="steps", save_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, optim="adamw_torch")
    model = tokenmixup_vit(hidden_size=128, intermediate_size=512)
    trainer = TokenMixupTrainer(model, args, train_dataset=Images(16))
    save = trainer._save_checkpoint
    def limited(*args):
        if trainer.state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        save(*args)
    trainer._save_checkpoint = limited
    try:
        trainer.train()
    except SaveError as error:
        print(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print([path.name for path in list_checkpoints(args.output_dir)])
"""


@pytest.mark.slow
def test_save_checkpoint_beyond_file_size_limit_raises(tmp_path):
    """RLIMIT_FSIZE truncates the weights or the optimizer state."""
    model = tokenmixup_vit(hidden_size=128, intermediate_size=512)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    limits = [1000, weights // 2, weights + weights // 2]
    command = [sys.executable, "-c", LIMITED, str(Path(__file__).parents[2]), tmp_path / "out", *limits]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=HANG_S, env=environment)
    assert result.returncode == 0, result.stderr
    for limit in limits:
        out = f"{tmp_path / 'out'}-{limit}"
        assert f"checkpoint-2 could not be written to {out} (" in result.stdout
        assert f"The latest complete checkpoint is {out}/checkpoint-1. Free disk space" in result.stdout
        assert find_checkpoint_error(Path(out) / "checkpoint-1") is None
    assert result.stdout.count("['checkpoint-1']\n") == 3
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_jsonl_logger_full_disk_warns_and_writes_lines_later(arguments, monkeypatch, caplog):
    """Training continues. The next successful write includes the missing lines, and a failed plot only warns."""
    args = arguments(max_steps=5, logging_steps=1)
    original_open, modes = Path.open, []

    def open_(path, mode="r", *args, **kwargs):
        if path.name == JsonlLoggerCallback.file_name and mode in "aw":
            modes.append(mode)
            if len(modes) in (3, 4):
                raise FULL
        return original_open(path, mode, *args, **kwargs)

    def full(*args):
        raise FULL

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr("hf_tokenmixup.training.callbacks.plot_training_curves", full)
    trainer = trainer_of(args, callbacks=[JsonlLoggerCallback(), TrainingCurvesCallback()])
    with caplog.at_level(logging.WARNING):
        trainer.train()
    lines = (Path(args.output_dir) / JsonlLoggerCallback.file_name).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 5]
    assert caplog.text.count("training_log.jsonl cannot be written now (No space left on device)") == 1
    assert "training_curves.png could not be written (No space left on device)" in caplog.text


def test_save_model_and_metrics_full_disk_raises_with_failed_part(arguments, monkeypatch):
    args = arguments(save_strategy="steps", save_steps=1)
    trainer = trainer_of(args)
    trainer.train()

    def full(*args, **kwargs):
        raise FULL

    monkeypatch.setattr("safetensors.torch.serialize_file", full)
    with pytest.raises(SaveError, match="The model could not be written to .*checkpoint-1. Free disk space"):
        trainer.save_model()
    monkeypatch.setattr("json.dump", full)
    with pytest.raises(SaveError, match="The results could not be written"):
        trainer.save_metrics("train", {"loss": 1.0})


def test_save_metrics_truncated_results_are_written_again(arguments):
    trainer = trainer_of(arguments())
    trainer.save_metrics("train", {"train_loss": 1.0})
    trainer.save_metrics("eval", {"eval_loss": 2.0})
    file = Path(trainer.args.output_dir) / "all_results.json"
    assert json.loads(file.read_text()) == {"train_loss": 1.0, "eval_loss": 2.0}
    file.write_text('{"train_lo')
    trainer.save_metrics("train", {"train_loss": 1.0})
    assert json.loads(file.read_text()) == {"train_loss": 1.0}
