"""Check that resuming, the best model and the exported model have exactly the expected tensors."""

import json
from pathlib import Path

import pytest
import torch
from helpers.state_dicts import assert_same
from helpers.tiny_training import Images, plain_vit, tokenmixup_vit
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTImageProcessor

from hf_tokenmixup.models import TokenMixupViTForImageClassification
from hf_tokenmixup.training import TokenMixupTrainer

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
MODELS = [plain_vit, tokenmixup_vit]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def get_differing_names(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in expected if not torch.equal(actual[name], expected[name])}


@pytest.fixture
def trained(arguments):
    """Return a function that trains two epochs of three steps, saves each step and returns the trainer."""

    def make(make_model, **settings):
        args = arguments(save_strategy="steps", save_steps=1, max_steps=6, **settings)
        trainer = TokenMixupTrainer(make_model(**DROPOUT), args, train_dataset=Images(12))
        trainer.train()
        return trainer

    return make


@pytest.mark.parametrize("make_model", MODELS)
@pytest.mark.parametrize("step", [2, 3, 5])
def test_resume_at_any_step_equals_uninterrupted(trained, make_model, step):
    # The states of momentum, dropout, mixup and an augmentation by epoch must all be restored.
    first = trained(make_model, optim_args="momentum=0.9", mixup_alpha=0.8)
    args, expected = first.args, weights(first.model)
    other = make_model(**DROPOUT)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.uniform_(-1, 1)
    images = Images(12)
    resumed = TokenMixupTrainer(other, args, train_dataset=images)
    resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-{step}")
    assert images.seen[-1] == 1 and set(images.seen) <= {step // 3, 1}
    assert_same(weights(other), expected)


@pytest.mark.parametrize("make_model", MODELS)
def test_load_checkpoint_restores_all_tensors_and_keeps_random_state(trained, make_model):
    trainer = trained(make_model)
    expected = weights(trainer.model)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1.0)
    random_state = torch.get_rng_state()
    trainer._load_from_checkpoint(f"{trainer.args.output_dir}/checkpoint-6")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(weights(trainer.model), expected)


@pytest.mark.parametrize("make_model", MODELS)
def test_load_best_model_equals_best_checkpoint(arguments, make_model):
    at_step = {}

    class Worsening(TokenMixupTrainer):
        def evaluate(self, *args, **kwargs):
            at_step[self.state.global_step] = weights(self.model)
            self.state.log_history.append({"step": self.state.global_step})
            return {"eval_top1": 0.9 if self.state.global_step == 2 else 0.5}

    args = arguments(
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="top1",
    )
    trainer = Worsening(make_model(), args, train_dataset=Images(16), eval_dataset=Images(4))
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert_same(weights(trainer.model), at_step[2])
    assert len(get_differing_names(at_step[4], at_step[2])) > len(at_step[2]) // 2


def test_load_checkpoint_sharded_restores_all_tensors(trained):
    trainer = trained(tokenmixup_vit)
    folder = Path(trainer.args.output_dir) / "checkpoint-6"
    expected = weights(trainer.model)
    (folder / "model.safetensors").unlink()
    trainer.model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1.0)
    trainer._load_from_checkpoint(str(folder))
    assert_same(weights(trainer.model), expected)


def test_load_checkpoint_of_another_model_raises(trained, tmp_path):
    trainer = trained(tokenmixup_vit)
    checkpoint = f"{trainer.args.output_dir}/checkpoint-6"
    before = weights(trainer.model)

    for model in (plain_vit(), trainer.model.to_plain_model()):
        model.save_pretrained(tmp_path / "no_scorenet")
        with pytest.raises(ValueError, match="does not match this TokenMixupViT.* missing: .*(ScoreNet|scorenet)"):
            trainer._load_from_checkpoint(str(tmp_path / "no_scorenet"))
    assert_same(weights(trainer.model), before)

    args = trainer.args
    other = TokenMixupTrainer(tokenmixup_vit(horizontal_layers=[1, 2]), args, train_dataset=Images(4))
    with pytest.raises(ValueError, match="does not match.* missing: vit.layers.2.scorenet"):
        other.train(resume_from_checkpoint=checkpoint)

    other = TokenMixupTrainer(tokenmixup_vit(intermediate_size=24), args, train_dataset=Images(4))
    with pytest.raises(ValueError, match="does not match.* of another shape: vit.layers.0.mlp.*and 6 more"):
        other.train(resume_from_checkpoint=checkpoint)


def test_save_model_exports_plain_model_and_checkpoint_has_scorenet(arguments):
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    args = arguments(save_strategy="steps", save_steps=1, max_steps=1)
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(4), processing_class=processor)
    trainer.train()
    trainer.save_model()
    out = Path(args.output_dir)
    full, exported = load_file(out / "checkpoint-1/model.safetensors"), load_file(out / "model.safetensors")
    assert sorted(full.keys() - exported.keys()) == sorted(name for name in full if "scorenet" in name) != []
    for name, tensor in exported.items():
        assert torch.equal(tensor, full[name]), name
    assert (out / "preprocessor_config.json").is_file()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]
    assert isinstance(trainer.model, TokenMixupViTForImageClassification)

    model, report = ViTForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixels = Images(4).pixels
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, trainer.model.eval()(pixels).logits)
    assert type(AutoModelForImageClassification.from_pretrained(out)) is ViTForImageClassification

    restored = TokenMixupViTForImageClassification.from_pretrained(out / "checkpoint-1")
    assert_same(weights(restored), weights(trainer.model))


def test_save_model_before_training_changes_no_model_or_random_state(arguments):
    trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(), train_dataset=Images(4))
    random_state = torch.get_rng_state()
    trainer.save_model()
    assert torch.equal(torch.get_rng_state(), random_state)
    trainer.train()
    assert trainer.model.training and "scorenet" in " ".join(trainer.model.state_dict())
