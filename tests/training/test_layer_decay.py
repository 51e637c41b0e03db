"""Layer-wise decay of the learning rate."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.families import BOTH, TESTED, build_tiny
from helpers.tiny_training import Images, plain_vit, resnet, tokenmixup_cct, tokenmixup_vit
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from transformers import (
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_tokenmixup.training import TokenMixupTrainer, add_lora, apply_layer_decay
from hf_tokenmixup.training.checkpointing.compatibility import check_resume_compatibility, training_fingerprint
from hf_tokenmixup.training.effective_settings import hyperparameters
from hf_tokenmixup.training.layer_decay import find_transformer_layers, layer_decay_factors


def test_factors_of_vit_by_hand():
    factors = layer_decay_factors(tokenmixup_vit(), 0.5)
    expected = {"vit.embeddings.cls_token": 0.0625, "vit.embeddings.position_embeddings": 0.0625}
    expected |= {"vit.embeddings.patch_embeddings.projection.weight": 0.0625}
    expected |= {"vit.layers.0.attention.q_proj.weight": 0.125, "vit.layers.1.mlp.fc1.bias": 0.25}
    expected |= {"vit.layers.2.layernorm_after.weight": 0.5, "vit.layers.1.scorenet.classifier.weight": 1.0}
    expected |= {"vit.layernorm.weight": 1.0, "classifier.bias": 1.0}
    assert {name: factors[name] for name in expected} == expected
    assert factors.keys() == dict(tokenmixup_vit().named_parameters()).keys()


@pytest.mark.parametrize("model_type", TESTED)
def test_factors_of_each_family(model_type):
    model = build_tiny(model_type, **BOTH)
    layers, entering = model.get_transformer_layers(), []
    path = next(name for name, module in model.named_modules() if module is layers)
    layers[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    model.eval()(torch.randn(2, 3, 20, 20))
    entering[0].square().sum().backward()
    factors = layer_decay_factors(model, 0.5)
    for name, parameter in model.named_parameters():
        if ".scorenet." in name:
            expected = 1.0
        elif match := re.match(rf"{re.escape(path)}\.(\d)\.", name):
            expected = 0.5 ** (4 - int(match[1]))
        elif parameter.grad is not None:
            expected = 0.5**5
        elif name.startswith("classifier"):
            expected = 1.0
        else:
            continue
        assert factors[name] == expected, name
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("model_type", TESTED)
def test_factors_of_plain_model_equal_those_with_tokenmixup(model_type):
    model = build_tiny(model_type, **BOTH)
    expected = {name: factor for name, factor in layer_decay_factors(model, 0.7).items() if ".scorenet." not in name}
    assert layer_decay_factors(model.to_plain_model(), 0.7) == expected


def test_factors_equal_those_of_timm():
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=3, num_heads=2, reg_tokens=2, num_classes=5)
    model.get_transformer_layers = lambda: model.blocks
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.7)
    expected = {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}
    factors = layer_decay_factors(model, 0.7)
    assert factors.keys() == expected.keys()
    differing = {name for name in factors if factors[name] != pytest.approx(expected[name])}
    # timm counts it to the last layer.
    assert differing == {"norm.weight", "norm.bias"} and expected["norm.weight"] == pytest.approx(0.7)


def test_find_layers_of_model_without_family():
    config = Data2VecVisionConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=8)
    model = Data2VecVisionForImageClassification(config)
    assert find_transformer_layers(model) is model.data2vec_vision.encoder.layer


def swin():
    return SwinForImageClassification(SwinConfig(image_size=8, embed_dim=12, depths=[1, 1], num_heads=[1, 1]))


@pytest.mark.parametrize("make_model", [resnet, swin])
def test_model_without_list_of_layers_raises(arguments, make_model):
    model = make_model()
    with pytest.raises(ValueError, match=f"needs a model with a single list of .* none in a {type(model).__name__}"):
        TokenMixupTrainer(model, arguments(layer_decay=0.7), train_dataset=Images(8))


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, float("nan")])
def test_layer_decay_out_of_range_raises(arguments, value):
    with pytest.raises(ValueError, match="`layer_decay` must be above 0 and at most 1"):
        arguments(layer_decay=value)


@pytest.mark.parametrize("make_model", [tokenmixup_vit, tokenmixup_cct, plain_vit])
def test_first_step_of_sgd_is_scaled_by_layer(arguments, make_model):
    moved = {}
    for decay in (1.0, 0.5):
        model = make_model()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trainer = TokenMixupTrainer(model, arguments(layer_decay=decay, logging_steps=1), train_dataset=Images(8))
        trainer.train()
        moved[decay] = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
        assert trainer.state.log_history[0]["learning_rate"] == 0.1
    factors = layer_decay_factors(model, 0.5)
    assert len(set(factors.values())) == 5
    for name, factor in factors.items():
        torch.testing.assert_close(moved[0.5][name], factor * moved[1.0][name], rtol=1e-3, atol=1e-6, msg=name)


def test_groups_keep_weight_decay_and_schedule(arguments):
    settings = {"optim": "adamw_torch", "weight_decay": 0.1, "lr_scheduler_type": "linear", "max_steps": 4}
    groups = {}
    for decay in (1.0, 0.5):
        model = tokenmixup_vit()
        trainer = TokenMixupTrainer(model, arguments(**settings, layer_decay=decay), train_dataset=Images(8))
        trainer.create_optimizer_and_scheduler(4)
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups[decay] = {
            names[parameter]: group for group in trainer.optimizer.param_groups for parameter in group["params"]
        }
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 3 / 4)
    factors = layer_decay_factors(model, 0.5)
    assert groups[0.5].keys() == groups[1.0].keys() == factors.keys()
    for name, factor in factors.items():
        assert groups[0.5][name]["weight_decay"] == groups[1.0][name]["weight_decay"]
        assert groups[0.5][name]["lr"] == pytest.approx(factor * groups[1.0][name]["lr"])
    assert {group["weight_decay"] for group in groups[0.5].values()} == {0.0, 0.1}


def test_lora_adapters_have_factor_of_their_layer(arguments):
    model = add_lora(tokenmixup_vit(), 2)
    trainer = TokenMixupTrainer(model, arguments(layer_decay=0.5), train_dataset=Images(8))
    optimizer = trainer.create_optimizer()
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: rates[parameter] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(found) == len(rates)
    for name, rate in found.items():
        layer = re.search(r"\.layers\.(\d)\.attention\.", name)
        assert rate == pytest.approx(0.1 * (0.5 ** (3 - int(layer[1])) if layer else 1.0)), name
    trainer.train()
    assert trainer.state.global_step == 1


def test_resumed_run_equals_uninterrupted_run(arguments):
    settings = {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "max_steps": 4, "learning_rate": 0.01}
    args = arguments(**settings, layer_decay=0.6, save_strategy="steps", save_steps=2, logging_steps=1)
    complete = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(20))
    complete.train()
    resumed = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(20))
    resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    expected = complete.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [
        group["lr"] for group in complete.optimizer.param_groups
    ]
    state = json.loads((Path(args.output_dir) / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["hf_tokenmixup"]["kept"]["plan"]["layer_decay"] == 0.6


def test_resume_checkpoint_of_earlier_version_has_no_layer_decay(arguments):
    now = training_fingerprint(TokenMixupTrainer(plain_vit(), arguments(), train_dataset=Images(8)))
    then = {name: value for name, value in now.items() if name != "layer_decay"}
    check_resume_compatibility(then, now, 3, False)
    with pytest.raises(ValueError, match="`layer_decay` cannot change on resume"):
        check_resume_compatibility(then, now | {"layer_decay": 0.5}, 3, False)


def test_layer_decay_is_in_hyperparameters(arguments):
    for decay in (1.0, 0.5):
        trainer = TokenMixupTrainer(plain_vit(), arguments(layer_decay=decay), train_dataset=Images(8))
        trainer.train()
        assert hyperparameters(trainer).get("layer_decay") == (None if decay == 1 else decay)


def test_optimizer_of_user_raises(arguments):
    model = plain_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no effect on an optimizer that is passed to the trainer"):
        TokenMixupTrainer(model, arguments(layer_decay=0.5), train_dataset=Images(8), optimizers=(optimizer, None))
    apply_layer_decay(optimizer, model, 0.5)
    trainer = TokenMixupTrainer(model, arguments(), train_dataset=Images(8), optimizers=(optimizer, None))
    trainer.train()
    assert {group["lr"] for group in optimizer.param_groups} == {0.1, 0.05, 0.025, 0.0125, 0.00625}


def test_optimizer_without_parameter_groups_raises(arguments):
    made = (LayerWiseDummyOptimizer, {"optimizer_dict": {}, "lr": 0.1})
    trainer = TokenMixupTrainer(
        plain_vit(), arguments(layer_decay=0.5), train_dataset=Images(8), optimizer_cls_and_kwargs=made
    )
    with pytest.raises(ValueError, match="`layer_decay` has no effect on LayerWiseDummyOptimizer"):
        trainer.train()


def test_optimizer_class_of_user_is_scaled(arguments):
    made = (torch.optim.SGD, {"lr": 0.2, "momentum": 0.9})
    trainer = TokenMixupTrainer(
        plain_vit(), arguments(layer_decay=0.5), train_dataset=Images(8), optimizer_cls_and_kwargs=made
    )
    groups = trainer.create_optimizer().param_groups
    assert groups[0]["lr"] == 0.2 and groups[-1]["lr"] == 0.2 * 0.5**4
    assert {group["momentum"] for group in groups} == {0.9}
