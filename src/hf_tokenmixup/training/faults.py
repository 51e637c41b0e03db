"""What goes wrong in a training, noticed before it spoils what was saved."""

import torch
from torch import Tensor
from transformers import Trainer

from .resuming import checkpoints_in

NEVER = torch.iinfo(torch.int64).max


class NonFiniteLossError(FloatingPointError):
    """The training loss became infinite or not a number; the message names the step and the last good checkpoint."""


class LossGuard:
    """Finds the first step of a training whose loss is not finite.

    The step is kept on the device, so that nothing waits for it: it is read where a log line is due, and before every
    checkpoint, none of which then holds weights that such a step has spoilt.

    With a limit above 0, such a step leaves the weights as they are, and the training goes on until there were more
    of them than that. Each step's loss is then waited for.

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

    def see(self, trainer: Trainer, loss: Tensor) -> Tensor:
        """Look at the loss () of a micro-batch, behind its backward pass.

        Returns:
            The loss to be logged: 0 in a step that is left out.
        """
        bad = ~loss.isfinite()
        if not self.skip_limit:
            step = torch.where(bad, trainer.state.global_step + 1, NEVER)
            self._first = step if self._first is None else torch.minimum(self._first, step)
            return loss
        self._bad = bad if self._bad is None else self._bad | bad
        self.left_out = False
        if trainer.accelerator.sync_gradients:
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
        if first != NEVER:
            raise NonFiniteLossError(_what_to_do(trainer, first, "is infinite or not a number"))

    def _skip(self, trainer: Trainer) -> None:
        self.skipped += 1
        self.left_out = True
        if self.skipped > self.skip_limit:
            trouble = f"is infinite or not a number, and {self.skip_limit} such steps were left out already"
            raise NonFiniteLossError(_what_to_do(trainer, trainer.state.global_step + 1, trouble))
        # An optimizer passes over parameters without gradient: no weight, moment or decay moves. The scaler of fp16
        # leaves such a step out by itself, and asks to see the gradients.
        if trainer.accelerator.scaler is None:
            trainer.model.zero_grad(set_to_none=True)


def _what_to_do(trainer: Trainer, step: int, trouble: str) -> str:
    good = [path for path in checkpoints_in(trainer.args.output_dir) if int(path.name.rpartition("-")[2]) < step]
    checkpoint = f"The last good checkpoint is {good[0]}" if good else "There is no checkpoint before it"
    return (
        f"The loss of step {step} {trouble}; the learning rate is {trainer._get_learning_rate():.3g} now, at step "
        f"{trainer.state.global_step}. {checkpoint}. Go on from there with a lower --learning_rate, with "
        "--max_grad_norm 1.0, in float32 instead of half precision, or with --skip_nonfinite_steps N."
    )
