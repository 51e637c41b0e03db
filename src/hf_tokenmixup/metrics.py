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

_KWARGS_DESCRIPTION = """
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
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("Accuracy needs at least one image, got none.")
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


class ComputeMetrics:
    """Top-1 and top-5 accuracy of an `EvalPrediction` whose predictions come from `top_classes`.

    For the Trainer's `compute_metrics`, with any of its ways to hand predictions over: all at once, as a list of
    batches (`eval_do_concat_batches=False`), or batch after batch (`batch_eval_metrics=True`). The last one adds up
    the batches in the object, so give each trainer its own: `TokenMixupTrainer` does that by itself.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the batches of an evaluation that did not reach its end."""
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, prediction, compute_result: bool | None = None) -> dict[str, float]:
        """Compute the accuracies.

        Args:
            prediction: an `EvalPrediction`: `predictions` (N, k) class indices, best first, or (N, C) logits in
                floating point, and `label_ids` (N,); or lists of such arrays, one for each batch. Of tuples the first
                entry counts.
            compute_result: None: these are all images. False: add a batch. True: add the last batch.

        Returns:
            `top1` and `top5`, between 0 and 1; nothing until the last batch.

        Raises:
            ValueError: there are no images, or not as many labels as predictions.
        """
        batch = (_joined(prediction.predictions), _joined(prediction.label_ids))
        if np.issubdtype(batch[0].dtype, np.floating) and batch[0].ndim == 2:
            batch = (top_classes(torch.from_numpy(batch[0])).numpy(), batch[1])
        if len(batch[0]) != len(batch[1]):
            raise ValueError(
                f"Expected one label for each prediction, got {len(batch[0])} predictions and {len(batch[1])} labels."
            )
        if compute_result is None:
            return self._result([batch])
        self._batches.append(batch)
        if not compute_result:
            return {}
        batches = self._batches
        self.reset()
        return self._result(batches)

    @staticmethod
    def _result(batches: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        classes, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return TopKAccuracy(keep_in_memory=True).compute(predictions=classes, references=labels)


compute_metrics = ComputeMetrics()


def _joined(values) -> np.ndarray:
    """The array that a tensor, an array, a tuple of outputs or a list of batches stands for."""
    if isinstance(values, tuple):
        values = values[0]
    if isinstance(values, list) and values and not isinstance(values[0], (int, float, list)):
        return np.concatenate([_joined(batch) for batch in values])
    if isinstance(values, torch.Tensor):
        values = values.cpu()
    return np.asarray(values)
