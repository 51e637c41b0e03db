"""Errors end a command with one line, including errors in workers and out-of-memory errors."""

import sys
from pathlib import Path

import pytest
import torch
from datasets import Value
from helpers.commands import import_command
from helpers.tiny_training import plain_vit
from torch._utils import ExceptionWrapper
from transformers import ViTImageProcessor
from user_errors.harness import DIGITS, Harness, encode_image, solid_image

from hf_tokenmixup.cli import program
from hf_tokenmixup.data import image_cache as images


def passed_on(raise_error) -> BaseException:
    """The error as torch raises it for a worker of a data loader."""
    try:
        raise_error()
    except Exception:
        wrapped = ExceptionWrapper(sys.exc_info(), where="in DataLoader worker process 1")
    with pytest.raises(Exception) as raised:
        wrapped.reraise()
    return raised.value


def decode_nothing() -> None:
    images.decode_image({"bytes": b"x", "path": None}, "Image 3", None)


def test_worker_error_of_package_gives_file_and_message():
    path, message = program.worker_error(passed_on(decode_nothing))
    assert path == Path(images.__file__)
    assert message.startswith("Image 3") and "Traceback" not in message and "File" not in message


def test_worker_error_of_other_errors_is_none():
    assert program.worker_error(ValueError("Caught a cold")) is None


def test_finetune_broken_image_in_worker_ends_in_one_line(tmp_path, monkeypatch):
    harness = Harness(tmp_path, tmp_path, monkeypatch)
    data = harness.write_parquet([encode_image(solid_image()), b"x"], [0, 1], Value("int64"))
    options = ["--dataset_name", data, "--do_train", *harness.vit_flags(), "--output_dir", tmp_path / "out"]
    options += "--use_cpu --max_steps 1 --report_to none --image_cache_gib 0 --dataloader_num_workers 1".split()
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, options)])
    with pytest.raises(SystemExit) as raised:
        import_command("finetune").entry_point()
    assert raised.value.code.startswith("finetune.py: Image 1 of split 'train' cannot be decoded")
    assert "Traceback" not in raised.value.code


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        MemoryError(),
    ],
    ids=["device", "cpu", "worker", "python"],
)
@pytest.mark.parametrize("step", ["build_trainer", "train_and_evaluate"])
def test_finetune_without_memory_names_batch_size(monkeypatch, step, error):
    finetune = import_command("finetune")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(finetune, "build_trainer", lambda arguments: None)
    monkeypatch.setattr(finetune, step, fail)
    with pytest.raises(SystemExit) as raised:
        finetune.entry_point()
    assert "--per_device_train_batch_size" in raised.value.code
    with pytest.raises(SystemExit, match="not enough memory"):
        program.run_command(fail)


def test_finetune_other_runtime_error_has_traceback(monkeypatch):
    finetune = import_command("finetune")

    def fail(arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr(finetune, "build_trainer", fail)
    with pytest.raises(RuntimeError, match="something else"):
        finetune.entry_point()


def test_finetune_missing_package_ends_in_one_line(monkeypatch):
    finetune = import_command("finetune")

    def prepare(arguments):
        raise ImportError("This needs peft: pip install peft")

    monkeypatch.setattr(finetune, "build_trainer", prepare)
    with pytest.raises(SystemExit) as raised:
        finetune.entry_point()
    assert raised.value.code.endswith("This needs peft: pip install peft")


def test_build_trainer_batches_of_one_image_warn(tmp_path, monkeypatch, caplog):
    Harness(tmp_path, tmp_path, monkeypatch).prepare_digits(
        "--horizontal_layers", 1, "--per_device_train_batch_size", 1
    )
    assert "no effect in batches of one image" in caplog.text


def test_train_and_evaluate_best_model_without_evaluation_warns(tmp_path, monkeypatch, caplog):
    steps = "--max_steps 1 --eval_strategy steps --eval_steps 1 --save_steps 1 --eval_delay 9 --load_best_model_at_end"
    harness = Harness(tmp_path, tmp_path, monkeypatch)
    harness.train(*DIGITS, *harness.vit_flags(), *steps.split())
    assert "no checkpoint was evaluated" in caplog.text


@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_entry_point_message_of_library_names_flags(tmp_path, monkeypatch, command):
    harness = Harness(tmp_path, tmp_path, monkeypatch)
    data = harness.write_parquet([encode_image(solid_image())] * 2, [0, 1], Value("int64"))
    options = ["--dataset_name", data, "--eval_split", "train", "--image_column_name", "pic"]
    if command == "finetune":
        options += ["--do_train", *harness.vit_flags(), "--output_dir", tmp_path / "out"]
    else:
        plain_vit().save_pretrained(tmp_path / "model")
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
        options.insert(0, tmp_path / "model")
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *map(str, options)])
    with pytest.raises(SystemExit) as raised:
        import_command(command).entry_point()
    assert "Choose one with `--image_column_name`" in raised.value.code


def run_entry_point(monkeypatch, command, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as raised:
        import_command(command).entry_point()
    return raised.value.code


def test_entry_point_message_about_output_folder_names_flags(tmp_path, monkeypatch):
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"weights")
    options = ["--recipe", "digits-quickstart", "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "last"]
    message = run_entry_point(monkeypatch, "finetune", *options)
    assert "Pass `--resume_from_checkpoint auto`" in message and "the `--output_dir` of the run" in message


@pytest.mark.parametrize("command", ["benchmark", "throughput", "study", "visualize", "convert", "publish"])
def test_entry_point_of_each_command_replaces_parameters_by_its_flags(monkeypatch, command):
    def fail(*arguments):
        raise ValueError("Set `image_size=64`, `license=mit` or `seed=1`; `no_such_option=1` stays.")

    module = import_command(command)
    monkeypatch.setattr(module, "main", fail)
    message = run_entry_point(monkeypatch, command)
    own = {
        "visualize": "Set `image_size=64`, `license=mit` or `--seed 1`",
        "convert": "Set `--image_size 64`, `license=mit` or `seed=1`",
        "publish": "Set `image_size=64`, `--license mit` or `seed=1`",
    }
    assert own.get(command, "Set `--image_size 64`, `--license mit` or `--seed 1`") in message
    assert "`no_such_option=1` stays" in message
