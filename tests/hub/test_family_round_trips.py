"""`finetune.py` from a plain checkpoint of each family to a plain model on the Hub, resumed in between."""

import json

import pytest
import torch
from helpers.commands import import_command
from helpers.family_checkpoints import CHECKPOINTS, DIGITS, MIXING, write_checkpoint
from transformers import AutoModelForImageClassification

OPTIONS = "--use_cpu --report_to none --disable_tqdm true --seed 3 --per_device_train_batch_size 8".split()
OPTIONS += "--max_train_samples 24 --max_eval_samples 20 --do_train --do_eval --max_steps 2 --save_steps 1".split()
OPTIONS += ["--logging_steps", "1", *DIGITS, *MIXING]


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_finetuned_checkpoint_resumes_and_opens_in_plain_class(name, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    # The figure takes a third of the time.
    monkeypatch.setattr("hf_tokenmixup.training.callbacks.plot_training_curves", lambda *arguments: None)
    finetune = import_command("finetune")
    out = tmp_path / "out"
    options = [*OPTIONS, *write_checkpoint(tmp_path / "checkpoint", name), "--output_dir", str(out)]
    uninterrupted = finetune.build_trainer(options)
    uninterrupted.train()
    expected = weights(uninterrupted.model)
    assert any("scorenet" in parameter for parameter in expected)

    publish = ["--push_to_hub", "--hub_model_id", f"alice/{name}"]
    trainer = finetune.build_trainer([*options, *publish, "--resume_from_checkpoint", str(out / "checkpoint-1")])
    assert not all(torch.equal(tensor, expected[key]) for key, tensor in weights(trainer.model).items())
    finetune.train_and_evaluate(trainer)
    assert trainer.state.global_step == 2
    resumed = weights(trainer.model)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[key], tensor) for key, tensor in expected.items())
    records = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record.get("replaced_tokens")] == [1, 2]

    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for file, content in hub.files(f"alice/{name}").items():
        (downloaded / file).write_bytes(content)
    trust = {"trust_remote_code": True} if name == "cct" else {}
    opened, report = AutoModelForImageClassification.from_pretrained(downloaded, output_loading_info=True, **trust)
    assert not any(report.values()) and "TokenMixup" not in type(opened).__name__
    pixels = torch.stack([item["pixel_values"] for item in (trainer.eval_dataset[0], trainer.eval_dataset[1])])
    with torch.no_grad():
        torch.testing.assert_close(opened.eval()(pixels).logits, trainer.model.eval()(pixels).logits)
