"""Model card of a run, and uploads of the exported model and of checkpoints to the Hub."""

import json
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy

from ..evaluation.evaluate import EvaluationResult
from ..evaluation.flops import count_macs, count_parameters
from ..hub.card_redaction import redact_json
from ..hub.model_card import TrainingCardData, build_model_card
from ..hub.upload import UPLOAD_PATTERNS, commit_files, create_and_check_repo
from ..utils.environment import describe_hardware, library_versions
from .callbacks import TrainingCurvesCallback
from .checkpointing.integrity import CALLBACK_STATE_KEY, TRAINER_STATE_NAME
from .effective_settings import devices, forward_precision, hyperparameters
from .lora import get_adapter_hyperparameters
from .mixing_summary import describe_mixing
from .processes import on_main_process

if TYPE_CHECKING:
    from .trainer import TokenMixupTrainer

# A pickle that may have a token of the Hub and local paths, and the card that peft writes.
PRIVATE_FILES = ["training_args.bin", "README.md", "*/README.md"]


def public_state(checkpoint: Path) -> dict[str, bytes]:
    """Return the trainer's state as it is uploaded, by file name: with the uploaded files and without local paths."""
    path = checkpoint / TRAINER_STATE_NAME
    if not path.is_file():
        return {}
    state = json.loads(path.read_text(encoding="utf-8"))
    if best := state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(best).name
    saved = (state.get("stateful_callbacks") or {}).get(CALLBACK_STATE_KEY, {})
    if "files" in saved:
        uploaded = {
            name: saved["files"][name] for name in filter_repo_objects(saved["files"], ignore_patterns=PRIVATE_FILES)
        }
        changed = {name: content for name in uploaded if (content := redact_json(checkpoint / name)) is not None}
        saved["files"] = uploaded | {name: len(content) for name, content in changed.items()}
    return {path.name: (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()}


class RunRecord(TrainerCallback):
    """What a model card and an upload need to know of a run.

    Args:
        trainer: The trainer of the run.
        training_card_data: What the model card reports of the run and a trainer cannot know: dataset, base model,
            recipe, command, settings of the augmentation.
        eval_card_data: Fields of `EvaluationResult` that are known before anything is evaluated: `dataset`,
            `dataset_config`, `dataset_revision`, `dataset_fingerprint`, `split` and `command` (in which `{model}`
            stands for the repository). None: the card has no `model-index`.

    Attributes:
        metrics: Those of the last evaluation of the weights as they are; empty if there was none.
    """

    def __init__(
        self,
        trainer: "TokenMixupTrainer",
        training_card_data: TrainingCardData | None,
        eval_card_data: Mapping[str, Any] | None,
    ) -> None:
        self.training_card_data = training_card_data or TrainingCardData()
        self.eval_card_data = eval_card_data
        self.metrics: dict[str, float] = {}
        self.train_seconds: float | None = None
        self._trainer = trainer
        self._measured: dict[str, Any] = {}
        self._resumed = False

    def begin_run(self) -> None:
        """Forget the results of an earlier run."""
        self.metrics, self.train_seconds = {}, None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._resumed = state.global_step > 0

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # They are not those of the new weights.
        self.metrics = {}

    def set_evaluation(self, num_images: int, weights: torch.dtype | None) -> None:
        """Record how the last evaluation was made; `weights` is their dtype, None for that of the model."""
        self._measured = {"num_images": num_images, "dtype": forward_precision(self._trainer, weights)}

    def set_best_model(self) -> None:
        """Use the metrics that the best model had when it was evaluated."""
        state = self._trainer.state
        lines = (line for line in reversed(state.log_history) if line["step"] == state.best_global_step)
        self.metrics = next((line for line in lines if "eval_loss" in line), {})

    def build_model_card(self, repo_id: str, **changes: Any) -> ModelCard:
        """Build the model card for a repository.

        Args:
            repo_id: Name of the repository.
            changes: Fields of `TrainingCardData` that replace the recorded ones.
        """
        evaluation = self.evaluation_result(repo_id)
        return build_model_card(
            self._trainer.unwrapped_model.config,
            repo_id,
            replace(self.card_data(), **changes),
            evaluations=[evaluation] if evaluation else [],
        )

    def card_data(self) -> TrainingCardData:
        """Return the data of the run for its model card."""
        trainer = self._trainer
        adapters = get_adapter_hyperparameters(trainer.classifier_model)
        mixing = trainer.mixing_totals.run_metrics()
        curves = Path(trainer.args.output_dir) / TrainingCurvesCallback.file_name
        return replace(
            self.training_card_data,
            hyperparameters=hyperparameters(trainer) | dict(self.training_card_data.hyperparameters),
            hardware=describe_hardware(devices(trainer), trainer.accelerator.device),
            seconds=self.train_seconds,
            epochs=trainer.state.epoch,
            resumed=self._resumed,
            versions=library_versions() | ({"peft": version("peft")} if adapters else {}),
            curves=curves.name if curves.exists() else None,
            mixing=describe_mixing(mixing, trainer.classifier_model.config, trainer.mixing_totals.complete),
            nothing_mixed=mixing.get("train_mixed_fraction") == 0,
        )

    def evaluation_result(self, repo_id: str) -> EvaluationResult | None:
        """Return the last evaluation as a result of this repository; None if it cannot be one."""
        metrics = self.metrics
        if self.eval_card_data is None or not {"eval_loss", "eval_top1", "eval_top5"} <= metrics.keys():
            return None
        trainer = self._trainer
        model = trainer.plain_model()
        if trainer.is_fsdp_enabled:
            # The weights are sharded, and the shapes are enough.
            with torch.device("meta"):
                model = type(model)(model.config)
        image = next(iter(trainer.eval_dataset))["pixel_values"]
        known = dict(self.eval_card_data)
        return EvaluationResult(
            **known | {"command": known["command"].replace("{model}", repo_id)},
            model=repo_id,
            model_revision=None,
            num_parameters=count_parameters(model),
            macs=count_macs(model, tuple(image.shape)),
            num_images=self._measured.get("num_images") or len(trainer.eval_dataset),
            top1=metrics["eval_top1"],
            top5=metrics["eval_top5"] if model.config.num_labels > 5 else None,
            loss=metrics["eval_loss"],
            calibration_error=metrics.get("eval_calibration_error"),
            images_per_second=metrics.get("eval_samples_per_second", 0.0),
            batch_size=trainer.args.eval_batch_size,
            num_processes=trainer.args.world_size,
            hardware=describe_hardware(devices(trainer), trainer.accelerator.device),
            dtype=self._measured.get("dtype") or forward_precision(trainer),
            versions=library_versions(),
        )


def create_repository(args: TrainingArguments, token: str | None = None, private: bool | None = None) -> str:
    """Create the repository of a run if needed, and check write access in the main process.

    Returns:
        The name of the repository, `owner/name`, in all processes.

    Raises:
        HubUploadError: There is no write access, or no login; in all processes.
    """
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    private = args.hub_private_repo if private is None else private
    return on_main_process(lambda: create_and_check_repo(name, token=token or args.hub_token, private=private))


def start_upload(trainer: "TokenMixupTrainer", checkpoint: str) -> list[Future]:
    """Upload the exported model in the background, and the checkpoint too if `hub_strategy` asks for it.

    Trainer would copy the weights of the checkpoint, with ScoreNet, into the output folder and upload those.

    Args:
        trainer: The trainer, whose output folder has the exported model and its card.
        checkpoint: The checkpoint that was just saved.
    """
    args, state = trainer.args, trainer.state
    by_step = args.save_strategy == SaveStrategy.STEPS
    progress = f"step {state.global_step}" if by_step else f"epoch {int(state.epoch)}"
    api = HfApi(token=args.hub_token)
    target = {"repo_id": trainer.hub_model_id, "revision": args.hub_revision}
    message = f"Training in progress, {progress}"
    uploads = [api.run_as_future(commit_files, api, args.output_dir, message=message, **UPLOAD_PATTERNS, **target)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        last_only = args.hub_strategy == HubStrategy.CHECKPOINT
        uploads.append(
            api.run_as_future(
                commit_files,
                api,
                checkpoint,
                path_in_repo="last-checkpoint" if last_only else Path(checkpoint).name,
                message=f"{message}, checkpoint",
                ignore_patterns=PRIVATE_FILES,
                changed=public_state(Path(checkpoint)),
                **target,
            )
        )
    return uploads
