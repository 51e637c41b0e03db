"""`accelerate launch` command of a run, with the settings of the launcher and without the options of the script."""

import os

from accelerate.utils import DynamoBackend, parse_flag_from_env

from ..training import TokenMixupTrainer
from ..training.effective_settings import mixed_precision
from ..utils.environment import strip_local_path

# Options of `accelerate launch` with the environment variables that they set, and their defaults.
DYNAMO_OPTIONS = {
    "dynamo_mode": ("ACCELERATE_DYNAMO_MODE", "default"),
    "dynamo_use_fullgraph": ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "false"),
    "dynamo_use_dynamic": ("ACCELERATE_DYNAMO_USE_DYNAMIC", "false"),
    "dynamo_use_regional_compilation": ("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "false"),
}
FSDP_OPTIONS = {
    "fsdp_version": ("FSDP_VERSION", "1"),
    "fsdp_sharding_strategy": ("FSDP_SHARDING_STRATEGY", "full_shard"),
    "fsdp_reshard_after_forward": ("FSDP_RESHARD_AFTER_FORWARD", "true"),
    "fsdp_offload_params": ("FSDP_OFFLOAD_PARAMS", "false"),
    "fsdp_auto_wrap_policy": ("FSDP_AUTO_WRAP_POLICY", ""),
    "fsdp_transformer_layer_cls_to_wrap": ("FSDP_TRANSFORMER_CLS_TO_WRAP", ""),
    "fsdp_state_dict_type": ("FSDP_STATE_DICT_TYPE", ""),
    "fsdp_activation_checkpointing": ("FSDP_ACTIVATION_CHECKPOINTING", "false"),
}
DEEPSPEED_OPTIONS = {
    "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", ""),
    "deepspeed_config_file": ("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""),
    "gradient_accumulation_steps": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ""),
    "gradient_clipping": ("ACCELERATE_GRADIENT_CLIPPING", ""),
    "offload_optimizer_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
}
OPTIONS_WITHOUT_VALUE = {"dynamo_use_fullgraph", "dynamo_use_dynamic", "dynamo_use_regional_compilation"}


def launch_command(trainer: TokenMixupTrainer) -> str:
    """Return the `accelerate launch` command with the settings that a run has from its launcher.

    The launcher reads them from its options, its configuration file or environment variables. Settings that are also
    training arguments are omitted.
    """
    args, state = trainer.args, trainer.accelerator.state
    words = []
    if trainer.is_fsdp_enabled and not args.fsdp:
        words += ["--use_fsdp", *_format_nondefault_options(FSDP_OPTIONS)]
    elif trainer.is_deepspeed_enabled and not args.deepspeed:
        words += ["--use_deepspeed", *_format_nondefault_options(DEEPSPEED_OPTIONS)]
    elif args.world_size > 1:
        # Without this option, accelerate starts a single process on a machine without a GPU.
        words += ["--multi_gpu"]
    elif parse_flag_from_env("ACCELERATE_USE_CPU"):
        words += ["--cpu"]
    if args.world_size > 1:
        words += ["--num_processes", str(args.world_size)]
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or args.world_size)
    if local_world_size < args.world_size:
        words += ["--num_machines", str(args.world_size // local_world_size)]
    precision = mixed_precision(trainer.accelerator)
    if precision != "no" and not getattr(args, precision, False):
        words += ["--mixed_precision", precision]
    if getattr(state, "downcast_bfloat", False):
        words += ["--downcast_bf16"]
    backend = state.dynamo_plugin.backend
    if backend != DynamoBackend.NO and not args.torch_compile:
        words += ["--dynamo_backend", backend.value.lower(), *_format_nondefault_options(DYNAMO_OPTIONS)]
    return " ".join(["accelerate launch", *words])


def _format_nondefault_options(options: dict[str, tuple[str, str]]) -> list[str]:
    """Format the options whose environment variable differs from the default."""
    words = []
    for option, (variable, default) in options.items():
        value = os.environ.get(variable, "")
        if value.lower() not in ("", default):
            words += [f"--{option}"] if option in OPTIONS_WITHOUT_VALUE else [f"--{option}", strip_local_path(value)]
    return words
