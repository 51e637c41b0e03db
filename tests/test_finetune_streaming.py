"""scripts/finetune.py and scripts/evaluate.py with --streaming, on one process and on two."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from streams import write_shards

SCRIPTS = Path(__file__).parents[1] / "scripts"
TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY |= {"intermediate_size": 32}
COMMON = "--use_cpu --report_to none --disable_tqdm true --seed 3 --per_device_train_batch_size 4".split()
SCRATCH = ["--from_scratch", "--model_type", "vit", "--config_overrides", json.dumps(TINY)]
MIXING = "--horizontal_layers 1 --horizontal_tau none --horizontal_rho 0 --vertical_layers 2".split()

pytestmark = pytest.mark.usefixtures("quick_streams")


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics(folder):
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture
def source(tmp_path):
    folder = write_shards(tmp_path / "source", [9, 9, 9, 9])
    write_shards(folder, [10, 5], "validation", first=100)
    return ["--dataset_name", str(folder), "--cache_dir", str(tmp_path / "cache")]


def test_train_and_evaluate_with_and_without_streaming(source, tmp_path, capsys):
    finetune, out = script("finetune"), tmp_path / "out"
    options = [*COMMON, *source, *SCRATCH, *MIXING, "--do_train", "--do_eval", "--num_train_epochs", "1"]
    trainer = finetune.prepare([*options, "--streaming", "--shuffle_buffer", "8", "--output_dir", str(out)])
    assert trainer.train_dataset.shuffle_buffer == 8
    finetune.run(trainer)
    assert trainer.state.global_step == 9 and metrics(out)["eval_samples"] == 15
    assert "| 15 |" in (out / "README.md").read_text()

    options = [str(out), *source, "--use_cpu", "--batch_size", "4"]
    results = []
    for more in ([], ["--streaming", "--num_workers", "3"]):
        script("evaluate").main([*options, *more, "--json", str(tmp_path / "result.json")])
        results.append(json.loads((tmp_path / "result.json").read_text()))
    whole, streamed = results
    assert streamed["num_images"] == 15 and streamed["dataset_fingerprint"] is None
    for name in ("top1", "top5", "loss"):
        assert whole[name] == pytest.approx(streamed[name], rel=1e-5)
        assert whole[name] == pytest.approx(metrics(out)[f"eval_{name}"], rel=1e-5)


def test_mistakes_are_told_before_training(source, tmp_path):
    finetune = script("finetune")
    options = [*COMMON, *source, *SCRATCH, "--do_train", "--streaming", "--output_dir", str(tmp_path / "out")]
    for more, message in (
        (["--max_train_samples", "5"], "--max_train_samples draws from the whole split"),
        (["--eval_split", "dev", "--do_eval"], "No split 'dev'"),
        (["--shuffle_buffer", "0"], "--shuffle_buffer must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune.prepare([*options, *more])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_train_evaluate_and_resume_on_a_stream(source, tmp_path, workers):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2"]
    options = [str(SCRIPTS / "finetune.py"), *COMMON, *source, *SCRATCH, *MIXING, "--streaming", "--do_train"]
    options += ["--do_eval", "--max_steps", "7", "--logging_steps", "1", "--save_steps", "3"]
    options += ["--dataloader_num_workers", str(workers), "--mixup_alpha", "0.8"]

    def launch(folder, *more, program=torchrun):
        command = [*program, *options, "--output_dir", folder, *more]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=300)
        lines = (tmp_path / folder / "training_log.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record]

    whole = launch("two")
    result = metrics(tmp_path / "two")
    # 36 images in batches of 2 * 4: four steps an epoch.
    assert len(whole) == 7 and result["epoch"] == 1.75 and result["eval_samples"] == 15
    # As if interrupted behind step 3, the last but one of the first epoch.
    (tmp_path / "parts").mkdir()
    (tmp_path / "two" / "checkpoint-3").rename(tmp_path / "parts" / "checkpoint-3")
    assert launch("parts", "--resume_from_checkpoint", "last") == whole
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("two", "parts"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())

    # Two processes evaluate as one does, by the host's loop and by the script of its own.
    options = [str(SCRIPTS / "finetune.py"), *COMMON, *source, "--model_name_or_path", "two", "--do_eval"]
    for program, folder, more in ((torchrun, "both", ["--streaming"]), ([sys.executable], "alone", [])):
        command = [*program, *options, *more, "--output_dir", folder]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=300)
    both, alone = metrics(tmp_path / "both"), metrics(tmp_path / "alone")
    assert both["eval_samples"] == 15
    assert (both["eval_top1"], both["eval_top5"]) == (alone["eval_top1"], alone["eval_top5"])
    results = []
    for program, more in ((torchrun, ["--streaming"]), ([sys.executable], [])):
        command = [*program, str(SCRIPTS / "evaluate.py"), "two", *source, "--use_cpu", "--batch_size", "4", *more]
        subprocess.run([*command, "--json", "r.json"], check=True, env=environment, cwd=tmp_path, timeout=300)
        results.append(json.loads((tmp_path / "r.json").read_text()))
    assert [result["num_images"] for result in results] == [15, 15] and results[0]["num_processes"] == 2
    assert results[0]["top1"] == results[1]["top1"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)
