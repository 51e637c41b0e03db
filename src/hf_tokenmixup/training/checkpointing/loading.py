"""Loading of checkpoints: every tensor of the weights or adapters, and the state of the same optimizer.

Trainer loads weights with `load_state_dict(strict=False)`. A ViT's checkpoint has the names of transformers 4
(`vit.encoder.layer.0...`), so that its encoder would stay as it was, with a warning only. `from_pretrained` knows the
renaming, so it reads the weights here, and they are then loaded strictly.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ...models import TokenMixupModelMixin, find_adapter_layers
from ...utils.text import format_list
from ..lora import is_adapter_checkpoint, load_adapter_state_dicts

if TYPE_CHECKING:
    from ..trainer import TokenMixupTrainer

WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def load_weights(trainer: "TokenMixupTrainer", checkpoint: str) -> bool:
    """Load every tensor of a checkpoint into the model of a trainer.

    Returns:
        Whether they were loaded. False where Trainer has another way, as for FSDP and DeepSpeed.

    Raises:
        ValueError: A tensor is missing, unexpected or of another shape; the checkpoint has adapters and the model has
            none. Nothing is loaded then.
    """
    if _uses_adapters(trainer, checkpoint):
        _load_adapters(trainer, checkpoint)
        return True
    if _is_pretrained_folder(trainer, checkpoint):
        _load_pretrained(trainer, checkpoint)
        return True
    return False


def get_optimizer_options(trainer: "TokenMixupTrainer", checkpoint: str | None) -> set[str]:
    """Return the options of the optimizer's parameter groups, before the state of a checkpoint is loaded.

    Raises:
        ValueError: The checkpoint contains the model alone.
    """
    has_schedule = checkpoint is None or trainer.is_deepspeed_enabled or (Path(checkpoint) / SCHEDULER_NAME).is_file()
    if not has_schedule:
        raise ValueError(
            f"The checkpoint {checkpoint} contains the model alone (`save_only_model`) and cannot be resumed. Start a "
            "new run from its weights (`model_name_or_path`)."
        )
    # torch adds options to the defaults, which no group has, whenever it loads a state.
    defaults = getattr(trainer.optimizer, "defaults", None)
    return defaults.keys() & trainer.optimizer.param_groups[0].keys() if isinstance(defaults, dict) else set()


def validate_optimizer_state(trainer: "TokenMixupTrainer", checkpoint: str | None, options: set[str]) -> None:
    """Check that the state that was loaded is that of the same optimizer.

    torch loads the state of another optimizer, and fails at the first step.

    Args:
        trainer: With the state of `checkpoint`.
        checkpoint: None if nothing was loaded.
        options: What `get_optimizer_options` returned before.

    Raises:
        ValueError: It is the state of another optimizer.
    """
    if checkpoint is None or not options:
        return
    if missing := sorted(options - trainer.optimizer.param_groups[0].keys()):
        optim = getattr(trainer.args.optim, "value", trainer.args.optim)
        raise ValueError(
            f"The checkpoint {checkpoint} has the state of another optimizer than `optim={optim}`, without "
            f"{', '.join(missing)}. Resume with the optimizer that it was trained with."
        )


def compare_state_dicts(
    saved: dict[str, Tensor], expected: dict[str, Tensor], missing: Iterable[str] = (), unexpected: Iterable[str] = ()
) -> list[str]:
    """Return how the tensors of a checkpoint differ from those of a model in names and shapes, as sentences."""
    differences = {
        "missing": [*missing, *(expected.keys() - saved.keys())],
        "unexpected": [*unexpected, *(saved.keys() - expected.keys())],
        "of another shape": [
            name for name in expected.keys() & saved.keys() if expected[name].shape != saved[name].shape
        ],
    }
    return [f"{kind}: {format_list(sorted(set(names)), 3, str)}." for kind, names in differences.items() if names]


def _uses_adapters(trainer: "TokenMixupTrainer", checkpoint: str) -> bool:
    """Return whether the model has adapters; then the checkpoint has these alone.

    Raises:
        ValueError: The checkpoint has adapters, and the model has none.
    """
    model = trainer.unwrapped_model
    has_adapters = bool(find_adapter_layers(model))
    if not has_adapters and is_adapter_checkpoint(checkpoint):
        raise ValueError(
            f"The checkpoint {checkpoint} contains adapters, and this {type(model).__name__} has none. Resume with "
            "the `lora_rank` and the model that the run was started with."
        )
    return has_adapters


def _load_adapters(trainer: "TokenMixupTrainer", checkpoint: str) -> None:
    from peft import set_peft_model_state_dict

    loaded = {}
    for name, saved, expected in load_adapter_state_dicts(checkpoint, trainer.unwrapped_model):
        _raise_on_mismatch(trainer, checkpoint, compare_state_dicts(saved, expected))
        loaded[name] = saved
    for name, saved in loaded.items():
        set_peft_model_state_dict(trainer.classifier_model, saved, adapter_name=name)


def _is_pretrained_folder(trainer: "TokenMixupTrainer", checkpoint: str) -> bool:
    model = trainer.unwrapped_model
    return (
        isinstance(model, PreTrainedModel)
        and getattr(model, "hf_quantizer", None) is None
        and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
        and (Path(checkpoint) / CONFIG_NAME).is_file()
        and any((Path(checkpoint) / name).is_file() for name in WEIGHT_FILES)
    )


def _load_pretrained(trainer: "TokenMixupTrainer", checkpoint: str) -> None:
    model = trainer.unwrapped_model
    # Building a model draws random numbers, which an uninterrupted run does not.
    with torch.random.fork_rng(devices=[]):
        loaded, report = type(model).from_pretrained(checkpoint, output_loading_info=True)
    saved, expected = loaded.state_dict(), model.state_dict()
    # `load_state_dict` copies what fits before it raises, so everything is compared first.
    problems = compare_state_dicts(saved, expected, report["missing_keys"], report["unexpected_keys"])
    if isinstance(model, TokenMixupModelMixin):
        # `from_pretrained` does not report a missing ScoreNet, which is right for an exported model alone.
        num_saved = _count_tensors(Path(checkpoint))
        if num_saved is not None and num_saved < len(saved):
            problems.append(
                f"missing: {len(saved) - num_saved} tensors, probably those of ScoreNet, as in an exported model."
            )
        # These layers have no weights of their own, so the tensors do not show a difference.
        problems += [
            f"{name}: {getattr(loaded.config, name)} there, {getattr(model.config, name)} here."
            for name in ("vertical_layers", "manifold_mixup_layers")
            if getattr(loaded.config, name) != getattr(model.config, name)
        ]
    _raise_on_mismatch(trainer, checkpoint, problems)
    model.load_state_dict(saved)


def _raise_on_mismatch(trainer: "TokenMixupTrainer", checkpoint: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"The checkpoint {checkpoint} does not match this {type(trainer.classifier_model).__name__}: "
            f"{' '.join(problems)} No weights were loaded. Build the model with the settings that the checkpoint was "
            "trained with (see its config.json or adapter_config.json), or start a new run."
        )


def _count_tensors(checkpoint: Path) -> int | None:
    """Return how many tensors the safetensors files of `checkpoint` have; None if there are no such files."""
    if (single := checkpoint / SAFE_WEIGHTS_NAME).is_file():
        with safe_open(single, framework="pt") as file:
            return len(file.keys())
    if (index := checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return len(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return None
