"""Parameters and MACs against numbers computed by hand. Counting does not change the model."""

import pytest
import torch
from helpers.tiny_training import resnet, tokenmixup_vit
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

from hf_tokenmixup.evaluation.flops import count_macs, count_parameters
from hf_tokenmixup.models import CctConfig, CctForImageClassification

CLASSES, WIDTH, MLP, LAYERS = 7, 16, 32, 2
SIZES = {"hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
SIZES |= {"image_size": 16, "num_labels": CLASSES}


def encoder_macs(tokens):
    """Projections of query, key, value and output, the two products of attention, and the MLP."""
    return LAYERS * (4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH + 2 * tokens * WIDTH * MLP)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_count_macs_vit_with_each_attention(attention):
    model = ViTForImageClassification._from_config(ViTConfig(patch_size=4, **SIZES), attn_implementation=attention)
    # 16 patches of 4x4x3 and the CLS token; the classifier reads one token.
    assert count_macs(model, (3, 16, 16)) == 16 * 48 * WIDTH + encoder_macs(17) + WIDTH * CLASSES
    assert model.config._attn_implementation == attention


def test_count_macs_model_that_calls_sdpa():
    """timm models call torch's fused function themselves, regardless of the configuration."""

    class Attention(nn.Module):
        device, dtype, config = torch.device("cpu"), torch.float32, object()

        def forward(self, pixel_values):
            tokens = pixel_values.flatten(2).transpose(1, 2)[:, None]
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    assert count_macs(Attention(), (3, 4, 4)) == 2 * 16 * 16 * 3


def test_count_macs_cct():
    model = CctForImageClassification(CctConfig(num_conv_layers=2, conv_channels=8, **SIZES))
    # 3x3 convolutions at 16x16 and, after pooling, 8x8. Sequence pooling of 4x4 tokens is a linear layer and a sum.
    tokenizer = 256 * 27 * 8 + 64 * 72 * WIDTH
    assert count_macs(model, (3, 16, 16)) == tokenizer + encoder_macs(16) + 2 * 16 * WIDTH + WIDTH * CLASSES


def test_count_macs_resnet():
    stem = 256 * 147 * 8
    first = 64 * (8 * 2 + 2 * 18 + 2 * 8)  # a bottleneck of width 2 at 8x8
    second = 16 * 8 * 16 + 64 * 8 * 4 + 16 * (4 * 36 + 4 * 16)  # at 4x4: shortcut and a bottleneck of width 4
    assert count_macs(resnet(), (3, 32, 32)) == stem + first + second + 16 * 4


def test_count_macs_depthwise_convolutions():
    config = ConvNextConfig(num_stages=1, hidden_sizes=[8], depths=[1], num_labels=CLASSES)
    # 4x4 patches, a depthwise 7x7 convolution, and an MLP of four times the width.
    expected = 16 * 48 * 8 + 16 * 8 * 49 + 16 * 2 * 8 * 32 + 8 * CLASSES
    assert count_macs(ConvNextForImageClassification(config), (3, 16, 16)) == expected


def test_count_macs_with_tokenmixup_matches_base_model():
    assert count_macs(tokenmixup_vit().train(), (3, 8, 8)) == count_macs(
        tokenmixup_vit(horizontal_layers=[], vertical_layers=[]), (3, 8, 8)
    )


def test_count_parameters_counts_shared_parameters_once():
    layer = nn.Linear(3, 4)
    assert count_parameters(nn.ModuleList([layer, nn.Sequential(layer), nn.Conv2d(3, 2, 5)])) == 16 + 152
    with_scorenet = tokenmixup_vit(scorenet_pooling="cls")
    assert count_parameters(with_scorenet) == sum(tensor.numel() for tensor in with_scorenet.state_dict().values())


def test_count_macs_does_not_change_the_model():
    model = resnet().train()
    model.resnet.embedder.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.random.get_rng_state()
    count_macs(model, (3, 32, 32))
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random) and torch.is_grad_enabled()


def test_count_macs_failure_does_not_change_the_model():
    model = ViTForImageClassification._from_config(ViTConfig(patch_size=4, **SIZES)).train()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="image size"):
        count_macs(model, (3, 8, 8))
    assert model.training and model.config._attn_implementation == "flex_attention"


def test_count_macs_exclude_attention_products():
    """The two products of attention are 2 N^2 D per layer."""
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    model = ViTForImageClassification(config)
    total = count_macs(model, (3, 16, 16))
    without_attention = count_macs(model, (3, 16, 16), exclude_attention_products=True)
    assert total - without_attention == 3 * 2 * 17**2 * 8
