"""The trainer: mixes the input images on the device, takes the loss, and logs what TokenMixup did.

It serves every image-classification model of transformers, TokenMixup or not, so that a baseline is trained by the
same code. A TokenMixup model computes its own loss (it alone knows the mixed labels); for any other model the loss is
the cross-entropy between its logits and the targets, taken here.
"""

import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, has_length, unwrap_peft_model

from ..data import ImageClassificationIterableDataset, InputMixup
from ..metrics import ComputeMetrics, compute_metrics
from ..models import TokenMixupModelMixin, find_adapter_layers, validate_single_label
from ..models.loss import cross_entropy_loss
from .callbacks import (
    CheckpointedLayersCallback,
    EpochLogCallback,
    JsonlLoggerCallback,
    SetEpochCallback,
    TrainingCurvesCallback,
)
from .checkpointing.compatibility import check_resume_compatibility, training_fingerprint
from .effective_settings import is_compiled
from .fsdp import set_transformer_layer_cls_to_wrap
from .hub import PublishingTrainer
from .lora import check_scorenet_trainable
from .memory_format import (
    align_optimizer_state_format,
    channels_last,
    mark_dynamic_batch_size,
    restore_weights_on_exit,
)
from .metrics import MixingMetrics
from .nonfinite import NonFiniteGuard
from .processes import RankSeedCallback
from .streaming import StreamingTrainer
from .training_args import TokenMixupTrainingArguments

logger = logging.getLogger(__name__)


class TokenMixupTrainer(PublishingTrainer, StreamingTrainer):
    """A `transformers.Trainer` for TokenMixup models and the baselines beside them.

    Batches hold `pixel_values` (B, 3, H, W) and `labels` (B,), class indices. Input mixup, CutMix and label smoothing
    (see `TokenMixupTrainingArguments`) make distributions of the labels on the device, in training only; evaluation
    is the plain cross-entropy with the labels as they are.

    The loss of an optimizer step is the mean over all its images: over the micro-batches of gradient accumulation,
    the last and smaller one included, and over processes. (With `average_tokens_across_devices=False` each process
    averages over its own images and the processes are then averaged, which differs only where their shares do.)

    In training, process r draws from `seed + r`: dropout, mixup, CutMix and TokenMixup differ between processes. The
    initial weights and the order of the images come from the common seed.

    Each logged training loss comes with the counts of the model's outputs: those of samples and tokens
    (`mixed_samples`, `easy_samples`, ...) for a whole step, summed over its micro-batches and processes and averaged
    over the steps since the last such line; `difficulty` and `scorenet_loss` averaged over the images.

    Raises:
        NonFiniteLossError: in training, for a loss that is not finite, before its weights are saved.
        ValueError: If `args` is not a `TokenMixupTrainingArguments` or a `compute_loss_func` is given; in training,
            if the labels are missing or are not class indices.
    """

    def __init__(self, model: nn.Module | None = None, args: TokenMixupTrainingArguments | None = None, **kwargs: Any):
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
        if args.ddp_find_unused_parameters is None and isinstance(unwrap_peft_model(model), TokenMixupModelMixin):
            # Every parameter that trains gets a gradient in every step, also where no image is easy; looking would
            # cost time. The host reads this while it is built.
            args.ddp_find_unused_parameters = False
        # Before the callbacks of the user and of the parts of this trainer, which may decide otherwise.
        kwargs["callbacks"] = [EpochLogCallback(), *(kwargs.get("callbacks") or [])]
        self._epochs = SetEpochCallback()
        super().__init__(model=model, args=args, **kwargs)
        if self.compute_metrics is compute_metrics:
            # It may collect batches, and those of two trainers must not mix.
            self.compute_metrics = ComputeMetrics()
        self._set_memory_format(self.model)
        # Has the host count the images of all micro-batches (and processes) of a step, hand the number to
        # `compute_loss` and leave the loss undivided, whatever the signature of the model's forward.
        self.model_accepts_loss_kwargs = True
        if self.args.n_gpu > 1:
            # DataParallel is one process: its images are counted exactly, not divided evenly among the replicas.
            self.args.average_tokens_across_devices = True
        if find_adapter_layers(self.unwrapped_model):
            self._prepare_for_adapters()
        if self.is_deepspeed_enabled and args.skip_nonfinite_steps:
            raise ValueError(
                "`skip_nonfinite_steps` does not go with DeepSpeed, which takes the step before its loss is looked at "
                "and passes over some such steps by its own settings: leave it out."
            )
        if self.is_fsdp_enabled:
            set_transformer_layer_cls_to_wrap(self.accelerator.state.fsdp_plugin, self.unwrapped_model)
        self._configure_for_model(self.classifier_model)
        if args.ddp_find_unused_parameters is None and isinstance(self.classifier_model, TokenMixupModelMixin):
            # The model came from `model_init`, and the accelerator was made before.
            args.ddp_find_unused_parameters = False
            if self.accelerator.ddp_handler is not None:
                self.accelerator.ddp_handler.find_unused_parameters = False
        self.add_callback(self._epochs)
        self.add_callback(CheckpointedLayersCallback())
        self.add_callback(RankSeedCallback())
        self._counts = MixingMetrics()
        self._guard = NonFiniteGuard(args.skip_nonfinite_steps)

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super().call_model_init(*args, **kwargs)
        self._set_memory_format(model)
        self._configure_for_model(unwrap_peft_model(model))
        return model

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`.

        Raises:
            ValueError: the training dataset has no batch to give.
        """
        if has_length(self.train_dataset) and len(self.train_dataset) == 0:
            raise ValueError("`train_dataset` has no images: check the split and its limits (`max_train_samples`).")
        loader = super().get_train_dataloader()
        if has_length(loader):
            self._check_batches(len(loader))
        return loader

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._guard.begin(self)
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._counts.end_step()
        return self._guard.see(self, loss)

    @property
    def skipped_steps(self) -> int:
        """Steps of the run whose loss or gradient was not finite and which were therefore skipped."""
        return self._guard.skipped

    def step_was_skipped(self) -> bool:
        return self._guard.left_out or super().step_was_skipped()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a micro-batch: its share of the optimizer step's mean in training, its own mean in evaluation.

        Args:
            model: The model, possibly wrapped.
            inputs: `pixel_values` (B, 3, H, W), `labels` (B,) and whatever else the model's forward takes.
            return_outputs: Whether to return the model's outputs too.
            num_items_in_batch: The number of images of the whole optimizer step, over all processes where
                `average_tokens_across_devices` is set. None: the loss is the mean over this micro-batch.
        """
        inputs = dict(inputs)
        labels = self._pop_labels(inputs)
        if model.training and self.input_mixing.enabled:
            inputs["pixel_values"], labels = self.input_mixing(inputs["pixel_values"], labels)
        self._prepare_batch_for_compile(inputs, labels)
        if not model.training:
            outputs = model(**inputs)
            own = self._num_real_samples(len(labels))
            loss = F.cross_entropy(outputs.logits[:own].float(), labels[:own])
            return (loss, outputs) if return_outputs else loss

        if self._model_computes_loss:
            outputs = model(**inputs, labels=labels, num_items_in_batch=num_items_in_batch)
            # A scalar, but for DataParallel: there each replica returns its share (or its mean).
            loss = outputs.loss.mean() if num_items_in_batch is None else outputs.loss.sum()
            self._counts.add(getattr(outputs, "mixing_metrics", None) or {}, len(labels))
        else:
            # Float labels would become binary cross-entropy in the model and change its `config.problem_type`.
            outputs = model(**inputs)
            loss = cross_entropy_loss(outputs.logits, labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The number counts the images of all processes, whose gradients are averaged, not summed.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, dataloader: DataLoader, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`.

        Raises:
            ValueError: there are no images, or, in an evaluation, no labels.
        """
        if isinstance(self.compute_metrics, ComputeMetrics):
            self.compute_metrics.reset()
        half = (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.is_in_train
        # The host would leave the model in half precision, and a later save write it so.
        restored = restore_weights_on_exit(self.unwrapped_model) if half else nullcontext()
        with restored, self._epochs.unchanged(dataloader):
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if output.num_samples == 0:
            raise ValueError(f"{description}: the dataset has no images. Check the split and its limits.")
        if description == "Evaluation" and not any(name.endswith("_loss") for name in output.metrics):
            raise ValueError(
                "Evaluation needs batches with `labels`, and these have none. Use `predict` for images without "
                "labels, or a `data_collator` that returns them as `labels`."
            )
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`; with a training loss among them, the counts of a step too. All processes call this together.

        Raises:
            NonFiniteLossError: the loss of a step since the last such line was not finite.
        """
        if "loss" in logs:
            self._guard.check(self)
            logs |= self._counts.summary(self.accelerator)
            self._counts = MixingMetrics()
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any):
        result = super().train(*args, **kwargs)
        # What the end would save must not be spoilt either.
        self._guard.check(self)
        self._guard.raise_if_nonfinite_weights(self)
        return result

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        # A trial of a search has its own arguments and accelerator. Until `model_init` is called, it has no model.
        searching = self.hp_search_backend is not None and trial is not None
        if searching:
            self._begin_trial()
        check_scorenet_trainable(self.classifier_model)
        self._warn_of_half_weights()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, JsonlLoggerCallback | TrainingCurvesCallback):
                callback.folder = self._get_output_dir(trial) if searching else None

    def _begin_trial(self) -> None:
        """Check the arguments of a trial, and fit to them what was made of the arguments before."""
        self.args.check()
        self._set_memory_format(self.model)
        self._configure_for_model(self.classifier_model)
        if find_adapter_layers(self.unwrapped_model):
            self._prepare_for_adapters()
        if self.is_fsdp_enabled:
            set_transformer_layer_cls_to_wrap(self.accelerator.state.fsdp_plugin, self.unwrapped_model)
        if self.args.ema_decay:
            self._validate_ema_support()

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # Counts of an earlier run, or of an attempt with a batch that was too large, are not part of this one.
        self._counts = MixingMetrics()
        self._guard = NonFiniteGuard(self.args.skip_nonfinite_steps)
        return super()._init_training_state(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._guard.check(self)
        self._guard.raise_if_nonfinite_weights(self)
        super()._save_checkpoint(*args, **kwargs)

    def kept(self) -> dict[str, Any]:
        own = {"counts": self._counts.kept(self.accelerator), "skipped_steps": self._guard.skipped}
        return super().kept() | own | {"plan": training_fingerprint(self)}

    def restore_kept(self, kept: dict[str, Any]) -> None:
        streamed = isinstance(self.train_dataset, ImageClassificationIterableDataset)
        check_resume_compatibility(kept["plan"], training_fingerprint(self), self.state, streamed)
        super().restore_kept(kept)
        self._counts.restore(kept["counts"], self.accelerator)
        self._guard.skipped = kept["skipped_steps"]

    def _configure_for_model(self, model: nn.Module) -> None:
        """How a classifier's loss is taken and its input mixed, by the arguments as they are. It has no wrappers."""
        validate_single_label(model.config)
        # A plain model's forward would note a problem type at its first loss, and be compiled anew for that.
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

    def _warn_of_half_weights(self) -> None:
        half = {
            str(weight.dtype)
            for weight in self.classifier_model.parameters()
            if weight.requires_grad and weight.itemsize < 4
        }
        if half:
            logger.warning(
                "The weights are in %s and are trained in it: small updates are lost. Open the model with "
                "dtype=torch.float32; bf16 or fp16 in the training arguments compute in half precision by autocast.",
                " and ".join(sorted(half)).replace("torch.", ""),
            )

    def _prepare_for_adapters(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "A model with adapters cannot be merged while FSDP or DeepSpeed keeps it in parts: train on several "
                "devices without these, as `accelerate launch --multi_gpu` does."
            )

    def _check_batches(self, batches: int) -> None:
        """Check how many batches of an epoch this process has.

        Raises:
            ValueError: none.
        """
        args = self.args
        if batches == 0:
            images = len(self.train_dataset) if has_length(self.train_dataset) else "too few"
            each = f" in each of {args.world_size} processes" if args.world_size > 1 else ""
            raise ValueError(
                f"An epoch has no complete batch: `train_dataset` has {images} images, and a batch "
                f"{self._train_batch_size}{each}. Lower `per_device_train_batch_size`, or set "
                "`dataloader_drop_last=False`."
            )
        if batches < args.gradient_accumulation_steps:
            logger.warning(
                "`gradient_accumulation_steps` is %d, but an epoch has %d batches: an optimizer step takes these.",
                args.gradient_accumulation_steps,
                batches,
            )

    def _num_real_samples(self, images: int) -> int:
        """How many of an evaluation's batch count: with several processes, the last is filled up with images again."""
        data = self.accelerator.gradient_state
        if not data.end_of_dataloader or data.remainder < 1:
            return images
        own = data.remainder - self.accelerator.process_index * images
        # Where there are none, the host drops the whole batch's loss.
        return own if 0 < own < images else images

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(self.optimizer, torch.optim.Optimizer):
            align_optimizer_state_format(self.optimizer)

    def _set_memory_format(self, model: nn.Module) -> None:
        if self.args.channels_last:
            model.to(memory_format=torch.channels_last)

    def _prepare_batch_for_compile(self, inputs: dict[str, Any], labels: Tensor) -> None:
        """Prepare a batch for the model's memory format and its compiler."""
        if self.args.channels_last:
            inputs["pixel_values"] = channels_last(inputs["pixel_values"])
        if is_compiled(self.accelerator) and not (self.args.dataloader_drop_last and self.model.training):
            mark_dynamic_batch_size(inputs["pixel_values"], labels)

    def _pop_labels(self, inputs: dict[str, Any]) -> Tensor:
        """Take the labels (B,) out of `inputs`."""
        labels = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(
                f"A batch must hold `labels`, got {', '.join(inputs) or 'nothing'}. Rename the dataset's label column "
                "or collate the batch with a `data_collator`."
            )
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"`labels` must be class indices of shape (B,), got {labels.dtype} of shape {tuple(labels.shape)}. "
                "Mixup, CutMix and label smoothing are applied by the trainer: set them in its arguments."
            )
        if len(labels) == 0:
            raise ValueError("A batch must have at least one image, got none: check the sampler and the dataset.")
        return labels
