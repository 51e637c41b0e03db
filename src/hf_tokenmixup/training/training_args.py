"""Training arguments: those of transformers, mixup and CutMix of the input images, and an EMA of the weights.

`HfArgumentParser(TokenMixupTrainingArguments)` turns every field into a command-line flag. Settings of TokenMixup are
in the model's configuration. The paper combines TokenMixup with input mixup (Zhang et al., 2018) and CutMix (Yun et
al., 2019).
"""

import inspect
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend, is_deepspeed_available, parse_flag_from_env
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from ..data.mixup import MIXUP_MODES
from .peers import watch_peers

# Names that transformers deprecates, with their replacements in 5.23 and later.
CHECKPOINTING_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Keyword arguments of `torch.utils.checkpoint.checkpoint`; the first one is in its `**kwargs`.
CHECKPOINT_KWARGS = [
    "preserve_rng_state",
    *(
        name
        for name, parameter in inspect.signature(checkpoint).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY or name == "use_reentrant"
    ),
]


@dataclass
class TokenMixupTrainingArguments(TrainingArguments):
    """Arguments of a `TokenMixupTrainer`.

    These are the arguments of `transformers.TrainingArguments` with two other defaults (`remove_unused_columns=False`,
    `logging_nan_inf_filter=False`), and the fields below. `label_smoothing_factor` applies to the mixed targets of
    training only.

    SGD with momentum is `optim="sgd", optim_args="momentum=0.9"`. A cosine schedule with warm-up and a minimum
    learning rate is `lr_scheduler_type="cosine_warmup_with_min_lr"` (or `"cosine_with_min_lr"`) with
    `lr_scheduler_kwargs={"min_lr": 1e-5}`.

    Raises:
        ValueError: A value is not allowed, has no effect with another one, or is not supported by this machine; or a
            launcher started several processes that are not connected.
    """

    mixup_alpha: float = field(
        default=0.0,
        metadata={"help": "Mixup of the input images: lam is drawn from Beta(alpha, alpha). 0: off."},
    )
    cutmix_alpha: float = field(
        default=0.0,
        metadata={"help": "CutMix of the input images: lam is drawn from Beta(alpha, alpha). 0: off."},
    )
    mixup_prob: float = field(
        default=1.0,
        metadata={"help": "Probability that a batch (or an image, see `mixup_mode`) is mixed."},
    )
    mixup_switch_prob: float = field(
        default=0.5,
        metadata={"help": "Probability of CutMix instead of mixup, if both are on."},
    )
    mixup_mode: str = field(
        default="batch",
        metadata={
            "help": "Images that share one lam: a batch ('batch'), a pair ('pair') or none ('elem').",
            "choices": list(MIXUP_MODES),
        },
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Layer-wise decay of the learning rate: a layer has the rate of the next one times this factor. "
            "0.65 to 0.75 is common for fine-tuning. 1: off."
        },
    )
    skip_nonfinite_steps: int = field(
        default=0,
        metadata={
            "help": "Skip up to N steps with a non-finite loss instead of stopping at the first. Adds one device "
            "synchronization per step."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of an exponential moving average (EMA) of the weights, which is evaluated and exported. "
            "0.9999 averages over about 10,000 steps; use less, or `ema_warmup`, for short runs. 0: off."
        },
    )
    ema_warmup: bool = field(
        default=False,
        metadata={"help": "Use the smaller of `ema_decay` and 1 - t^(-2/3) in step t."},
    )
    channels_last: bool = field(
        default=False,
        metadata={"help": "Store images and convolutions in channels-last format: faster on GPUs with tensor cores."},
    )
    # transformers has this name since 5.23, and deprecates `gradient_checkpointing` for it.
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute a layer's activations in the backward pass instead of storing them, which saves "
            "memory. `gradient_checkpointing` is the same.",
            "nargs": "?",
            "const": True,
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `torch.utils.checkpoint.checkpoint`, as JSON."},
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={
            "help": "Remove dataset columns that the model's forward does not name. Off by default, since images that "
            "are transformed on the fly would lose their source column."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to resume from: a path, `last` (latest complete checkpoint in `output_dir`), or "
            "`auto` (like `last`, or start from scratch)."
        },
    )
    max_time: float | None = field(
        default=None,
        metadata={
            "help": "Stop the run after this number of minutes, with a checkpoint. The same command with "
            "`resume_from_checkpoint=auto` continues it. Loading before the first step and saving do not count."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Replace NaN and infinite losses by an average in the logs. Off by default, since it hides a "
            "diverging run and synchronizes with the device in every step."
        },
    )

    def __post_init__(self):
        # transformers parses these too, but its errors do not name the option.
        self.lr_scheduler_kwargs = _parse_json_dict(
            "lr_scheduler_kwargs", self.lr_scheduler_kwargs, '{"min_lr": 1e-5}'
        )
        self._merge_checkpointing_names()
        # transformers replaces None by a default folder.
        self.output_dir_is_default = self.output_dir is None
        if parse_flag_from_env("ACCELERATE_USE_CPU"):
            # Set by `accelerate launch --cpu`. transformers only follows it partially and would mix devices.
            self.use_cpu = True
        if self.dataloader_num_workers == 0:
            self._reset_worker_args()
        self._validate_bf16_support()
        self._validate_before_transformers()
        sets_non_blocking = self._sets_non_blocking()
        super().__post_init__()
        if not sets_non_blocking:
            # From pinned memory, the next batch is copied while the device computes. accelerate's default waits.
            self.accelerator_config.non_blocking = self.dataloader_pin_memory
        # From here on, an error of all processes is printed once.
        watch_peers()
        self._validate_launcher_settings()
        self._validate_integrations()
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "DeepSpeed ZeRO stage 3 is not supported, since saliency reads a layer's weights before the layer "
                "runs. Use stage 1 or 2 in the DeepSpeed configuration, or FSDP2 (`fsdp`)."
            )
        if not torch.accelerator.is_available():
            # It would have no effect, and torch would warn.
            self.dataloader_pin_memory = False
        self.check()
        self._validate_distributed_init()

    def check(self) -> None:
        """Validate the current values, which a hyperparameter search may have set after `__post_init__`.

        Raises:
            ValueError: A value is not allowed, or has no effect with another one.
        """
        self._validate_transformers_args()
        self._validate_unsupported_args()
        self._validate_compiler()
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a finite number of at least 0 (0 turns it off), got {value}.")
        for name in ("mixup_prob", "mixup_switch_prob"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` is a probability and must be between 0 and 1, got {value}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"`layer_decay` must be above 0 and at most 1 (1 turns it off), got {self.layer_decay}.")
        if self.skip_nonfinite_steps < 0:
            raise ValueError(
                f"`skip_nonfinite_steps` must be at least 0 (0: stop at the first), got {self.skip_nonfinite_steps}."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"`ema_decay` must be at least 0 (off) and less than 1, got {self.ema_decay}. 0.9999 is common for "
                "long runs, 0.99 to 0.999 for short ones."
            )
        if self.max_time is not None and not 0 < self.max_time < math.inf:
            raise ValueError(f"`max_time` must be a finite number of minutes above 0, got {self.max_time}.")
        if self.max_time is not None and self.enable_jit_checkpoint:
            raise ValueError("`max_time` cannot be used with `enable_jit_checkpoint`. Omit one of them.")
        if self.ema_warmup and not self.ema_decay:
            raise ValueError("`ema_warmup` needs an EMA of the weights. Pass `ema_decay` too, such as 0.9999.")
        if self.mixup_mode not in MIXUP_MODES:
            raise ValueError(f"`mixup_mode` must be one of {', '.join(MIXUP_MODES)}, got {self.mixup_mode!r}.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(
                f"`label_smoothing_factor` must be at least 0 and less than 1, got {self.label_smoothing_factor}."
            )

    def _validate_unsupported_args(self) -> None:
        """Validate arguments that are for other data than images, or leave nothing to measure."""
        by_length = ("group_by_length", "batch_rebalance")
        if self.train_sampling_strategy in by_length:
            raise ValueError(
                f"`train_sampling_strategy` must be random or sequential, got {self.train_sampling_strategy}: images "
                "have no length, and the Trainer would decode the entire dataset to find one."
            )
        if self.label_names is not None and "labels" not in self.label_names:
            raise ValueError(
                f"`label_names` must contain 'labels', got {self.label_names}: the Trainer would evaluate without "
                "labels. Omit it, and have the dataset or the `data_collator` return `labels`."
            )
        if self.use_liger_kernel:
            raise ValueError("`use_liger_kernel` has no effect: Liger's kernels are for language models. Omit it.")
        noise = self.neftune_noise_alpha
        if noise is not None and not 0 <= noise < math.inf:
            raise ValueError(f"`neftune_noise_alpha` must be a finite number of at least 0, got {noise}.")
        best = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if self.prediction_loss_only and not best.endswith("loss"):
            raise ValueError(
                f"`metric_for_best_model` is {self.metric_for_best_model!r}, but with `prediction_loss_only` an "
                "evaluation only measures the loss. Omit one of them."
            )

    def _sets_non_blocking(self) -> bool:
        """Whether `accelerator_config`, in one of its four forms, has a value for `non_blocking`."""
        given = self.accelerator_config
        if isinstance(given, str):
            given = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8"))
        return isinstance(given, AcceleratorConfig) or "non_blocking" in (given or {})

    def _validate_before_transformers(self) -> None:
        """Validate values that `TrainingArguments` replaces silently, or rejects without naming the argument."""
        if self.eval_steps == 0 and self.eval_strategy in ("steps", IntervalStrategy.STEPS):
            raise ValueError("`eval_steps` must be above 0 (`eval_strategy=no` turns evaluation off), got 0.")
        for name in ("accelerator_config", "fsdp_config", "deepspeed"):
            _validate_json_or_file(name, getattr(self, name, None))
        if isinstance(self.accelerator_config, str) and self.accelerator_config.lstrip().startswith("{"):
            _validate_keys("accelerator_config", json.loads(self.accelerator_config), _field_names(AcceleratorConfig))
        _validate_keys(
            "activation_checkpointing_kwargs", self.activation_checkpointing_kwargs or {}, CHECKPOINT_KWARGS
        )
        if self.deepspeed and not is_deepspeed_available():
            raise ValueError("`deepspeed` needs DeepSpeed, which is not installed: pip install deepspeed, or omit it.")
        backends = [backend.value.lower() for backend in DynamoBackend]
        if self.torch_compile_backend is not None and self.torch_compile_backend.lower() not in backends:
            raise ValueError(
                f"`torch_compile_backend` must be one of {', '.join(backends)}, got {self.torch_compile_backend!r}."
            )

    def _validate_compiler(self) -> None:
        """Check that `torch.compile` accepts the mode and the backend on this platform."""
        if not self.torch_compile:
            return
        try:
            # Nothing is compiled before the first call.
            torch.compile(_identity, backend=self.torch_compile_backend, mode=self.torch_compile_mode)
        except RuntimeError as error:
            raise ValueError(
                f"torch.compile rejects `torch_compile_mode` {self.torch_compile_mode!r} with "
                f"`torch_compile_backend` {self.torch_compile_backend!r}: {error}"
            ) from error

    def _merge_checkpointing_names(self) -> None:
        """Set both names of each argument to one value: that of the newer name, if it is given."""
        for old, new in CHECKPOINTING_NAMES.items():
            value = getattr(self, old) if getattr(self, new) is None else getattr(self, new)
            value = _parse_json_dict(new, value, '{"use_reentrant": false}') if new.endswith("kwargs") else bool(value)
            setattr(self, old, value)
            setattr(self, new, value)

    def _validate_transformers_args(self) -> None:
        """Validate values that transformers accepts silently, and that have no effect or fail during the run."""
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be a finite number of at least 0, got {value}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, or -1 to use `num_train_epochs`, got {self.max_steps}.")
        if self.max_steps == -1 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"`num_train_epochs` must be a finite number above 0, got {self.num_train_epochs}.")
        if self.dataloader_num_workers < 0:
            raise ValueError(
                f"`dataloader_num_workers` must be at least 0 (0: load in this process), got "
                f"{self.dataloader_num_workers}."
            )
        for name in ("dataloader_prefetch_factor", "eval_accumulation_steps", "save_total_limit", "ddp_timeout"):
            value = getattr(self, name)
            if value is not None and value < 1:
                hint = " Omit it to keep all checkpoints." if name == "save_total_limit" else ""
                raise ValueError(f"`{name}` must be at least 1, got {value}.{hint}")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**32:
                raise ValueError(f"`{name}` must be between 0 and {2**32 - 1}, got {value}.")
        if not 0 <= self.eval_delay < math.inf:
            raise ValueError(f"`eval_delay` must be a finite number of at least 0, got {self.eval_delay}.")
        warmup = self.warmup_steps
        if not 0 <= warmup < math.inf or (warmup > 1 and warmup != int(warmup)):
            raise ValueError(
                f"`warmup_steps` must be an integer number of steps, or a fraction of all steps below 1, got {warmup}."
            )
        strategies = {"logging_steps": self.logging_strategy, "save_steps": self.save_strategy}
        for name, strategy in (strategies | {"eval_steps": self.eval_strategy}).items():
            if strategy == "steps" and not getattr(self, name) > 0:
                option = name.replace("steps", "strategy")
                raise ValueError(f"`{name}` must be above 0 (`{option}=no` turns it off), got {getattr(self, name)}.")

    def _reset_worker_args(self) -> None:
        """Reset arguments of data loader workers if there are none, since torch rejects them."""
        self.dataloader_persistent_workers = False
        self.dataloader_prefetch_factor = None
        if hasattr(self, "dataloader_multiprocessing_context"):
            self.dataloader_multiprocessing_context = None

    def _validate_bf16_support(self) -> None:
        """Check that bfloat16 is supported where it is requested."""
        name = next((name for name in ("bf16", "bf16_full_eval") if getattr(self, name)), None)
        if name is None or self.use_cpu or is_torch_xla_available() or is_torch_bf16_gpu_available():
            return
        raise ValueError(
            f"`{name}` needs a GPU that computes in bfloat16, and {_describe_gpu()}. Pass `{name}=False` to compute "
            "in float32, or `use_cpu=True` to compute in bfloat16 on the CPU."
        )

    def _validate_launcher_settings(self) -> None:
        """Check the environment variables that `accelerate launch` and its configuration file set.

        Raises:
            ValueError: The device does not support the precision, or gradient accumulation differs from these
                arguments, which the Trainer uses.
        """
        precision, by_argument = self.mixed_precision, self.fp16 or self.bf16
        requested = f"`{precision}`" if by_argument else f"`{precision}`, set by the launcher,"
        hint = "" if by_argument else " (with `accelerate launch`, set mixed_precision to no)"
        if precision in ("fp16", "fp8") and self.device.type == "cpu":
            raise ValueError(
                f"{requested} has no effect on a CPU, where the run would be in float32. Omit it{hint}, or pass "
                "`bf16=True`."
            )
        if precision == "bf16" and self.device.type == "cuda" and not is_torch_bf16_gpu_available():
            raise ValueError(
                f"{requested} needs a GPU that computes in bfloat16, and {_describe_gpu()}. Omit it{hint}."
            )
        steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        if not steps.isdigit() or int(steps) in (1, self.gradient_accumulation_steps) or self.deepspeed_plugin:
            return
        raise ValueError(
            f"The launcher sets {steps} steps of gradient accumulation, but the Trainer uses "
            f"`gradient_accumulation_steps`, which is {self.gradient_accumulation_steps}. Pass "
            f"`gradient_accumulation_steps={steps}`, or unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS."
        )

    def _validate_integrations(self) -> None:
        """Check that the trackers of `report_to` are installed. The Trainer rejects unknown names."""
        # transformers does not search for flyte.
        installed = [*get_available_reporting_integrations(), "flyte"]
        missing = [name for name in self.report_to if name in INTEGRATION_TO_CALLBACK and name not in installed]
        if missing:
            raise ValueError(
                f"`report_to` names {missing[0]!r}, which is not installed. Install it, or choose from "
                f"{', '.join([*installed[:-1], 'none'])}."
            )

    def _validate_distributed_init(self) -> None:
        """Check that the processes of a launcher are connected.

        Without a GPU and without `use_cpu`, transformers (with accelerate 1.15 and later) does not initialize
        `torch.distributed`: every process of torchrun trains on all data and writes to the same folder.
        """
        world_size = os.environ.get("WORLD_SIZE", "1")
        if world_size.isdigit() and int(world_size) > 1 and self.world_size == 1:
            raise ValueError(
                f"WORLD_SIZE is {world_size}, but torch.distributed is not initialized: every process would train on "
                "its own and overwrite the others' files. On a machine without a GPU pass "
                "`use_cpu=True`; for a single process start the script with `python`, or start one process."
            )


def _describe_gpu() -> str:
    """Why there is no bfloat16, as part of a sentence."""
    return f"{torch.cuda.get_device_name()} does not" if torch.cuda.is_available() else "there is no GPU"


def _identity(value: Any) -> Any:
    return value


def _validate_json_or_file(name: str, value: Any) -> None:
    """Check that a text is a JSON object, or the path of a file with one."""
    if not isinstance(value, str) or not value:
        return
    try:
        text = value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"`{name}` must be a JSON object or a JSON file, got {value!r} ({reason}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"`{name}` must be a JSON object or a JSON file of one, got {value!r}.")


def _field_names(settings: type) -> list[str]:
    return [item.name for item in fields(settings)]


def _validate_keys(name: str, mapping: dict[str, Any], known: Iterable[str]) -> None:
    """Check that all keys of `mapping` are `known`."""
    if unknown := sorted(mapping.keys() - set(known)):
        raise ValueError(
            f"`{name}` has no {', '.join(map(repr, unknown))}. Remove unknown keys; it takes {', '.join(known)}."
        )


def _parse_json_dict(name: str, value: dict | str | None, example: str) -> dict | None:
    """A dictionary, which may be given as JSON text. Errors show the `example`."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
        valid = parsed is None or isinstance(parsed, dict)
    except json.JSONDecodeError:
        valid = False
    if not valid:
        raise ValueError(f"`{name}` must be a JSON object such as {example}, got {value!r}.")
    return parsed
