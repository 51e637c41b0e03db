"""scripts/finetune.py and scripts/evaluate.py with --streaming, on one process and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import HANG_S, SCRIPTS, import_command
from helpers.streams import write_shards
from safetensors.torch import load_file

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY |= {"intermediate_size": 32}
COMMON = "--use_cpu --report_to none --disable_tqdm true --seed 3 --per_device_train_batch_size 4".split()
SCRATCH = ["--from_scratch", "--model_type", "vit", "--config_overrides", json.dumps(TINY)]
MIXING = "--horizontal_layers 1 --horizontal_tau none --horizontal_rho 0 --vertical_layers 2".split()


def metrics(folder):
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture
def source(tmp_path):
    folder = write_shards(tmp_path / "source", [9, 9, 9, 9])
    write_shards(folder, [10, 5], "validation", first=100)
    return ["--dataset_name", str(folder), "--cache_dir", str(tmp_path / "cache")]


def test_evaluate_with_streaming_equals_evaluate_without(source, tmp_path, capsys):
    finetune, out = import_command("finetune"), tmp_path / "out"
    options = [*COMMON, *source, *SCRATCH, *MIXING, "--do_train", "--do_eval", "--num_train_epochs", "1"]
    trainer = finetune.build_trainer([*options, "--streaming", "--shuffle_buffer", "8", "--output_dir", str(out)])
    assert trainer.train_dataset.shuffle_buffer == 8
    finetune.train_and_evaluate(trainer)
    assert trainer.state.global_step == 9 and metrics(out)["eval_samples"] == 15
    assert "| 15 |" in (out / "README.md").read_text()

    options = [str(out), *source, "--use_cpu", "--batch_size", "4"]
    results = []
    for more in ([], ["--streaming", "--num_workers", "3"]):
        import_command("evaluate").main([*options, *more, "--json", str(tmp_path / "result.json")])
        results.append(json.loads((tmp_path / "result.json").read_text()))
    loaded, streamed = results
    assert streamed["num_images"] == 15 and streamed["dataset_fingerprint"] is None
    # There are at most five classes.
    assert loaded["top5"] is None and streamed["top5"] is None
    for name in ("top1", "loss"):
        assert loaded[name] == pytest.approx(streamed[name], rel=1e-5)
        assert loaded[name] == pytest.approx(metrics(out)[f"eval_{name}"], rel=1e-5)


def test_build_trainer_with_wrong_streaming_option_raises(source, tmp_path):
    finetune = import_command("finetune")
    options = [*COMMON, *source, *SCRATCH, "--do_train", "--streaming", "--output_dir", str(tmp_path / "out")]
    for more, message in (
        (["--max_train_samples", "5"], "`max_train_samples` selects images of the complete split"),
        (["--eval_split", "dev", "--do_eval"], "no split 'dev'"),
        (["--shuffle_buffer", "0"], "`shuffle_buffer` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune.build_trainer([*options, *more])


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]


def launch(program, script, folder, *options):
    command = [*program, str(SCRIPTS / f"{script}.py"), *options]
    subprocess.run(command, check=True, env=ENVIRONMENT, cwd=folder, timeout=HANG_S)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 restores no optimizer to the device 'cpu:0'")
def test_finetune_resumed_on_stream_equals_uninterrupted_run(source, tmp_path):
    options = [*COMMON, *source, *SCRATCH, *MIXING, "--streaming", "--do_train", "--do_eval", "--max_steps", "7"]
    options += "--logging_steps 1 --save_steps 3 --dataloader_num_workers 2 --mixup_alpha 0.8".split()
    launch(TORCHRUN, "finetune", tmp_path, *options, "--output_dir", "uninterrupted")
    # 36 images in batches of 2 * 4: four steps an epoch.
    assert (
        metrics(tmp_path / "uninterrupted")["epoch"] == 1.75
        and metrics(tmp_path / "uninterrupted")["eval_samples"] == 15
    )
    # As if interrupted after step 3, the second to last of the first epoch.
    (tmp_path / "parts").mkdir()
    (tmp_path / "uninterrupted" / "checkpoint-3").rename(tmp_path / "parts" / "checkpoint-3")
    launch(TORCHRUN, "finetune", tmp_path, *options, "--output_dir", "parts", "--resume_from_checkpoint", "last")
    weights, logs = [], []
    for folder in (tmp_path / "uninterrupted", tmp_path / "parts"):
        weights.append(load_file(folder / "model.safetensors"))
        records = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
        logs.append([record["loss"] for record in records if "loss" in record])
    assert logs[0] == logs[1] and len(logs[0]) == 7
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


@pytest.mark.slow
def test_evaluate_stream_on_two_processes_equals_one_process(source, tmp_path):
    options = [*COMMON, *source, *SCRATCH, "--do_train", "--max_steps", "5", "--output_dir", "model"]
    launch([sys.executable], "finetune", tmp_path, *options)
    options = [*COMMON, *source, "--model_name_or_path", "model", "--do_eval", "--streaming", "--output_dir", "both"]
    launch(TORCHRUN, "finetune", tmp_path, *options, "--per_device_eval_batch_size", "4")
    results = []
    for program, more in ((TORCHRUN, ["--streaming"]), ([sys.executable], [])):
        options = ["model", *source, "--use_cpu", "--batch_size", "4", "--json", "result.json", *more]
        launch(program, "evaluate", tmp_path, *options)
        results.append(json.loads((tmp_path / "result.json").read_text()))
    two, one = results
    assert (two["num_processes"], two["num_images"], one["num_images"]) == (2, 15, 15)
    assert metrics(tmp_path / "both")["eval_samples"] == 15
    for name in ("top1", "top5"):
        assert two[name] == one[name] == pytest.approx(metrics(tmp_path / "both")[f"eval_{name}"])
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
