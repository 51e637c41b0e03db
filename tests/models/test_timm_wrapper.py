"""TokenMixup in architectures of timm behind `TimmWrapperForImageClassification`."""

import copy
import inspect
import json

import pytest
import torch
from helpers.family_steps import assert_same_step, step

pytest.importorskip("timm", reason="timm is optional")

import timm
from PIL import Image
from safetensors.torch import save_file
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva, EvaBlock
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from hf_tokenmixup.data.transforms import resize_image_processor
from hf_tokenmixup.functional import select_salient_tokens, token_saliency
from hf_tokenmixup.models import FAMILIES, load_classifier
from hf_tokenmixup.models.gradient_checkpointing import enable_checkpointing
from hf_tokenmixup.models.timm_wrapper.layers_timm_wrapper import find_unsupported_layer

TINY = {"embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 20, "patch_size": 5}
# Older versions of timm have no such argument.
NO_QK_NORM = {"qk_norm": False} if "qk_norm" in inspect.signature(Eva).parameters else {}
# Architecture, arguments, number of prefix tokens, and what the classifier reads.
VARIANTS = {
    "vit": ("vit_tiny_patch16_224", {}, 1, "cls"),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}, 2, "cls"),
    "deit3": ("deit3_small_patch16_224", {}, 1, "cls"),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {}, 5, "cls"),
    "dinov3": ("vit_small_patch16_dinov3", {}, 5, "mean"),
    "dinov3 with biases, cls": ("vit_small_patch16_dinov3_qkvb", {"global_pool": "token"}, 5, "cls"),
    "siglip": ("vit_base_patch16_siglip_224", {}, 0, "mean"),
    "clip": ("vit_base_patch16_clip_224", {}, 1, "cls"),
    "eva02": ("eva02_tiny_patch14_336", {}, 1, "mean"),
    "eva02 separate projections": ("eva02_base_patch14_448", {"global_pool": "token"}, 1, "cls"),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {"attn_pool_num_heads": 3}, 1, "mean"),
    "aimv2": ("aimv2_large_patch14_224", {}, 0, "mean"),
    "mixed rotary": ("vit_small_patch16_rope_mixed_224", NO_QK_NORM, 1, "cls"),
}
if timm.is_model("vit_base_patch16_sapiens2"):
    # Three heads share one key and value in the layers in the middle. Positions have no random scale in training.
    grouped = {"num_kv_heads": [3, 1, 1, 3], "rope_rescale_coords": 1.0}
    VARIANTS["sapiens2"] = ("vit_base_patch16_sapiens2", grouped, 9, "cls")
DROPOUT = {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.2}
BOTH = {"horizontal_layers": [1], "horizontal_tau": None, "horizontal_rho": 0.002, "vertical_layers": [2, 3]}
VERTICAL = {"vertical_layers": [2, 3]}
CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}


def build(variant, *, model_args=None, **settings):
    """Tiny model in training mode. The noise in all parameters makes attention peaked and LayerScale large."""
    architecture, arguments, *_ = VARIANTS[variant]
    config_class, model_class = FAMILIES["timm_wrapper"]
    arguments = TINY | arguments | (model_args or {})
    torch.manual_seed(0)
    model = model_class(config_class(architecture=architecture, model_args=arguments, num_labels=5, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scorenet" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def build_plain(model):
    """Plain model of transformers with the same weights."""
    plain = TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(model.config.to_dict()))
    state_dict = {name: tensor for name, tensor in model.state_dict().items() if "scorenet" not in name}
    plain.load_state_dict(state_dict)
    return plain.train(model.training)


def attention_maps(plain, images):
    """Attention probabilities (B, H, N, N) of each layer of the plain model without fused attention."""
    maps, plain = [], copy.deepcopy(plain).eval()
    for block in plain.timm_model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))
    with torch.no_grad():
        plain(images)
    return maps


@pytest.mark.parametrize("variant", VARIANTS)
def test_network_describes_model(variant):
    model = build(variant)
    network, (_, _, num_prefix_tokens, pooling) = model.config.network, VARIANTS[variant]
    assert (network.hidden_size, network.num_layers, network.num_heads) == (24, 4, 3)
    assert (network.image_size, network.patch_size, model.config.token_grid(20, 20)) == ((20, 20), (5, 5), (4, 4))
    assert network.mlp_size == model.get_transformer_layers()[0].mlp.fc2.weight.shape[1]
    assert (network.num_prefix_tokens, network.classifier_pooling) == (num_prefix_tokens, pooling)


@pytest.mark.parametrize("variant", VARIANTS)
def test_disabled_tokenmixup_matches_plain_model(variant, images, labels):
    off = build(variant, model_args=DROPOUT)
    assert_same_step(step(build_plain(off), images, labels), step(off, images, labels))


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_matches_plain_model(variant, images, labels):
    model = build(variant, model_args=DROPOUT, **BOTH).eval()
    output, expected = model(images, labels=labels), build_plain(model)(images, labels=labels)
    assert type(output) is type(expected)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)


@pytest.mark.parametrize("query", ["auto", "mean"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saliency_matches_unfused_attention(variant, query, images, labels):
    model = build(variant, model_args=DROPOUT, **BOTH, saliency_query=query)
    config = model.config
    maps = attention_maps(build_plain(model), images)
    with torch.no_grad():
        inputs = []
        for layer in model.get_transformer_layers():
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: inputs.append((args[0], kwargs.get("rope"))), with_kwargs=True
            )
        model.eval()(images)
        for (states, rope), attention, layer in zip(inputs, maps, model.train().get_transformer_layers(), strict=True):
            torch.testing.assert_close(layer.attention_weights(states, rope=rope), attention, atol=1e-5, rtol=1e-4)
            expected = token_saliency(attention.mean(dim=1), config.num_prefix_tokens, config.effective_saliency_query)
            kwargs = {} if rope is None else {"rope": rope}
            for route in ("auto", "output_attentions"):
                config.saliency_route = route
                saliency = layer._detect_saliency((layer,), None, states, layer_kwargs=kwargs)
                torch.testing.assert_close(saliency, expected, atol=1e-6, rtol=1e-4)
    # Attention depends on the image, or the comparison would show little.
    assert expected.std(dim=1).mean() > 0.05 / 16


@pytest.mark.parametrize("variant", VARIANTS)
def test_rollout_in_training_matches_unfused_attention(variant, images, labels):
    model = build(variant, **BOTH | {"vertical_layers": []}, rollout_steps=2)
    config, maps = model.config, [item.mean(dim=1) for item in attention_maps(build_plain(model), images)]
    found = model(images, labels=labels).horizontal[0].saliency
    expected = token_saliency(maps[3] @ maps[2] @ maps[1], config.num_prefix_tokens, config.effective_saliency_query)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def attend_by_hand(attention, normed, memory, rope, slots):
    """Eq. (13) for one image: queries of (N, D) tokens, keys and values also of (M, D) memory tokens from `slots`."""
    sources, prefix = torch.cat([normed, memory]), getattr(attention, "num_prefix_tokens", 0)
    if attention.qkv is None:
        query, key, value = attention.q_proj(normed), attention.k_proj(sources), attention.v_proj(sources)
    else:
        biases = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            biases = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        biases = [0.0] * 3 if biases is None else biases.chunk(3)
        query, key, value = (
            states @ weight.T + bias
            for states, weight, bias in zip(
                (normed, sources, sources), attention.qkv.weight.chunk(3), biases, strict=True
            )
        )
    query, key, value = (states.unflatten(1, (-1, 8)).transpose(0, 1) for states in (query, key, value))  # (H, N, d)
    query, key = attention.q_norm(query), attention.k_norm(key)
    key, value = (torch.stack([states[head * len(states) // 3] for head in range(3)]) for states in (key, value))
    if rope is not None:
        half = {"half": True} if getattr(attention, "rotate_half", False) else {}
        rope = rope.expand(3, -1, -1)
        rows = [rope[:, slot : slot + 1] for slot in slots]
        query = torch.cat([query[:, :prefix], apply_rot_embed_cat(query[:, prefix:], rope, **half)], dim=1)
        patches = apply_rot_embed_cat(key[:, prefix : len(normed)], rope, **half)
        collected = apply_rot_embed_cat(key[:, len(normed) :], torch.cat(rows, dim=1), **half)
        key = torch.cat([key[:, :prefix], patches, collected], dim=1)
    weights = (query @ key.transpose(1, 2) * 8**-0.5).softmax(dim=-1)
    output = attention.norm((weights @ value).transpose(0, 1).flatten(1))
    return attention.proj(output)


@pytest.mark.parametrize("variant", VARIANTS)
def test_vertical_attention_matches_computation_by_hand(variant, images, labels, monkeypatch):
    model = build(variant, **VERTICAL, vertical_kappa=3)
    config, inputs, outputs, widths = model.config, [], [], []
    prefix = config.num_prefix_tokens
    for layer in model.get_transformer_layers():
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append((args[0], kwargs.get("rope"))), with_kwargs=True
        )
        layer.attn.proj_drop.register_forward_hook(lambda module, args, output: outputs.append(output))
    original = F.scaled_dot_product_attention

    def scaled_dot_product_attention(query, key, value, **kwargs):
        widths.append(key.shape[2])
        return original(query, key, value, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    with torch.no_grad():
        output = model(images, labels=labels)
        num_tokens = 16 + prefix
        assert widths[:4] == [num_tokens, num_tokens, num_tokens + 6, num_tokens + 9]
        assert output.mixing_metrics["vertical_tokens"] == 6 * 3 * 3
        memory, slots = [], []
        for index, layer in enumerate(model.get_transformer_layers()):
            hidden, rope = inputs[index]
            rope = rope[index] if rope is not None and rope.dim() == 4 else rope
            if index >= 2:
                for image in range(len(images)):
                    expected = attend_by_hand(
                        layer.attn,
                        layer.norm1(hidden[image]),
                        layer.norm1(torch.cat([tokens[image] for tokens in memory])),
                        rope,
                        torch.cat([chosen[image] for chosen in slots]).tolist(),
                    )
                    torch.testing.assert_close(outputs[index][image, :num_tokens], expected, atol=1e-5, rtol=1e-4)
            saliency = token_saliency(
                layer.attention_weights(hidden, rope=rope).mean(dim=1), prefix, config.effective_saliency_query
            )
            memory.append(select_salient_tokens(hidden, saliency, 3, prefix))
            slots.append(saliency.topk(3, dim=1).indices)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("settings", [{}, BOTH])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
def test_gradient_checkpointing_is_exact(variant, settings, reentrant, images, labels):
    model = build(variant, model_args=DROPOUT, **settings)
    expected, calls = step(model, images, labels), []
    checkpointed = copy.deepcopy(model)
    enable_checkpointing(checkpointed, {"use_reentrant": reentrant})
    assert not checkpointed.timm_model.grad_checkpointing
    checkpointed.get_transformer_layers()[2].mlp.register_forward_hook(lambda *args: calls.append(1))
    assert_same_step(expected, step(checkpointed, images, labels))
    assert len(calls) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_model_opens_in_plain_classes(variant, images, tmp_path):
    model = build(variant, **BOTH).eval()
    exported = model.to_plain_model()
    assert type(exported) is TimmWrapperForImageClassification
    expected = model(images).logits
    assert torch.equal(exported(images).logits, expected) and expected.isfinite().all()
    exported.save_pretrained(tmp_path)
    for model_class in (TimmWrapperForImageClassification, AutoModelForImageClassification):
        opened, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(opened) is TimmWrapperForImageClassification
        assert {name: set(info[name]) for name in CLEAN} == CLEAN
        assert torch.equal(opened.eval()(images).logits, expected)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and again.config.vertical_layers == [2, 3]


@pytest.mark.parametrize(
    "architecture, model_args, message",
    [
        ("resnet18", {}, "'resnet18' is a ResNet"),
        ("swin_tiny_patch4_window7_224", {}, "'swin_tiny_patch4_window7_224' is a SwinTransformer"),
        ("vit_small_patch16_18x2_224", {"depth": 2}, "has ParallelThingsBlock"),
        ("vit_tiny_patch16_224", {"depth": 2, "attn_layer": "diff"}, "has Block with DiffAttention"),
        ("vit_tiny_patch16_224", {"depth": 2, "patch_drop_rate": 0.5}, "patch_drop_rate=0.5"),
        ("vit_tiny_patch16_224", {"depth": 2, "global_pool": ""}, "reads each token by itself"),
        ("vit_tiny_patch16", {}, "cannot create 'vit_tiny_patch16'"),
        ("vit_tiny_patch16_224", {"depht": 2}, "cannot create .*depht"),
    ],
)
def test_unsupported_architecture_raises(architecture, model_args, message):
    config_class, _ = FAMILIES["timm_wrapper"]
    with pytest.raises(ValueError, match=message):
        config_class(architecture=architecture, model_args=model_args)


def test_gated_attention_is_unsupported():
    block = EvaBlock(24, 3)
    assert find_unsupported_layer([block]) is None
    if "gated_attn" not in inspect.signature(EvaBlock).parameters:
        pytest.skip("this version of timm has no gated attention")
    gated = EvaBlock(24, 3, gated_attn=True)
    assert find_unsupported_layer([block, gated]) == "EvaBlock with gated EvaAttention"


def save_like_timm(folder, variant, num_classes, **model_args):
    """Write a checkpoint as in timm's repositories on the Hub: without `model_type` and with timm's names."""
    architecture, arguments, *_ = VARIANTS[variant]
    arguments = TINY | arguments | model_args
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=num_classes, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    config = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": 24,
        "pretrained_cfg": {"tag": "tiny", "input_size": [3, 20, 20], "num_classes": num_classes},
        "model_args": arguments,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return model.eval()


@pytest.mark.parametrize("variant", ["vit", "dinov3"])
def test_load_classifier_reads_checkpoint_of_timm(variant, images, labels, tmp_path):
    original = save_like_timm(tmp_path / "timm", variant, num_classes=5)
    model = load_classifier(str(tmp_path / "timm"), tokenmixup=BOTH)
    assert type(model) is FAMILIES["timm_wrapper"][1]
    assert torch.equal(model.eval()(images).logits, original(images))
    names = list("abc")
    with pytest.raises(ValueError, match="was trained for 5 classes, but the data has 3"):
        load_classifier(str(tmp_path / "timm"), tokenmixup=BOTH, label_names=names)
    model = load_classifier(
        str(tmp_path / "timm"), tokenmixup=BOTH, label_names=names, ignore_mismatched_sizes=True
    ).train()
    assert model(images, labels=labels % 3).loss.isfinite()
    model.to_plain_model().save_pretrained(tmp_path / "exported")
    other = load_classifier(str(tmp_path / "exported"), label_names=list("cab"))
    assert other.config.id2label == {0: "c", 1: "a", 2: "b"}
    assert torch.equal(other.timm_model.head.weight, model.timm_model.head.weight[[2, 0, 1]])
    other.to_plain_model().save_pretrained(tmp_path / "again")
    assert load_classifier(str(tmp_path / "again"), plain=True).config.id2label == {0: "c", 1: "a", 2: "b"}


def test_load_classifier_backbone_without_classes(images, tmp_path):
    save_like_timm(tmp_path, "dinov3", num_classes=0)
    model = load_classifier(str(tmp_path), tokenmixup=BOTH, label_names=list("abc"), ignore_mismatched_sizes=True)
    assert model(images, labels=torch.tensor([0, 1, 2, 0, 1, 2])).loss.isfinite()
    assert model.timm_model.head.out_features == 3


def test_load_classifier_other_architecture_trains_without_tokenmixup(tmp_path):
    config = {"architecture": "resnet18", "model_args": {"layers": [1, 1, 1, 1]}, "num_labels": 5}
    TimmWrapperForImageClassification(TimmWrapperConfig(**config)).save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), label_names=list("abcde"), ignore_mismatched_sizes=True)
    assert type(model) is TimmWrapperForImageClassification
    with pytest.raises(ValueError, match="'resnet18' is a ResNet. Remove vertical_kappa"):
        load_classifier(str(tmp_path), tokenmixup={"vertical_kappa": 2})


@pytest.mark.parametrize("variant", ["vit", "deit3", "dinov3", "eva02"])
def test_image_size_interpolates_positions_as_timm(variant, tmp_path, labels):
    original = save_like_timm(tmp_path / "timm", variant, num_classes=5)
    model = load_classifier(str(tmp_path / "timm"), tokenmixup=BOTH, image_size=[30, 25])
    assert model.config.image_size == (30, 25) and model.config.model_args["img_size"] == [30, 25]
    original.set_input_size(img_size=(30, 25))
    images = torch.randn(6, 3, 30, 25)
    expected = original(images)
    assert torch.equal(model.eval()(images).logits, expected)
    assert model.train()(images, labels=labels).horizontal[0].replaced.shape == (6, 30)
    model.eval().to_plain_model().save_pretrained(tmp_path / "exported")
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "exported").eval()
    torch.testing.assert_close(opened(images).logits, expected)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "exported")
    assert processor(Image.new("RGB", (64, 48)))["pixel_values"].shape == (1, 3, 30, 25)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "timm")
    resize_image_processor(processor, 30, 25)
    assert processor(Image.new("RGB", (64, 48)))["pixel_values"].shape == (1, 3, 30, 25)


def test_other_image_size_raises(images):
    with pytest.raises(ValueError, match=r"expects images of 20x20 pixels, got 30x30. .*image_size=\[30, 30\]"):
        build("vit", **BOTH)(torch.randn(2, 3, 30, 30), labels=torch.tensor([0, 1]))


def test_dynamic_image_size_mixes_images_of_other_sizes(labels):
    model = build("dinov3", model_args={"dynamic_img_size": True}, **BOTH)
    output = model(torch.randn(6, 3, 30, 25), labels=labels)
    assert output.horizontal[0].replaced.shape == (6, 30) and output.loss.isfinite()


@pytest.mark.parametrize("variant", ["vit", "dinov3 with biases, cls", "eva02", "eva02 separate projections"])
def test_lora_adapts_attention_and_trains_head(variant, images, labels):
    pytest.importorskip("peft", reason="peft is optional")
    from hf_tokenmixup.training import add_lora

    model = build(variant, **BOTH)
    plain_logits = model.eval()(images).logits
    adapted = add_lora(model.train(), rank=2)
    torch.testing.assert_close(adapted.eval()(images).logits, plain_logits)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(adapted(images).logits, plain_logits)
    adapted.train()(images, labels=labels).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(adapted.get_parameter(name).grad is not None for name in trained)
    assert any("timm_model.head." in name for name in trained) and any("scorenet" in name for name in trained)
    exported = adapted.eval().base_model.model.to_plain_model()
    torch.testing.assert_close(exported(images).logits, adapted(images).logits, atol=1e-4, rtol=1e-4)
