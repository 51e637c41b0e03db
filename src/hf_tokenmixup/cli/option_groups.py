"""The groups of options in the help of finetune, by topic."""

import argparse
from collections.abc import Sequence
from typing import NamedTuple


class OptionGroup(NamedTuple):
    """Options with one topic.

    Attributes:
        title: Heading of the group.
        options: Names of the options, in the order in which `--help` lists them.
        more: Names of less common options of transformers, which only `--help_all` lists. Versions of transformers
            may lack some of them.
        description: Text below the heading.
    """

    title: str
    options: tuple[str, ...]
    more: tuple[str, ...] = ()
    description: str | None = None


OPTION_GROUPS = (
    OptionGroup(
        "run",
        (
            "recipe",
            "print_recipe",
            "dry_run",
            "do_train",
            "do_eval",
            "output_dir",
            "resume_from_checkpoint",
            "max_time",
            "seed",
        ),
        ("do_predict", "data_seed", "full_determinism", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
    ),
    OptionGroup(
        "model",
        (
            "model_name_or_path",
            "from_scratch",
            "model_type",
            "config_overrides",
            "ignore_mismatched_sizes",
            "attn_implementation",
        ),
    ),
    OptionGroup(
        "image size and normalization",
        ("image_size", "image_mean", "image_std", "image_processor_name", "image_processor_overrides"),
    ),
    OptionGroup(
        "data",
        (
            "dataset_name",
            "dataset_config_name",
            "train_dir",
            "validation_dir",
            "image_column_name",
            "label_column_name",
            "classes",
            "label_mapping",
        ),
        ("label_names", "remove_unused_columns"),
    ),
    OptionGroup(
        "splits and number of images",
        ("train_split", "eval_split", "train_val_split", "max_train_samples", "max_eval_samples"),
    ),
    OptionGroup(
        "loading of images",
        ("dataloader_num_workers", "image_cache_gib", "streaming", "shuffle_buffer"),
        (
            "dataloader_prefetch_factor",
            "dataloader_persistent_workers",
            "dataloader_multiprocessing_context",
            "dataloader_pin_memory",
            "dataloader_drop_last",
            "dataloader_in_order",
            "train_sampling_strategy",
        ),
    ),
    OptionGroup(
        "augmentation of training images",
        (
            "crop_scale",
            "crop_ratio",
            "hflip",
            "color_jitter",
            "auto_augment",
            "random_erasing",
            "erasing_mode",
            "erase_after_mixing",
            "train_interpolation",
        ),
    ),
    OptionGroup(
        "mixup and CutMix of training images",
        ("mixup_alpha", "cutmix_alpha", "mixup_prob", "mixup_switch_prob", "mixup_mode"),
    ),
    OptionGroup(
        "TokenMixup, horizontal (HTM)",
        (
            "horizontal_layers",
            "horizontal_tau",
            "horizontal_tau_relative",
            "horizontal_rho",
            "horizontal_rho_relative",
            "assignment_group_size",
        ),
        description="Options of TokenMixup are settings of the model. Default: the value in the\n"
        "model's configuration.",
    ),
    OptionGroup(
        "TokenMixup, ScoreNet of HTM",
        ("scorenet_pooling", "scorenet_loss_weight", "scorenet_detach"),
    ),
    OptionGroup("TokenMixup, vertical (VTM)", ("vertical_layers", "vertical_kappa", "vertical_detach")),
    OptionGroup(
        "TokenMixup, saliency",
        ("saliency_detector", "saliency_query", "rollout_steps", "saliency_route"),
    ),
    OptionGroup(
        "TokenMixup, ablations and baselines",
        ("assignment", "token_selection", "relabel", "manifold_mixup_layers", "manifold_mixup_alpha"),
    ),
    OptionGroup("LoRA (needs peft)", ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")),
    OptionGroup(
        "length and batches",
        ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
        ("auto_find_batch_size",),
    ),
    OptionGroup(
        "optimizer and learning rate",
        (
            "learning_rate",
            "lr_scheduler_type",
            "lr_scheduler_kwargs",
            "warmup_steps",
            "layer_decay",
            "optim",
            "optim_args",
            "weight_decay",
            "max_grad_norm",
        ),
        ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules"),
    ),
    OptionGroup(
        "loss and EMA of the weights",
        ("label_smoothing_factor", "skip_nonfinite_steps", "ema_decay", "ema_warmup"),
        ("neftune_noise_alpha",),
    ),
    OptionGroup(
        "precision, memory and speed",
        ("bf16", "fp16", "activation_checkpointing", "torch_compile", "channels_last", "use_cpu"),
        (
            "tf32",
            "activation_checkpointing_kwargs",
            "gradient_checkpointing",
            "gradient_checkpointing_kwargs",
            "torch_compile_backend",
            "torch_compile_mode",
            "torch_empty_cache_steps",
        ),
    ),
    OptionGroup(
        "evaluation",
        ("eval_strategy", "per_device_eval_batch_size"),
        (
            "eval_steps",
            "eval_delay",
            "eval_on_start",
            "bf16_full_eval",
            "fp16_full_eval",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "batch_eval_metrics",
            "include_for_metrics",
            "prediction_loss_only",
        ),
    ),
    OptionGroup(
        "checkpoints",
        ("save_strategy", "save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
        ("save_steps", "greater_is_better", "save_only_model", "save_on_each_node", "enable_jit_checkpoint"),
    ),
    OptionGroup(
        "logs",
        ("logging_steps", "report_to"),
        (
            "logging_strategy",
            "logging_first_step",
            "logging_nan_inf_filter",
            "log_level",
            "log_level_replica",
            "log_on_each_node",
            "disable_tqdm",
            "run_name",
            "project",
            "trackio_space_id",
            "trackio_bucket_id",
            "trackio_static_space_id",
            "skip_memory_metrics",
        ),
    ),
    OptionGroup("download from the Hub", ("model_revision", "token", "cache_dir")),
    OptionGroup(
        "sharing on the Hub",
        ("push_to_hub", "hub_model_id", "license"),
        ("hub_private_repo", "hub_token", "hub_strategy", "hub_revision", "hub_always_push"),
    ),
    OptionGroup(
        "several processes",
        (),
        (
            "accelerator_config",
            "parallelism_config",
            "fsdp",
            "fsdp_config",
            "deepspeed",
            "ddp_backend",
            "ddp_timeout",
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "local_rank",
        ),
    ),
)
# Options without a group, such as those of a newer version of transformers.
LAST_GROUP = "other options of transformers"
SHOWN_OPTIONS = {name for group in OPTION_GROUPS for name in group.options}


def group_options(parser: argparse.ArgumentParser, groups: Sequence[OptionGroup] = OPTION_GROUPS) -> None:
    """Replace the groups of a parser's options by groups with one topic each. Parsing does not change.

    Args:
        parser: of a command, with all of its options.
        groups: in the order of the help. Options without a group are in a last one.
    """
    remaining = list(parser._actions)
    for existing in parser._action_groups:
        existing._group_actions.clear()
    for group in groups:
        target = parser.add_argument_group(group.title, group.description)
        for name in (*group.options, *group.more):
            target._group_actions += [action for action in remaining if action.dest == name]
            remaining = [action for action in remaining if action.dest != name]
    parser.add_argument_group(LAST_GROUP)._group_actions += remaining
