"""A training step with its optimizer, plain and with each saver of memory or time."""

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
from .timing import Timing, interleave, peak_memory

LEARNING_RATE = 1e-5
LORA_RANK = 8
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "qkv"]  # queries, keys and values of ViT and of CCT
BASELINE = "plain"


class OptimizedTrainStep:
    """Forward, backward and an update by AdamW, as a call.

    Args:
        model: in training mode. It is trained, so each step needs its own.
        images: (B, 3, H, W).
        labels: as the model takes them.
        autocast: dtype of the forward; None: that of the weights.
        scale_loss: against underflow, as fp16 needs it.
        compiled: by ``torch.compile``.
        ema: follow the weights with their moving average.
        optimizer: how AdamW goes through the weights (``fused``, ``foreach``); torch's choice if empty.
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
        """What stays between steps: weights, buffers, the optimizer's moments, the moving average."""
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
    """Adapters on queries, keys and values; the classifier and ScoreNet are trained whole."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules=LORA_TARGETS))
    for name, parameter in model.named_parameters():
        if ".classifier." in name or ".scorenet." in name:
            parameter.requires_grad_(True)
    return OptimizedTrainStep(model, images, labels)


# How to make the step, from a model of its own, images and labels. A further saver is a further line.
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


def unsupported_reason(saver: str, device: torch.device) -> str | None:
    """Why a saver cannot be measured here; None if it can."""
    if saver == "fp16" and device.type == "cpu":
        return "a CPU has no fp16 arithmetic"
    if saver == "torch_compile" and torch.__version__.startswith("2.6."):
        return "transformers needs a newer torch for it"
    if saver == "lora" and find_spec("peft") is None:
        return "peft is not installed"
    return None


class OptimizationResults(NamedTuple):
    """What :func:`benchmark_optimizations` measured, each by name; ``left_out`` says why."""

    timings: dict[str, Timing]
    peak_memory: dict[str, int]
    left_out: dict[str, str]


def benchmark_optimizations(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    savers: Iterable[str] = tuple(OPTIMIZATIONS),
    **timing: Any,
) -> OptimizationResults:
    """Time and memory of a training step with its optimizer, by each saver and plain.

    Two steps exist at a time, the plain one and another, so that the device need not hold the models of all.
    The memory is :meth:`OptimizedTrainStep.persistent_bytes` and :func:`~hf_tokenmixup.benchmarks.timing.peak_memory`
    of the step: weights, moments, gradients, activations, and what they need on the way.

    Args:
        model: in training mode; it is copied.
        images: (B, 3, H, W), which are in no sum.
        labels: as the model takes them.
        savers: of :data:`OPTIMIZATIONS`.
        timing: see :func:`~hf_tokenmixup.benchmarks.timing.interleave`.
    """
    device = images.device
    left_out = {name: reason for name in savers if (reason := unsupported_reason(name, device))}
    plain = OptimizedTrainStep(copy.deepcopy(model), images, labels)
    timings, memory = {}, {}
    for name in savers:
        if name in left_out:
            continue
        step = OPTIMIZATIONS[name](copy.deepcopy(model), images, labels)
        pair = interleave({BASELINE: plain, name: step}, reference=BASELINE, **timing)
        timings = {BASELINE: pair[BASELINE]} | timings | {name: pair[name]}
        memory[name] = peak_memory(step, device) + step.persistent_bytes()
        del step
    memory = {BASELINE: peak_memory(plain, device) + plain.persistent_bytes()} | memory
    return OptimizationResults(timings, memory, left_out)
