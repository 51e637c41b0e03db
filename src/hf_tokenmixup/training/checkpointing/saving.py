"""What a training writes and reads back: checkpoints that lose no tensor, and the published model beside them.

A checkpoint (`checkpoint-N`) holds everything, ScoreNet included. What lies in the output folder, and what goes to the
Hub, is the published form: a plain transformers model.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, has_length, unwrap_peft_model
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ...models import TokenMixupModelMixin, find_adapter_layers, merge_adapters
from ..lora import is_adapter_checkpoint, load_adapter_state_dicts
from ..processes import check_equal, connected, folder_is_shared, gather, on_all_processes
from .disk_space import SaveError, check_disk_space, check_writable, saving
from .integrity import (
    CALLBACK_STATE_KEY,
    TRAINER_STATE_NAME,
    find_checkpoint_error,
    list_file_sizes,
    list_incomplete_checkpoints,
    remove_checkpoint,
    resolve_resume_checkpoint,
    validate_checkpoint,
)
from .resume_state import ContinuingTrainer, warn_about_newer_checkpoints

logger = logging.getLogger(__name__)


class CheckpointTrainer(ContinuingTrainer):
    """A Trainer that restores every tensor of a checkpoint and publishes plain models.

    The stock Trainer reads checkpoints back with `load_state_dict(strict=False)`. A ViT's checkpoint holds the names
    of transformers 4 (`vit.encoder.layer.0...`), so that its encoder stays as it was, with a warning only.
    `from_pretrained` knows the renaming; here it does the reading, and the loading is strict.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The checkpoint that holds the weights as they are now.
        self._held: Path | None = None
        given = kwargs.get("args")
        if connected() and given is not None:
            # transformers makes the output folder in one process, whose error the others would wait for.
            on_all_processes(lambda: check_writable(given.output_dir) if given.should_save else None)
        try:
            super().__init__(*args, **kwargs)
        except OSError:
            # The host makes the output folder.
            check_writable(kwargs["args"].output_dir)
            raise

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without the wrappers of distributed training and `torch.compile`."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def classifier_model(self) -> nn.Module:
        """The classifier itself: `unwrapped_model`, or what it wraps where that is a model of peft."""
        return unwrap_peft_model(self.unwrapped_model)

    def plain_model(self) -> nn.Module:
        """The model in the form that goes into the output folder and to the Hub: plain, with adapters merged."""
        model = self.classifier_model
        with torch.random.fork_rng(devices=[]):
            return model.published() if isinstance(model, TokenMixupModelMixin) else merge_adapters(model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; True or "last" resumes from the newest checkpoint that was written to its end.

        "auto" does so too, and begins anew where there is none.

        Raises:
            ValueError: there is none such, or the one that is named is cut short; the output folder cannot be written
                to, or has no room for a checkpoint.
            SaveError: a checkpoint could not be written. Those before it are as they were.
        """
        on_all_processes(lambda: check_writable(self.args.output_dir))
        if connected():
            self._compare_processes()
        self._held = None
        if resume_from_checkpoint:
            resume_from_checkpoint = resolve_resume_checkpoint(str(resume_from_checkpoint), self.args.output_dir)
        if resume_from_checkpoint:
            self._held = Path(resume_from_checkpoint).absolute()
            if self.args.should_log:
                warn_about_newer_checkpoints(self._held)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As in `Trainer`; results that an interrupted run wrote by halves are written anew."""
        if combined and self.is_world_process_zero():
            _remove_if_truncated(Path(self.args.output_dir) / "all_results.json")
        with saving("The results", self.args.output_dir):
            super().save_metrics(split, metrics, combined)

    def save_state(self) -> None:
        with saving("The state of the training", self.args.output_dir):
            super().save_state()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        # The state of a resumed run has those of the run before. `TrainerState.compute_steps` reads the new intervals.
        self.state.compute_steps(self.args, self.state.max_steps)
        self.state.train_batch_size = self._train_batch_size
        on_all_processes(
            lambda: check_disk_space(self.unwrapped_model, self.args, self.state) if self.args.should_save else None
        )
        return super()._prepare_for_training(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=trial)).absolute() / name
        try:
            with saving(name, folder.parent):
                if self._is_held(folder):
                    self._rewrite_trainer_state(folder)
                else:
                    self._clear_checkpoint_dir(folder)
                    super()._save_checkpoint(model, trial)
                    self._held = folder
        except SaveError:
            if self.args.should_save and find_checkpoint_error(folder) is not None:
                remove_checkpoint(folder)
            raise

    def _is_held(self, folder: Path) -> bool:
        """Whether this checkpoint was written or loaded since the last step, in all processes that write one."""
        held = folder == self._held and (not self.args.should_save or find_checkpoint_error(folder) is None)
        return all(gather(held)) if connected() else held

    def _compare_processes(self) -> None:
        """Compare what must be the same in all processes: the training images and, for checkpoints, the output folder.

        Raises:
            ValueError: The datasets have other lengths. Several processes would write the same checkpoint, or the best
                one could not be read by all.
        """
        args, folder = self.args, self.args.output_dir
        if has_length(self.train_dataset):
            found = {"the number of images": len(self.train_dataset)}
            labels = getattr(self.train_dataset, "labels", None)
            if isinstance(labels, np.ndarray):
                found["the digest of the labels"] = hashlib.blake2b(
                    np.ascontiguousarray(labels), digest_size=8
                ).hexdigest()
            check_equal("The training dataset", found, "Give all processes the same files, in the same order.")
        if args.save_strategy == SaveStrategy.NO:
            return
        shared, writers = folder_is_shared(folder), sum(gather(args.should_save))
        if shared and writers > 1:
            raise ValueError(
                f"save_on_each_node=True, but all processes share {folder}, where {writers} of them would write the "
                "same files. Set save_on_each_node=False, or give each machine a folder on its own disk."
            )
        if shared or args.save_on_each_node:
            return
        found = (
            f"The output folder of the main process, {gather(str(folder))[0]}, is not that of all processes, as with "
            "separate disks or where each process chooses its own name"
        )
        hint = "Set save_on_each_node=True, or choose a folder that all processes share."
        if args.load_best_model_at_end:
            raise ValueError(f"{found}: only some could load the best model at the end. {hint}")
        if args.should_log:
            logger.warning("%s: no run can be resumed from its checkpoints. %s", found, hint)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if connected() and self.args.load_best_model_at_end and not self.terminated:
            best = self.state.best_model_checkpoint
            hint = "All processes load the best model: resume with a folder that all of them share."
            check_equal("The best checkpoint", {"its name": None if best is None else Path(best).name}, hint)
            if best is not None:
                on_all_processes(lambda: validate_checkpoint(best))
        return super()._finalize_training(*args, **kwargs)

    def _clear_checkpoint_dir(self, folder: Path) -> None:
        """Remove what lies in the place of a new checkpoint, and what the host would count as checkpoints."""
        # Written by the host where there is an optimizer to resume with.
        self.state.stateful_callbacks.pop(CALLBACK_STATE_KEY, None)
        if self.args.should_save:
            remove_checkpoint(folder)
            if self.args.save_total_limit:
                for unfinished in list_incomplete_checkpoints(folder.parent):
                    remove_checkpoint(unfinished)
        self.accelerator.wait_for_everyone()

    def _rewrite_trainer_state(self, folder: Path) -> None:
        """Nothing was trained since this checkpoint was written: only its log and the best metric have changed."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        self._store_resume_state(folder)
        if self.args.should_save:
            self.state.save_to_json(folder / f".{TRAINER_STATE_NAME}")
            (folder / f".{TRAINER_STATE_NAME}").replace(folder / TRAINER_STATE_NAME)

    def _store_resume_state(self, folder: Path) -> None:
        kept = self.kept()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.stateful_callbacks[CALLBACK_STATE_KEY] = {"kept": kept, "files": list_file_sizes(folder)}

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What is written behind this is the state itself.
        self._store_resume_state(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if model is None and self._uses_adapters(resume_from_checkpoint):
            self._load_adapters(resume_from_checkpoint)
        elif model is None and self._loads_with_from_pretrained(resume_from_checkpoint):
            self._load_weights(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not (self.is_deepspeed_enabled or (Path(checkpoint) / SCHEDULER_NAME).is_file()):
            raise ValueError(
                f"The checkpoint {checkpoint} holds the model alone, as --save_only_model writes it: there is no "
                "optimizer and no schedule to go on with. Begin a new training from its weights, by "
                "--model_name_or_path."
            )
        # torch adds options to the defaults, which no group has, whenever it loads a state.
        defaults = getattr(self.optimizer, "defaults", None)
        options = defaults.keys() & self.optimizer.param_groups[0].keys() if isinstance(defaults, dict) else set()
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not options:
            return
        # torch takes another optimizer's state as it comes, and fails at the first step.
        lacking = sorted(options - self.optimizer.param_groups[0].keys())
        if lacking:
            optim = getattr(self.args.optim, "value", self.args.optim)
            raise ValueError(
                f"The checkpoint {checkpoint} holds the state of another optimizer than --optim {optim}, without "
                f"{', '.join(lacking)}: resume with the optimizer that it was trained with."
            )

    def _load_best_model(self) -> None:
        if self._uses_adapters(self.state.best_model_checkpoint):
            self._load_adapters(self.state.best_model_checkpoint)
        elif self._loads_with_from_pretrained(self.state.best_model_checkpoint):
            self._load_weights(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _uses_adapters(self, checkpoint: str) -> bool:
        """Whether the model has adapters, of which alone `checkpoint` must then tell.

        Raises:
            ValueError: It does, and the model has none.
        """
        adapted = bool(find_adapter_layers(self.unwrapped_model))
        if not adapted and is_adapter_checkpoint(checkpoint):
            raise ValueError(
                f"The checkpoint {checkpoint} holds adapters, and this {type(self.unwrapped_model).__name__} has "
                "none: resume with the --lora_rank and the model that the training began with."
            )
        return adapted

    def _load_adapters(self, checkpoint: str) -> None:
        """Load the adapters, and what trains in full beside them, into the model.

        Raises:
            ValueError: If a tensor is missing, left over or of another shape.
        """
        from peft import set_peft_model_state_dict

        restored = {}
        for name, held, own in load_adapter_state_dicts(checkpoint, self.unwrapped_model):
            self._raise_on_mismatch(checkpoint, compare_state_dicts(held, own))
            restored[name] = held
        for name, held in restored.items():
            set_peft_model_state_dict(self.classifier_model, held, adapter_name=name)

    def _loads_with_from_pretrained(self, checkpoint: str) -> bool:
        """Whether `from_pretrained` reads `checkpoint`: the host has other ways for FSDP and DeepSpeed."""
        weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        model = self.unwrapped_model
        return (
            isinstance(model, PreTrainedModel)
            and getattr(model, "hf_quantizer", None) is None
            and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            and (Path(checkpoint) / CONFIG_NAME).is_file()
            and any((Path(checkpoint) / name).is_file() for name in weights)
        )

    def _load_weights(self, checkpoint: str) -> None:
        """Load every tensor of `checkpoint` into the model.

        Raises:
            ValueError: If a tensor is missing, left over or of another shape.
        """
        model = self.unwrapped_model
        # Building a model draws random numbers; the resumed run must go on as if it had not.
        with torch.random.fork_rng(devices=[]):
            restored, report = type(model).from_pretrained(checkpoint, output_loading_info=True)
        held, own = restored.state_dict(), model.state_dict()
        # `load_state_dict` copies what fits before it raises, so the whole is compared first.
        trouble = compare_state_dicts(held, own, report["missing_keys"], report["unexpected_keys"])
        # A fresh ScoreNet is no fault in `from_pretrained`, which does not report it; in a checkpoint it is one.
        in_files = _count_tensors(Path(checkpoint))
        if isinstance(model, TokenMixupModelMixin) and in_files is not None and in_files < len(held):
            trouble.append(f"missing: {len(held) - in_files} tensors, ScoreNet's it seems, as in a published model.")
        # Layers without weights of their own leave no trace in the tensors.
        trouble += [
            f"{name}: {getattr(restored.config, name)} there, {getattr(model.config, name)} here."
            for name in ("vertical_layers", "manifold_mixup_layers")
            if isinstance(model, TokenMixupModelMixin)
            and getattr(restored.config, name) != getattr(model.config, name)
        ]
        self._raise_on_mismatch(checkpoint, trouble)
        model.load_state_dict(held)

    def _raise_on_mismatch(self, checkpoint: str, trouble: list[str]) -> None:
        if trouble:
            raise ValueError(
                f"The checkpoint {checkpoint} does not fit this {type(self.classifier_model).__name__}, and nothing "
                f"is restored by halves. {' '.join(trouble)} Build the model with the settings that the checkpoint "
                "was trained with (its config.json or adapter_config.json holds them), or start a new training."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; the published model is also written where FSDP's checkpoints are sharded."""
        super().save_model(output_dir, _internal_call)
        folder = self.args.output_dir if output_dir is None else output_dir
        if not self.is_fsdp_enabled or self._is_checkpoint(folder):
            return
        if "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            # The host writes no model at all then.
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if self._is_checkpoint(output_dir):
            return super()._save(output_dir, state_dict)
        with saving("The model", output_dir):
            self._save_plain_model(output_dir, state_dict)

    def _save_plain_model(self, output_dir: str, state_dict: dict | None) -> None:
        trained = self.model
        published = self.plain_model()
        if published is self.unwrapped_model:
            return super()._save(output_dir, state_dict)
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


def _remove_if_truncated(file: Path) -> None:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except ValueError:
        file.unlink()


def _count_tensors(checkpoint: Path) -> int | None:
    """How many tensors the safetensors files of `checkpoint` hold; None if there are none of these."""
    if (single := checkpoint / SAFE_WEIGHTS_NAME).is_file():
        with safe_open(single, framework="pt") as file:
            return len(file.keys())
    if (index := checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return len(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return None


def compare_state_dicts(
    held: dict[str, Tensor], own: dict[str, Tensor], missing: Iterable[str] = (), unexpected: Iterable[str] = ()
) -> list[str]:
    """How the tensors `held` in a checkpoint differ from a model's `own`, beyond their values."""
    faults = {
        "missing": [*missing, *(own.keys() - held.keys())],
        "unexpected": [*unexpected, *(held.keys() - own.keys())],
        "of another shape": [name for name in own.keys() & held.keys() if own[name].shape != held[name].shape],
    }
    return [f"{kind}: {_few(names)}" for kind, names in faults.items() if names]


def _few(names: Iterable[str]) -> str:
    """Up to three of `names`, and how many more there are."""
    names = sorted(set(names))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more + "."
