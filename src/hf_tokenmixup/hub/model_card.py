"""Model cards: metadata for the Hub, and a text with the recorded facts of training and evaluation."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..evaluation.evaluate import EvaluationResult
from ..paper_results import PaperTable, find_paper_results
from ..utils.environment import public_dataset, strip_local_path
from ..utils.redaction import is_secret_name
from . import card_formatting as text
from .card_metadata import GENERATED_TAG, build_eval_results, insert_eval_results, read_card
from .card_redaction import as_hub_repo_id, redact_text, redact_value
from .model_summary import ModelSummary, summarize_model

README_NAME = "README.md"
SMALL_IMAGE_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class TrainingCardData:
    """Facts about a training run. Those that are None or empty are omitted from the card.

    Attributes:
        base_model: Name on the Hub of the model that training started from; None from scratch or for a folder.
        dataset: Name on the Hub, or a folder, of which only the name is shown.
        dataset_config: Configuration of the dataset.
        train_split: Split used for training.
        recipe: Name of the recipe.
        command: Command line that reproduces the run.
        hyperparameters: Hyperparameters by name, in the order of the card.
        hardware: Devices, such as `2 x NVIDIA H100 80GB HBM3`.
        seconds: Duration of the run.
        epochs: Number of epochs.
        resumed: The run was resumed, and `seconds` counts only the last part.
        versions: Versions of the libraries by name.
        curves: File name of a figure next to the card.
        license: License of the weights, an identifier of the Hub. None: the card has no license.
        mixing: What HTM did in the run, as a sentence without a capital letter and a full stop.
        nothing_mixed: HTM was enabled, but mixed no image in the run.
    """

    base_model: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    train_split: str | None = None
    recipe: str | None = None
    command: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    hardware: str | None = None
    seconds: float | None = None
    epochs: float | None = None
    resumed: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    curves: str | None = None
    license: str | None = None
    mixing: str | None = None
    nothing_mixed: bool = False


def build_model_card(
    config: PreTrainedConfig,
    repo_id: str,
    training: TrainingCardData | None = None,
    evaluations: Sequence[EvaluationResult] = (),
    paper: PaperTable | None = None,
    *,
    license: str | None = None,
) -> ModelCard:
    """Build the card of a trained model. Tokens and local paths are removed.

    Args:
        config: Configuration of the exported plain model, or of the TokenMixup model.
        repo_id: Name on the Hub or folder that the model is loaded from.
        training: Facts about the training run; None if unknown, as for converted weights.
        evaluations: Evaluation results, for the text and for `model-index` in the metadata.
        paper: Results of the paper to show. None: those of the recipe, if the paper reports any.
        license: License of the weights; replaces that of `training`.

    Raises:
        ValueError: The configuration is not that of an image classifier, or has invalid TokenMixup settings.
    """
    return _render(config, repo_id, training, evaluations, paper, license, trained=True)


def build_untrained_model_card(
    config: PreTrainedConfig, folder: str, training: TrainingCardData, paper: PaperTable | None = None
) -> ModelCard:
    """Build the card of a model that a recipe trains and that has no weights yet.

    Args:
        config: Configuration of the model.
        folder: Output folder of the recipe.
        training: Facts about the run, with a command that trains and uploads the model.
        paper: Results of the paper to show. None: those of the recipe, if the paper reports any.
    """
    return _render(config, folder, training, (), paper, None, trained=False)


def update_model_card(
    target: str, evaluation: EvaluationResult, token: str | None = None, revision: str | None = None
) -> str:
    """Insert an evaluation result into the metadata of a model card. Creates the card if there is none.

    Results for the same task, dataset, configuration, split and metric are replaced. Nothing else changes.

    Args:
        target: A folder, or a repository on the Hub.
        evaluation: The result.
        token: Token for the Hub. None: that of the login.
        revision: Branch of the repository. None: `main`.

    Returns:
        The path of the card, or the URL of the commit.

    Raises:
        ValueError: The target is neither a folder nor a repository name, its metadata is invalid, or the folder has
            neither a card nor a model.
        HfHubHTTPError: The Hub rejected the commit, for example because the repository has changed in the meantime.
    """
    if Path(target).is_dir():
        return _update_folder(Path(target), evaluation)
    try:
        validate_repo_id(target)
    except HFValidationError as error:
        raise ValueError(f"{target!r} is neither a folder nor a repository name: {error}") from error
    return _update_repository(target, evaluation, HfApi(token=token), revision)


def _update_folder(folder: Path, evaluation: EvaluationResult) -> str:
    path = folder / README_NAME
    # `.` has no name of its own.
    name = folder.resolve().name
    if path.exists():
        card = insert_eval_results(read_card(path), name, build_eval_results(evaluation))
    elif (folder / CONFIG_NAME).exists():
        card = str(build_model_card(AutoConfig.from_pretrained(folder), name, evaluations=[evaluation]))
    else:
        raise ValueError(
            f"{folder} contains neither a model card ({README_NAME}) nor a model ({CONFIG_NAME}). Use another folder."
        )
    path.write_bytes(card.encode())
    return str(path)


def _update_repository(repo_id: str, evaluation: EvaluationResult, api: HfApi, revision: str | None) -> str:
    # `parent_commit` makes the commit fail if the card has changed since it was read.
    head = api.model_info(repo_id, revision=revision).sha
    try:
        old = Path(api.hf_hub_download(repo_id, README_NAME, revision=head)).read_bytes().decode()
    except RemoteEntryNotFoundError:
        config = AutoConfig.from_pretrained(Path(api.hf_hub_download(repo_id, CONFIG_NAME, revision=head)).parent)
        card = str(build_model_card(config, repo_id, evaluations=[evaluation]))
    else:
        card = insert_eval_results(old, _title(repo_id), build_eval_results(evaluation))
    return api.upload_file(
        path_or_fileobj=card.encode(),
        path_in_repo=README_NAME,
        repo_id=repo_id,
        revision=revision,
        parent_commit=head,
        commit_message=f"Evaluation on {public_dataset(evaluation.dataset)}, {evaluation.split}",
        commit_description=redact_text(evaluation.command),
    ).commit_url


def _render(
    config: PreTrainedConfig,
    source: str,
    training: TrainingCardData | None,
    evaluations: Sequence[EvaluationResult],
    paper: PaperTable | None,
    license: str | None,
    trained: bool,
) -> ModelCard:
    model, source = summarize_model(config), strip_local_path(source)
    facts = _redact(training) if training else None
    license = license or (facts.license if facts else None)
    paper = paper or (find_paper_results(facts.recipe) if facts else None)
    return ModelCard.from_template(
        _metadata(model, source, facts, evaluations, license),
        # Jinja removes one line break at the end.
        template_str=(files(__package__) / "templates" / "model_card.md").read_text(encoding="utf-8") + "\n",
        title=_title(source),
        source=json.dumps(source),
        trained=trained,
        training=facts,
        model=model,
        parameters=text.format_millions(model.num_parameters),
        article="an" if model.name.strip("`")[0] in "AEIOU" else "a",
        class_names=text.join_words(model.class_names),
        size=text.model_table(model, next((item.macs for item in evaluations if item.macs), None)),
        uses_tokenmixup=model.uses_tokenmixup,
        supports_tokenmixup=model.supports_tokenmixup,
        horizontal=text.format_layers(model.horizontal_layers),
        vertical=text.format_layers(model.vertical_layers),
        manifold=text.format_layers(model.manifold_layers),
        is_low_resolution=model.image_size is not None and max(model.image_size) <= SMALL_IMAGE_SIZE,
        settings=text.markdown_table(
            ("setting", "value", ""), ((f"`{name}`", *rest) for name, *rest in model.settings)
        ),
        dataset_link=facts and text.hub_link(facts.dataset, "datasets/"),
        base_model_link=facts and text.hub_link(facts.base_model),
        training_table=facts and text.markdown_table(("", ""), _training_rows(facts)),
        hyperparameters=facts
        and text.markdown_table(
            ("hyperparameter", "value"), ((f"`{name}`", value) for name, value in facts.hyperparameters.items())
        ),
        results=text.result_table(evaluations),
        evaluations=[
            {"command": redact_text(item.command), "setup": text.evaluation_setup(item)} for item in evaluations
        ],
        paper=paper,
        paper_results=paper and text.paper_table(paper),
    )


def _metadata(
    model: ModelSummary,
    source: str,
    training: TrainingCardData | None,
    evaluations: Sequence[EvaluationResult],
    license: str | None,
) -> ModelCardData:
    results = [result for evaluation in evaluations for result in build_eval_results(evaluation)]
    tags = ["image-classification", GENERATED_TAG, *(["tokenmixup"] if model.uses_tokenmixup else []), model.family]
    return ModelCardData(
        base_model=training.base_model if training else None,
        datasets=[training.dataset] if training and as_hub_repo_id(training.dataset) else None,
        library_name="transformers",
        license=license,
        metrics=["accuracy"] if results else None,
        pipeline_tag="image-classification",
        tags=tags,
        model_name=_title(source) if results else None,
        eval_results=results or None,
    )


def _redact(training: TrainingCardData) -> TrainingCardData:
    """Remove secrets and local paths from the facts about a training run."""
    return dataclasses.replace(
        training,
        base_model=as_hub_repo_id(training.base_model),
        dataset=training.dataset and public_dataset(training.dataset),
        recipe=training.recipe and PureWindowsPath(training.recipe).name.removesuffix(".yaml"),
        command=training.command and redact_text(training.command),
        hyperparameters={
            name: redact_value(value) for name, value in training.hyperparameters.items() if not is_secret_name(name)
        },
        curves=training.curves and PureWindowsPath(training.curves).name,
    )


def _training_rows(training: TrainingCardData) -> list[tuple[str, str]]:
    dataset = text.hub_link(training.dataset, "datasets/")
    if dataset and training.dataset_config:
        dataset += f" ({training.dataset_config})"
    resumed = " since the run was resumed" if training.resumed else ""
    rows = {
        "dataset": dataset,
        "split": training.train_split,
        "base model": text.hub_link(training.base_model),
        "recipe": training.recipe and f"`{training.recipe}`",
        "epochs": training.epochs is not None and f"{training.epochs:g}",
        "hardware": training.hardware,
        "duration": training.seconds is not None and text.format_duration(training.seconds) + resumed,
        "versions": text.format_versions(training.versions),
    }
    return [(name, value) for name, value in rows.items() if value]


def _title(source: str) -> str:
    # `.` has no name of its own.
    return PureWindowsPath(source).name or Path(source).resolve().name
