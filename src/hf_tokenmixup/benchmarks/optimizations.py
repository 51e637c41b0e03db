"""Training steps with an optimizer: the baseline and each option that saves memory or time."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import nn

from ..models.gradient_checkpointing import enable_checkpointing
from .timing import Timing, peak_memory, time_interleaved

LEARNING_RATE = 1e-5
LORA_RANK = 8
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "qkv"]  # query, key and value projections of ViT and CCT
BASELINE = "plain"


class OptimizedTrainStep:
    """A callable training step: forward, backward and an AdamW update.

    Args:
        model: A model in training mode. Its weights change, so every step needs its own model.
        images: (B, 3, H, W).
        labels: Labels for the model.
        autocast: dtype for autocast. None: no autocast.
        scale_loss: Scale the loss against underflow, which fp16 requires.
        compiled: Use `torch.compile`.
        ema: Update an exponential moving average of the weights.
        optimizer: Further arguments of AdamW, such as `fused` or `foreach`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        autocast: torch.dtype | None = None,
        scale_loss: bool = False,
        compiled: bool = False,
        ema: bool = False,
        optimizer: Mapping[str, bool] | None = None,
    ) -> None:
        self.model, self.images, self.labels, self.autocast = model, images, labels, autocast
        self.forward = torch.compile(model) if compiled else model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, **optimizer or {})
        self.scaler = torch.amp.GradScaler(images.device.type, enabled=scale_loss)
        self.ema = ModelEmaV3(model) if ema else None

    def __call__(self) -> None:
        with torch.autocast(self.images.device.type, self.autocast) if self.autocast else nullcontext():
            loss = self.forward(pixel_values=self.images, labels=self.labels).loss
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)

    def persistent_bytes(self) -> int:
        """Count the bytes of weights, buffers, optimizer states and the moving average."""
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in (*tensors, *filter(torch.is_tensor, moments)))


def _checkpointed(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> OptimizedTrainStep:
    enable_checkpointing(model)
    return OptimizedTrainStep(model, images, labels)


def _channels_last(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> OptimizedTrainStep:
    model.to(memory_format=torch.channels_last)
    return OptimizedTrainStep(model, images.contiguous(memory_format=torch.channels_last), labels)


def _lora(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> OptimizedTrainStep:
    """Add LoRA adapters to query, key and value projections; classifier and ScoreNet stay trainable."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules=LORA_TARGETS))
    for name, parameter in model.named_parameters():
        if ".classifier." in name or ".scorenet." in name:
            parameter.requires_grad_(True)
    return OptimizedTrainStep(model, images, labels)


# Name to factory(model, images, labels).
OPTIMIZATIONS: dict[str, Callable[[nn.Module, torch.Tensor, torch.Tensor], OptimizedTrainStep]] = {
    "bf16": partial(OptimizedTrainStep, autocast=torch.bfloat16),
    "fp16": partial(OptimizedTrainStep, autocast=torch.float16, scale_loss=True),
    "gradient_checkpointing": _checkpointed,
    "torch_compile": partial(OptimizedTrainStep, compiled=True),
    "channels_last": _channels_last,
    "fused": partial(OptimizedTrainStep, optimizer={"fused": True}),
    "foreach": partial(OptimizedTrainStep, optimizer={"foreach": True}),
    "for_loop": partial(OptimizedTrainStep, optimizer={"foreach": False}),
    "ema": partial(OptimizedTrainStep, ema=True),
    "lora": _lora,
}


def unsupported_reason(name: str, device: torch.device) -> str | None:
    """Explain why an optimization cannot be measured on this device or installation. None if it can."""
    if name == "fp16" and device.type == "cpu":
        return "a CPU has no fp16 arithmetic"
    if name == "torch_compile" and torch.__version__.startswith("2.6."):
        return "transformers needs a newer torch for it"
    if name == "lora" and find_spec("peft") is None:
        return "peft is not installed"
    return None


class OptimizationResults(NamedTuple):
    """Results of `benchmark_optimizations`, by name.

    Attributes:
        timings: Latency of a step.
        peak_memory: Bytes at the peak of a step.
        skipped: Reasons why optimizations were not measured.
    """

    timings: dict[str, Timing]
    peak_memory: dict[str, int]
    skipped: dict[str, str]


def benchmark_optimizations(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    names: Iterable[str] = tuple(OPTIMIZATIONS),
    **timing: Any,
) -> OptimizationResults:
    """Measure latency and memory of a training step with its optimizer, for the baseline and each optimization.

    Only the baseline and one other model exist at a time, to limit the memory. Peak memory is the sum of
    `OptimizedTrainStep.persistent_bytes` and `timing.peak_memory`: weights, optimizer states, gradients, activations
    and temporary tensors, but not the images.

    Args:
        model: A model in training mode; it is copied.
        images: (B, 3, H, W).
        labels: Labels for the model.
        names: Keys of `OPTIMIZATIONS`.
        timing: Arguments of `timing.time_interleaved`.
    """
    device = images.device
    skipped = {name: reason for name in names if (reason := unsupported_reason(name, device))}
    baseline = OptimizedTrainStep(copy.deepcopy(model), images, labels)
    timings, memory = {}, {}
    for name in names:
        if name in skipped:
            continue
        step = OPTIMIZATIONS[name](copy.deepcopy(model), images, labels)
        pair = time_interleaved({BASELINE: baseline, name: step}, reference=BASELINE, **timing)
        timings = {BASELINE: pair[BASELINE]} | timings | {name: pair[name]}
        memory[name] = peak_memory(step, device) + step.persistent_bytes()
        del step
    memory = {BASELINE: peak_memory(baseline, device) + baseline.persistent_bytes()} | memory
    return OptimizationResults(timings, memory, skipped)
