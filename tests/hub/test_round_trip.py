"""From `finetune.py --push_to_hub` to a user who has transformers but not this package."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from helpers.commands import SCRIPTS, import_command
from helpers.hub_consumer import describe, open_without_package
from huggingface_hub import ModelCard
from safetensors.torch import load

from hf_tokenmixup.data import load_digits_dataset

COMMON = "--use_cpu --report_to none --disable_tqdm true --seed 3 --per_device_train_batch_size 16".split()
DIGITS = "--dataset_name digits --eval_split test --max_train_samples 64 --max_eval_samples 40 --hflip 0".split()
MIXING = "--from_scratch --horizontal_layers 1 --horizontal_tau none --horizontal_rho 0 --vertical_layers 1".split()
TRAINING = "--do_train --do_eval --max_steps 3 --save_steps 2 --logging_steps 1 --push_to_hub".split()
SMALL = {"image_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32}
MODELS = {"vit": SMALL | {"patch_size": 4}, "cct": SMALL}


@pytest.fixture(scope="module")
def finetune():
    return import_command("finetune")


def arguments(family, out, *more):
    model = ["--model_type", family, "--config_overrides", json.dumps(MODELS[family])]
    return [*COMMON, *DIGITS, *MIXING, *TRAINING, *model, "--output_dir", str(out), *more]


def test_pushed_model_loads_without_hf_tokenmixup(finetune, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    image = load_digits_dataset()["test"][0]["image"].convert("RGB")
    expected = {}
    for family in MODELS:
        trainer = finetune.build_trainer(
            arguments(family, tmp_path / family, "--hub_model_id", f"alice/digits-{family}")
        )
        finetune.train_and_evaluate(trainer)
        model = trainer.model.to_plain_model()
        files = hub.files(f"alice/digits-{family}")
        code = {"configuration_cct.py", "modeling_cct.py"} if family == "cct" else set()
        assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} | code <= set(files)
        assert not any("/" in name or name.endswith((".pt", ".bin", ".pth")) for name in files)
        assert not any(b"hf_tokenmixup" in files[name] for name in code)

        metrics = json.loads((tmp_path / family / "all_results.json").read_text())
        card = ModelCard(files["README.md"].decode())
        results = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert results["accuracy"] == metrics["eval_top1"] and results["loss"] == metrics["eval_loss"]
        command = f"scripts/evaluate.py alice/digits-{family} --dataset_name=digits --eval_split=test"
        assert command in card.text and "--max_eval_samples=40" in card.text and "![Training" in card.text

        pixels = trainer.eval_dataset.transform(image)[None]
        expected[f"alice/digits-{family}"] = describe(model, pixels, remote_code=family == "cct")
        names = set(load(files["model.safetensors"]))
        assert names and not any("scorenet" in name for name in names)
    assert not hub.requests_containing(str(tmp_path)) and not hub.requests_containing("hf_alice")

    open_without_package(hub, tmp_path, image, expected)


def test_publish_script_after_failed_push_uploads_folder(finetune, hub, tmp_path):
    out = tmp_path / "out"
    first = ["--hub_model_id", "alice/first", "--hub_token", "hf_alice", "--hub_strategy", "end"]
    trainer = finetune.build_trainer(arguments("cct", out, *first))
    hub.reject_next_upload()
    with pytest.raises(finetune.HubUploadError, match="hf-tokenmixup publish .*out alice/first"):
        finetune.train_and_evaluate(trainer)
    assert set(hub.files("alice/first")) == {".gitattributes"}

    environment = hub.environment("hf_alice", cache=tmp_path / "cache") | {"OMP_NUM_THREADS": "1"}
    publish = [sys.executable, str(SCRIPTS / "publish.py"), str(out), "alice/second"]
    done = subprocess.run(publish, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("alice/second"), done.stderr
    files = hub.files("alice/second")
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert 'model="alice/second"' in card and "evaluate.py alice/second " in card and "alice/first" not in card
    assert ModelCard(card).data.model_name == "second"

    assert not hub.requests_containing(str(tmp_path)) and not hub.requests_containing("hf_alice")


def test_card_command_reproduces_results(finetune, tmp_path):
    """The evaluation images are a fraction of the training split, which the command must select again."""
    data = load_digits_dataset()["train"].select(range(200))
    data.to_parquet(tmp_path / "pictures" / "train.parquet")
    model = ["--model_type", "vit", "--from_scratch", "--config_overrides", json.dumps(MODELS["vit"])]
    options = ["--dataset_name", tmp_path / "pictures", "--train_val_split", 0.3, "--do_train", "--do_eval"]
    trainer = finetune.build_trainer(
        [*COMMON, *model, *map(str, [*options, "--max_steps", 2, "--output_dir", tmp_path])]
    )
    finetune.train_and_evaluate(trainer)
    metrics = json.loads((tmp_path / "eval_results.json").read_text())
    (line,) = re.findall(r"^python (scripts/evaluate.py .*)$", (tmp_path / "README.md").read_text(), re.MULTILINE)
    # The card contains neither the path of the data nor that of the model.
    assert str(tmp_path) not in line
    line = line.replace(f" {tmp_path.name} ", f" {tmp_path} ").replace("=pictures", f"={tmp_path / 'pictures'}")
    command = [sys.executable, *shlex.split(line), "--use_cpu", "--json", str(tmp_path / "again.json")]
    done = subprocess.run(command, cwd=SCRIPTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["num_images"] == 60 and again["top1"] == metrics["eval_top1"]
    assert again["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
