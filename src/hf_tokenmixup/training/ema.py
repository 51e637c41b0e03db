"""Exponential moving average (EMA) of the weights: updated, evaluated, exported and checkpointed.

Training continues from the raw weights, as if there were no EMA.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from .trainer import TokenMixupTrainer

logger = logging.getLogger(__name__)

EMA_WEIGHTS_NAME = "average.safetensors"

# Warn if the weights of the first step still contribute more than this at the end.
MAX_INITIAL_WEIGHT = 0.1


class ModelEma:
    """timm's `ModelEmaV3` over everything of a model that is saved: ScoreNet and buffers too, integers as they are.

    Update t sets it to `d * ema + (1 - d) * weights`, with d = 0 for t = 1 (the EMA starts from the weights after the
    first step, not from random ones), then `decay`, and with `warmup` `min(decay, 1 - t ** (-2 / 3))`. Weights in half
    precision are averaged in float32.

    Args:
        model: The unwrapped model, whose weights the EMA starts with.
        decay: At least 0 and less than 1.
        warmup: Whether the decay grows from 0.

    Attributes:
        updates: Number of updates.
        decay: As passed.
        warmup: As passed.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False) -> None:
        self.updates = 0
        self.decay, self.warmup = decay, warmup
        self._names = list(_saved_tensors(model))
        self._buffers = {name for name, _ in model.named_buffers()}
        self._ema = ModelEmaV3(_TensorModule(model), decay=decay, use_warmup=warmup)
        self._averaged = list(self.tensors().values())
        self._model: nn.Module | None = None
        self._weights: list[Tensor] = []

    def tensors(self) -> dict[str, Tensor]:
        """Return the EMA by the model's names; a tensor that several names share is under the first of them."""
        averaged = self._ema.module.state_dict()
        return {name: averaged[str(index)] for index, name in enumerate(self._names)}

    def state_dict(self) -> dict[str, Any]:
        """Return the EMA tensors by name, and the number of updates."""
        return {"tensors": self.tensors(), "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, bit for bit.

        Raises:
            ValueError: Names or shapes differ; nothing is loaded.
        """
        tensors, expected = state["tensors"], self.tensors()
        names = tensors.keys() | expected.keys()
        mismatched = sorted(
            name
            for name in names
            if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape
        )
        if mismatched:
            raise ValueError(
                f"{len(mismatched)} of {len(expected)} tensors differ in name or shape, {mismatched[0]} among them"
            )
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
        self.updates = state["updates"]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the EMA with the weights after an optimizer step, without synchronizing the device."""
        if model is not self._model:
            # Listing the tensors of a model takes longer than averaging them. An optimizer needs them unchanged, too.
            self._model, self._weights = model, list(_saved_tensors(model).values())
        self.updates += 1
        # As in `ModelEmaV3.apply_update_`, which lists the tensors in each update.
        averages, weights = [], []
        for average, weight in zip(self._averaged, self._weights, strict=True):
            if average.is_floating_point():
                averages.append(average)
                weights.append(weight.detach().to(average.dtype))
            else:
                average.copy_(weight)
        get_ema_multi_avg_fn(self._ema.get_decay(self.updates))(averages, weights, None)

    @contextmanager
    def swap_into(self, model: nn.Module) -> Iterator[None]:
        """Swap the EMA weights into `model`, and restore the raw weights on exit, also after an exception.

        Values are copied, so that the parameters stay the same objects: optimizers, wrappers and compiled code refer
        to them.
        """
        raw = {name: tensor.detach().clone() for name, tensor in _saved_tensors(model).items()}
        try:
            _copy_into(model, self.tensors())
            yield
        finally:
            _copy_into(model, raw)

    def broadcast_buffers(self) -> None:
        """Copy the buffers of process 0, which saves them, to all processes. A collective operation.

        Each process has the batch-norm statistics of its own images.
        """
        for name, tensor in self.tensors().items():
            if name in self._buffers:
                torch.distributed.broadcast(tensor, src=0)

    def save(self, file: Path) -> None:
        """Write the EMA to a safetensors file."""
        state = self.state_dict()
        tensors = {name: tensor.contiguous() for name, tensor in state["tensors"].items()}
        save_file(tensors, file, metadata={"format": "pt", "updates": str(state["updates"])})

    def load(self, file: Path) -> None:
        """Load what `save` wrote, bit for bit.

        Raises:
            ValueError: The file is truncated, or its tensors are not those of this model; nothing is loaded.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                updates = int((opened.metadata() or {})["updates"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as EMA weights ({error}). Remove it to continue.") from error
        try:
            self.load_state_dict({"tensors": tensors, "updates": updates})
        except ValueError as error:
            raise ValueError(
                f"{file} has the EMA weights of another model: {error}. Build the model with the settings that the "
                "checkpoint was trained with, or remove the file to start a new EMA."
            ) from error


class EmaCallback(TrainerCallback):
    """The EMA of a trainer: started, updated once per optimizer step that was not skipped, saved and loaded.

    A checkpoint contains the raw weights and, in `average.safetensors`, the EMA. From a checkpoint without that file,
    a new EMA starts at the raw weights.

    Args:
        trainer: The trainer whose weights are averaged, if its `args.ema_decay` is set.

    Attributes:
        model: The EMA; None before a run, and if it is off.
    """

    def __init__(self, trainer: "TokenMixupTrainer") -> None:
        self.model: ModelEma | None = None
        self._trainer = trainer

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the EMA weights, if there are any, into the trainer's model; restore the raw weights on exit."""
        with nullcontext() if self.model is None else self.model.swap_into(self._trainer.unwrapped_model):
            yield

    def broadcast_buffers(self) -> None:
        """See `ModelEma.broadcast_buffers`."""
        if self.model is not None and self._trainer.args.world_size > 1:
            self.model.broadcast_buffers()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # `hyperparameter_search` may have changed it.
        if not args.ema_decay:
            self.model = None
            return
        if state.global_step == 0 or self.model is None:
            self.model = self._new_ema()
        if self._trainer.is_world_process_zero():
            self._report(state.max_steps - state.global_step + self.model.updates)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if args.ema_decay and not self._trainer.step_was_skipped():
            self.model.update(self._trainer.unwrapped_model)

    def save(self, checkpoint: str) -> None:
        """Write the EMA into a checkpoint."""
        file = Path(checkpoint) / EMA_WEIGHTS_NAME
        if self.model is not None:
            self.model.save(file)
        else:
            # A file of an earlier run at this step.
            file.unlink(missing_ok=True)

    def read(self, checkpoint: str) -> ModelEma | None:
        """Read the EMA of a checkpoint; None if there is none, or EMA is off.

        Raises:
            ValueError: The file cannot be read, or is that of another model.
        """
        file = Path(checkpoint) / EMA_WEIGHTS_NAME
        if not self._trainer.args.ema_decay:
            if file.is_file():
                logger.warning("Ignoring %s because ema_decay is not set.", file)
            return None
        if not file.is_file():
            logger.warning("%s has no EMA weights: a new EMA starts from its raw weights.", checkpoint)
            return None
        ema = self._new_ema()
        ema.load(file)
        return ema

    def set(self, ema: ModelEma | None) -> None:
        """Use the EMA of a checkpoint whose weights were loaded; None starts a new one at these weights."""
        if self._trainer.args.ema_decay:
            self.model = self._new_ema() if ema is None else ema

    def validate(self) -> None:
        """Check that the weights of the trainer's model can be averaged.

        Raises:
            ValueError: They are sharded, or the optimizer averages weights itself.
        """
        trainer = self._trainer
        sharded_by = {
            "FSDP": trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled,
            "DeepSpeed": trainer.is_deepspeed_enabled,
            "a model sharded over devices": getattr(trainer, "is_distributed_loading_by_transformers", False),
        }
        for what, is_active in sharded_by.items():
            if is_active:
                raise ValueError(
                    f"`ema_decay` is not supported with {what}, because the weights are sharded. Use DDP (`accelerate "
                    "launch --multi_gpu`), or remove `ema_decay`."
                )
        if "schedule_free" in trainer.args.optim:
            raise ValueError(
                f"`ema_decay` is not supported with optim={trainer.args.optim.value}, which averages the weights "
                "itself. Remove `ema_decay`, or choose another `optim`."
            )

    def _new_ema(self) -> ModelEma:
        args = self._trainer.args
        return ModelEma(self._trainer.unwrapped_model, args.ema_decay, args.ema_warmup)

    def _report(self, steps: int) -> None:
        """Log what uses the EMA, and warn if `steps` updates are few for its decay."""
        args = self._trainer.args
        logger.warning(
            "EMA enabled (ema_decay=%g%s): evaluation, best-model selection and export use the EMA weights; "
            "checkpoints contain both.",
            args.ema_decay,
            " with warm-up" if args.ema_warmup else "",
        )
        initial_weight = args.ema_decay ** max(steps - 1, 0)
        if initial_weight > MAX_INITIAL_WEIGHT and not args.ema_warmup:
            logger.warning(
                "After %d steps, the weights of the first step still contribute %.0f %% of the EMA. Use a lower "
                "ema_decay or ema_warmup.",
                steps,
                100 * initial_weight,
            )


class _TensorModule(nn.Module):
    """The saved tensors of a model, each once, by index. timm would update shared tensors twice.

    Half precision is converted to float32, as one update of the EMA is too small for it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for index, tensor in enumerate(_saved_tensors(model).values()):
            if tensor.is_floating_point():
                wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
                self.register_parameter(str(index), nn.Parameter(wide, requires_grad=False))
            else:
                self.register_buffer(str(index), tensor.detach())


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, each under the first of its names."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


@torch.no_grad()
def _copy_into(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in _saved_tensors(model).items():
        tensor.copy_(values[name])
