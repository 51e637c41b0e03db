"""What goes to the Hub from a training, when, and what its card says."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_training import Images, resnet, tokenmixup_vit
from huggingface_hub import ModelCard
from safetensors.torch import load
from transformers import ViTImageProcessor

from hf_tokenmixup.data import collate
from hf_tokenmixup.hub.model_card import TrainingCardData
from hf_tokenmixup.hub.upload import HubUploadError
from hf_tokenmixup.metrics import compute_metrics, top_classes
from hf_tokenmixup.training import TokenMixupTrainer
from hf_tokenmixup.training.checkpointing.integrity import find_checkpoint_error

PUBLISHED = {".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
EVALUATION = {
    "dataset": "alice/pictures",
    "dataset_config": None,
    "dataset_revision": None,
    "dataset_fingerprint": "0123456789abcdef",
    "split": "test",
    "command": "python scripts/evaluate.py {model} --dataset_name=alice/pictures",
}


def trainer_of(args, model=None, **options):
    return TokenMixupTrainer(
        model or tokenmixup_vit(),
        args,
        train_dataset=Images(8),
        eval_dataset=Images(10),
        data_collator=collate,
        processing_class=ViTImageProcessor(size={"height": 8, "width": 8}),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=top_classes,
        **options,
    )


@pytest.mark.parametrize("model", [tokenmixup_vit, resnet])
def test_push_to_hub_uploads_exported_model(hub, arguments, tmp_path, model):
    args = arguments(push_to_hub=True, hub_model_id="alice/vit", hub_token="hf_alice", hub_private_repo=True)
    facts = TrainingCardData(dataset="alice/pictures", recipe="tiny", command="accelerate launch scripts/finetune.py")
    trainer = trainer_of(args, model(), training_card_data=facts, eval_card_data=EVALUATION)
    # The repository is there before the training.
    assert hub.repo("alice/vit").private and set(hub.files("alice/vit")) == {".gitattributes"}
    trainer.train()
    metrics = trainer.evaluate()
    trainer.push_to_hub()

    files = hub.files("alice/vit")
    assert set(files) == PUBLISHED
    sent, own = load(files["model.safetensors"]), trainer.model.state_dict()
    names = [name for name in own if ".scorenet." not in name]
    assert sum(tensor.numel() for tensor in sent.values()) == sum(own[name].numel() for name in names)
    card = ModelCard(files["README.md"].decode())
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["accuracy"].metric_value == metrics["eval_top1"] and results["loss"].dataset_split == "test"
    assert results["accuracy"].dataset_type == "alice/pictures" and card.data.datasets == ["alice/pictures"]
    assert 'model="alice/vit"' in card.text and "scripts/evaluate.py alice/vit --dataset_name" in card.text
    assert "`learning_rate` | 0.1" in card.text and "recipe | `tiny`" in card.text
    assert not hub.requests_containing(str(tmp_path)) and not hub.requests_containing("hf_alice")


def test_card_evaluation_is_that_of_exported_model(arguments):
    trainer = trainer_of(arguments(), eval_card_data=EVALUATION)
    assert not trainer.model_card("alice/vit").data.eval_results
    metrics = trainer.evaluate()
    evaluation = trainer.run_record.evaluation_result("alice/vit")
    exported = trainer.model.to_plain_model()
    assert evaluation.num_parameters == sum(p.numel() for p in exported.parameters())
    assert evaluation.num_parameters < sum(p.numel() for p in trainer.model.parameters())
    assert (evaluation.num_images, evaluation.loss, evaluation.dtype) == (10, metrics["eval_loss"], "fp32")
    assert evaluation.macs > 0 and not trainer_of(arguments()).run_record.evaluation_result("alice/vit")


def test_push_to_hub_without_write_access_raises_before_training(hub, arguments):
    hub.add_repo("alice/vit")
    for token, said in (("hf_bob", "No write access to alice/vit"), ("hf_stale", "rejected the token")):
        args = arguments(push_to_hub=True, hub_model_id="alice/vit", hub_token=token)
        with pytest.raises(HubUploadError, match=said):
            trainer_of(args)


def test_push_to_hub_failed_upload_leaves_run_complete(hub, arguments, tmp_path):
    args = arguments(push_to_hub=True, hub_model_id="alice/vit", hub_token="hf_alice")
    trainer = trainer_of(args)
    trainer.train()
    hub.reject_next_upload()
    with pytest.raises(HubUploadError, match="Repeat the upload: `hf-tokenmixup publish .*out alice/vit`"):
        trainer.push_to_hub()
    assert PUBLISHED - {".gitattributes"} <= {path.name for path in (tmp_path / "out").iterdir()}
    trainer.push_to_hub()
    assert set(hub.files("alice/vit")) == PUBLISHED


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_upload_during_training_has_exported_model(hub, arguments, strategy):
    args = arguments(
        save_strategy="steps", save_steps=1, max_steps=2, push_to_hub=True, hub_strategy=strategy,
        hub_model_id="alice/vit", hub_token="hf_alice", hub_always_push=True,
    )  # fmt: skip
    trainer = trainer_of(args)
    trainer.train()
    trainer._finish_current_push()

    commits = [commit.title for commit in hub.repo("alice/vit").commits.values()]
    assert {"Training in progress, step 1", "Training in progress, step 2"} <= set(commits)
    files = hub.files("alice/vit")
    assert {name for name in files if "/" not in name} == PUBLISHED
    assert "scorenet" not in " ".join(load(files["model.safetensors"]))
    saved = {name.removeprefix("last-checkpoint/") for name in files if "/" in name}
    if strategy == "every_save":
        assert not saved
        return
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= saved and "training_args.bin" not in saved
    checkpoint = load(files["last-checkpoint/model.safetensors"])
    (name,) = [name for name in checkpoint if name.endswith("scorenet.classifier.weight")]
    assert torch.equal(checkpoint[name], trainer.model.vit.layers[1].scorenet.classifier.weight)
    assert not hub.requests_containing("hf_alice")


def test_uploaded_checkpoint_has_no_local_path_and_is_complete(hub, arguments, tmp_path):
    args = arguments(
        save_strategy="steps", save_steps=1, max_steps=2, eval_strategy="steps", eval_steps=1, push_to_hub=True,
        hub_strategy="all_checkpoints", hub_model_id="alice/vit", hub_token="hf_alice", hub_always_push=True,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer = trainer_of(args)
    trainer.train()
    trainer.push_to_hub()

    files = hub.files("alice/vit")
    state = json.loads(files["checkpoint-2/trainer_state.json"])
    assert state["best_model_checkpoint"] in ("checkpoint-1", "checkpoint-2")
    on_disk = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert str(tmp_path) in on_disk["best_model_checkpoint"] and state["log_history"] == on_disk["log_history"]
    for folder in (str(tmp_path), f"{Path.home()}/"):
        assert [name for name, content in files.items() if folder.encode() in content] == []
        assert not hub.requests_containing(folder)
    downloaded = tmp_path / "downloaded"
    for name, content in files.items():
        (downloaded / name).parent.mkdir(parents=True, exist_ok=True)
        (downloaded / name).write_bytes(content)
    assert find_checkpoint_error(downloaded / "checkpoint-2") is None
