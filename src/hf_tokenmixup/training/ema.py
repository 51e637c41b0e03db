"""An exponential moving average of the weights: kept beside the training, evaluated, published, and resumed.

The training itself goes on from the plain weights, as if there were no average.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from .checkpointing.saving import CheckpointTrainer

logger = logging.getLogger(__name__)

EMA_WEIGHTS_NAME = "average.safetensors"

# An average that still holds so much of the first step's weights at the end is hardly one of the training.
MAX_INITIAL_WEIGHT = 0.1


class ModelEma:
    """timm's `ModelEmaV3` over everything of a model that is saved: ScoreNet and buffers too, integers as they are.

    Update t makes it `d * average + (1 - d) * weights`, with d = 0 for t = 1 (the average starts from the weights
    after the first step, not from random ones), then `decay`, and with `warmup` `min(decay, 1 - t ** (-2 / 3))`.
    Weights in half precision are averaged in float32.

    Args:
        model: The bare model, whose weights the average begins with.
        decay: At least 0 and less than 1.
        warmup: Whether the decay grows from 0.

    Attributes:
        updates: How many there were.
        decay, warmup: As given.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False) -> None:
        self.updates = 0
        self.decay, self.warmup = decay, warmup
        self._names = list(_saved_tensors(model))
        self._buffers = {name for name, _ in model.named_buffers()}
        self._ema = ModelEmaV3(_TensorModule(model), decay=decay, use_warmup=warmup)

    def tensors(self) -> dict[str, Tensor]:
        """The average by the model's names; what several names share stands under the first of them."""
        held = self._ema.module.state_dict()
        return {name: held[str(number)] for number, name in enumerate(self._names)}

    def update(self, model: nn.Module) -> None:
        """Take in the weights after an optimizer step. The device is not waited for."""
        self.updates += 1
        self._ema.update(_TensorModule(model), step=self.updates)

    @contextmanager
    def swap_into(self, model: nn.Module) -> Iterator[None]:
        """Within it, `model` has the average for its weights; behind it, also after an exception, its own again.

        Values are copied, so that parameters stay where they are: optimizers, wrappers and compiled code hold them.
        """
        own = {name: tensor.detach().clone() for name, tensor in _saved_tensors(model).items()}
        try:
            _copy_into(model, self.tensors())
            yield
        finally:
            _copy_into(model, own)

    def broadcast_buffers(self) -> None:
        """Take the buffers of process 0, which saves them. To be called by all processes together.

        Each process has batch-norm statistics of its own images.
        """
        for name, tensor in self.tensors().items():
            if name in self._buffers:
                torch.distributed.broadcast(tensor, src=0)

    def save(self, file: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        save_file(tensors, file, metadata={"format": "pt", "updates": str(self.updates)})

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Take over what `save` wrote, bit for bit.

        Raises:
            ValueError: the file is cut short, or its tensors are not those of this model; nothing is taken then.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                updates = int((opened.metadata() or {})["updates"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{file} cannot be read as an average of weights ({error}): remove it to go on."
            ) from error
        own = self.tensors()
        shapes, own_shapes = ({name: t.shape for name, t in tensors.items()} for tensors in (held, own))
        if shapes != own_shapes:
            unlike = sorted(name for name in shapes.keys() | own_shapes if shapes.get(name) != own_shapes.get(name))
            raise ValueError(
                f"{file} is the average of another model: {len(unlike)} of {len(own)} tensors differ in name or "
                f"shape, {unlike[0]} among them. Build the model with the settings that the checkpoint was trained "
                "with, or remove the file to start the average afresh."
            )
        for name, tensor in own.items():
            tensor.copy_(held[name])
        self.updates = updates


class AveragingTrainer(CheckpointTrainer):
    """A Trainer that evaluates and publishes an average of the weights, if `args.ema_decay` is set.

    The average is updated once per optimizer step, unless that was skipped. `evaluate`, `predict`, the choice of the
    best model, and what is saved anywhere but in a checkpoint use it; `model` keeps the plain weights, from which the
    training goes on. A checkpoint holds both, the average in `average.safetensors`. A checkpoint without that file
    stands for its plain weights: a training that goes on from it starts its average there.

    Attributes:
        average: None before a training, and where it is off.

    Raises:
        ValueError: With FSDP, DeepSpeed and weights spread over devices, and with an optimizer that averages itself.
    """

    average: ModelEma | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.ema_decay:
            self._validate_ema_support()
        self.add_callback(EmaCallback(self))

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within it, `model` has the averaged weights; its own where there is no average."""
        with nullcontext() if self.average is None else self.average.swap_into(self.unwrapped_model):
            yield

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        if self.average is not None and self.args.world_size > 1:
            self.average.broadcast_buffers()
        with self.ema_weights():
            return super().evaluation_loop(*args, **kwargs)

    def step_was_skipped(self) -> bool:
        """Whether the optimizer left the weights of this step as they were."""
        return self.accelerator.optimizer_step_was_skipped

    def init_ema(self) -> None:
        """At the beginning of a training: start the average, unless it came from a checkpoint, and say so."""
        if self.state.global_step == 0 or self.average is None:
            self.average = self._new_average()
        if not self.is_world_process_zero():
            return
        args, steps = self.args, self.state.max_steps - self.state.global_step + self.average.updates
        logger.warning(
            "Evaluation, the best model and what is published use an average of the weights (ema_decay=%g%s); the "
            "training goes on from the plain ones, and checkpoints hold both.",
            args.ema_decay,
            " with warm-up" if args.ema_warmup else "",
        )
        share = args.ema_decay ** max(steps - 1, 0)
        if share > MAX_INITIAL_WEIGHT and not args.ema_warmup:
            logger.warning(
                "After %d steps, %.0f %% of the average will be the weights of the first: choose a lower --ema_decay, "
                "or add --ema_warmup.",
                steps,
                100 * share,
            )

    def update_ema(self) -> None:
        """Behind an optimizer step."""
        if not self.step_was_skipped():
            self.average.update(self.unwrapped_model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        average = self._load_ema(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._set_ema(average)

    def _load_best_model(self) -> None:
        average = self._load_ema(self.state.best_model_checkpoint)
        super()._load_best_model()
        self._set_ema(average)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if not self._is_checkpoint(output_dir):
            with self.ema_weights():
                return super()._save(output_dir, state_dict)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        file = Path(output_dir) / EMA_WEIGHTS_NAME
        if self.average is not None:
            self.average.save(file)
        else:
            # Of an earlier training that went through this step.
            file.unlink(missing_ok=True)

    def _new_average(self) -> ModelEma:
        return ModelEma(self.unwrapped_model, self.args.ema_decay, self.args.ema_warmup)

    def _load_ema(self, checkpoint: str) -> ModelEma | None:
        """The average that `checkpoint` holds; None where there is none, or none is wanted.

        Raises:
            ValueError: it cannot be read, or is another model's.
        """
        file = Path(checkpoint) / EMA_WEIGHTS_NAME
        if not self.args.ema_decay:
            if file.is_file():
                logger.warning("%s is left out: there is no --ema_decay, and the plain weights are taken.", file)
            return None
        if not file.is_file():
            logger.warning("%s holds no average of weights: it starts afresh from the weights there.", checkpoint)
            return None
        average = self._new_average()
        average.load(file)
        return average

    def _set_ema(self, average: ModelEma | None) -> None:
        if self.args.ema_decay:
            self.average = self._new_average() if average is None else average

    def _validate_ema_support(self) -> None:
        spread = {
            "FSDP": self.is_fsdp_enabled or self.is_fsdp_xla_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "a model that is spread over devices": getattr(self, "is_distributed_loading_by_transformers", False),
        }
        for what, given in spread.items():
            if given:
                raise ValueError(
                    f"`ema_decay` does not go with {what}, which keeps and restores weights in parts: train on "
                    "several GPUs by plain data parallelism (accelerate launch --multi_gpu), or leave out --ema_decay."
                )
        if "schedule_free" in self.args.optim:
            raise ValueError(
                f"`ema_decay` does not go with optim={self.args.optim.value}, which averages the weights itself: "
                "leave out --ema_decay, or choose another --optim."
            )


class EmaCallback(TrainerCallback):
    def __init__(self, trainer: AveragingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # A search for settings may have turned it on or off since.
        if args.ema_decay:
            self._trainer.init_ema()
        else:
            self._trainer.average = None

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if args.ema_decay:
            self._trainer.update_ema()


class _TensorModule(nn.Module):
    """The saved tensors of a model, each once, by number: as timm goes through them, shared ones would move twice.

    Half precision is widened, as one step of the average is too small for it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for number, tensor in enumerate(_saved_tensors(model).values()):
            if tensor.is_floating_point():
                wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
                self.register_parameter(str(number), nn.Parameter(wide, requires_grad=False))
            else:
                self.register_buffer(str(number), tensor.detach())


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each under the first of its names."""
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
