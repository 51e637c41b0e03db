"""Accuracy, loss and throughput of a classifier on a split."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from ..data import ImageClassificationData, ImageClassificationIterableDataset, collate
from ..metrics import calibration_error
from ..saliency import eval_mode
from ..utils.tables import format_text_table
from .corruptions import CorruptedTransform, CorruptionResult, with_transform


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Result of an evaluation, and what is needed to reproduce it.

    Attributes:
        model: Name on the Hub, or a folder.
        model_revision: See `resolve_model_revision`.
        num_parameters: Number of parameters.
        macs: Multiply-accumulate operations per image.
        dataset: Name on the Hub, or a folder.
        dataset_config: Configuration of the dataset.
        dataset_revision: Commit of the dataset on the Hub.
        dataset_fingerprint: Fingerprint of the loaded data.
        split: Name of the split.
        num_images: Number of images.
        top1: Top-1 accuracy in [0, 1].
        top5: Top-5 accuracy in [0, 1]. None for a model of at most five classes, for which it is 1.
        loss: Mean cross-entropy in nats.
        calibration_error: Expected calibration error in [0, 1], see `hf_tokenmixup.metrics.calibration_error`; None if
            it was not computed.
        images_per_second: Throughput of all processes together, including data loading.
        batch_size: Images per batch and process.
        num_processes: Number of processes.
        hardware: Devices, such as `2 x NVIDIA H100 80GB HBM3`.
        dtype: Precision of the forward pass, such as `bf16`.
        command: Command line that reproduces the result.
        versions: Versions of the libraries by name.
        corruptions: Results on corrupted images, if there are any.
        corruption_mean: Their means.
    """

    model: str
    model_revision: str | None
    num_parameters: int
    macs: int | None
    dataset: str
    dataset_config: str | None
    dataset_revision: str | None
    dataset_fingerprint: str | None
    split: str
    num_images: int
    top1: float
    top5: float | None
    loss: float
    images_per_second: float
    batch_size: int
    num_processes: int
    hardware: str
    dtype: str
    command: str
    calibration_error: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    corruptions: tuple[CorruptionResult, ...] = ()
    corruption_mean: CorruptionResult | None = None

    def table(self) -> str:
        """Format the result for a terminal: one value per line, then one line per corruption and their mean."""
        dataset = " ".join(filter(None, (self.dataset, self.dataset_config)))
        processes = f", {self.num_processes} processes" if self.num_processes > 1 else ""
        rows = {
            "model": self.model + _format_version(self.model_revision),
            "dataset": dataset + _format_version(self.dataset_revision or self.dataset_fingerprint),
            "split": f"{self.split}, {self.num_images:,} images",
            "top-1": f"{self.top1:.2%}",
            "top-5": None if self.top5 is None else f"{self.top5:.2%}",
            "loss": f"{self.loss:.4f}",
            "ECE": "unknown" if self.calibration_error is None else f"{self.calibration_error:.4f}",
            "images/s": f"{self.images_per_second:,.1f}, batches of {self.batch_size}{processes}",
            "parameters": f"{self.num_parameters:,}",
            "MACs/image": "unknown" if self.macs is None else f"{self.macs:,}",
            "hardware": f"{self.hardware}, {self.dtype}",
        }
        lines = [f"{name:10}  {value}" for name, value in rows.items() if value is not None]
        if self.corruption_mean is not None:
            header = [f"severity {self.corruption_mean.severity}", "top-1", "loss", "ECE"]
            cells = [
                [result.name, f"{result.top1:.2%}", f"{result.loss:.4f}", f"{result.calibration_error:.4f}"]
                for result in (*self.corruptions, self.corruption_mean)
            ]
            lines += ["", format_text_table([header, *cells])]
        return "\n".join(lines)


@dataclass(frozen=True)
class MetricSums:
    """Sums over images, and the images' confidences.

    Attributes:
        num_images: Number of images.
        top1: Images whose label has the highest logit.
        top5: Images whose label is among the five highest logits.
        loss: Sum of the cross-entropies in nats.
        num_nonfinite: Images whose loss is infinite or NaN.
        seconds: Time of the slowest process.
        confidences: (N,) probabilities of the best class, on the CPU.
        correct: (N,) whether the best class is the label.
    """

    num_images: int = 0
    top1: int = 0
    top5: int = 0
    loss: float = 0.0
    num_nonfinite: int = 0
    seconds: float = 0.0
    confidences: torch.Tensor = field(default_factory=lambda: torch.empty(0), compare=False)
    correct: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool), compare=False)

    def calibration_error(self) -> float:
        """Return the expected calibration error, see `hf_tokenmixup.metrics.calibration_error`."""
        return calibration_error(self.confidences, self.correct)


def evaluate_classifier(
    model: PreTrainedModel,
    data: ImageClassificationData | ImageClassificationIterableDataset,
    *,
    batch_size: int,
    num_workers: int = 0,
    dtype: torch.dtype = torch.float32,
    state: PartialState | None = None,
    progress: bool = False,
) -> MetricSums:
    """Evaluate a classifier on every image of a split exactly once, in evaluation mode on the model's device.

    With several processes, process r of n reads images r, r + n, r + 2n, ...: no image is read twice or skipped, and
    no batch is padded. All processes return the same. An iterable dataset distributes its shards itself.

    Args:
        model: An image classifier.
        data: The split.
        batch_size: Images per batch and process. The last batch may be smaller.
        num_workers: Data loading processes per process; 0 loads in the process itself.
        dtype: float32, or a half precision for autocast. The weights keep their dtype.
        state: State of accelerate's processes. None: this process reads all images.
        progress: Show a progress bar.

    Returns:
        The sums. Of classes with equal logits, the lower index ranks first. With fewer than five classes, every image
        counts for top-5.

    Raises:
        ValueError: The split is empty, batch_size is below 1, num_workers is negative, a label has no class in the
            model, or the loss of an image is not finite.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"batch_size must be at least 1 and num_workers at least 0, got {batch_size} and {num_workers}."
        )
    rank, world = (state.process_index, state.num_processes) if state is not None else (0, 1)
    if isinstance(data, ImageClassificationIterableDataset):
        shard = data.shard(rank, world, batch_size)
        num_workers = min(num_workers, shard.num_shards)
    else:
        shard = Subset(data, range(rank, len(data), world))
    loader = DataLoader(
        shard,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=model.device.type == "cuda",
    )
    if state is not None:
        state.wait_for_everyone()
    start = time.perf_counter()
    with eval_mode(model), torch.inference_mode():
        batches = [
            _sum_batch(model, batch, dtype) for batch in tqdm(loader, unit="batch", disable=None if progress else True)
        ]
    sums = _total([*batches, MetricSums(seconds=time.perf_counter() - start)])
    if world > 1:
        sums = _total(gather_object([sums]))
    if sums.num_images == 0:
        raise ValueError("The split is empty: there are no images to evaluate on.")
    if sums.num_nonfinite:
        raise ValueError(
            f"The loss of {sums.num_nonfinite} of {sums.num_images} images is not finite in "
            f"{str(dtype).removeprefix('torch.')}. Use float32, and check the weights for infinities and NaN."
        )
    return sums


def evaluate_corruptions(
    model: PreTrainedModel,
    data: ImageClassificationData | ImageClassificationIterableDataset,
    image_processor: Any,
    names: Sequence[str],
    *,
    severity: int = 3,
    seed: int = 42,
    **options: Any,
) -> tuple[CorruptionResult, ...]:
    """Evaluate a classifier on a split with each of several corruptions.

    Args:
        model: An image classifier.
        data: The split; its transform is replaced.
        image_processor: Image processor of the model.
        names: Names of the corruptions, see `hf_tokenmixup.evaluation.corruptions.CORRUPTIONS`.
        severity: Severity, 1 to 5.
        seed: Seed of the corruptions, see `CorruptedTransform`.
        options: Options of `evaluate_classifier`.

    Returns:
        One result per corruption, in order.

    Raises:
        ValueError: As `evaluate_classifier`, or a name or the severity does not exist.
    """
    results = []
    for name in names:
        corrupted = with_transform(data, CorruptedTransform(image_processor, name, severity, seed))
        sums = evaluate_classifier(model, corrupted, **options)
        top1, loss = sums.top1 / sums.num_images, sums.loss / sums.num_images
        results.append(CorruptionResult(name, severity, top1, loss, sums.calibration_error()))
    return tuple(results)


def _sum_batch(model: PreTrainedModel, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> MetricSums:
    device, labels = model.device, batch["labels"]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(pixel_values=batch["pixel_values"].to(device, model.dtype, non_blocking=True)).logits
    if labels.max() >= logits.shape[-1]:
        raise ValueError(
            f"The model has {logits.shape[-1]} classes, but an image has the label {labels.max()}. Pass the label_map "
            "that build_label_mapping returns to the dataset."
        )
    labels, logits = labels.to(device), logits.float()
    ranks, losses = rank_of_label(logits, labels), cross_entropy(logits, labels, reduction="none")
    return MetricSums(
        num_images=len(labels),
        top1=int((ranks < 1).sum()),
        top5=int((ranks < 5).sum()),
        loss=losses.cpu().double().sum().item(),
        num_nonfinite=int((~losses.isfinite()).sum()),
        confidences=logits.softmax(1).amax(1).cpu(),
        correct=(ranks < 1).cpu(),
    )


def _total(parts: Sequence[MetricSums]) -> MetricSums:
    columns = {item.name: [getattr(part, item.name) for part in parts] for item in fields(MetricSums)}
    images = {name: torch.cat(columns.pop(name)) for name in ("confidences", "correct")}
    seconds = max(columns.pop("seconds"))
    return MetricSums(**{name: sum(values) for name, values in columns.items()}, **images, seconds=seconds)


def rank_of_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Rank of the label among the logits of an image, 0 for the highest.

    Of equal logits, which are frequent in half precision, the lower class index ranks first. `topk` returns them in
    any order.

    Args:
        logits: (B, C).
        labels: (B,) int64.

    Returns:
        (B,) int64.
    """
    label_logits = logits.gather(1, labels[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > label_logits) | ((logits == label_logits) & lower)).sum(1)


def resolve_model_revision(name_or_path: str, **hub_options) -> str | None:
    """Identify the weights of a model by its commit on the Hub or by a hash of its weight files.

    Args:
        name_or_path: Name on the Hub, or a folder.
        hub_options: `revision` (branch, tag or commit), `token`, `cache_dir`.

    Returns:
        The commit; for a folder, `sha256:` and the first 16 digits of the SHA-256 of the weight files in the order of
        their names. None for a folder without weight files.

    Raises:
        OSError: The Hub has no such model, or cannot be reached.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        # Newer versions of transformers do not store the commit in the configuration.
        return extract_commit_hash(cached_file(name_or_path, CONFIG_NAME, **hub_options), None)
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for file in files:
        for chunk in _read_chunks(file):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()[:16]}" if files else None


def _format_version(version: str | None) -> str:
    return f" ({version})" if version else ""


def _read_chunks(file: Path, size: int = 2**24) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(size):
            yield chunk
