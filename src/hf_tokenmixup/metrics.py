"""Top-1 and top-5 accuracy as an `evaluate.Metric`, which works without a network.

The file stands alone: `evaluate.load("<path to this file>")` loads it by itself, which takes one import per line and
nothing of this package. It is fed with the five best classes of each image, reduced on the device by `top_classes`:
fifty thousand images of a thousand classes are then a quarter of a million numbers instead of fifty million.
"""

import datasets
import evaluate
import numpy as np
import torch

_DESCRIPTION = """\
Top-1 and top-5 accuracy: the share of images whose label is the best class, or among the five best classes."""

_INPUTS = """
Args:
    predictions: for every image the indices of its best classes, best first: (N, k) integers. Top-5 accuracy uses the
        first five of them, or all where there are fewer (a task of three classes, say).
    references: the label of every image: (N,) integers.
Returns:
    top1: share of images whose label is the first class, between 0 and 1.
    top5: share of images whose label is among the first five classes, between 0 and 1.
"""


class TopKAccuracy(evaluate.Metric):
    """`compute(predictions=(N, k) class indices, references=(N,) labels) -> {"top1": float, "top5": float}`.

    Both are shares between 0 and 1. `add_batch` collects batches; `keep_in_memory=True` keeps them off the disk.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        if len({len(row) for row in predictions}) != 1 or len(predictions[0]) == 0:
            raise ValueError(
                "predictions must hold the same number of class indices for every image, one at least, best first; "
                f"got {len(predictions)} images with {sorted({len(row) for row in predictions})} classes each."
            )
        hits = np.asarray(predictions)[:, :5] == np.asarray(references)[:, None]
        return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(axis=1).mean())}


def top_classes(logits, labels=None, k: int = 5) -> torch.Tensor:
    """Indices of the k best classes per image, best first: (B, C) logits -> (B, min(k, C)) int64, on their device.

    For the Trainer's `preprocess_logits_for_metrics`, which passes `labels` (unused) and, for models with further
    outputs, a tuple whose first entry are the logits.
    """
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    return logits.topk(min(k, logits.shape[-1]), dim=-1).indices


def compute_metrics(prediction) -> dict[str, float]:
    """Top-1 and top-5 accuracy of an `EvalPrediction` whose predictions come from `top_classes`."""
    classes = prediction.predictions
    classes = classes[0] if isinstance(classes, (tuple, list)) else classes
    metric = TopKAccuracy(keep_in_memory=True)
    return metric.compute(predictions=np.asarray(classes), references=np.asarray(prediction.label_ids))
