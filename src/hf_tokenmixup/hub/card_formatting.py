"""Markdown tables and phrases of a model card."""

from collections.abc import Iterable, Sequence

from ..evaluation.evaluate import EvaluationResult
from ..paper_results import PaperTable
from ..utils.environment import is_local_dataset, public_dataset
from .card_redaction import as_hub_repo_id
from .model_summary import ModelSummary


# transformers.modelcard.make_markdown_table rounds numbers, needs distinct column names and does not escape `|`.
def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table in Markdown. Empty without rows."""
    rows = [[_format_cell(value) for value in row] for row in rows]
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hub_link(name: str | None, repo_type: str = "") -> str | None:
    """Format the name of a model or dataset, as a link if it is on the Hub.

    Args:
        name: Name on the Hub, name of a folder, or None.
        repo_type: Prefix of the URL, `datasets/` for datasets.
    """
    if not name:
        return None
    if is_local_dataset(name):
        folder, separator, description = name.partition(" (local ")
        return f"`{folder}`{separator}{description}" if separator else name
    return f"[`{name}`](https://huggingface.co/{repo_type}{name})" if as_hub_repo_id(name) else f"`{name}`"


def format_layers(indices: Sequence[int]) -> str:
    """Format layer indices: `layer 3`, `layers 1, 2 and 5`."""
    if not indices:
        return ""
    *first, last = map(str, indices)
    return f"layers {', '.join(first)} and {last}" if first else f"layer {last}"


def format_millions(count: int) -> str:
    """Format a count in millions: `86.57 M`."""
    return f"{count / 1e6:.2f} M"


def format_duration(seconds: float) -> str:
    """Format a duration as `2 h 3 min`, `3 min 20 s` or `20 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def format_versions(versions: dict[str, str]) -> str:
    """Format versions of libraries: `torch 2.6.0, transformers 5.9.0`."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def model_table(model: ModelSummary, macs: int | None) -> str:
    """Format the size of a model as a table.

    Args:
        model: Summary of the model.
        macs: Multiply-accumulate operations per image, if known.
    """
    rows = [("parameters", f"{model.num_parameters:,}")]
    rows += [("multiply-accumulate operations per image", _format_macs(macs))] if macs else []
    rows += [*model.sizes, ("classes", model.num_labels)]
    return markdown_table(("model", model.name), rows)


def join_words(words: Sequence[str]) -> str:
    """Format names on one line: `cat, dog and horse`."""
    words = [_format_cell(word) for word in words]
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def result_table(evaluations: Sequence[EvaluationResult]) -> str:
    """Format the values of evaluations as a table, without a column for top-5 if no evaluation has it."""
    header = ["dataset", "split", "images", "top-1", "top-5", "cross-entropy", "calibration error"]
    columns = [
        column
        for column in zip(header, *map(_result_row, evaluations), strict=True)
        if column[0] != "top-5" or any(column[1:])
    ]
    names, *rows = zip(*columns, strict=True)
    return markdown_table(names, rows)


def _result_row(evaluation: EvaluationResult) -> tuple[str, ...]:
    dataset = public_dataset(evaluation.dataset)
    dataset = hub_link(dataset) if is_local_dataset(dataset) else f"`{dataset}`"
    dataset += f" ({evaluation.dataset_config})" if evaluation.dataset_config else ""
    accuracies = ("" if value is None else f"{100 * value:.2f}" for value in (evaluation.top1, evaluation.top5))
    calibration = "" if evaluation.calibration_error is None else f"{evaluation.calibration_error:.4f}"
    return dataset, evaluation.split, f"{evaluation.num_images:,}", *accuracies, f"{evaluation.loss:.4f}", calibration


def evaluation_setup(evaluation: EvaluationResult) -> str:
    """Describe hardware, precision, batch size, versions and revisions of an evaluation in sentences."""
    batches = f"batches of {evaluation.batch_size}"
    batches += f" in each of {evaluation.num_processes} processes" if evaluation.num_processes > 1 else ""
    parts = [f"{evaluation.hardware}, {evaluation.dtype}, {batches}."]
    parts += [f"{format_versions(evaluation.versions)}."] if evaluation.versions else []
    parts += [f"Model revision: `{evaluation.model_revision}`."] if evaluation.model_revision else []
    parts += [f"Dataset revision: `{evaluation.dataset_revision}`."] if evaluation.dataset_revision else []
    parts += [f"Dataset fingerprint: `{evaluation.dataset_fingerprint}`."] if evaluation.dataset_fingerprint else []
    return " ".join(parts)


def paper_table(paper: PaperTable) -> str:
    """Format the paper's results in percent as a table."""
    header = ["method", "parameters during training", "MACs", "top-1"]
    rows = [[row.method, row.parameters, paper.macs, row.top1] for row in paper.rows.values()]
    if any(row.top5 for row in paper.rows.values()):
        header.append("top-5")
        rows = [[*cells, row.top5] for cells, row in zip(rows, paper.rows.values(), strict=True)]
    return markdown_table(header, rows)


def _format_macs(macs: int) -> str:
    return f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.2f} M"


def _format_cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
