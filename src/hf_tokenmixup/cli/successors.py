"""Options of transformers 4 and of its image-classification examples, and what takes their place."""

from collections.abc import Container, Iterable

# The option, what to say of it, and the option that the answer names ("" if it names none).
SUCCESSORS: dict[str, tuple[str, str]] = {
    "warmup_ratio": ("was removed in transformers 5: pass a fraction of all steps, as in {} 0.1", "warmup_steps"),
    "num_warmup_steps": ("has another name: pass {}, a number of steps or a fraction of all", "warmup_steps"),
    "evaluation_strategy": ("was removed in transformers 5: pass {}", "eval_strategy"),
    "evaluate_during_training": ("was removed from transformers: pass {} steps", "eval_strategy"),
    "eval_batch_size": ("has another name: pass {}", "per_device_eval_batch_size"),
    "train_batch_size": ("has another name: pass {}", "per_device_train_batch_size"),
    "batch_size": ("has another name: pass {} (images of each process)", "per_device_train_batch_size"),
    "per_gpu_train_batch_size": ("was removed from transformers: pass {}", "per_device_train_batch_size"),
    "per_gpu_eval_batch_size": ("was removed from transformers: pass {}", "per_device_eval_batch_size"),
    "epochs": ("has another name: pass {}", "num_train_epochs"),
    "lr": ("has another name: pass {}", "learning_rate"),
    "max_train_steps": ("has another name: pass {}", "max_steps"),
    "overwrite_output_dir": (
        "was removed in transformers 5: name another {}, or continue the run there with --resume_from_checkpoint auto",
        "output_dir",
    ),
    "no_cuda": ("was removed in transformers 5: pass {}", "use_cpu"),
    "use_mps_device": (
        "was removed in transformers 5: remove it, MPS is used if available ({}: not)",
        "use_cpu",
    ),
    "use_ipex": ("was removed in transformers 5: remove it", ""),
    "xpu_backend": ("was removed in transformers 5: pass {}", "ddp_backend"),
    "logging_dir": ("was removed in transformers 5: set the environment variable TENSORBOARD_LOGGING_DIR", ""),
    "save_safetensors": ("was removed in transformers 5: remove it, weights are always saved as safetensors", ""),
    "adafactor": ("was removed in transformers 5: pass {} adafactor", "optim"),
    "fp16_backend": ("was removed in transformers 5: remove it, {} is torch's autocast", "fp16"),
    "half_precision_backend": ("was removed in transformers 5: remove it, {} and --bf16 are torch's autocast", "fp16"),
    "fp16_opt_level": ("was removed in transformers 5 with apex: remove it, {} is torch's autocast", "fp16"),
    "push_to_hub_model_id": ("was removed in transformers 5: pass {} NAME", "hub_model_id"),
    "push_to_hub_organization": ("was removed in transformers 5: pass {} ORGANIZATION/NAME", "hub_model_id"),
    "push_to_hub_token": ("was removed in transformers 5: pass {}", "hub_token"),
    "include_inputs_for_metrics": ("was removed in transformers 5: pass {} inputs", "include_for_metrics"),
    "group_by_length": ("was removed in transformers 5 and is for texts: remove it", ""),
    "dispatch_batches": (
        "was removed in transformers 5: pass {} '{\"dispatch_batches\": true}'",
        "accelerator_config",
    ),
    "split_batches": ("was removed in transformers 5: pass {} '{\"split_batches\": true}'", "accelerator_config"),
    "sharded_ddp": ("was removed in transformers 5 with fairscale: pass {}", "fsdp"),
    "fsdp_min_num_params": ("was removed in transformers 5: it is min_num_params in {}, as JSON", "fsdp_config"),
    "fsdp_transformer_layer_cls_to_wrap": (
        "was removed in transformers 5: it is transformer_layer_cls_to_wrap in {}, as JSON",
        "fsdp_config",
    ),
    "torchdynamo": ("was removed in transformers 5: pass {} inductor", "torch_compile_backend"),
    "jit_mode_eval": ("was removed in transformers 5: pass {}", "torch_compile"),
    "ray_scope": ("was removed in transformers 5: pass scope to Trainer.hyperparameter_search", ""),
    "tpu_num_cores": ("was removed in transformers 5: start the processes with accelerate launch", ""),
    "tpu_metrics_debug": ("was removed in transformers 5: pass {} tpu_metrics_debug", "debug"),
    "mp_parameters": ("was removed in transformers 5 with SageMaker's model parallelism: remove it", ""),
    "past_index": ("was removed in transformers 5 and is for texts: remove it", ""),
    "use_legacy_prediction_loop": ("was removed in transformers 5: remove it", ""),
    "include_tokens_per_second": ("was removed in transformers 5 and is for texts: remove it", ""),
    "torch_dtype": ("is not an option: weights are trained in float32, and {} computes in half precision", "bf16"),
    "low_cpu_mem_usage": ("was removed in transformers 5: remove it, weights are always loaded so", ""),
    "overwrite_cache": ("has no effect here: name another {}", "cache_dir"),
    "preprocessing_num_workers": ("has no effect here: pass {}", "dataloader_num_workers"),
    "predict_with_generate": ("is for texts: remove it", ""),
    "label_smoothing": ("has another name: pass {}", "label_smoothing_factor"),
    "use_auth_token": ("was removed in transformers 5: log in with `hf auth login`, or pass {} TOKEN", "token"),
    "feature_extractor_name": ("was removed in transformers 5: pass {}", "image_processor_name"),
    "config_name": ("has no effect here: pass {} NAME --from_scratch", "model_name_or_path"),
    "tokenizer_name": ("is for texts: pass {}", "image_processor_name"),
    "validation_split": ("has another name: pass {}", "eval_split"),
    "validation_split_percentage": ("has another name: pass {}, a fraction", "train_val_split"),
    "task_name": ("has another name: pass {}", "dataset_name"),
    "train_file": ("is for texts: pass {}, a folder of one subfolder per class", "train_dir"),
    "validation_file": ("is for texts: pass {}, a folder of one subfolder per class", "validation_dir"),
    "checkpointing_steps": ("has another name: pass {}", "save_steps"),
    "with_tracking": ("has another name: pass {}", "report_to"),
    "hub_token": ("has another name: pass {}", "token"),
    "trust_remote_code": (
        "is not supported: models are built from the code of transformers and of this package. Remove it",
        "",
    ),
}

# Values of transformers 4, by their options.
VALUES: dict[str, dict[str, str]] = {
    "optim": {
        "adamw_hf": "was removed from transformers: pass adamw_torch",
        "adamw_apex_fused": "was removed in transformers 5 with apex: pass adamw_torch_fused",
        "adamw": "has another name: pass adamw_torch",
    }
}


def successor_of_value(name: str, value: object, choices: Container[object]) -> str | None:
    """What to do in place of a removed value of an option; None for one that is not listed, or is still there."""
    return None if value in choices else VALUES.get(name, {}).get(str(value))


def successor(name: str, known: Iterable[str], dashes: str = "--") -> str | None:
    """What to do in place of a removed option; None for one that is not listed, or whose successor is not known.

    Args:
        name: of the option, without dashes.
        known: the options that there are.
        dashes: what a name in the answer begins with; empty for the keys of a recipe.
    """
    text, option = SUCCESSORS.get(name, (None, ""))
    if text is None or option and option not in known:
        return None
    text = text.replace("{}", f"--{option}", 1)
    return text if dashes else text.replace("--", "")
