"""Training arguments: those of transformers, and how images and labels are mixed before the model sees them.

`HfArgumentParser(TokenMixupTrainingArguments)` turns every field into a command-line flag. The settings of TokenMixup
itself belong to the model's configuration, not here: this is input mixup (Zhang et al., 2018) and CutMix (Yun et al.,
2019), which the paper combines TokenMixup with.
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

# Names that transformers deprecates, and those that it has for them since 5.23.
CHECKPOINTING_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# What `torch.utils.checkpoint.checkpoint` takes; it hides one of them in its `**kwargs`.
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

    All that `transformers.TrainingArguments` takes, with two other defaults (`remove_unused_columns=False`,
    `logging_nan_inf_filter=False`), five settings of input mixing, `skip_nonfinite_steps`, `channels_last`, and two of
    an average of the weights. `label_smoothing_factor` keeps its name; it is applied to the targets in training only,
    together with the mixing.

    SGD with momentum is `optim="sgd", optim_args="momentum=0.9"`; a cosine that ends at a floor after a warm-up is
    `lr_scheduler_type="cosine_warmup_with_min_lr"` (or `"cosine_with_min_lr"`) with
    `lr_scheduler_kwargs={"min_lr": 1e-5}`.

    Raises:
        ValueError: If a setting is outside what it allows, or if a launcher has started several processes that would
            train without knowing of each other.
    """

    _argument_group_name = "training (more of transformers' options: --help_all)"

    mixup_alpha: float = field(
        default=0.0,
        metadata={"help": "Mixup on the input images: an image's share is drawn from Beta(alpha, alpha). 0: off."},
    )
    cutmix_alpha: float = field(
        default=0.0,
        metadata={"help": "CutMix on the input images: the area kept is drawn from Beta(alpha, alpha). 0: off."},
    )
    mixup_prob: float = field(
        default=1.0,
        metadata={"help": "Probability that a batch (or an image, see --mixup_mode) is mixed at all."},
    )
    mixup_switch_prob: float = field(
        default=0.5,
        metadata={"help": "Probability of CutMix rather than mixup, where both are on."},
    )
    mixup_mode: str = field(
        default="batch",
        metadata={
            "help": "What one draw holds for: the batch ('batch'), a pair of images ('pair') or one image ('elem').",
            "choices": list(MIXUP_MODES),
        },
    )
    skip_nonfinite_steps: int = field(
        default=0,
        metadata={
            "help": "Leave out up to so many steps whose loss is infinite or not a number, instead of stopping at the "
            "first. Costs a wait for the device in each step."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Keep an exponential moving average of the weights that keeps so much of itself in each step "
            "(0.9999: it reaches back some 10,000 steps; a short training needs less, or --ema_warmup), and evaluate "
            "and publish it. 0: off."
        },
    )
    ema_warmup: bool = field(
        default=False,
        metadata={"help": "Let the decay grow: in step t the smaller of --ema_decay and 1 - t^(-2/3)."},
    )
    channels_last: bool = field(
        default=False,
        metadata={"help": "Images and convolutions with channels last in memory: faster on GPUs with tensor cores."},
    )
    # transformers has this name since 5.23, and deprecates `gradient_checkpointing` for it.
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute a layer's activations again in the backward pass instead of storing them, which saves "
            "memory. --gradient_checkpointing is the same.",
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
            "help": "Remove dataset columns that the model's forward does not name. Off by default: images that are "
            "transformed when they are read would lose their source column."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on with a training: `last`, from the newest whole checkpoint of --output_dir; `auto`, so too, "
            "or from the beginning where there is none; or a checkpoint's folder."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Replace NaN and infinite losses by an average in the logs. Off by default: it hides a diverging "
            "training, and reads the loss back from the device at every step, which the device then waits for."
        },
    )

    def __post_init__(self):
        # The host parses these by itself, and does not say what it could not read.
        self.lr_scheduler_kwargs = _parse_json_dict(
            "lr_scheduler_kwargs", self.lr_scheduler_kwargs, '{"min_lr": 1e-5}'
        )
        self._unite_names_of_checkpointing()
        # transformers puts a name of its own in the place of None.
        self.output_dir_is_default = self.output_dir is None
        if parse_flag_from_env("ACCELERATE_USE_CPU"):
            # `accelerate launch --cpu`; transformers follows it in part only and would mix devices.
            self.use_cpu = True
        if self.dataloader_num_workers == 0:
            self._drop_worker_settings()
        self._refuse_bf16_without_hardware()
        self._check_before_transformers()
        super().__post_init__()
        # From here on, an error of all processes is printed once.
        watch_peers()
        self._refuse_what_the_launcher_asks_in_vain()
        self._refuse_missing_integrations()
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "ZeRO stage 3 of DeepSpeed keeps a layer's weights in parts until the layer runs, and saliency asks "
                "for them before: choose stage 1 or 2 in the DeepSpeed configuration, or FSDP2 (--fsdp)."
            )
        self.check()
        self._check_distributed_init()

    def check(self) -> None:
        """Check the values as they are; a hyperparameter search sets them after the arguments were made.

        Raises:
            ValueError: a setting is outside of what it allows, or does not go with another.
        """
        self._validate_transformers_args()
        self._check_helpers()
        self._check_compiler()
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a finite number of at least 0 (0 turns it off), got {value}.")
        for name in ("mixup_prob", "mixup_switch_prob"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` is a probability and must lie between 0 and 1, got {value}.")
        if self.skip_nonfinite_steps < 0:
            raise ValueError(
                f"`skip_nonfinite_steps` must be at least 0 (0: stop at the first), got {self.skip_nonfinite_steps}."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"`ema_decay` must be at least 0 (off) and less than 1, got {self.ema_decay}; 0.9999 is usual for "
                "long trainings, 0.99 to 0.999 for short ones."
            )
        if self.ema_warmup and not self.ema_decay:
            raise ValueError("`ema_warmup` is for an average of the weights: give `ema_decay` too, such as 0.9999.")
        if self.mixup_mode not in MIXUP_MODES:
            raise ValueError(f"`mixup_mode` must be one of {', '.join(MIXUP_MODES)}, got {self.mixup_mode!r}.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(
                f"`label_smoothing_factor` must be at least 0 and less than 1, got {self.label_smoothing_factor}."
            )

    def _check_helpers(self) -> None:
        """Check the options of the Trainer that are for other data than images, or leave nothing to measure."""
        by_length = ("group_by_length", "batch_rebalance")
        if self.train_sampling_strategy in by_length:
            raise ValueError(
                f"`train_sampling_strategy` must be random or sequential, got {self.train_sampling_strategy}: images "
                "have no length, and the Trainer would decode the entire dataset to look for one."
            )
        if self.label_names is not None and "labels" not in self.label_names:
            raise ValueError(
                f"`label_names` must contain 'labels', got {self.label_names}: the Trainer would evaluate without "
                "labels. Leave it out, and have the dataset or the `data_collator` return `labels`."
            )
        if self.use_liger_kernel:
            raise ValueError("`use_liger_kernel` has no effect: Liger's kernels are for language models. Omit it.")
        noise = self.neftune_noise_alpha
        if noise is not None and not 0 <= noise < math.inf:
            raise ValueError(f"`neftune_noise_alpha` must be a finite number of at least 0, got {noise}.")
        best = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if self.prediction_loss_only and not best.endswith("loss"):
            raise ValueError(
                f"`metric_for_best_model` is {self.metric_for_best_model!r}, and with `prediction_loss_only` an "
                "evaluation measures the loss alone. Leave one of them out."
            )

    def _check_before_transformers(self) -> None:
        """Check what `TrainingArguments` replaces without a word, or fails on without naming the option."""
        if self.eval_steps == 0 and self.eval_strategy in ("steps", IntervalStrategy.STEPS):
            raise ValueError("`eval_steps` must be above 0 (`eval_strategy=no` turns evaluation off), got 0.")
        for name in ("accelerator_config", "fsdp_config", "deepspeed"):
            _check_json_or_file(name, getattr(self, name, None))
        if isinstance(self.accelerator_config, str) and self.accelerator_config.lstrip().startswith("{"):
            _check_keys("accelerator_config", json.loads(self.accelerator_config), _names_of_fields(AcceleratorConfig))
        _check_keys("activation_checkpointing_kwargs", self.activation_checkpointing_kwargs or {}, CHECKPOINT_KWARGS)
        if self.deepspeed and not is_deepspeed_available():
            raise ValueError("`deepspeed` needs DeepSpeed, which is not installed: pip install deepspeed, or omit it.")
        backends = [backend.value.lower() for backend in DynamoBackend]
        if self.torch_compile_backend is not None and self.torch_compile_backend.lower() not in backends:
            raise ValueError(
                f"`torch_compile_backend` must be one of {', '.join(backends)}, got {self.torch_compile_backend!r}."
            )

    def _check_compiler(self) -> None:
        """
        Raises:
            ValueError: `torch.compile` does not take the mode, or does not support this platform.
        """
        if not self.torch_compile:
            return
        try:
            # Nothing is compiled before the first call.
            torch.compile(_identity, backend=self.torch_compile_backend, mode=self.torch_compile_mode)
        except RuntimeError as error:
            raise ValueError(
                f"torch.compile refuses `torch_compile_mode` {self.torch_compile_mode!r} with "
                f"`torch_compile_backend` {self.torch_compile_backend!r}: {error}"
            ) from error

    def _unite_names_of_checkpointing(self) -> None:
        """Give both names of each setting one value, that of the newer name where both are given."""
        for old, new in CHECKPOINTING_NAMES.items():
            value = getattr(self, old) if getattr(self, new) is None else getattr(self, new)
            value = _parse_json_dict(new, value, '{"use_reentrant": false}') if new.endswith("kwargs") else bool(value)
            setattr(self, old, value)
            setattr(self, new, value)

    def _validate_transformers_args(self) -> None:
        """The host's own numbers: what it takes unseen, and then trains without an effect or stops in the middle."""
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be a finite number of at least 0, got {value}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, or -1 to go by the epochs, got {self.max_steps}.")
        if self.max_steps == -1 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"`num_train_epochs` must be a finite number above 0, got {self.num_train_epochs}.")
        if self.dataloader_num_workers < 0:
            raise ValueError(
                f"`dataloader_num_workers` must be at least 0 (0: this process loads), got "
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
                raise ValueError(f"`{name}` must lie between 0 and {2**32 - 1}, got {value}.")
        if not 0 <= self.eval_delay < math.inf:
            raise ValueError(f"`eval_delay` must be a finite number of at least 0, got {self.eval_delay}.")
        warmup = self.warmup_steps
        if not 0 <= warmup < math.inf or (warmup > 1 and warmup != int(warmup)):
            raise ValueError(
                f"`warmup_steps` must be a whole number of steps, or a fraction of all steps below 1, got {warmup}."
            )
        strategies = {"logging_steps": self.logging_strategy, "save_steps": self.save_strategy}
        for name, strategy in (strategies | {"eval_steps": self.eval_strategy}).items():
            if strategy == "steps" and not getattr(self, name) > 0:
                option = name.replace("steps", "strategy")
                raise ValueError(f"`{name}` must be above 0 (`{option}=no` turns it off), got {getattr(self, name)}.")

    def _drop_worker_settings(self) -> None:
        """Forget settings of the data loader's workers where there are none: torch would refuse them."""
        self.dataloader_persistent_workers = False
        self.dataloader_prefetch_factor = None
        if hasattr(self, "dataloader_multiprocessing_context"):
            self.dataloader_multiprocessing_context = None

    def _refuse_bf16_without_hardware(self) -> None:
        name = next((name for name in ("bf16", "bf16_full_eval") if getattr(self, name)), None)
        if name is None or self.use_cpu or is_torch_xla_available() or is_torch_bf16_gpu_available():
            return
        raise ValueError(
            f"`{name}` needs a GPU that computes in bfloat16, and {_gpu_found()}. Pass `{name}=False` to compute "
            "in float32, or `use_cpu=True` to compute in bfloat16 on the CPU."
        )

    def _refuse_what_the_launcher_asks_in_vain(self) -> None:
        """Check what the environment asks for, as `accelerate launch` and its configuration file set it.

        Raises:
            ValueError: for a precision that the device does not have, and for gradient accumulation, which the Trainer
                takes from its own arguments.
        """
        precision, by_flag = self.mixed_precision, self.fp16 or self.bf16
        asked = f"`{precision}`" if by_flag else f"`{precision}`, asked for by the launcher,"
        to_launcher = "" if by_flag else " (of accelerate launch: --mixed_precision no)"
        if precision in ("fp16", "fp8") and self.device.type == "cpu":
            raise ValueError(
                f"{asked} has no effect on a CPU, where the run would be in float32. Leave it out{to_launcher}, or "
                "pass `bf16=True`."
            )
        if precision == "bf16" and self.device.type == "cuda" and not is_torch_bf16_gpu_available():
            raise ValueError(
                f"{asked} needs a GPU that computes in bfloat16, and {_gpu_found()}. Leave it out{to_launcher}."
            )
        steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        if not steps.isdigit() or int(steps) in (1, self.gradient_accumulation_steps) or self.deepspeed_plugin:
            return
        raise ValueError(
            f"The launcher asks for {steps} steps of gradient accumulation, and `gradient_accumulation_steps` is "
            f"{self.gradient_accumulation_steps}, which alone counts here. Pass "
            f"`gradient_accumulation_steps={steps}`, or unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS."
        )

    def _refuse_missing_integrations(self) -> None:
        """
        Raises:
            ValueError: `report_to` names a tracker that is not installed. The Trainer refuses unknown ones.
        """
        # flyte is not among those that transformers looks for.
        installed = [*get_available_reporting_integrations(), "flyte"]
        missing = [name for name in self.report_to if name in INTEGRATION_TO_CALLBACK and name not in installed]
        if missing:
            raise ValueError(
                f"`report_to` names {missing[0]!r}, which is not installed. Install it, or choose from "
                f"{', '.join([*installed[:-1], 'none'])}."
            )

    def _check_distributed_init(self) -> None:
        """Raise if a launcher started several processes and the host did not connect them.

        Without a GPU and without `use_cpu`, transformers (seen from accelerate 1.15 on) leaves each process of a
        torchrun on its own: every one of them trains on all the data and writes to the same folder.
        """
        launched = os.environ.get("WORLD_SIZE", "1")
        if launched.isdigit() and int(launched) > 1 and self.world_size == 1:
            raise ValueError(
                f"{launched} processes were started (WORLD_SIZE={launched}), but this one is not connected to the "
                "others: each would train alone and overwrite the others' files. On a machine without GPU add "
                "`--use_cpu` (`use_cpu=True`); for a single process start the script with `python` or "
                "`--nproc_per_node 1`."
            )


def _gpu_found() -> str:
    """What there is in place of a GPU with bfloat16, as part of a sentence."""
    return f"{torch.cuda.get_device_name()} does not" if torch.cuda.is_available() else "there is no GPU"


def _identity(value: Any) -> Any:
    return value


def _check_json_or_file(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: `value` is text, and neither a JSON object nor the path of a file that has one.
    """
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


def _names_of_fields(settings: type) -> list[str]:
    return [item.name for item in fields(settings)]


def _check_keys(name: str, mapping: dict[str, Any], known: Iterable[str]) -> None:
    """
    Raises:
        ValueError: `mapping` has a key that is not `known`.
    """
    if unknown := sorted(mapping.keys() - set(known)):
        raise ValueError(
            f"`{name}` has no {', '.join(map(repr, unknown))}; it takes {', '.join(known)}. Remove what is unknown."
        )


def _parse_json_dict(name: str, value: dict | str | None, example: str) -> dict | None:
    """A mapping that may come as JSON text. An error shows the `example`."""
    try:
        mapping = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        mapping = error
    if mapping is not None and not isinstance(mapping, dict):
        raise ValueError(f"`{name}` must be a JSON object such as {example}, got {value!r}.")
    return mapping
