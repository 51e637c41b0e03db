"""LoRA: what trains, what a checkpoint holds, what is exported, and mistakes that are reported."""

import sys
from pathlib import Path

import pytest
import torch
from helpers.peft_versions import skip_without_add_adapter
from helpers.tiny_training import CLASSES, Images, plain_vit, resnet, tokenmixup_vit
from safetensors.torch import load, load_file
from transformers import AutoModelForImageClassification, ViTForImageClassification

from hf_tokenmixup.models import TokenMixupCctConfig, TokenMixupCctForImageClassification, load_classifier
from hf_tokenmixup.training import LoraArguments, TokenMixupTrainer, add_lora
from hf_tokenmixup.training.checkpointing.integrity import find_checkpoint_error

peft = pytest.importorskip("peft")

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


def tokenmixup_cct(**settings) -> TokenMixupCctForImageClassification:
    torch.manual_seed(1)
    size = {"image_size": 8, "tokenizer": "patch", "hidden_size": 16, "num_hidden_layers": 3, "num_labels": CLASSES}
    size |= {"num_attention_heads": 2, "intermediate_size": 32, "horizontal_layers": [1], "vertical_layers": [2]}
    size |= {"horizontal_tau": None, "vertical_kappa": 2, "horizontal_rho": 0.0}
    return TokenMixupCctForImageClassification(TokenMixupCctConfig(**size | settings))


MODELS = {"vit": tokenmixup_vit, "cct": tokenmixup_cct}
TARGETS = {"vit": ["q_proj", "v_proj"], "cct": ["qkv"]}
IN_FULL = {"vit": ["classifier"], "cct": ["classifier", "scorenet.attention"]}


def adapt(family="vit", route="ours", dropout=0.0, **settings):
    """A model with adapters, by our function, by peft's or by that of transformers."""
    model = MODELS[family](**settings)
    torch.manual_seed(2)
    if route == "ours":
        return add_lora(model, 2, dropout=dropout)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, lora_dropout=dropout, target_modules=TARGETS[family], modules_to_save=IN_FULL[family]
    )
    if route == "peft":
        return peft.get_peft_model(model, config)
    skip_without_add_adapter()
    model.add_adapter(config)
    return model


def inner(model):
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in inner(model).state_dict().items()}


def trainable(model):
    return {name for name, parameter in inner(model).named_parameters() if parameter.requires_grad}


def expected_to_train(family):
    adapted = {
        f"{family}.layers.{layer}.attention.{target}.lora_{part}.default.weight"
        for layer in range(3)
        for target in TARGETS[family]
        for part in "AB"
    }
    full = ["classifier", f"{family}.layers.1.scorenet.classifier"]
    full += [f"{family}.layers.1.scorenet.attention"] if family == "cct" else []
    return adapted | {f"{name}.modules_to_save.default.{kind}" for name in full for kind in ("weight", "bias")}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tau", [None, 1e-9])
def test_lora_trains_adapters_classifier_and_scorenet(family, tau):
    """By name; also where no image is easy, so that processes need not look for unused parameters."""
    model = adapt(family, horizontal_tau=tau).train()
    assert trainable(model) == expected_to_train(family)
    images = Images(6)
    output = model(pixel_values=images.pixels, labels=images.labels)
    assert output.mixing_metrics["easy_samples"] == (6 if tau is None else 0)
    output.loss.backward()
    without = {name for name, parameter in inner(model).named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in inner(model).named_parameters()} - expected_to_train(family)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("route", ["ours", "peft", "transformers"])
def test_lora_resumed_run_matches_uninterrupted_run(arguments, family, route):
    """And what trained is what should, its checkpoint is small, and what is exported is a plain model."""
    args = arguments(save_strategy="steps", save_steps=3, max_steps=6, optim_args="momentum=0.9", mixup_alpha=0.8)
    model = adapt(family, route, dropout=0.2, **DROPOUT)
    before = weights(model)
    trainer = TokenMixupTrainer(model, args, train_dataset=Images(12))
    assert trainer.accelerator.ddp_handler.find_unused_parameters is False
    trainer.train()
    expected = weights(model)
    assert {name for name in before if not torch.equal(before[name], expected[name])} == expected_to_train(family)

    checkpoint = Path(args.output_dir) / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    other = adapt(family, route, dropout=0.2, **DROPOUT)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.uniform_(-1, 1)
    resumed = TokenMixupTrainer(other, args, train_dataset=Images(12))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert trainable(other) == expected_to_train(family)
    got = weights(other)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)

    trainer.save_model()
    names = {path.name for path in Path(args.output_dir).iterdir()}
    # With an adapter's files beside the model, transformers would put it in a second time.
    assert "model.safetensors" in names and not any("adapter" in name for name in names)
    exported, report = inner(model).base_model_class.from_pretrained(args.output_dir, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixels = Images(5).pixels
    torch.testing.assert_close(exported(pixels).logits, model.eval()(pixel_values=pixels).logits)
    after = weights(model)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_lora_metrics_match_full_training(arguments):
    """At the first step, before any weight has moved; over micro-batches of different sizes."""
    lines = []
    for model in (tokenmixup_vit(), adapt()):
        args = arguments(gradient_accumulation_steps=2, logging_steps=1, label_smoothing_factor=0.1, cutmix_alpha=1.0)
        trainer = TokenMixupTrainer(model, args, train_dataset=Images(7))
        trainer.train()
        lines.append(trainer.state.log_history[0])
    assert lines[0]["mixed_samples"] > 0 and lines[0].keys() == lines[1].keys()
    # The attention to collected tokens is measured after the step.
    for name in lines[0].keys() - {"grad_norm", "vertical_attention"}:
        assert lines[1][name] == pytest.approx(lines[0][name], rel=1e-6), name


@pytest.mark.parametrize("make_model", [plain_vit, resnet])
def test_lora_trains_baseline(arguments, make_model):
    model = make_model()
    adapted = add_lora(model, 2, target_modules=["q_proj"] if make_model is plain_vit else ["convolution"])
    args = arguments(max_steps=2, mixup_alpha=0.8)
    trainer = TokenMixupTrainer(adapted, args, train_dataset=Images(8), eval_dataset=Images(6))
    trainer.train()
    trainer.save_model()
    exported, report = AutoModelForImageClassification.from_pretrained(args.output_dir, output_loading_info=True)
    assert type(exported) is type(model) and not report["missing_keys"] and not report["unexpected_keys"]
    pixels = Images(5).pixels
    torch.testing.assert_close(exported(pixels).logits, adapted.eval()(pixel_values=pixels).logits)


@pytest.mark.parametrize("route", ["ours", "transformers"])
def test_lora_best_model_has_all_tensors_of_its_checkpoint(arguments, route):
    at_step = {}

    class Worsening(TokenMixupTrainer):
        def evaluate(self, *args, **kwargs):
            at_step[self.state.global_step] = weights(self.model)
            self.state.log_history.append({"step": self.state.global_step})
            return {"eval_top1": 0.9 if self.state.global_step == 1 else 0.5}

    args = arguments(
        max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="top1",
    )  # fmt: skip
    trainer = Worsening(adapt(route=route), args, train_dataset=Images(12), eval_dataset=Images(4))
    trainer.train()
    best = weights(trainer.model)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert all(torch.equal(best[name], tensor) for name, tensor in at_step[1].items())
    assert {name for name in best if not torch.equal(best[name], at_step[3][name])} <= expected_to_train("vit")
    assert not torch.equal(
        best["classifier.modules_to_save.default.weight"], at_step[3]["classifier.modules_to_save.default.weight"]
    )


def test_lora_adapter_with_other_name_resumes(arguments):
    args = arguments(save_strategy="steps", save_steps=1, max_steps=2)

    def named():
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
        return peft.get_peft_model(tokenmixup_vit(), config, adapter_name="digits")

    model = named()
    TokenMixupTrainer(model, args, train_dataset=Images(8)).train()
    checkpoint = Path(args.output_dir) / "checkpoint-1"
    other = named()
    TokenMixupTrainer(other, args, train_dataset=Images(8)).train(resume_from_checkpoint=str(checkpoint))
    got, expected = weights(other), weights(model)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    file = checkpoint / "digits" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert find_checkpoint_error(checkpoint) == "digits/adapter_model.safetensors is truncated"


def test_lora_truncated_or_mismatched_checkpoint_raises(arguments):
    args = arguments(save_strategy="steps", save_steps=1)
    TokenMixupTrainer(adapt(), args, train_dataset=Images(4)).train()
    checkpoint = Path(args.output_dir) / "checkpoint-1"
    assert find_checkpoint_error(checkpoint) is None

    def resume(model, message):
        before = weights(model)
        with pytest.raises(ValueError, match=message):
            TokenMixupTrainer(model, args, train_dataset=Images(4)).train(resume_from_checkpoint=str(checkpoint))
        after = weights(model)
        assert all(torch.equal(after[name], before[name]) for name in before)

    resume(add_lora(tokenmixup_vit(), 3), "does not match this TokenMixupViT.* of another shape: .*lora_A")
    resume(add_lora(tokenmixup_vit(), 2, target_modules=["q_proj"]), "does not match .* unexpected: .*v_proj")
    resume(adapt(horizontal_layers=[1, 2]), "does not match .* missing: vit.layers.2.scorenet")
    resume(tokenmixup_vit(), "contains adapters, and this TokenMixupViT.* has none. Resume with the `lora_rank`")

    for name in ("adapter_model.safetensors", "adapter_config.json"):
        complete = (checkpoint / name).read_bytes()
        for share in (0.0, 0.5, 0.95):
            (checkpoint / name).write_bytes(complete[: int(share * len(complete))])
            assert find_checkpoint_error(checkpoint) == f"{name} is truncated"
        (checkpoint / name).write_bytes(complete)
    (checkpoint / "adapter_model.safetensors").unlink()
    assert find_checkpoint_error(checkpoint) == "adapter_model.safetensors is missing"

    full = arguments(save_strategy="steps", save_steps=1, output_dir=str(checkpoint.parent / "full"))
    TokenMixupTrainer(tokenmixup_vit(), full, train_dataset=Images(4)).train()
    checkpoint = Path(full.output_dir) / "checkpoint-1"
    resume(adapt(), "has no adapters .* or train without LoRA")


def test_lora_gradient_checkpointing_after_frozen_embeddings_trains(arguments):
    ends = []
    for settings in ({}, {"use_reentrant": False}, {"use_reentrant": True}):
        checkpointing = {"activation_checkpointing": bool(settings), "activation_checkpointing_kwargs": settings}
        args = arguments(max_steps=2, **checkpointing)
        model = adapt(dropout=0.2, **DROPOUT)
        TokenMixupTrainer(model, args, train_dataset=Images(8)).train()
        ends.append(weights(model))
    for other in ends[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in ends[0].items())


def test_lora_trains_under_autocast(arguments):
    args = arguments(bf16=True, logging_steps=1)
    model = adapt(dropout=0.2)
    before = weights(model)
    trainer = TokenMixupTrainer(model, args, train_dataset=Images(4))
    trainer.train()
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The gradient of A vanishes as long as B is zero.
    assert moved == {name for name in expected_to_train("vit") if ".lora_A." not in name}
    assert trainer.state.log_history[0]["mixed_samples"] == 4


def test_lora_frozen_scorenet_raises(arguments):
    for in_full in (None, ["scorenet", "classifier"]):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=in_full)
        model = peft.get_peft_model(tokenmixup_vit(horizontal_tau=1.0), config)
        trainer = TokenMixupTrainer(model, arguments(), train_dataset=Images(4), eval_dataset=Images(4))
        assert trainer.evaluate()["eval_loss"] > 0
        with pytest.raises(ValueError, match=r"before layer 1 are frozen .*modules_to_save=\['classifier'\] without"):
            trainer.train()
    # A wrapper around the whole of it is right, and so is none where difficulties are not asked for.
    for in_full, tau in ((["scorenet"], 1.0), (None, None)):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=in_full)
        model = peft.get_peft_model(tokenmixup_vit(horizontal_tau=tau), config)
        TokenMixupTrainer(model, arguments(), train_dataset=Images(4)).train()


def test_lora_all_linear_excludes_modules_to_save():
    model = add_lora(tokenmixup_cct(), 2, target_modules=["all-linear"])
    names = {name.partition(".lora_A")[0].split(".")[-1] for name in trainable(model) if ".lora_A." in name}
    assert names == {"qkv", "proj", "linear1", "linear2", "attention_pool"}
    assert expected_to_train("cct") < trainable(model)


def test_lora_settings_are_in_card(arguments):
    for model in (adapt(dropout=0.2), adapt(route="transformers", dropout=0.2)):
        text = TokenMixupTrainer(model, arguments(), train_dataset=Images(4)).model_card("alice/vit").text
        for row in ("`lora_rank` | 2", "`lora_alpha` | 4", "`lora_dropout` | 0.2", "q_proj, v_proj", "peft 0."):
            assert row in text
    assert "lora" not in TokenMixupTrainer(tokenmixup_vit(), arguments()).model_card("alice/vit").text


def test_lora_upload_during_training_has_merged_model(hub, arguments, tmp_path):
    """The merged model, and the checkpoint of the adapters; no folder of this machine is named in it."""
    plain_vit().save_pretrained(tmp_path / "base")
    model = add_lora(load_classifier(str(tmp_path / "base"), tokenmixup={"horizontal_layers": [1]}), 2)
    args = arguments(
        save_strategy="steps", save_steps=1, push_to_hub=True, hub_strategy="checkpoint", hub_model_id="alice/vit",
        hub_token="hf_alice", hub_always_push=True,
    )  # fmt: skip
    trainer = TokenMixupTrainer(model, args, train_dataset=Images(4))
    trainer.train()
    trainer._finish_current_push()
    files = hub.files("alice/vit")
    assert load(files["model.safetensors"]).keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    saved = {name.removeprefix("last-checkpoint/") for name in files if "/" in name}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} < saved
    assert "model.safetensors" not in saved and not hub.requests_containing(str(tmp_path))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "`rank` must be an integer of at least 1, got 0"),
        ({"rank": 2.5}, "`rank` must be an integer of at least 1, got 2.5"),
        ({"alpha": 0}, "`alpha` must be a finite number above 0, got 0"),
        ({"dropout": 1.0}, "`dropout` must be a probability below 1, got 1.0"),
        ({"target_modules": ["q_proj", "query"]}, "^query is not a layer of TokenMixupViT.*k_proj, .*all-linear"),
    ],
)
def test_lora_settings_out_of_range_raise(settings, message):
    model = tokenmixup_vit()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **settings)
    # It is not left with half of them.
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_lora_model_without_default_targets_raises():
    with pytest.raises(ValueError, match="no default target modules for ResNet.*Pass some of .*convolution"):
        add_lora(resnet())
    with pytest.raises(ValueError, match="trains the `classifier` in full, but ViTModel has no module"):
        add_lora(plain_vit().vit, target_modules=["q_proj"])


def test_lora_without_peft_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'LoRA needs peft, which is not installed: pip install -e ".\[lora\]"'):
        add_lora(tokenmixup_vit())


def test_lora_arguments_parse():
    model = tokenmixup_vit()
    assert LoraArguments().apply(model) is model and LoraArguments(lora_rank=0).apply(model) is model
    adapted = LoraArguments(lora_rank=3, lora_dropout=0.1, lora_target_modules=["k_proj"]).apply(model)
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (3, 6, 0.1, {"k_proj"})
    with pytest.raises(ValueError, match="`lora_rank` must be at least 1, or 0 for no LoRA, got -1"):
        LoraArguments(lora_rank=-1)
    with pytest.raises(ValueError, match="`lora_alpha` requires `lora_rank`, such as 8"):
        LoraArguments(lora_alpha=16)


def test_lora_with_sharded_weights_raises(arguments):
    class Sharded(TokenMixupTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

    with pytest.raises(ValueError, match="LoRA is not supported with FSDP or DeepSpeed"):
        Sharded(adapt(), arguments(), train_dataset=Images(4))


def test_lora_exported_folder_loads_with_tokenmixup_class(arguments):
    trainer = TokenMixupTrainer(adapt(), arguments(max_steps=2), train_dataset=Images(8))
    trainer.train()
    trainer.save_model()
    ours = load_classifier(trainer.args.output_dir)
    assert ours.config.horizontal_layers == [1] and type(ours.to_plain_model()) is ViTForImageClassification
    assert all(parameter.requires_grad for parameter in ours.parameters())
