"""How well a classifier does on a split, and what it costs."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

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
from ..saliency import eval_mode


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """One measurement, with all that repeats it.

    Shares (`top1`, `top5`) lie in [0, 1]; `loss` is the mean cross-entropy in nats; `macs` are multiply-accumulate
    operations of one image's forward pass; `images_per_second` counts loading and is that of all processes together.
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
    top5: float
    loss: float
    images_per_second: float
    batch_size: int
    num_processes: int
    hardware: str
    dtype: str
    command: str
    versions: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """The results and what they were measured on, one a line."""
        dataset = " ".join(filter(None, (self.dataset, self.dataset_config)))
        processes = f", {self.num_processes} processes" if self.num_processes > 1 else ""
        rows = {
            "model": self.model + _format_version(self.model_revision),
            "dataset": dataset + _format_version(self.dataset_revision or self.dataset_fingerprint),
            "split": f"{self.split}, {self.num_images:,} images",
            "top-1": f"{self.top1:.2%}",
            "top-5": f"{self.top5:.2%}",
            "loss": f"{self.loss:.4f}",
            "images/s": f"{self.images_per_second:,.1f}, batches of {self.batch_size}{processes}",
            "parameters": f"{self.num_parameters:,}",
            "MACs/image": "unknown" if self.macs is None else f"{self.macs:,}",
            "hardware": f"{self.hardware}, {self.dtype}",
        }
        return "\n".join(f"{name:10}  {value}" for name, value in rows.items())


@dataclass(frozen=True)
class MetricSums:
    """Sums over images.

    `top1` and `top5` of them have their label first and among the first five, `not_finite` have a loss that is
    infinite or NaN; `loss` is the sum of their cross-entropies in nats, `seconds` the time of the slowest process.
    """

    num_images: int = 0
    top1: int = 0
    top5: int = 0
    loss: float = 0.0
    not_finite: int = 0
    seconds: float = 0.0


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
    """Classify every image of a split exactly once, in evaluation mode, on the device where the model lies.

    With several processes (`state`), process r of n reads images r, r + n, r + 2n, ...: none is read twice, none is
    left out, and no batch is padded. All of them return the same. A stream is shared as
    `ImageClassificationIterableDataset` says.

    Args:
        batch_size: of each process; the last batch may be smaller.
        num_workers: processes that load images, for each process here; 0: none.
        dtype: float32, or a half precision in which autocast computes what it may; the weights stay as they are.
        state: accelerate's; None: this process reads all images.
        progress: show a bar, where there is a terminal.

    Returns:
        The sums. Where logits are equal, the class of the lower number comes first. With fewer than five classes every
        image counts for top-5.

    Raises:
        ValueError: no images, a batch size below 1, a label that the model has no class for, or logits that are not
            finite.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"Expected a batch_size of at least 1 and no negative num_workers, got {batch_size} and {num_workers}."
        )
    rank, world = (state.process_index, state.num_processes) if state is not None else (0, 1)
    if isinstance(data, ImageClassificationIterableDataset):
        share = data.shard(rank, world, batch_size)
        num_workers = min(num_workers, share.num_shards)
    else:
        share = Subset(data, range(rank, len(data), world))
    loader = DataLoader(
        share,
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
            _count_batch(model, batch, dtype)
            for batch in tqdm(loader, unit="batch", disable=None if progress else True)
        ]
    counts = _total([*batches, MetricSums(seconds=time.perf_counter() - start)])
    if world > 1:
        counts = _total(gather_object([counts]))
    if counts.num_images == 0:
        raise ValueError("There is no image to evaluate on: the split is empty.")
    if counts.not_finite:
        raise ValueError(
            f"The loss of {counts.not_finite} of {counts.num_images} images is infinite or not a number with "
            f"{str(dtype).removeprefix('torch.')}: try float32, and look into the weights if that does not help."
        )
    return counts


def _count_batch(model: PreTrainedModel, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> MetricSums:
    device, labels = model.device, batch["labels"]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(pixel_values=batch["pixel_values"].to(device, model.dtype, non_blocking=True)).logits
    if labels.max() >= logits.shape[-1]:
        raise ValueError(
            f"The model has {logits.shape[-1]} classes, and an image the label {labels.max()}: give the data the "
            "label_map that build_label_mapping returns."
        )
    labels, logits = labels.to(device), logits.float()
    ranks, losses = rank_of_label(logits, labels), cross_entropy(logits, labels, reduction="none")
    return MetricSums(
        num_images=len(labels),
        top1=int((ranks < 1).sum()),
        top5=int((ranks < 5).sum()),
        loss=losses.cpu().double().sum().item(),
        not_finite=int((~losses.isfinite()).sum()),
    )


def _total(parts: Sequence[MetricSums]) -> MetricSums:
    sums = {item.name: sum(getattr(part, item.name) for part in parts) for item in fields(MetricSums)}
    return MetricSums(**sums | {"seconds": max(part.seconds for part in parts)})


def rank_of_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many classes come before the label: (B, C) logits, (B,) labels -> (B,) int64.

    Those of higher logit, and those of equal logit and lower number: half precision makes many equal, and `topk` puts
    these in no particular order.
    """
    own = logits.gather(1, labels[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & lower)).sum(1)


def model_revision(name_or_path: str, **hub_options) -> str | None:
    """What tells a model's weights from others: its commit on the Hub, or the SHA-256 of its folder's weight files.

    The latter reads `sha256:` and the first 16 hexadecimal digits, over the files in the order of their names; None if
    there are none.

    Args:
        hub_options: `revision` (branch, tag or commit), `token`, `cache_dir`.

    Raises:
        OSError: there is no such model on the Hub, or the Hub cannot be reached.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        # The configuration's own note of its commit is gone from newer versions of transformers.
        return extract_commit_hash(cached_file(name_or_path, CONFIG_NAME, **hub_options), None)
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for file in files:
        for part in _read_chunks(file):
            digest.update(part)
    return f"sha256:{digest.hexdigest()[:16]}" if files else None


def _format_version(version: str | None) -> str:
    return f" ({version})" if version else ""


def _read_chunks(file: Path, size: int = 2**24) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while part := stream.read(size):
            yield part
