"""Optimized training steps update the weights as the baseline does, and their memory is counted."""

import copy

import pytest
import torch
from helpers.tiny_training import CLASSES, VIT, tokenmixup_vit

from hf_tokenmixup.benchmarks import optimizations
from hf_tokenmixup.benchmarks.optimizations import (
    LEARNING_RATE,
    OPTIMIZATIONS,
    OptimizedTrainStep,
    benchmark_optimizations,
    unsupported_reason,
)
from hf_tokenmixup.models import TokenMixupCctConfig, TokenMixupCctForImageClassification
from hf_tokenmixup.models.gradient_checkpointing import is_checkpointed

CPU = torch.device("cpu")
AVAILABLE = [name for name in OPTIMIZATIONS if unsupported_reason(name, CPU) is None]
EAGER = [name for name in AVAILABLE if name not in ("torch_compile", "lora")]
needs_peft = pytest.mark.skipif("lora" not in AVAILABLE, reason="peft is not installed")


def vit():
    return tokenmixup_vit().train()


def cct():
    torch.manual_seed(1)
    sizes = {name: size for name, size in VIT.items() if name != "patch_size"}
    off = {"attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}
    config = TokenMixupCctConfig(**sizes, **off, horizontal_layers=[1], vertical_layers=[2], vertical_kappa=2)
    return TokenMixupCctForImageClassification(config).train()


@pytest.fixture
def batch():
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return images, torch.arange(6) % CLASSES


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("build", [vit, cct])
def test_optimized_step_is_one_adamw_update(build, name, batch):
    """The first update of AdamW is the learning rate times the sign of the gradient, which bounds the differences."""
    model = build()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    expected = copy.deepcopy(model)
    expected(*batch).loss.backward()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=LEARNING_RATE)
    optimizer.step()
    step = OPTIMIZATIONS[name](model, *batch)
    step()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert is_checkpointed(model) == (name == "gradient_checkpointing")
    tolerance = 2.1 * LEARNING_RATE if name == "bf16" else 0.02 * LEARNING_RATE
    for key, parameter in expected.named_parameters():
        large = parameter.grad.abs() > 1e-3 * parameter.grad.abs().max() + 1e-7  # signs of smaller ones are rounding
        update, expected_update = (
            one.detach() - before[key] for one in (dict(model.named_parameters())[key], parameter)
        )
        assert ((update - expected_update).abs() <= tolerance + 1e-7)[large].all(), key
        assert update.any()


def test_optimizations_have_their_settings(batch):
    steps = {name: OPTIMIZATIONS[name](vit(), *batch) for name in EAGER}
    assert steps["bf16"].autocast == torch.bfloat16 and not steps["bf16"].scaler.is_enabled()
    groups = {name: step.optimizer.param_groups[0] for name, step in steps.items()}
    assert groups["fused"]["fused"] and groups["foreach"]["foreach"] and groups["for_loop"]["foreach"] is False
    convolution = steps["channels_last"].model.vit.embeddings.patch_embeddings.projection.weight
    for tensor in (convolution, steps["channels_last"].images):
        assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    ema = steps["ema"]
    weight, averaged = ema.model.classifier.weight, ema.ema.module.classifier.weight
    first = averaged.clone()
    with torch.no_grad():
        weight += 1.0
    ema()
    torch.testing.assert_close(averaged, first.lerp(weight, 1 - ema.ema.decay))


def test_fp16_step_scales_the_loss(batch):
    step = OPTIMIZATIONS["fp16"](vit(), *batch)
    before = step.model.classifier.weight.clone()
    step()
    assert step.scaler.is_enabled() and step.scaler.get_scale() > 1 and step.autocast == torch.float16
    assert not torch.equal(step.model.classifier.weight, before)


@needs_peft
@pytest.mark.parametrize("build", [vit, cct])
def test_lora_trains_adapters_classifier_and_scorenet(build, batch):
    step = OPTIMIZATIONS["lora"](build(), *batch)
    before = {name: tensor.clone() for name, tensor in step.model.named_parameters()}
    step(), step()  # lora_A has no gradient while lora_B is zero
    moved = {name for name, tensor in step.model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if any(part in name for part in ("lora_", "classifier", "scorenet"))}
    assert any("lora_" in name for name in moved) and any("scorenet" in name for name in moved)
    expected = nbytes(before.values()) + 2 * nbytes(before[name] for name in moved)
    assert expected <= step.persistent_bytes() < expected + 4 * len(before) + 1


def test_persistent_bytes_counts_weights_optimizer_states_and_ema(batch):
    step, ema = OptimizedTrainStep(vit(), *batch), OptimizedTrainStep(vit(), *batch, ema=True)
    weights = nbytes(step.model.parameters())
    assert (step.persistent_bytes(), ema.persistent_bytes()) == (weights, 2 * weights)
    step()
    counters = 4 * len(list(step.model.parameters()))
    assert step.persistent_bytes() == 3 * weights + counters


def test_benchmark_optimizations_compares_with_baseline(batch):
    names = [name for name in AVAILABLE if name != "torch_compile"]
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    timings, memory, skipped = benchmark_optimizations(model, *batch, [*names, "fp16"], rounds=2, warmup=1)
    assert list(timings) == list(memory) == ["plain", *names] and list(skipped) == ["fp16"]
    assert [name for name, timing in timings.items() if timing.ratio is None] == ["plain"]
    weights = nbytes(model.parameters())
    assert memory["plain"] > 4 * weights  # gradients too
    assert memory["ema"] >= memory["plain"] + weights
    assert memory["lora"] < memory["plain"] if "lora" in names else True
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_benchmark_optimizations_checkpointing_saves_memory(batch):
    images = torch.randn(64, 3, 8, 8)
    _, memory, _ = benchmark_optimizations(vit(), images, torch.zeros(64).long(), ["gradient_checkpointing"], rounds=2)
    assert memory["gradient_checkpointing"] < 0.8 * memory["plain"]


def test_unsupported_reason(monkeypatch):
    assert unsupported_reason("fp16", torch.device("cuda")) is None and "no fp16" in unsupported_reason("fp16", CPU)
    monkeypatch.setattr(optimizations, "find_spec", lambda name: None)
    assert unsupported_reason("lora", CPU) == "peft is not installed" and unsupported_reason("ema", CPU) is None
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    assert "newer torch" in unsupported_reason("torch_compile", CPU)


@pytest.mark.slow
@pytest.mark.skipif("torch_compile" not in AVAILABLE, reason="this torch cannot compile ViT")
def test_compiled_step_matches_baseline(batch):
    plain, compiled = OptimizedTrainStep(vit(), *batch), OPTIMIZATIONS["torch_compile"](vit(), *batch)
    for _ in range(3):
        plain(), compiled()
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], tensor, rtol=1e-3, atol=3 * LEARNING_RATE)
