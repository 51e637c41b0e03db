"""What a training writes and reads back: checkpoints that lose no tensor, and the published model beside them.

A checkpoint (`checkpoint-N`) holds everything, ScoreNet included. What lies in the output folder, and what goes to the
Hub, is the published form: a plain transformers model.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..models import TokenMixupModel
from .resuming import check_checkpoint, last_complete_checkpoint


class CheckpointTrainer(Trainer):
    """A Trainer that restores every tensor of a checkpoint and publishes plain models.

    The stock Trainer reads checkpoints back with `load_state_dict(strict=False)`. A ViT's checkpoint holds the names
    of transformers 4 (`vit.encoder.layer.0...`), so that its encoder stays as it was, with a warning only.
    `from_pretrained` knows the renaming; here it does the reading, and the loading is strict.
    """

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrappers of distributed training and `torch.compile`."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; True resumes from the newest checkpoint that was written to its end.

        Raises:
            ValueError: there is none such, or the one that is named is cut short.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(self.args.output_dir))
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if model is None and self._reads_back(resume_from_checkpoint):
            self._restore(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(getattr(self.optimizer, "defaults", None), dict):
            return
        # torch takes another optimizer's state as it comes, and fails at the first step.
        lacking = sorted(self.optimizer.defaults.keys() - self.optimizer.param_groups[0].keys())
        if lacking:
            optim = getattr(self.args.optim, "value", self.args.optim)
            raise ValueError(
                f"The checkpoint {checkpoint} holds the state of another optimizer than --optim {optim}, without "
                f"{', '.join(lacking)}: resume with the optimizer that it was trained with."
            )

    def _load_best_model(self) -> None:
        if self._reads_back(self.state.best_model_checkpoint):
            self._restore(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _reads_back(self, checkpoint: str) -> bool:
        """Whether `from_pretrained` reads `checkpoint`: the host has other ways for FSDP, DeepSpeed and PEFT."""
        weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        model = self.bare_model
        return (
            isinstance(model, PreTrainedModel)
            and not getattr(model, "_hf_peft_config_loaded", False)
            and getattr(model, "hf_quantizer", None) is None
            and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            and (Path(checkpoint) / CONFIG_NAME).is_file()
            and any((Path(checkpoint) / name).is_file() for name in weights)
        )

    def _restore(self, checkpoint: str) -> None:
        """Load every tensor of `checkpoint` into the model.

        Raises:
            ValueError: If a tensor is missing, left over or of another shape.
        """
        model = self.bare_model
        # Building a model draws random numbers; the resumed run must go on as if it had not.
        with torch.random.fork_rng(devices=[]):
            restored, report = type(model).from_pretrained(checkpoint, output_loading_info=True)
        held, own = restored.state_dict(), model.state_dict()
        # `load_state_dict` copies what fits before it raises, so the whole is compared first.
        faults = {
            "missing": [*report["missing_keys"], *(own.keys() - held.keys())],
            "unexpected": [*report["unexpected_keys"], *(held.keys() - own.keys())],
            "of another shape": [name for name in own.keys() & held.keys() if own[name].shape != held[name].shape],
        }
        trouble = [f"{kind}: {_few(names)}" for kind, names in faults.items() if names]
        # A fresh ScoreNet is no fault in `from_pretrained`, which does not report it; in a checkpoint it is one.
        in_files = _tensors_in(Path(checkpoint))
        if isinstance(model, TokenMixupModel) and in_files is not None and in_files < len(held):
            trouble.append(f"missing: {len(held) - in_files} tensors, ScoreNet's it seems, as in a published model.")
        # Layers without weights of their own leave no trace in the tensors.
        trouble += [
            f"{name}: {getattr(restored.config, name)} there, {getattr(model.config, name)} here."
            for name in ("vertical_layers", "manifold_mixup_layers")
            if isinstance(model, TokenMixupModel) and getattr(restored.config, name) != getattr(model.config, name)
        ]
        if trouble:
            raise ValueError(
                f"The checkpoint {checkpoint} does not fit this {type(model).__name__}, and nothing is restored by "
                f"halves. {' '.join(trouble)} Build the model with the settings that the checkpoint was trained with "
                "(its config.json holds them), or start a new training from it with `from_pretrained`."
            )
        model.load_state_dict(held)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        trained = self.model
        if self._is_checkpoint(output_dir) or not isinstance(self.bare_model, TokenMixupModel):
            return super()._save(output_dir, state_dict)
        with torch.random.fork_rng(devices=[]):
            published = self.bare_model.published()
        if state_dict is not None:
            names = published.state_dict().keys()
            state_dict = {name: tensor for name, tensor in state_dict.items() if name in names}
        # The host writes `self.model`, with the image processor and the arguments beside it.
        self.model = published
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model = trained

    def _is_checkpoint(self, folder: str) -> bool:
        return Path(folder) != Path(self.args.output_dir) and bool(
            re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).name)
        )


def _tensors_in(checkpoint: Path) -> int | None:
    """How many tensors the safetensors files of `checkpoint` hold; None if there are none of these."""
    if (single := checkpoint / SAFE_WEIGHTS_NAME).is_file():
        with safe_open(single, framework="pt") as file:
            return len(file.keys())
    if (index := checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return len(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return None


def _few(names: Iterable[str]) -> str:
    """Up to three of `names`, and how many more there are."""
    names = sorted(set(names))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more + "."
