"""Detect non-finite losses, gradients and weights before they are saved."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from .checkpointing.integrity import list_checkpoints
from .effective_settings import mixed_precision, weights_dtype

NO_STEP = torch.iinfo(torch.int64).max
NONFINITE_DESCRIPTION = "is infinite or not a number"


class NonFiniteLossError(FloatingPointError):
    """Raised for a non-finite training loss or weight; the message names the last checkpoint before it."""


class NonFiniteGuard:
    """Finds the first step of a run whose loss is not finite.

    The index of the step stays on the device, so that nothing synchronizes. It is read when a log line is due and
    before every checkpoint, so that no checkpoint has weights from after such a step.

    With a limit above 0, a step with a non-finite loss or gradient is skipped: weights and batch-norm statistics stay
    as they are. The run stops after more such steps than the limit. Each step then synchronizes the device.

    Args:
        skip_limit: Maximum number of skipped steps; 0: the first one raises.

    Attributes:
        skipped: Number of steps that were skipped.
        step_skipped: Whether the current step is skipped.
    """

    def __init__(self, skip_limit: int = 0) -> None:
        self.skip_limit = skip_limit
        self.skipped = 0
        self.step_skipped = False
        self._first_nonfinite_step: Tensor | None = None
        self._step_nonfinite: Tensor | None = None
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def on_micro_batch_begin(self, trainer: Trainer) -> None:
        """Save the buffers before the forward of a micro-batch, if steps may be skipped."""
        if self.skip_limit and self._step_nonfinite is None:
            self._buffers = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]

    def on_backward_end(self, trainer: Trainer, loss: Tensor) -> Tensor:
        """Check the loss () of a micro-batch after its backward pass.

        Returns:
            The loss to be logged: 0 in a step that is skipped.
        """
        bad = ~loss.isfinite()
        if not self.skip_limit:
            step = torch.where(bad, trainer.state.global_step + 1, NO_STEP)
            self._first_nonfinite_step = (
                step if self._first_nonfinite_step is None else torch.minimum(self._first_nonfinite_step, step)
            )
            return loss
        self._step_nonfinite = bad if self._step_nonfinite is None else self._step_nonfinite | bad
        self.step_skipped = False
        if trainer.accelerator.sync_gradients:
            if trainer.accelerator.scaler is None:
                self._step_nonfinite = self._step_nonfinite | ~_all_finite(trainer.model, gradients=True)
            if trainer.accelerator.reduce(self._step_nonfinite.float(), reduction="sum").item() > 0:
                self._skip(trainer)
            self._step_nonfinite = None
        return torch.where(bad, 0.0, loss)

    def raise_if_nonfinite_loss(self, trainer: Trainer) -> None:
        """Check the losses since the last call. A collective operation.

        Raises:
            NonFiniteLossError: The loss of a step was not finite, in any process.
        """
        if self._first_nonfinite_step is None:
            return
        first = int(trainer.accelerator.gather(self._first_nonfinite_step.reshape(1)).min())
        self._first_nonfinite_step = None
        if first != NO_STEP:
            raise NonFiniteLossError(
                _format_nonfinite_error(trainer, first, f"The loss of step {first} {NONFINITE_DESCRIPTION}")
            )

    def raise_if_nonfinite_weights(self, trainer: Trainer) -> None:
        """Check the weights before they are saved: one gradient is enough, whatever the loss. Synchronizes the device.

        Raises:
            NonFiniteLossError: A trained weight is not finite, in any process. All of them raise it.
        """
        finite = _all_finite(trainer.model).to(trainer.accelerator.device)
        if not trainer.accelerator.gather(finite.reshape(1)).all():
            step = trainer.state.global_step
            raise NonFiniteLossError(
                _format_nonfinite_error(trainer, step, f"After step {step}, a weight {NONFINITE_DESCRIPTION}")
            )

    def _skip(self, trainer: Trainer) -> None:
        self.skipped += 1
        self.step_skipped = True
        if self.skipped > self.skip_limit:
            step = trainer.state.global_step + 1
            problem = (
                f"The loss or a gradient of step {step} {NONFINITE_DESCRIPTION}, and {self.skip_limit} such steps "
                "were skipped"
            )
            raise NonFiniteLossError(_format_nonfinite_error(trainer, step, problem))
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        if trainer.accelerator.scaler is None:
            # Optimizers skip parameters whose grad is None: no weight, moment or decay changes.
            trainer.model.zero_grad(set_to_none=True)
        else:
            # The gradient scaler of fp16 needs gradients, and skips a step with an infinite one.
            for parameter in trainer.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.inf)


def _all_finite(model: nn.Module, gradients: bool = False) -> Tensor:
    """Return whether all trained weights of this process, or their gradients, are finite: () on their device."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    tensors = [weight.grad for weight in weights if weight.grad is not None] if gradients else weights
    tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    tensors = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.tensor(True)
    return nn.utils.get_total_norm(tensors, math.inf).isfinite()


def _format_nonfinite_error(trainer: Trainer, step: int, problem: str) -> str:
    args = trainer.args
    checkpoints = [path for path in list_checkpoints(args.output_dir) if int(path.name.rpartition("-")[2]) < step]
    suggestions = ["a lower `learning_rate`"]
    if not args.max_grad_norm:
        suggestions.append("`max_grad_norm=1.0`")
    if mixed_precision(trainer.accelerator) != "no" or weights_dtype(trainer.model) != torch.float32:
        suggestions.append("float32 instead of half precision")
    if checkpoints:
        last = checkpoints[0]
        hint = f"The last checkpoint before it is {last}: start from its weights (`model_name_or_path={last}`)"
    else:
        hint = "There is no checkpoint before it: start a new run"
    hint += f" with {' or '.join(suggestions)}"
    if checkpoints and not args.skip_nonfinite_steps:
        hint += ", or resume from it with `skip_nonfinite_steps`"
    rate, now = trainer.optimizer.param_groups[0]["lr"], trainer.state.global_step
    return f"{problem}; the learning rate is {rate:.3g} now, at step {now}. {hint}."
