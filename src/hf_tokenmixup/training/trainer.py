"""`TokenMixupTrainer`: applies input mixup on the device, computes the loss, and logs what TokenMixup did.

It trains every image-classification model of transformers, with TokenMixup or without, so that a baseline is trained
by the same code. A TokenMixup model computes its own loss, since only it has the mixed labels. For any other model the
loss is the cross-entropy between its logits and the targets.

The trainer owns its parts, one file each: `nonfinite`, `metrics`, `ema`, `preemption`, `hub`, `streaming`, `loaders`,
`batches`, and `checkpointing`. Its methods override those of `transformers.Trainer` and call the parts in order. The
private ones are listed with their reasons in `tests/helpers/private_members.py`.
"""

import dataclasses
import signal
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, ModelCard
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    HubStrategy,
    TrainOutput,
    has_length,
    unwrap_peft_model,
)
from transformers.utils import PushInProgress

from ..data import DeviceTransform, InputMixup
from ..hub.model_card import TrainingCardData
from ..hub.upload import upload_model_folder
from ..metrics import ComputeMetrics, compute_metrics
from ..models import TokenMixupModelMixin, find_adapter_layers, merge_adapters, validate_single_label
from ..models.loss import cross_entropy_loss
from .batches import (
    half_precision_eval_dtype,
    normalize_images,
    num_real_samples,
    pop_labels,
    prepare_for_model,
    validate_num_batches,
    warn_about_half_precision_weights,
)
from .callbacks import (
    CheckpointedLayersCallback,
    EpochLogCallback,
    JsonlLoggerCallback,
    SetEpochCallback,
    TrainingCurvesCallback,
)
from .checkpointing.agreement import validate_best_checkpoint, validate_processes_agree
from .checkpointing.compatibility import check_resume_compatibility, check_steps_left, training_fingerprint
from .checkpointing.disk_space import check_disk_space, check_writable, saving
from .checkpointing.integrity import TRAINER_STATE_NAME
from .checkpointing.loading import get_optimizer_options, load_weights, validate_optimizer_state
from .checkpointing.resume_state import ResumeState, saved_state
from .checkpointing.resuming import resolve_resume_checkpoint, warn_about_newer_checkpoints
from .checkpointing.saving import CheckpointWriter, is_checkpoint_folder, remove_if_truncated
from .effective_settings import get_user_optimization
from .ema import EmaCallback, ModelEma
from .fsdp import set_transformer_layer_cls_to_wrap
from .hub import RunRecord, create_repository, start_upload
from .layer_decay import apply_layer_decay, validate_layer_decay
from .loaders import loader_settings, set_generator_and_workers
from .lora import check_scorenet_trainable
from .memory_format import align_optimizer_state_format, restore_weights_on_exit
from .metrics import MixingMetrics, MixingTotals
from .mixing_warnings import MixingWarnings
from .nonfinite import NonFiniteGuard
from .preemption import PreemptionCallback
from .processes import RankSeedCallback, is_distributed, on_all_processes
from .streaming import (
    SkipBatchesCallback,
    build_eval_loader,
    build_train_loader,
    find_resume_position,
    is_streamed,
    validate_run_length,
    with_stream_length,
)
from .training_args import TokenMixupTrainingArguments
from .vertical_probe import VerticalProbe


class TokenMixupTrainer(Trainer):
    """A `transformers.Trainer` for TokenMixup models and their baselines.

    Batches contain `pixel_values` (B, 3, H, W) and `labels` (B,), class indices. Images of 8 bits need a
    `device_transform`. Input mixup, CutMix and label
    smoothing (see `TokenMixupTrainingArguments`) make distributions of the labels on the device, in training only.
    Evaluation is the cross-entropy with the labels as they are.

    The loss of an optimizer step is the mean over all its images: over the micro-batches of gradient accumulation, the
    last and smaller one included, and over processes. With `average_tokens_across_devices=False` each process averages
    over its own images and the processes are then averaged, which differs only if they have other numbers of images.

    In training, process r draws from `seed + r`: dropout, mixup, CutMix and TokenMixup differ between processes. The
    initial weights and the order of the images come from the common seed.

    Each logged training loss comes with the metrics of the model's outputs. Those of samples and tokens
    (`mixed_samples`, `easy_samples`, ...) are for a full step, summed over its micro-batches and processes and
    averaged over the steps since the last such line. `difficulty` and `scorenet_loss` are averaged over the images.

    A checkpoint contains the full state of the run. The output folder and the Hub get the exported plain model. With
    `args.ema_decay`, evaluation, the best model and the exported model use the EMA of the weights.

    Args:
        model: An image classifier of transformers, possibly wrapped by peft.
        args: The training arguments.
        device_transform: Normalizes 8-bit images, and erases rectangles of training images after mixup and CutMix.
        training_card_data: What the model card reports of the run and a trainer cannot know, see `RunRecord`.
        eval_card_data: The same for evaluations.
        kwargs: Those of `transformers.Trainer`, without `compute_loss_func`.

    Raises:
        NonFiniteLossError: In training, for a non-finite loss, before its weights are saved.
        ValueError: `args` is not a `TokenMixupTrainingArguments` or `compute_loss_func` is passed; the number of steps
            of a streamed run is unknown; in training, the labels are missing or are not class indices.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TokenMixupTrainingArguments | None = None,
        *,
        device_transform: DeviceTransform | None = None,
        training_card_data: TrainingCardData | None = None,
        eval_card_data: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, TokenMixupTrainingArguments):
            raise ValueError(
                f"`args` must be a TokenMixupTrainingArguments, got {type(args).__name__}. It takes everything that "
                "TrainingArguments does."
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` is not supported: labels are mixed in training, so the loss is computed by the "
                "trainer. Override `compute_loss` in a subclass instead."
            )
        validate_run_length(kwargs.get("train_dataset"), args)
        if args.ddp_find_unused_parameters is None and isinstance(unwrap_peft_model(model), TokenMixupModelMixin):
            # A parameter that the family uses has a gradient in every step, also if no image is easy. Trainer reads
            # this when it is built.
            args.ddp_find_unused_parameters = unwrap_peft_model(model).has_unused_parameters
        self.device_transform = device_transform
        self.nonfinite = NonFiniteGuard(args.skip_nonfinite_steps)
        self.mixing_metrics, self.mixing_totals = MixingMetrics(), MixingTotals()
        self.mixing_warnings = MixingWarnings(None)
        self.vertical_probe = VerticalProbe()
        self.ema = EmaCallback(self)
        self.preemption = PreemptionCallback()
        self.resume_state = ResumeState(self)
        self.checkpoints = CheckpointWriter(self)
        self.run_record = RunRecord(self, training_card_data, eval_card_data)
        self._epochs = SetEpochCallback()
        self._resume_from: str | None = None
        # Before the callbacks of the user and of the parts, which may decide otherwise.
        kwargs["callbacks"] = [EpochLogCallback(), *(kwargs.get("callbacks") or [])]
        self._init_transformers(model, args, kwargs)
        self.user_optimization = get_user_optimization(self)
        if self.compute_metrics is compute_metrics:
            # It may collect batches, and those of two trainers must not mix.
            self.compute_metrics = ComputeMetrics()
        # Trainer counts the images of all micro-batches (and processes) of a step, passes the number to `compute_loss`
        # and leaves the loss undivided, whatever the signature of the model's forward.
        self.model_accepts_loss_kwargs = True
        if self.args.n_gpu > 1:
            # DataParallel is one process: its images are counted exactly, not divided evenly among the replicas.
            self.args.average_tokens_across_devices = True
        if self.is_deepspeed_enabled and args.skip_nonfinite_steps:
            raise ValueError(
                "`skip_nonfinite_steps` is not supported with DeepSpeed, which handles non-finite steps by its own "
                "settings. Remove it."
            )
        self._set_memory_format(self.model)
        self._configure_for_model(self.classifier_model)
        self._configure_for_arguments()
        if args.ddp_find_unused_parameters is None and isinstance(self.classifier_model, TokenMixupModelMixin):
            # The model came from `model_init`, and the accelerator was made before.
            args.ddp_find_unused_parameters = self.classifier_model.has_unused_parameters
            if self.accelerator.ddp_handler is not None:
                self.accelerator.ddp_handler.find_unused_parameters = args.ddp_find_unused_parameters
        self.add_callback(SkipBatchesCallback())
        if not self.args.enable_jit_checkpoint:
            self.add_callback(self.preemption)
        for callback in (self.resume_state, self.ema, self.run_record, self._epochs):
            self.add_callback(callback)
        self.add_callback(CheckpointedLayersCallback())
        self.add_callback(RankSeedCallback())

    def _init_transformers(self, model: nn.Module | None, args: TokenMixupTrainingArguments, kwargs: dict) -> None:
        if is_distributed():
            # transformers makes the output folder in one process, whose error the others would wait for.
            on_all_processes(lambda: check_writable(args.output_dir) if args.should_save else None)
        try:
            super().__init__(model=model, args=args, **kwargs)
        except OSError:
            # transformers makes the output folder.
            check_writable(args.output_dir)
            raise

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without the wrappers of distributed training and `torch.compile`."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def classifier_model(self) -> nn.Module:
        """The classifier itself: `unwrapped_model`, or what it wraps if that is a model of peft."""
        return unwrap_peft_model(self.unwrapped_model)

    @property
    def ema_model(self) -> ModelEma | None:
        """The EMA of the weights; None before a run, and if it is off."""
        return self.ema.model

    @property
    def terminated(self) -> bool:
        """Whether SIGTERM or `max_time` ended the last run, with a checkpoint to resume from."""
        return self.preemption.preempted

    @property
    def timed_out(self) -> bool:
        """Whether `max_time` ended the last run, with a checkpoint to resume from."""
        return self.preemption.timed_out

    @property
    def skipped_steps(self) -> int:
        """Steps of the run whose loss or gradient was not finite and which were therefore skipped."""
        return self.nonfinite.skipped

    @property
    def training_card_data(self) -> TrainingCardData:
        """See `RunRecord`."""
        return self.run_record.training_card_data

    @training_card_data.setter
    def training_card_data(self, data: TrainingCardData) -> None:
        self.run_record.training_card_data = data

    @property
    def eval_card_data(self) -> Mapping[str, Any] | None:
        """See `RunRecord`."""
        return self.run_record.eval_card_data

    @eval_card_data.setter
    def eval_card_data(self, data: Mapping[str, Any] | None) -> None:
        self.run_record.eval_card_data = data

    def plain_model(self) -> nn.Module:
        """Return the model as it is exported to the output folder and the Hub: plain, with adapters merged."""
        model = self.classifier_model
        with torch.random.fork_rng(devices=[]):
            return model.to_plain_model() if isinstance(model, TokenMixupModelMixin) else merge_adapters(model)

    def step_was_skipped(self) -> bool:
        """Return whether the last step left the weights as they were."""
        return self.nonfinite.step_skipped or self.accelerator.optimizer_step_was_skipped

    # Configuration

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super().call_model_init(*args, **kwargs)
        self._set_memory_format(model)
        self._configure_for_model(unwrap_peft_model(model))
        return model

    def _set_memory_format(self, model: nn.Module) -> None:
        if self.args.channels_last:
            model.to(memory_format=torch.channels_last)

    def _configure_for_model(self, model: nn.Module) -> None:
        """Configure the loss and input mixup for a classifier without wrappers, by the arguments as they are."""
        validate_single_label(model.config)
        # The forward of a plain model would set a problem type at its first loss, and be compiled again for that.
        self._model_computes_loss = isinstance(model, TokenMixupModelMixin) and model.config.tokenmixup_enabled
        args = self.args
        self.input_mixing = InputMixup(
            model.config.num_labels,
            mixup_alpha=args.mixup_alpha,
            cutmix_alpha=args.cutmix_alpha,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.label_smoothing_factor,
        )

    def _configure_for_arguments(self) -> None:
        """Check the arguments against the model, and set up FSDP."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded and find_adapter_layers(self.unwrapped_model):
            raise ValueError(
                "LoRA is not supported with FSDP or DeepSpeed, because sharded weights cannot be merged. Use DDP "
                "(`accelerate launch --multi_gpu`)."
            )
        if self.args.ema_decay:
            self.ema.validate()
        validate_layer_decay(self)
        if self.is_fsdp_enabled:
            set_transformer_layer_cls_to_wrap(self.accelerator.state.fsdp_plugin, self.unwrapped_model)

    def _hp_search_setup(self, trial: Any) -> None:
        # Called at the beginning of every run, after the arguments of a trial are set and before weights are loaded.
        super()._hp_search_setup(trial)
        # A trial has its own arguments and accelerator. Until `model_init` is called, it has no model.
        searching = self.hp_search_backend is not None and trial is not None
        if searching:
            self.args.check()
            self._set_memory_format(self.model)
            self._configure_for_model(self.classifier_model)
            self._configure_for_arguments()
        check_scorenet_trainable(self.classifier_model)
        warn_about_half_precision_weights(self.classifier_model)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, JsonlLoggerCallback | TrainingCurvesCallback):
                callback.folder = self._get_output_dir(trial) if searching else None
        if self._resume_from is not None and not self.args.auto_find_batch_size:
            self._check_compatibility(TrainerState.load_from_json(str(Path(self._resume_from) / TRAINER_STATE_NAME)))

    # Training

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As in `Trainer`; True or "last" resumes from the latest complete checkpoint.

        "auto" does the same, or starts from scratch if there is none.

        Raises:
            NonFiniteLossError: A loss is not finite, before its weights are saved.
            SaveError: A checkpoint could not be written. Earlier ones are unchanged.
            SystemExit: SIGTERM or `max_time` ended a trial of a hyperparameter search, which would start the next
                trial otherwise.
            ValueError: There is no complete checkpoint, or the one that is passed is truncated or does not fit this
                run; the output folder is not writable, or has no space for a checkpoint.
        """
        on_all_processes(lambda: check_writable(self.args.output_dir))
        validate_processes_agree(self)
        self.run_record.begin_run()
        resume_from_checkpoint = self._resolve_checkpoint(resume_from_checkpoint)
        try:
            result = super().train(resume_from_checkpoint, trial, *args, **kwargs)
        finally:
            # Callbacks are not notified when training raises.
            self.preemption.restore_signal_handler()
        if self.terminated and trial is not None:
            raise SystemExit(128 + signal.SIGTERM)
        # The model that is saved at the end must be finite too.
        self._raise_if_nonfinite()
        self.run_record.train_seconds = result.metrics.get("train_runtime")
        return result._replace(training_loss=result.metrics["train_loss"])

    def _resolve_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | bool | None:
        self.checkpoints.current = self._resume_from = None
        if resume_from_checkpoint:
            resume_from_checkpoint = resolve_resume_checkpoint(str(resume_from_checkpoint), self.args.output_dir)
        if resume_from_checkpoint:
            self._resume_from = resume_from_checkpoint
            self.checkpoints.current = Path(resume_from_checkpoint).absolute()
            if self.args.should_log:
                warn_about_newer_checkpoints(self.checkpoints.current)
        return resume_from_checkpoint

    def _check_compatibility(self, state: TrainerState) -> None:
        """Compare the settings of this run with those of the checkpoint that has this state."""
        saved = saved_state(state)
        if saved is not None:
            streamed = is_streamed(self.train_dataset)
            check_resume_compatibility(saved["plan"], training_fingerprint(self), state.global_step, streamed)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        # Those of an earlier run, or of an attempt with a batch that was too large, are not part of this one.
        self.mixing_metrics, self.mixing_totals = MixingMetrics(), MixingTotals()
        self.nonfinite = NonFiniteGuard(self.args.skip_nonfinite_steps)
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        if saved_state(self.state) is not None:
            if self.args.auto_find_batch_size:
                # The batch size of the checkpoint was not known before.
                self._check_compatibility(self.state)
            check_steps_left(self.state)
        self.vertical_probe = VerticalProbe(enabled=self._measures_vertical_attention())
        self.mixing_warnings = MixingWarnings(
            self.classifier_model.config if self._model_computes_loss and self.is_world_process_zero() else None,
            num_update_steps_per_epoch,
            can_have_partners=self._train_batch_size // max(1, self.args.n_gpu) > 1,
            is_first=self.state.global_step == 0,
        )
        return find_resume_position(self, checkpoint) or position

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        # The state of a resumed run has the intervals of the run before.
        self.state.compute_steps(self.args, self.state.max_steps)
        self.state.train_batch_size = self._train_batch_size
        on_all_processes(
            lambda: check_disk_space(self.unwrapped_model, self.args, self.state) if self.args.should_save else None
        )
        return super()._prepare_for_training(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Trainer checks `max_steps` only after a step and would run one extra.
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.nonfinite.on_micro_batch_begin(self)
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.mixing_metrics.step()
        return self.nonfinite.on_backward_end(self, loss)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the loss of a micro-batch: its part of the optimizer step's mean, or its own mean in evaluation.

        Args:
            model: The model, possibly wrapped.
            inputs: `pixel_values` (B, 3, H, W), `labels` (B,) and whatever else the model's forward takes.
            return_outputs: Whether to return the model's outputs too.
            num_items_in_batch: Number of images of the full optimizer step, over all processes with
                `average_tokens_across_devices`. None: the loss is the mean over this micro-batch.
        """
        inputs = normalize_images(dict(inputs), self.device_transform)
        labels = pop_labels(inputs)
        if model.training and self.input_mixing.enabled:
            inputs["pixel_values"], labels = self.input_mixing(inputs["pixel_values"], labels)
        if model.training and self.device_transform is not None:
            inputs["pixel_values"] = self.device_transform.erase(inputs["pixel_values"])
        prepare_for_model(self, inputs, labels)
        if not model.training:
            outputs = model(**inputs)
            num_real = num_real_samples(self, len(labels))
            loss = F.cross_entropy(outputs.logits[:num_real].float(), labels[:num_real])
            return (loss, outputs) if return_outputs else loss

        if self._model_computes_loss:
            outputs = model(**inputs, labels=labels, num_items_in_batch=num_items_in_batch)
            # A scalar, but for DataParallel: there each replica returns its part (or its mean).
            loss = outputs.loss.mean() if num_items_in_batch is None else outputs.loss.sum()
            self.mixing_metrics.update(getattr(outputs, "mixing_metrics", None) or {}, len(labels))
            self.vertical_probe.set_images(inputs["pixel_values"])
        else:
            # Float labels would become binary cross-entropy in the model and change its `config.problem_type`.
            outputs = model(**inputs)
            loss = cross_entropy_loss(outputs.logits, labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The number counts the images of all processes, whose gradients are averaged, not summed.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        self.resume_state.grad_norm, self.resume_state.learning_rate = grad_norm, kwargs.get("learning_rate")
        # After SIGTERM there may be no time to evaluate. With `save_strategy="best"`, Trainer would also save nothing
        # after an evaluation that is not the best.
        self.resume_state.evaluation_due = self.terminated and self.control.should_evaluate
        if self.resume_state.evaluation_due:
            self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`; with a training loss among them, the metrics of TokenMixup too. A collective operation.

        Raises:
            NonFiniteLossError: The loss of a step since the last such line was not finite.
        """
        if "loss" in logs:
            self.nonfinite.raise_if_nonfinite_loss(self)
            logs |= self._end_mixing_interval() | self.vertical_probe.measure(self.classifier_model, self.accelerator)
        if "train_loss" in logs:
            self.resume_state.correct_run_metrics(logs)
            self._end_mixing_interval()
            logs |= self.mixing_totals.run_metrics()
        super().log(logs, start_time)

    def _end_mixing_interval(self) -> dict[str, float]:
        """Add the metrics since the last log line to those of the run, and return them. A collective operation."""
        totals = self.mixing_metrics.totals(self.accelerator)
        self.mixing_metrics = MixingMetrics()
        self.mixing_totals += totals
        self.mixing_warnings.add(totals)
        return totals.summarize()

    def _measures_vertical_attention(self) -> bool:
        # Sharded weights are complete only within the model's own forward pass.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return self._model_computes_loss and not sharded and bool(self.classifier_model.config.vertical_layers)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.terminated:
            if self.args.load_best_model_at_end:
                validate_best_checkpoint(self)
            return super()._finalize_training(*args, **kwargs)
        # Trainer would load the best model and, with a limit of 1, remove every other checkpoint.
        settings = {"load_best_model_at_end": False, "save_total_limit": None}
        original = {name: getattr(self.args, name) for name in settings}
        try:
            vars(self.args).update(settings)
            return super()._finalize_training(*args, **kwargs)
        finally:
            vars(self.args).update(original)

    def _raise_if_nonfinite(self) -> None:
        self.nonfinite.raise_if_nonfinite_loss(self)
        self.nonfinite.raise_if_nonfinite_weights(self)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in `Trainer`; with `args.layer_decay`, the learning rate of a parameter depends on its layer.

        Raises:
            ValueError: `layer_decay` has no effect with this optimizer.
        """
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.layer_decay != 1:
            apply_layer_decay(optimizer, self.classifier_model, self.args.layer_decay)
        return optimizer

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`.

        Raises:
            ValueError: The training dataset has no batch.
        """
        if has_length(self.train_dataset) and len(self.train_dataset) == 0:
            raise ValueError("`train_dataset` has no images: check the split and its limits (`max_train_samples`).")
        streamed = is_streamed(self.train_dataset)
        loader = build_train_loader(self) if streamed else super().get_train_dataloader()
        if has_length(loader):
            validate_num_batches(self, len(loader))
        return loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        dataset = self.eval_dataset if dataset is None else dataset
        if is_streamed(dataset):
            return build_eval_loader(self, dataset)
        return super().get_eval_dataloader(eval_dataset)

    def num_examples(self, dataloader: DataLoader) -> int:
        count = super().num_examples(dataloader)
        return count * self.args.world_size if is_streamed(getattr(dataloader, "dataset", None)) else count

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with loader_settings(self, kwargs) as settings:
            loader = super()._get_dataloader(*args, **settings)
        return set_generator_and_workers(loader, self.args.seed)

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; the results of the trainer's own `eval_dataset` are in the model card."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is None or eval_dataset is self.eval_dataset:
            self.run_record.metrics = metrics
        return metrics

    def _evaluate(self, *args: Any, skip_scheduler: bool = False, **kwargs: Any) -> dict[str, float]:
        # The evaluation of `eval_on_start`, which a resumed run has had.
        if skip_scheduler and self.state.global_step:
            return {}
        return super()._evaluate(*args, skip_scheduler=skip_scheduler, **kwargs)

    def evaluation_loop(self, dataloader: DataLoader, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`.

        Raises:
            ValueError: There are no images, or, in an evaluation, no labels.
        """
        if isinstance(self.compute_metrics, ComputeMetrics):
            self.compute_metrics.reset()
        dtype = half_precision_eval_dtype(self)
        # Trainer would leave the model in half precision, and a later save would write it so.
        raw_weights = nullcontext() if dtype is None else restore_weights_on_exit(self.unwrapped_model)
        self.ema.broadcast_buffers()
        with raw_weights, self._epochs.preserve_epoch(dataloader), self.ema.applied():
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        output = with_stream_length(output, dataloader, kwargs.get("metric_key_prefix", "eval"))
        self.run_record.set_evaluation(output.num_samples, dtype)
        if output.num_samples == 0:
            raise ValueError(f"{description}: the dataset has no images. Check the split and its limits.")
        if description == "Evaluation" and not any(name.endswith("_loss") for name in output.metrics):
            raise ValueError(
                "Evaluation needs batches with `labels`, and these have none. Use `predict` for images without "
                "labels, or a `data_collator` that returns them as `labels`."
            )
        return output

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the parts that a checkpoint needs, as JSON values. A collective operation.

        The EMA has a file of its own.
        """
        return self.resume_state.state_dict() | {
            "counts": self.mixing_metrics.state_dict(self.accelerator),
            "mixing_totals": dataclasses.asdict(self.mixing_totals),
            "vertical_probe": self.vertical_probe.state_dict(self.classifier_model, self.accelerator),
            "skipped_steps": self.nonfinite.skipped,
            "plan": training_fingerprint(self),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, when a resumed run begins."""
        self.resume_state.load_state_dict(state)
        self.mixing_metrics.load_state_dict(state["counts"], self.accelerator)
        # Checkpoints of earlier versions do not have these.
        self.vertical_probe.load_state_dict(state.get("vertical_probe", {}))
        self.mixing_totals = MixingTotals(**state.get("mixing_totals", {"complete": False}))
        self.nonfinite.skipped = state["skipped_steps"]

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        self._raise_if_nonfinite()
        folder = (
            Path(self._get_output_dir(trial=trial)).absolute() / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        )
        self.checkpoints.save(folder, write=partial(super()._save_checkpoint, model, trial))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last call in which all processes take part before `trainer_state.json` is written. That file completes a
        # checkpoint, so it must have the state of the parts and the sizes of all other files.
        self.checkpoints.store_state(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        ema = self.ema.read(resume_from_checkpoint)
        if model is not None or not load_weights(self, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.ema.set(ema)

    def _load_best_model(self) -> None:
        checkpoint = self.state.best_model_checkpoint
        ema = self.ema.read(checkpoint)
        if not load_weights(self, checkpoint):
            super()._load_best_model()
        self.ema.set(ema)
        self.run_record.set_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        options = get_optimizer_options(self, checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        validate_optimizer_state(self, checkpoint, options)
        if checkpoint is not None and isinstance(self.optimizer, torch.optim.Optimizer):
            align_optimizer_state_format(self.optimizer)

    # Output folder and Hub

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; the exported model is also written if FSDP's checkpoints are sharded."""
        super().save_model(output_dir, _internal_call)
        folder = self.args.output_dir if output_dir is None else output_dir
        if not self.is_fsdp_enabled or is_checkpoint_folder(folder, self.args.output_dir):
            return
        if "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            # Trainer writes no model then.
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if is_checkpoint_folder(output_dir, self.args.output_dir):
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                self.ema.save(output_dir)
            return
        with self.ema.applied(), saving("The model", output_dir):
            original, plain = self.model, self.plain_model()
            if plain is not self.unwrapped_model and state_dict is not None:
                names = plain.state_dict().keys()
                state_dict = {name: tensor for name, tensor in state_dict.items() if name in names}
            try:
                # Trainer writes `self.model`, with the image processor and the arguments.
                self.model = original if plain is self.unwrapped_model else plain
                super()._save(output_dir, state_dict)
            finally:
                self.model = original

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As in `Trainer`; results that an interrupted run wrote partially are written again."""
        if combined and self.is_world_process_zero():
            remove_if_truncated(Path(self.args.output_dir) / "all_results.json")
        with saving("The results", self.args.output_dir):
            super().save_metrics(split, metrics, combined)

    def save_state(self) -> None:
        with saving("The state of the run", self.args.output_dir):
            super().save_state()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository and check write access; with `push_to_hub`, before training.

        Raises:
            HubUploadError: There is no write access, or no login.
        """
        self.hub_model_id = create_repository(self.args, token, private)
        self.push_in_progress = None

    def model_card(self, repo_id: str, **facts: Any) -> ModelCard:
        """Return the model card for a repository of this name; `facts` as in `create_model_card`."""
        return self.run_record.build_model_card(repo_id, **facts)

    def create_model_card(self, license: str | None = None, **facts: Any) -> None:
        """Write the model card (README.md) to the output folder.

        Args:
            license: Replaces that of `training_card_data`.
            facts: Fields of `TrainingCardData` that replace the recorded ones.
        """
        if not self.is_world_process_zero():
            return
        if license is not None:
            facts["license"] = license
        folder = Path(self.args.output_dir)
        repo_id = getattr(self, "hub_model_id", None) or folder.as_posix()
        with saving("The model card", folder):
            self.model_card(repo_id, **facts).save(folder / "README.md")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts: Any,
    ) -> CommitInfo | None:
        """Save the exported model and its card and upload them; arguments as in `Trainer.push_to_hub`.

        Raises:
            HubUploadError: There is no write access, or the upload fails. The output folder is complete then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if getattr(self, "hub_model_id", None) is None:
            self.init_hf_repo(token=token, private=private)
        # All processes: gathering sharded weights needs them.
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**facts)
        self._finish_current_push()
        return upload_model_folder(
            self.args.output_dir,
            self.hub_model_id,
            token=token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            message=commit_message,
            blocking=blocking,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy == HubStrategy.END:
            return
        if self.is_fsdp_enabled:
            # All processes: gathering sharded weights needs them.
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_fsdp_enabled:
            self._save(self.args.output_dir)
        self.create_model_card()
        uploads = start_upload(self, checkpoint_folder)
        if busy:
            self.push_in_progress.jobs.extend(uploads)
        else:
            self.push_in_progress = PushInProgress(uploads)
