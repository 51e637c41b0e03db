"""Tables and phrases of a model card, in Markdown."""

from collections.abc import Iterable, Sequence

from ..evaluation.evaluate import EvaluationResult
from ..paper_results import PaperTable
from ..utils.environment import is_local_dataset, public_dataset
from .card_redaction import as_hub_repo_id
from .model_summary import ModelSummary

RESULT_COLUMNS = ("dataset", "split", "images", "top-1", "top-5", "cross-entropy")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; nothing where there are no rows."""
    rows = [[_cell(value) for value in row] for row in rows]
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def on_hub(name: str | None, kind: str = "") -> str | None:
    """A link for a name of the Hub (of `kind` `datasets/`), the name itself for another."""
    if not name:
        return None
    if is_local_dataset(name):
        folder, local, what = name.partition(" (local ")
        return f"`{folder}`{local}{what}" if local else name
    return f"[`{name}`](https://huggingface.co/{kind}{name})" if as_hub_repo_id(name) else f"`{name}`"


def layers(numbers: Sequence[int]) -> str:
    """`layer 3`, `layers 1, 2 and 5`."""
    if not numbers:
        return ""
    *most, last = map(str, numbers)
    return f"layers {', '.join(most)} and {last}" if most else f"layer {last}"


def millions(count: int) -> str:
    """`86.57 M`."""
    return f"{count / 1e6:.2f} M"


def duration(seconds: float) -> str:
    """In whole hours and minutes, or minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def versions(libraries: dict[str, str]) -> str:
    """`torch 2.6.0, transformers 5.9.0`."""
    return ", ".join(f"{name} {version}" for name, version in libraries.items())


def model_table(model: ModelSummary, macs: int | None) -> str:
    """What the configuration tells of a model's size and classes."""
    rows = [("parameters", f"{model.num_parameters:,}")]
    rows += [("multiply-accumulate operations for an image", f"{macs / 1e9:.2f} G")] if macs else []
    rows += [*model.sizes, ("classes", model.num_labels)]
    rows += [("their names", ", ".join(model.class_names))] if model.class_names else []
    return table(("model", model.name), rows)


def result_row(evaluation: EvaluationResult) -> tuple[str, ...]:
    """The figures of an evaluation, under :data:`RESULT_COLUMNS`."""
    dataset = public_dataset(evaluation.dataset)
    dataset = on_hub(dataset) if is_local_dataset(dataset) else f"`{dataset}`"
    dataset += f" ({evaluation.dataset_config})" if evaluation.dataset_config else ""
    accuracies = (f"{100 * share:.2f}" for share in (evaluation.top1, evaluation.top5))
    return dataset, evaluation.split, f"{evaluation.num_images:,}", *accuracies, f"{evaluation.loss:.4f}"


def circumstances(evaluation: EvaluationResult) -> str:
    """What an evaluation was made with, in sentences."""
    batches = f"batches of {evaluation.batch_size}"
    batches += f" in each of {evaluation.num_processes} processes" if evaluation.num_processes > 1 else ""
    parts = [f"{evaluation.hardware}, {evaluation.dtype}, {batches}."]
    parts += [f"{versions(evaluation.versions)}."] if evaluation.versions else []
    parts += [f"Revision of the model: `{evaluation.model_revision}`."] if evaluation.model_revision else []
    parts += [f"Revision of the dataset: `{evaluation.dataset_revision}`."] if evaluation.dataset_revision else []
    fingerprint = evaluation.dataset_fingerprint
    parts += [f"Fingerprint of the data: `{fingerprint}`."] if fingerprint else []
    return " ".join(parts)


def paper_table(paper: PaperTable) -> str:
    """The paper's figures, in percent."""
    top5 = [row.top5 for row in paper.rows.values() if row.top5]
    header = ("the paper's system", "parameters in training", "MACs", "top-1", *(["top-5"] if top5 else []))
    return table(
        header,
        (
            (row.method, row.parameters, paper.macs, row.top1, *([row.top5] if top5 else []))
            for row in paper.rows.values()
        ),
    )


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
