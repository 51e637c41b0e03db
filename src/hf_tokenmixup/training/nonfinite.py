"""What goes wrong in a training, noticed before it spoils what was saved."""

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
    """The training loss, or a weight, became infinite or not a number; the message names the last good checkpoint."""


class NonFiniteGuard:
    """Finds the first step of a training whose loss is not finite.

    The step is kept on the device, so that nothing waits for it: it is read where a log line is due, and before every
    checkpoint, none of which then holds weights that such a step has spoilt.

    With a limit above 0, such a step, or one with such a gradient, leaves the weights and the statistics of batch
    norms as they are, and the training goes on until there were more of them than that. Each step is then waited for.

    Args:
        skip_limit: how many such steps to leave out before giving up; 0: give up at the first.

    Attributes:
        left_out: whether the step at hand is left out.
    """

    def __init__(self, skip_limit: int = 0) -> None:
        self.skip_limit = skip_limit
        self.skipped = 0
        self.left_out = False
        self._first: Tensor | None = None
        self._bad: Tensor | None = None
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def begin(self, trainer: Trainer) -> None:
        """Before the forward of a micro-batch."""
        if self.skip_limit and self._bad is None:
            self._buffers = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]

    def see(self, trainer: Trainer, loss: Tensor) -> Tensor:
        """Look at the loss () of a micro-batch, behind its backward pass.

        Returns:
            The loss to be logged: 0 in a step that is left out.
        """
        bad = ~loss.isfinite()
        if not self.skip_limit:
            step = torch.where(bad, trainer.state.global_step + 1, NO_STEP)
            self._first = step if self._first is None else torch.minimum(self._first, step)
            return loss
        self._bad = bad if self._bad is None else self._bad | bad
        self.left_out = False
        if trainer.accelerator.sync_gradients:
            if trainer.accelerator.scaler is None:
                self._bad = self._bad | ~_all_finite(trainer.model, gradients=True)
            if trainer.accelerator.reduce(self._bad.float(), reduction="sum").item() > 0:
                self._skip(trainer)
            self._bad = None
        return torch.where(bad, 0.0, loss)

    def check(self, trainer: Trainer) -> None:
        """To be called by all processes together.

        Raises:
            NonFiniteLossError: a step since the last check had a loss that is not finite, in any process.
        """
        if self._first is None:
            return
        first = int(trainer.accelerator.gather(self._first.reshape(1)).min())
        self._first = None
        if first != NO_STEP:
            raise NonFiniteLossError(
                _format_nonfinite_error(trainer, first, f"The loss of step {first} {NONFINITE_DESCRIPTION}")
            )

    def raise_if_nonfinite_weights(self, trainer: Trainer) -> None:
        """Before the weights are saved: one gradient is enough to spoil them, whatever the loss. Waits for the device.

        Raises:
            NonFiniteLossError: a weight that is trained is not finite, in any process. All of them raise it.
        """
        finite = _all_finite(trainer.model).to(trainer.accelerator.device)
        if not trainer.accelerator.gather(finite.reshape(1)).all():
            step = trainer.state.global_step
            raise NonFiniteLossError(
                _format_nonfinite_error(trainer, step, f"Behind step {step}, a weight {NONFINITE_DESCRIPTION}")
            )

    def _skip(self, trainer: Trainer) -> None:
        self.skipped += 1
        self.left_out = True
        if self.skipped > self.skip_limit:
            step = trainer.state.global_step + 1
            trouble = (
                f"The loss or a gradient of step {step} {NONFINITE_DESCRIPTION}, and {self.skip_limit} such steps "
                "were left out"
            )
            raise NonFiniteLossError(_format_nonfinite_error(trainer, step, trouble))
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        if trainer.accelerator.scaler is None:
            # An optimizer passes over parameters without gradient: no weight, moment or decay moves.
            trainer.model.zero_grad(set_to_none=True)
        else:
            # The scaler of fp16 wants to see gradients, and leaves out a step where one is infinite.
            for parameter in trainer.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.inf)


def _all_finite(model: nn.Module, gradients: bool = False) -> Tensor:
    """Whether all trained weights, or their gradients, of this process are finite: () on their device."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    tensors = [weight.grad for weight in weights if weight.grad is not None] if gradients else weights
    tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    tensors = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.tensor(True)
    return nn.utils.get_total_norm(tensors, math.inf).isfinite()


def _format_nonfinite_error(trainer: Trainer, step: int, trouble: str) -> str:
    args = trainer.args
    good = [path for path in list_checkpoints(args.output_dir) if int(path.name.rpartition("-")[2]) < step]
    means = ["a lower --learning_rate"]
    if not args.max_grad_norm:
        means.append("--max_grad_norm 1.0")
    if mixed_precision(trainer.accelerator) != "no" or weights_dtype(trainer.model) != torch.float32:
        means.append("float32 instead of half precision")
    if good:
        hint = f"The last good checkpoint is {good[0]}: train on from its weights (--model_name_or_path {good[0]})"
    else:
        hint = "There is no checkpoint before it: begin anew"
    hint += f" with {' or '.join(means)}"
    if good and not args.skip_nonfinite_steps:
        hint += ", or resume from it with --skip_nonfinite_steps N"
    rate, now = trainer.optimizer.param_groups[0]["lr"], trainer.state.global_step
    return f"{trouble}; the learning rate is {rate:.3g} now, at step {now}. {hint}."
