"""`finetune.py` from start to end for families of plain checkpoints: killed, resumed, published, opened, evaluated."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from helpers.commands import SCRIPTS
from helpers.hub_consumer import describe, open_without_package
from kill_and_resume import EVAL_IMAGES, differences, kill_and_resume
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_tokenmixup.data import load_digits_dataset

KILLS = 6


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["dinov2", "siglip", "timm_dinov3"])
def test_killed_run_publishes_model_of_uninterrupted_run(checkpoint, hub, tmp_path):
    _, kills = kill_and_resume(tmp_path, KILLS, seed=5, options=[], checkpoint=checkpoint)
    assert len(kills) == KILLS and len({kill.moment.phase for kill in kills}) == KILLS
    assert list(differences(tmp_path / "uninterrupted", tmp_path / "killed")) == []
    records = [json.loads(line) for line in (tmp_path / "killed" / "training_log.jsonl").read_text().splitlines()]
    assert any(record.get("replaced_tokens") for record in records)
    assert any(record.get("vertical_tokens") for record in records)

    name = f"alice/{checkpoint}"
    environment = hub.environment("hf_alice", cache=tmp_path / "cache") | {"OMP_NUM_THREADS": "1"}

    def run(script, *arguments):
        command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    run("publish.py", tmp_path / "killed", name)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "uninterrupted")
    image = load_digits_dataset()["test"][0]["image"].convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "uninterrupted")(image, return_tensors="pt")["pixel_values"]
    open_without_package(hub, tmp_path, image, {name: describe(model, pixels)})

    card = hub.files(name)["README.md"].decode()
    (command,) = re.findall(r"^python scripts/(evaluate.py .*)$", card, re.MULTILINE)
    assert command.startswith(f"evaluate.py {name} ")
    run(*shlex.split(command), "--use_cpu", "--json", tmp_path / "evaluated.json")
    evaluated = json.loads((tmp_path / "evaluated.json").read_text())
    expected = json.loads((tmp_path / "uninterrupted" / "all_results.json").read_text())
    assert evaluated["num_images"] == EVAL_IMAGES and evaluated["top1"] == expected["eval_top1"]
    assert evaluated["loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
