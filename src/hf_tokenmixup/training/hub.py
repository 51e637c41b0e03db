"""From a training to the Hub: the repository, the model card, and uploads of nothing but the published model."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from ..evaluation.evaluate import EvaluationResult
from ..evaluation.flops import count_macs, count_parameters
from ..hub.card_redaction import redact_json
from ..hub.model_card import TrainingCardData, build_model_card
from ..hub.upload import UPLOAD_PATTERNS, commit_files, create_and_check_repo, upload_model_folder
from ..utils.environment import describe_hardware, library_versions
from .callbacks import TrainingCurvesCallback
from .checkpointing.disk_space import saving
from .checkpointing.integrity import CALLBACK_STATE_KEY, TRAINER_STATE_NAME
from .effective_settings import devices, forward_precision, given_optimization, hyperparameters
from .ema import AveragingTrainer
from .lora import get_adapter_hyperparameters
from .processes import on_main_process

# A pickle with the token of the Hub, should one have been given, and local paths; and the card that peft writes.
PRIVATE_FILES = ["training_args.bin", "README.md", "*/README.md"]


def public_state(checkpoint: Path) -> dict[str, bytes]:
    """The state of a checkpoint as it is uploaded, by file name: for the files that are, and without local folders."""
    path = checkpoint / TRAINER_STATE_NAME
    if not path.is_file():
        return {}
    state = json.loads(path.read_text(encoding="utf-8"))
    if best := state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(best).name
    own = (state.get("stateful_callbacks") or {}).get(CALLBACK_STATE_KEY, {})
    if "files" in own:
        uploaded = {
            name: own["files"][name] for name in filter_repo_objects(own["files"], ignore_patterns=PRIVATE_FILES)
        }
        changed = {name: content for name in uploaded if (content := redact_json(checkpoint / name)) is not None}
        own["files"] = uploaded | {name: len(content) for name, content in changed.items()}
    return {path.name: (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()}


class PublishingTrainer(AveragingTrainer):
    """A Trainer whose uploads a stranger can use and trust.

    Args:
        training_card_data: what the model card tells about the training and a Trainer cannot know: data set, base
        model,
            recipe, command, settings of the augmentation. The trainer adds what it does know.
        eval_card_data: fields of :class:`~hf_tokenmixup.evaluation.evaluate.EvaluationResult` that are known before
            anything is measured: `dataset`, `dataset_config`, `dataset_revision`, `dataset_fingerprint`, `split` and
            `command` (in which `{model}` stands for the repository). With them, the results of the last `evaluate()`
            go into the card as a `model-index`.
    """

    def __init__(
        self,
        *args: Any,
        training_card_data: TrainingCardData | None = None,
        eval_card_data: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.training_card_data = training_card_data or TrainingCardData()
        self.eval_card_data = eval_card_data
        self._last_evaluation: dict[str, float] = {}
        self._measured: dict[str, Any] = {}
        self._train_seconds: float | None = None
        self._resumed = False
        super().__init__(*args, **kwargs)
        self.given_optimization = given_optimization(self)
        self.add_callback(_ResultsCallback(self))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository and make sure that one may write to it; with `push_to_hub`, before the training.

        Raises:
            HubUploadError: one may not, or is not logged in; says what to do.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        # The main process alone asks the Hub, and all of them raise its refusal.
        self.hub_model_id = on_main_process(
            lambda: create_and_check_repo(name, token=token or self.args.hub_token, private=private)
        )
        self.push_in_progress = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._last_evaluation, self._train_seconds = {}, None
        result = super().train(*args, **kwargs)
        self._train_seconds = result.metrics.get("train_runtime")
        return result

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; the results of the trainer's own `eval_dataset` go into the model card."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is None or eval_dataset is self.eval_dataset:
            self._last_evaluation = metrics
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        weights = None
        if not self.is_in_train and (self.args.bf16_full_eval or self.args.fp16_full_eval):
            weights = torch.float16 if self.args.fp16_full_eval else torch.bfloat16
        output = super().evaluation_loop(*args, **kwargs)
        self._measured = {"num_images": output.num_samples, "dtype": forward_precision(self, weights)}
        return output

    def weights_changed(self) -> None:
        """Forget the last evaluation: it is not that of the weights that the model has."""
        self._last_evaluation = {}

    def _load_best_model(self) -> None:
        super()._load_best_model()
        step = self.state.best_global_step
        results = (line for line in reversed(self.state.log_history) if line["step"] == step and "eval_loss" in line)
        self._last_evaluation = next(results, {})

    def create_model_card(self, license: str | None = None, **facts: Any) -> None:
        """Write the model card, README.md, into the output folder: from what was run, not from memory.

        Args:
            license: instead of that of `training_card_data`.
            facts: fields of `TrainingCardData` instead of those known.
        """
        if not self.is_world_process_zero():
            return
        if license is not None:
            facts["license"] = license
        folder = Path(self.args.output_dir)
        repo_id = getattr(self, "hub_model_id", None) or folder.as_posix()
        with saving("The model card", folder):
            self.model_card(repo_id, **facts).save(folder / "README.md")

    def model_card(self, repo_id: str, **facts: Any) -> ModelCard:
        """The model card for a repository of this name; `facts` as in `create_model_card`."""
        evaluation = self._evaluation(repo_id)
        return build_model_card(
            self.unwrapped_model.config,
            repo_id,
            replace(self._training_facts(), **facts),
            evaluations=[evaluation] if evaluation else [],
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts: Any,
    ) -> CommitInfo | None:
        """Save the published model and its card and upload them; arguments as in `Trainer.push_to_hub`.

        Raises:
            HubUploadError: one may not write there, or the upload breaks off. The output folder is complete then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if getattr(self, "hub_model_id", None) is None:
            self.init_hf_repo(token=token, private=private)
        # Every process takes part: gathering sharded weights needs all of them.
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
        """Upload the published model, and the checkpoint too where `hub_strategy` says so, in the background.

        The host would copy the checkpoint's weights, ScoreNet among them, into the output folder and upload those.
        """
        args = self.args
        if args.hub_strategy == HubStrategy.END:
            return
        if self.is_fsdp_enabled:
            # Gathering sharded weights needs every process.
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if not self.is_fsdp_enabled:
            self._save(args.output_dir)
        self.create_model_card()

        by_step = args.save_strategy == SaveStrategy.STEPS
        reached = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch)}"
        api, where = HfApi(token=args.hub_token), {"repo_id": self.hub_model_id, "revision": args.hub_revision}
        jobs = [
            api.run_as_future(
                commit_files,
                api,
                args.output_dir,
                message=f"Training in progress, {reached}",
                **UPLOAD_PATTERNS,
                **where,
            )
        ]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last_only = args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                api.run_as_future(
                    commit_files,
                    api,
                    checkpoint_folder,
                    path_in_repo="last-checkpoint" if last_only else Path(checkpoint_folder).name,
                    message=f"Training in progress, {reached}, checkpoint",
                    ignore_patterns=PRIVATE_FILES,
                    changed=public_state(Path(checkpoint_folder)),
                    **where,
                )
            )
        if busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _training_facts(self) -> TrainingCardData:
        facts, adapters = self.training_card_data, get_adapter_hyperparameters(self.classifier_model)
        folder = Path(self.args.output_dir)
        curves = TrainingCurvesCallback.file_name if (folder / TrainingCurvesCallback.file_name).exists() else None
        return replace(
            facts,
            hyperparameters=hyperparameters(self) | dict(facts.hyperparameters),
            hardware=describe_hardware(devices(self), self.accelerator.device),
            seconds=self._train_seconds,
            epochs=self.state.epoch,
            resumed=self._resumed,
            versions=library_versions() | ({"peft": version("peft")} if adapters else {}),
            curves=curves,
        )

    def _evaluation(self, repo_id: str) -> EvaluationResult | None:
        metrics = self._last_evaluation
        if self.eval_card_data is None or not {"eval_loss", "eval_top1", "eval_top5"} <= metrics.keys():
            return None
        args, model = self.args, self.plain_model()
        if self.is_fsdp_enabled:
            # The weights are spread over the processes, and this is one of them: the shapes are enough.
            with torch.device("meta"):
                model = type(model)(model.config)
        image = next(iter(self.eval_dataset))["pixel_values"]
        facts = dict(self.eval_card_data)
        return EvaluationResult(
            **facts | {"command": facts["command"].replace("{model}", repo_id)},
            model=repo_id,
            model_revision=None,
            num_parameters=count_parameters(model),
            macs=count_macs(model, tuple(image.shape)),
            num_images=self._measured.get("num_images") or len(self.eval_dataset),
            top1=metrics["eval_top1"],
            top5=metrics["eval_top5"],
            loss=metrics["eval_loss"],
            images_per_second=metrics.get("eval_samples_per_second", 0.0),
            batch_size=args.eval_batch_size,
            num_processes=args.world_size,
            hardware=describe_hardware(devices(self), self.accelerator.device),
            dtype=self._measured.get("dtype") or forward_precision(self),
            versions=library_versions(),
        )


class _ResultsCallback(TrainerCallback):
    """Tells a trainer when its results are no longer those of its weights, and whether its run was resumed."""

    def __init__(self, trainer: PublishingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._trainer._resumed = state.global_step > 0

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._trainer.weights_changed()
