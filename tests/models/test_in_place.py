"""`add_tokenmixup` and `remove_tokenmixup` for all model families."""

import copy
import dataclasses

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers.families import BOTH, CASES, TESTED, build_tiny
from transformers import (
    AutoModelForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    set_seed,
)

from hf_tokenmixup import add_tokenmixup, remove_tokenmixup
from hf_tokenmixup.configuration import TokenMixupConfigMixin
from hf_tokenmixup.models import FAMILIES, TokenMixupModelMixin
from hf_tokenmixup.models.gradient_checkpointing import enable_checkpointing, is_checkpointed
from hf_tokenmixup.training import TokenMixupTrainer, TokenMixupTrainingArguments

SETTINGS = {field.name for field in dataclasses.fields(TokenMixupConfigMixin)}


@pytest.fixture(params=TESTED)
def plain(request):
    """Plain model of a family in evaluation mode, without settings of TokenMixup."""
    tiny = build_tiny(request.param)
    attributes = {name: value for name, value in tiny.config.to_dict().items() if name not in SETTINGS}
    plain_class = tiny.base_model_class
    set_seed(0)
    return plain_class(plain_class.config_class.from_dict(attributes)).eval()


def family(plain):
    return FAMILIES[plain.config.model_type]


def layers_of(plain):
    return family(plain)[1].get_transformer_layers(plain)


def step(model, images, labels, seed=2):
    model.zero_grad()
    set_seed(seed)
    output = model(images, labels=labels)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def snapshot(model):
    """Classes, attributes and values of all modules and of the configuration."""
    modules = {}
    for name, module in model.named_modules():
        attributes = dict(vars(module))
        containers = {key: dict(attributes.pop(key)) for key in ("_parameters", "_buffers", "_modules")}
        modules[name] = (type(module), attributes, containers)
    return modules, type(model.config), copy.deepcopy(vars(model.config)), list(model.state_dict())


def assert_same_snapshot(found, expected):
    assert found[1:] == expected[1:]
    assert found[0].keys() == expected[0].keys()
    for name, (module_class, attributes, containers) in expected[0].items():
        found_class, found_attributes, found_containers = found[0][name]
        assert found_class is module_class, name
        assert found_attributes.keys() == attributes.keys(), name
        assert all(found_attributes[key] is attributes[key] for key in attributes), name
        for kind, items in containers.items():
            assert found_containers[kind].keys() == items.keys(), name
            assert all(found_containers[kind][key] is items[key] for key in items), name


def test_add_equals_model_created_with_tokenmixup(plain, images, labels):
    config_class, model_class = family(plain)
    created = model_class(config_class.from_dict(plain.config.to_dict(), **BOTH)).train()
    assert add_tokenmixup(plain, **BOTH) is plain
    assert type(plain) is model_class and type(plain.config) is config_class
    created.load_state_dict(plain.state_dict())
    assert [type(module) for module in plain.modules()] == [type(module) for module in created.modules()]
    assert plain._no_split_modules == created._no_split_modules
    assert plain.config.to_diff_dict() == created.config.to_diff_dict()
    output, gradients = step(plain.train(), images, labels)
    expected, expected_gradients = step(created, images, labels)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)
    assert output.mixing_metrics["vertical_tokens"] == 6 * 3 * 3 and output.horizontal[0].replaced.any()
    assert gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


def test_add_initializes_scorenet_as_the_classifier(plain):
    add_tokenmixup(plain, **BOTH)
    scorenet = plain.get_transformer_layers()[1].scorenet.classifier
    if hasattr(plain.config, "initializer_range"):
        assert scorenet.weight.std().item() == pytest.approx(plain.config.initializer_range, rel=0.3)
    else:
        # CLIP and SigLIP scale their classifiers by the width.
        std = plain.config.network.hidden_size**-0.5 * getattr(plain.config, "initializer_factor", 1.0)
        assert scorenet.weight.std().item() == pytest.approx(std, rel=0.3)
    assert not scorenet.bias.any() and scorenet.weight.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_add_keeps_parameters_buffers_hooks_mode_and_checkpointing(plain, training, images, labels):
    plain.train(training)
    next(plain.parameters()).requires_grad_(False)
    enable_checkpointing(plain, {"use_reentrant": False})
    parameters = dict(plain.named_parameters())
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    calls = []
    layer = layers_of(plain)[1]
    layer.register_buffer("scale", torch.full((2,), 3.0), persistent=False)
    layer.register_forward_hook(lambda *args: calls.append(1))
    add_tokenmixup(plain, **BOTH)
    kept = {name: parameter for name, parameter in plain.named_parameters() if ".scorenet." not in name}
    assert kept.keys() == parameters.keys() and all(kept[name] is parameters[name] for name in kept)
    assert [name for name, parameter in kept.items() if not parameter.requires_grad] == frozen
    assert plain.training is training and all(module.training is training for module in plain.modules())
    assert is_checkpointed(plain) and layer.gradient_checkpointing
    plain.train()(images, labels=labels).loss.backward()
    assert torch.equal(layer.scale, torch.full((2,), 3.0)) and calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_add_scorenet_has_dtype_and_device_of_model(plain, dtype, images, labels):
    add_tokenmixup(plain.to(dtype), **BOTH)
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    assert plain.train()(images.to(dtype), labels=labels).loss.isfinite()
    on_meta = add_tokenmixup(remove_tokenmixup(plain).to("meta"), **BOTH)
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}


def test_add_uses_settings_of_exported_model(plain, tmp_path):
    add_tokenmixup(plain, **BOTH, vertical_kappa=2)
    exported = plain.to_plain_model()
    exported.save_pretrained(tmp_path)
    loaded = type(exported).from_pretrained(tmp_path)
    before = snapshot(loaded)
    add_tokenmixup(loaded, vertical_layers=[3])
    config = loaded.config
    assert (config.horizontal_layers, config.vertical_layers, config.vertical_kappa) == ([1], [3], 2)
    assert (config.horizontal_rho, config.horizontal_rho_relative) == (BOTH["horizontal_rho"], None)
    assert_same_snapshot(snapshot(remove_tokenmixup(loaded)), before)


def test_add_then_evaluate_is_bit_equal(plain, images):
    expected = plain(images).logits
    assert torch.equal(add_tokenmixup(plain, **BOTH)(images).logits, expected)


def test_remove_restores_everything(plain, images, labels, tmp_path):
    expected_output, expected_gradients = step(plain.train(), images, labels)
    before = snapshot(plain)
    add_tokenmixup(plain, **BOTH)
    step(plain, images, labels)
    plain.save_pretrained(tmp_path)
    plain.zero_grad()
    plain.config.dtype = before[2].get("dtype")
    assert remove_tokenmixup(plain) is plain
    assert_same_snapshot(snapshot(plain), before)
    output, gradients = step(plain, images, labels)
    assert torch.equal(output.loss, expected_output.loss) and torch.equal(output.logits, expected_output.logits)
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in expected_gradients)
    plain.save_pretrained(tmp_path / "plain")
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not SETTINGS & vars(loaded.config).keys()


def test_remove_keeps_changes_that_are_not_of_tokenmixup(plain, images, labels):
    add_tokenmixup(plain, **BOTH)
    layer, calls, case = plain.get_transformer_layers()[2], [], CASES[plain.config.model_type]
    enable_checkpointing(plain, {"use_reentrant": False})
    layer.get_submodule(case.submodule).register_forward_pre_hook(lambda *args: calls.append(1))
    classifier = plain.get_submodule(case.classifier)
    classifier.weight.data.fill_(0.5)
    remove_tokenmixup(plain.train())
    assert layers_of(plain)[2] is layer and plain.training
    plain(images, labels=labels).loss.backward()
    assert len(calls) == 2, "gradient checkpointing or the hook is lost"
    assert bool((classifier.weight == 0.5).all())


def test_remove_from_model_created_with_tokenmixup(plain, images):
    config_class, model_class = family(plain)
    created = model_class(config_class.from_dict(plain.config.to_dict(), **BOTH)).eval()
    remove_tokenmixup(created).load_state_dict(plain.state_dict())
    assert [type(module) for module in created.modules()] == [type(module) for module in plain.modules()]
    assert created._no_split_modules == plain._no_split_modules
    # timm's names of the classes, which are those of `id2label`.
    attributes, expected = (
        {name: value for name, value in vars(config).items() if name != "label_names"}
        for config in (created.config, plain.config)
    )
    assert attributes == expected and type(created.config) is type(plain.config)
    assert torch.equal(created(images).logits, plain(images).logits)


def test_add_again_after_remove_and_in_copies(plain, images, labels):
    other = copy.deepcopy(add_tokenmixup(plain, **BOTH))
    remove_tokenmixup(other)
    assert isinstance(plain, TokenMixupModelMixin) and not isinstance(other, TokenMixupModelMixin)
    add_tokenmixup(other, vertical_layers=[2])
    assert other.config.horizontal_layers == [] and other.config.horizontal_rho_relative == 1.3
    assert other.train()(images, labels=labels).mixing_metrics["vertical_tokens"] == 6 * 3 * 2
    assert plain.train()(images, labels=labels).mixing_metrics["vertical_tokens"] == 6 * 3 * 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "No layer would mix tokens. Pass the layers: `horizontal_layers`"),
        ({"horizontal_tau": 1.0}, "No layer would mix tokens"),
        ({"horizontal_layers": [9]}, r"horizontal_layers must be between 0 and 3, got \[9\]"),
        ({"horizontal_layers": 3}, "horizontal_layers must be a list of layer indices, got 3"),
        ({"vertical_layers": [1], "vertical_kappa": 99}, "vertical_kappa must be an integer between 0 and 16"),
        ({"horizontal_layer": [1]}, "no setting 'horizontal_layer': did you mean 'horizontal_layers'?"),
        ({"num_labels": 3}, r"no setting 'num_labels'. The settings are horizontal_layers, "),
        ({"horizontal_rho": 0.1, "horizontal_rho_relative": 1.0, "horizontal_layers": [1]}, "two forms of one"),
    ],
)
def test_add_invalid_settings_raise_and_leave_model_unchanged(plain, settings, message):
    before = snapshot(plain)
    with pytest.raises(ValueError, match=message):
        add_tokenmixup(plain, **settings)
    assert_same_snapshot(snapshot(plain), before)


def test_add_twice_raises(plain):
    before = snapshot(add_tokenmixup(plain, **BOTH))
    with pytest.raises(ValueError, match=r"already is a TokenMixup.*call remove_tokenmixup\(model\) first"):
        add_tokenmixup(plain, **BOTH)
    assert_same_snapshot(snapshot(plain), before)


def test_add_interrupted_conversion_leaves_model_unchanged(plain, monkeypatch):
    layer_class, before = family(plain)[1].layer_class, snapshot(plain)
    original = layer_class.init_tokenmixup

    def init_tokenmixup(self, config, layer_index):
        if layer_index == 2:
            raise ValueError("not this layer")
        original(self, config, layer_index)

    monkeypatch.setattr(layer_class, "init_tokenmixup", init_tokenmixup)
    with pytest.raises(ValueError, match="not this layer"):
        add_tokenmixup(plain, **BOTH)
    assert_same_snapshot(snapshot(plain), before)


def test_add_to_replaced_forward_raises(plain):
    add_hook_to_module(layers_of(plain)[1], ModelHook())
    before = snapshot(plain)
    with pytest.raises(ValueError, match="forward pass of a .*(Layer|Block) is replaced, as accelerate"):
        add_tokenmixup(plain, **BOTH)
    assert_same_snapshot(snapshot(plain), before)


def test_add_to_model_of_accelerator_raises(plain):
    model = add_tokenmixup(plain, **BOTH)
    add_hook_to_module(model, ModelHook())
    with pytest.raises(ValueError, match="is replaced, as accelerate"):
        remove_tokenmixup(model)
    assert isinstance(model, TokenMixupModelMixin)


def test_add_and_remove_unsupported_model_raise():
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 8, "patch_size": 4}
    swin = SwinForImageClassification(SwinConfig(image_size=8, embed_dim=12, depths=[1], num_heads=[1]))
    vit = ViTForImageClassification(ViTConfig(**small))

    class OwnViT(ViTForImageClassification):
        pass

    for model in (torch.nn.Linear(2, 2), ViTModel(ViTConfig(**small)), OwnViT(ViTConfig(**small)), torch.compile(vit)):
        with pytest.raises(ValueError, match=r"Dinov2ForImageClassification, .*, got \w+. Pass the classifier itself"):
            add_tokenmixup(model, horizontal_layers=[0])
    with pytest.raises(
        ValueError, match="supports the model types .*vit_msn, got 'swin': attention is limited to windows"
    ):
        add_tokenmixup(swin, horizontal_layers=[0])
    for model in (vit, swin, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="Expected a classifier with TokenMixup, got a"):
            remove_tokenmixup(model)


def test_add_needs_newer_transformers_raises(plain, monkeypatch):
    before = snapshot(plain)
    monkeypatch.setattr(family(plain)[1], "min_transformers_version", "99.1")
    with pytest.raises(ValueError, match="needs transformers 99.1 or newer"):
        add_tokenmixup(plain, **BOTH)
    assert_same_snapshot(snapshot(plain), before)


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 20, 20, generator=generator), "labels": index % 5}


def test_added_model_trains_exports_saves_and_loads(plain, tmp_path, images):
    plain_class, parameters = type(plain), dict(plain.named_parameters())
    add_tokenmixup(plain, **BOTH)
    args = TokenMixupTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=6, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, learning_rate=0.01,
    )  # fmt: skip
    trainer = TokenMixupTrainer(plain, args, train_dataset=Examples())
    trainer.train()
    assert trainer.state.log_history[0]["mixed_fraction"] > 0
    trainer.save_model()
    exported = AutoModelForImageClassification.from_pretrained(tmp_path / "run").eval()
    expected = plain.eval()(images).logits
    assert type(exported) is plain_class is type(plain.to_plain_model())
    torch.testing.assert_close(exported(images).logits, expected, atol=1e-6, rtol=1e-6)
    plain.save_pretrained(tmp_path / "full")
    loaded, info = type(plain).from_pretrained(tmp_path / "full", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items())
    remove_tokenmixup(plain)
    assert dict(plain.named_parameters()).keys() == parameters.keys()
    assert torch.equal(plain(images).logits, expected)
