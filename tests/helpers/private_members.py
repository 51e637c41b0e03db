"""The private members of other libraries that the package uses or overrides.

Private members change without notice. Prefer a public one; where there is none, add an entry here, with the reason.
`test_private_members.py` compares this list with the installed libraries and with the source of the package, so that
an upgrade that removes or changes one of them fails there. After such a failure, look at the places in `src` that name
the member, adapt them for both versions, and correct the entry.
"""

from typing import NamedTuple


class PrivateMember(NamedTuple):
    """A private member of another library.

    Args:
        owner: Full name of the class or module that has it.
        name: The name of the member.
        parameters: Names of the parameters of a method or function, in order. None for any other attribute.
        reason: What the package needs it for.
    """

    owner: str
    name: str
    parameters: str | None
    reason: str


TRAINER = "transformers.Trainer"
CONFIG = "transformers.PreTrainedConfig"
MODEL = "transformers.PreTrainedModel"
LAYER = "transformers.modeling_layers.GradientCheckpointingLayer"
MODULE = "torch.nn.Module"
HELP = "argparse.HelpFormatter"

PRIVATE_MEMBERS = [
    # What a checkpoint holds, and how it is restored: the Trainer has one public hook, `save_model`.
    PrivateMember(
        TRAINER, "_save_checkpoint", "self model trial", "Refuse weights that are not finite; write it completely."
    ),
    PrivateMember(TRAINER, "_get_output_dir", "self trial", "The folder of a checkpoint that is about to be written."),
    PrivateMember(TRAINER, "_save", "self output_dir state_dict", "Save the plain model; save the moving average."),
    PrivateMember(
        TRAINER,
        "_save_rng_state",
        "self output_dir",
        "The last call before the state of a checkpoint is saved.",
    ),
    PrivateMember(
        TRAINER,
        "_load_from_checkpoint",
        "self resume_from_checkpoint model",
        "Restore every weight. The Trainer's own way loses those whose names differ in the file.",
    ),
    PrivateMember(TRAINER, "_load_best_model", "self", "The same for the best model."),
    PrivateMember(
        TRAINER,
        "_load_optimizer_and_scheduler",
        "self checkpoint",
        "Refuse another optimizer's state, and give the moments the memory format of the weights.",
    ),
    PrivateMember(
        TRAINER,
        "_prepare_for_training",
        "self max_steps train_dataloader resume_from_checkpoint",
        "Check the disk space when the number of steps is known and before anything is trained.",
    ),
    # A resumed run logs what an uninterrupted one does: the sums since the last log line are saved and restored.
    PrivateMember(TRAINER, "_tr_loss", None, "Sum of the losses since the last log line."),
    PrivateMember(TRAINER, "_total_loss_scalar", None, "Sum of the losses up to the last log line."),
    PrivateMember(TRAINER, "_globalstep_last_logged", None, "Step of the last log line."),
    PrivateMember(
        TRAINER,
        "_maybe_log_save_evaluate",
        "self tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
        "Log, save and evaluate at the end of a step that was interrupted right after training.",
    ),
    PrivateMember(
        TRAINER,
        "_evaluate",
        "self trial ignore_keys_for_eval skip_scheduler",
        "Skip the evaluation of `eval_on_start` in a resumed run.",
    ),
    PrivateMember(
        TRAINER,
        "_run_epoch",
        "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
        "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
        "Train no further step in a run that is resumed at its last one.",
    ),
    PrivateMember(
        TRAINER,
        "_finalize_training",
        "self trial num_train_samples start_time",
        "Keep all checkpoints and the weights when SIGTERM ends the run.",
    ),
    PrivateMember(
        TRAINER,
        "_get_dataloader",
        "self dataset description batch_size sampler_fn is_training dataloader_key",
        "Data loaders with their own generator, and complete evaluation with `dataloader_drop_last`.",
    ),
    PrivateMember(
        TRAINER, "_train_batch_size", None, "The batch size of streams where `auto_find_batch_size` has lowered it."
    ),
    # The beginning of a run or of a trial of a search, after its arguments are set and before its checkpoint is read.
    PrivateMember(TRAINER, "_hp_search_setup", "self trial", "Fit to the arguments and the model of a trial."),
    PrivateMember(
        TRAINER,
        "_init_training_state",
        "self max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
        "Reset what an earlier run counted, and resume at the right place of data without a length.",
    ),
    # Uploads.
    PrivateMember(
        TRAINER, "_push_from_checkpoint", "self checkpoint_folder", "Upload the plain model during training."
    ),
    PrivateMember(TRAINER, "_finish_current_push", "self", "Wait for the upload that is in progress."),
    # Models.
    PrivateMember(MODEL, "_from_config", "cls config kwargs", "Build a class that the `Auto` classes do not know."),
    PrivateMember(MODEL, "_init_weights", "self module", "Where a family of transformers initializes its weights."),
    PrivateMember(
        MODEL,
        "_adjust_missing_and_unexpected_keys",
        "self loading_info",
        "Warn of a ScoreNet that no checkpoint has, before transformers drops it from its report.",
    ),
    PrivateMember(MODEL, "_keys_to_ignore_on_load_missing", None, "ScoreNet is not in exported checkpoints."),
    PrivateMember(MODEL, "_keys_to_ignore_on_load_unexpected", None, "A model without HTM opens any checkpoint."),
    PrivateMember(MODEL, "_no_split_modules", None, "How transformers and FSDP find the layers of a family."),
    PrivateMember(MODEL, "_supports_sdpa", None, "Declares what CCT computes attention with."),
    PrivateMember(MODEL, "_supports_flash_attn", None, "As `_supports_sdpa`."),
    PrivateMember(MODEL, "_supports_flex_attn", None, "As `_supports_sdpa`."),
    PrivateMember(MODEL, "_supports_attention_backend", None, "As `_supports_sdpa`."),
    PrivateMember(MODEL, "_can_compile_fullgraph", None, "Declares that CCT compiles as one graph."),
    PrivateMember(MODEL, "_can_record_outputs", None, "Declares the layers that give CCT's attentions and states."),
    PrivateMember(MODEL, "_auto_class", None, "A CCT that trains is saved without the code of the plain CCT."),
    PrivateMember(MODEL, "_hf_peft_config_loaded", None, "Merged adapters leave a model without adapters."),
    PrivateMember(CONFIG, "_auto_class", None, "As for the model."),
    PrivateMember(CONFIG, "_attn_implementation", None, "The attention function; a copy of the config keeps it."),
    PrivateMember(
        LAYER,
        "_gradient_checkpointing_func",
        None,
        "Checkpoint a layer without its mixing, and layers after frozen weights without the reentrant kind.",
    ),
    PrivateMember(
        "transformers.models.timm_wrapper.modeling_timm_wrapper.TimmWrapperPreTrainedModel",
        "_set_gradient_checkpointing",
        "self enable args kwargs",
        "timm's own loop would checkpoint the mixing.",
    ),
    # timm.
    PrivateMember("timm.models.vision_transformer.VisionTransformer", "_pos_embed", "self x", "The loop over layers."),
    PrivateMember("timm.models.eva.Eva", "_pos_embed", "self x", "As for `VisionTransformer`, with rotary positions."),
    # torch.
    PrivateMember(MODULE, "_forward_hooks", None, "A projection with hooks is more than its weight."),
    PrivateMember(MODULE, "_forward_pre_hooks", None, "As `_forward_hooks`."),
    PrivateMember(MODULE, "_backward_hooks", None, "As `_forward_hooks`."),
    PrivateMember(MODULE, "_backward_pre_hooks", None, "As `_forward_hooks`."),
    PrivateMember("torch.utils", "_python_dispatch", None, "Count the operators of a step."),
    PrivateMember("torch", "_dynamo", None, "`maybe_mark_dynamic`: one graph for all batch sizes."),
    PrivateMember(
        "torch.distributed.distributed_c10d",
        "_get_default_store",
        "",
        "Processes agree on the step after which SIGTERM ends them, without waiting for a device.",
    ),
    # Others.
    PrivateMember("datasets.Dataset", "_fingerprint", None, "Recorded with the results: which images were evaluated."),
    PrivateMember("evaluate.Metric", "_info", "self", "How `evaluate` defines a metric."),
    PrivateMember("evaluate.Metric", "_compute", "self predictions references kwargs", "As `_info`."),
    PrivateMember("argparse.ArgumentParser", "_actions", None, "The names and types of all options, for recipes."),
    PrivateMember("argparse.ArgumentParser", "_action_groups", None, "The groups of --help by topic."),
    PrivateMember("argparse._ArgumentGroup", "_group_actions", None, "As `_action_groups`."),
    PrivateMember(HELP, "_metavar_formatter", "self action default_metavar", "The layout of --help."),
    PrivateMember(HELP, "_format_action_invocation", "self action", "As `_metavar_formatter`."),
    PrivateMember(
        HELP, "_get_help_string", "self action", "The defaults in --help, as argparse's own formatter has it."
    ),
    PrivateMember(HELP, "_format_args", "self action default_metavar", "As `_metavar_formatter`."),
]
