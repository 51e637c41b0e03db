"""Model cards: metadata that the Hub reads, and a text that says what was run and measured, and nothing else."""

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
from ..models import FAMILIES
from ..paper_results import PaperTable, find_paper_results
from ..utils.environment import public_dataset, strip_local_path
from ..utils.redaction import is_secret_name
from . import card_formatting as text
from .card_redaction import as_hub_repo_id, redact_text, redact_value
from .eval_results import eval_results, insert_eval_results, read_card
from .model_summary import ModelSummary, describe

README_NAME = "README.md"
SMALL_IMAGE_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class TrainingCardData:
    """What was run; what is not known is None or empty, and left out of the card.

    Args:
        base_model: its name on the Hub; None from scratch or for a folder.
        dataset: its name on the Hub, or its folder, of which only a name gets into the card.
        dataset_config: configuration of the dataset.
        train_split: the split that was trained on.
        recipe: its name in scripts/recipes.
        command: as a stranger would repeat it.
        hyperparameters: by name, in the order to be shown in.
        hardware: `2 x NVIDIA H100 80GB HBM3`.
        seconds: how long the training took.
        epochs: how many were trained.
        resumed: the training was, and `seconds` are those of its last part alone.
        versions: of the libraries, by name.
        curves: file name of a picture beside the card.
        license: of the weights, an identifier of the Hub; None: the card names none.
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


def build_model_card(
    config: PreTrainedConfig,
    repo_id: str,
    training: TrainingCardData | None = None,
    evaluations: Sequence[EvaluationResult] = (),
    paper: PaperTable | None = None,
    *,
    license: str | None = None,
) -> ModelCard:
    """The card of a trained model. No token and no path into this machine's folders gets into it.

    Args:
        config: of the published model, or of the TokenMixup model it comes from.
        repo_id: where the model is opened from: its name on the Hub, or a folder.
        training: None if it is not known, as for converted weights.
        evaluations: what was measured, each an entry of the metadata's `model-index` too.
        paper: the paper's figures; None takes those of the recipe, if it is one of the paper's.
        license: of the weights, instead of that of `training`.

    Raises:
        ValueError: for a configuration of no image classifier, or with settings that do not fit it.
    """
    return _render(config, repo_id, training, evaluations, paper, license, trained=True)


def build_untrained_model_card(
    config: PreTrainedConfig, folder: str, training: TrainingCardData, paper: PaperTable | None = None
) -> ModelCard:
    """The card of what a recipe would train, which says that it was not.

    Args:
        config: of that model.
        folder: where the recipe puts it.
        training: with the recipe, and with a command that trains and publishes.
        paper: as in :func:`build_model_card`.
    """
    return _render(config, folder, training, (), paper, None, trained=False)


def update_card(
    target: str, evaluation: EvaluationResult, token: str | None = None, revision: str | None = None
) -> str:
    """Put a result into the metadata of a model's card, which keeps everything else; makes a card where none is.

    Results of the same task, dataset, configuration, split and metric are replaced.

    Args:
        target: a folder, or a repository on the Hub.
        evaluation: the result.
        token: for the Hub, if not the one of the log-in.
        revision: a branch of the repository, `main` if None.

    Returns:
        The path of the card, or the address of the commit.

    Raises:
        ValueError: for a target that is neither, for metadata that cannot be read, and for a folder with neither a
            card nor a model.
        HfHubHTTPError: if the Hub refuses, also because the repository changed meanwhile.
    """
    if Path(target).is_dir():
        return _update_folder(Path(target), evaluation)
    try:
        validate_repo_id(target)
    except HFValidationError as error:
        raise ValueError(f"{target!r} is neither a folder nor the name of a repository: {error}") from error
    return _update_repository(target, evaluation, HfApi(token=token), revision)


def _update_folder(folder: Path, evaluation: EvaluationResult) -> str:
    path = folder / README_NAME
    # Absolute, so that the folder that one is in has a name too.
    name = folder.resolve().name
    if path.exists():
        card = insert_eval_results(read_card(path), name, eval_results(evaluation))
    elif (folder / CONFIG_NAME).exists():
        card = str(build_model_card(AutoConfig.from_pretrained(folder), name, evaluations=[evaluation]))
    else:
        raise ValueError(f"{folder} holds neither a card ({README_NAME}) nor a model ({CONFIG_NAME}): name another.")
    path.write_bytes(card.encode())
    return str(path)


def _update_repository(repo_id: str, evaluation: EvaluationResult, api: HfApi, revision: str | None) -> str:
    # Read from and written on top of one and the same commit, so that nobody's change in between is lost.
    head = api.model_info(repo_id, revision=revision).sha
    try:
        old = Path(api.hf_hub_download(repo_id, README_NAME, revision=head)).read_bytes().decode()
    except RemoteEntryNotFoundError:
        config = AutoConfig.from_pretrained(Path(api.hf_hub_download(repo_id, CONFIG_NAME, revision=head)).parent)
        card = str(build_model_card(config, repo_id, evaluations=[evaluation]))
    else:
        card = insert_eval_results(old, _title(repo_id), eval_results(evaluation))
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
    model, source = describe(config), strip_local_path(source)
    facts = _redact(training) if training else None
    license = license or (facts.license if facts else None)
    paper = paper or (find_paper_results(facts.recipe) if facts else None)
    return ModelCard.from_template(
        _metadata(model, source, facts, evaluations, license),
        # The template engine drops the last line break.
        template_str=(files(__package__) / "templates" / "model_card.md").read_text(encoding="utf-8") + "\n",
        title=_title(source),
        source=json.dumps(source),
        trained=trained,
        training=facts,
        model=model,
        parameters=text.millions(model.num_parameters),
        size=text.model_table(model, next((item.macs for item in evaluations if item.macs), None)),
        mixing=model.uses_tokenmixup,
        mixable=config.model_type in FAMILIES and config.num_hidden_layers > 1,
        horizontal=text.layers(model.horizontal_layers),
        vertical=text.layers(model.vertical_layers),
        manifold=text.layers(model.manifold_layers),
        small=model.image_size is not None and max(model.image_size) <= SMALL_IMAGE_SIZE,
        settings=text.table(("setting", "value", ""), ((f"`{name}`", *rest) for name, *rest in model.settings)),
        dataset=facts and text.on_hub(facts.dataset, "datasets/"),
        start=facts and text.on_hub(facts.base_model),
        run=facts and text.table(("", ""), _run(facts)),
        hyperparameters=facts
        and text.table(
            ("hyperparameter", "value"), ((f"`{name}`", value) for name, value in facts.hyperparameters.items())
        ),
        results=text.table(text.RESULT_COLUMNS, map(text.result_row, evaluations)),
        evaluations=[{"command": redact_text(item.command), "with": text.circumstances(item)} for item in evaluations],
        paper=paper,
        figures=paper and text.paper_table(paper),
    )


def _metadata(
    model: ModelSummary,
    source: str,
    training: TrainingCardData | None,
    evaluations: Sequence[EvaluationResult],
    license: str | None,
) -> ModelCardData:
    results = [result for evaluation in evaluations for result in eval_results(evaluation)]
    tags = ["image-classification", "hf_tokenmixup", *(["tokenmixup"] if model.uses_tokenmixup else []), model.family]
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
    """The same facts, of those that tell of one machine what others may know."""
    given = training.hyperparameters.items()
    return dataclasses.replace(
        training,
        base_model=as_hub_repo_id(training.base_model),
        dataset=training.dataset and public_dataset(training.dataset),
        recipe=training.recipe and PureWindowsPath(training.recipe).name.removesuffix(".yaml"),
        command=training.command and redact_text(training.command),
        hyperparameters={name: redact_value(value) for name, value in given if not is_secret_name(name)},
        curves=training.curves and PureWindowsPath(training.curves).name,
    )


def _run(training: TrainingCardData) -> list[tuple[str, str]]:
    dataset = text.on_hub(training.dataset, "datasets/")
    if dataset and training.dataset_config:
        dataset += f" ({training.dataset_config})"
    last_part = ", of the last part alone: the training was resumed" if training.resumed else ""
    rows = {
        "dataset": dataset,
        "split": training.train_split,
        "starting from": text.on_hub(training.base_model),
        "recipe": training.recipe and f"`{training.recipe}`",
        "epochs": training.epochs is not None and f"{training.epochs:g}",
        "hardware": training.hardware,
        "duration": training.seconds is not None and text.duration(training.seconds) + last_part,
        "versions": text.versions(training.versions),
    }
    return [(name, value) for name, value in rows.items() if value]


def _title(source: str) -> str:
    # The working directory has a name too.
    return PureWindowsPath(source).name or Path(source).resolve().name
