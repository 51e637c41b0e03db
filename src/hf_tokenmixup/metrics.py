"""Top-1 and top-5 accuracy as an `evaluate.Metric` that needs no network connection, and the calibration error.

`evaluate.load("<path to this file>")` loads this file without the package, so it imports nothing of the package. The
metric reads the five best classes of each image, which `top_classes` selects on the device. For 50,000 images of 1,000
classes these are 250,000 numbers instead of 50 million.
"""

import datasets
import evaluate
import numpy as np
import torch

# As in Guo et al., On Calibration of Modern Neural Networks (ICML 2017).
NUM_CALIBRATION_BINS = 15

_DESCRIPTION = """\
Top-1 and top-5 accuracy: fraction of images whose label is the best class, or one of the five best classes."""

_KWARGS_DESCRIPTION = """
Args:
    predictions: (N, k) integers, the indices of the best classes of each image, the best class first. Top-5 accuracy
        uses the first five classes, or all classes if there are fewer.
    references: (N,) integers, the label of each image.
Returns:
    top1: fraction of images whose label is the first class, between 0 and 1.
    top5: fraction of images whose label is among the first five classes, between 0 and 1.
"""


class TopKAccuracy(evaluate.Metric):
    """Top-1 and top-5 accuracy, between 0 and 1.

    `compute` takes `predictions`, class indices (N, k) with the best class first, and `references`, labels (N,).
    `add_batch` collects batches. With `keep_in_memory=True` nothing is written to disk.

    Example:
        >>> metric = TopKAccuracy(keep_in_memory=True)
        >>> metric.compute(predictions=[[2, 0], [1, 2]], references=[2, 2])
        {'top1': 0.5, 'top5': 1.0}
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
            raise ValueError("Accuracy needs at least one image, got 0.")
        if len({len(row) for row in predictions}) != 1 or len(predictions[0]) == 0:
            raise ValueError(
                "predictions must have the same number of class indices for each image, at least 1, got "
                f"{len(predictions)} images with {sorted({len(row) for row in predictions})} classes each."
            )
        hits = np.asarray(predictions)[:, :5] == np.asarray(references)[:, None]
        return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(axis=1).mean())}


def top_classes(logits, labels=None, k: int = 5) -> torch.Tensor:
    """Indices of the k best classes of each image, for `Trainer`'s `preprocess_logits_for_metrics`.

    Args:
        logits: (B, C) class scores, or a tuple of outputs with the class scores first.
        labels: unused; `Trainer` passes them.
        k: number of classes.

    Returns:
        (B, min(k, C)) int64 class indices on the device of the logits, the best class first.

    Example:
        >>> top_classes(torch.tensor([[0.1, 0.7, 0.2]]), k=2)
        tensor([[1, 2]])
    """
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    return logits.topk(min(k, logits.shape[-1]), dim=-1).indices


def top_predictions(logits, labels=None, k: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """As `top_classes`, with the confidence, from which `ComputeMetrics` computes the calibration error.

    Args:
        logits: (B, C) class scores, or a tuple of outputs with the class scores first.
        labels: unused; `Trainer` passes them.
        k: number of classes.

    Returns:
        (B, min(k, C)) int64 class indices, the best class first, and (B,) float32 probabilities of the best class, on
        the device of the logits.

    Example:
        >>> top_predictions(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), k=1)[1]
        tensor([0.2500])
    """
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    return top_classes(logits, k=k), logits.float().softmax(-1).amax(-1)


def calibration_error(confidences: torch.Tensor, correct: torch.Tensor) -> float:
    """Expected calibration error: mean over images of |accuracy - mean confidence| of the image's bin.

    The 15 bins have equal width between 0 and 1.

    Args:
        confidences: (N,) probabilities of the best class.
        correct: (N,) whether the best class is the label, bool or 0 and 1.

    Returns:
        The error, between 0 and 1.

    Example:
        >>> calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([True, False]))  # |0.5 - 0.75|
        0.25
    """
    # The import takes seconds.
    from torchmetrics.functional.classification import binary_calibration_error

    # In float64 the order of the images does not change the sums visibly.
    error = binary_calibration_error(confidences.double(), correct.long(), n_bins=NUM_CALIBRATION_BINS, norm="l1")
    return error.item()


class ComputeMetrics:
    """Top-1 and top-5 accuracy and calibration error for `Trainer`'s `compute_metrics`.

    `Trainer` passes all predictions at once, as a list of batches (`eval_do_concat_batches=False`), or batch by batch
    (`batch_eval_metrics=True`). In the last case the object stores the batches, so each trainer needs its own object.
    `TokenMixupTrainer` creates one.

    Example:
        >>> from transformers import EvalPrediction
        >>> ComputeMetrics()(EvalPrediction(predictions=np.array([[2, 0], [1, 2]]), label_ids=np.array([2, 2])))
        {'top1': 0.5, 'top5': 1.0}
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Discard the batches of an incomplete evaluation."""
        self._batches: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []

    def __call__(self, prediction, compute_result: bool | None = None) -> dict[str, float]:
        """Compute the metrics.

        Args:
            prediction: an `EvalPrediction`. `predictions` are class indices (N, k) with the best class first, or
                logits (N, C) in floating point; `label_ids` are labels (N,). Both may be lists of arrays, one per
                batch. The first entry of a tuple is used, and the second one if it has the confidences (N,), as
                `top_predictions` returns them.
            compute_result: None for all images at once, False for a batch, True for the last batch.

        Returns:
            `top1` and `top5`, and with confidences `calibration_error`, between 0 and 1; an empty dictionary before
            the last batch.

        Raises:
            ValueError: if there are no images, or the numbers of labels and predictions differ.
        """
        classes, labels = _to_array(prediction.predictions), _to_array(prediction.label_ids)
        if np.issubdtype(classes.dtype, np.floating) and classes.ndim == 2:
            classes = top_classes(torch.from_numpy(classes)).numpy()
        if len(classes) != len(labels):
            raise ValueError(
                f"Expected one label per prediction, got {len(classes)} predictions and {len(labels)} labels."
            )
        batch = (classes, labels, _get_confidences(prediction.predictions))
        if compute_result is None:
            return self._compute([batch])
        self._batches.append(batch)
        if not compute_result:
            return {}
        batches = self._batches
        self.reset()
        return self._compute(batches)

    @staticmethod
    def _compute(batches: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> dict[str, float]:
        classes, labels = (np.concatenate([batch[index] for batch in batches]) for index in (0, 1))
        metrics = TopKAccuracy(keep_in_memory=True).compute(predictions=classes, references=labels)
        confidences = [batch[2] for batch in batches if batch[2] is not None]
        if len(confidences) == len(batches):
            correct = torch.from_numpy(classes[:, 0] == labels)
            metrics["calibration_error"] = calibration_error(torch.from_numpy(np.concatenate(confidences)), correct)
        return metrics


compute_metrics = ComputeMetrics()


def _to_array(values) -> np.ndarray:
    """Convert a tensor, an array, a tuple of outputs or a list of batches to one array."""
    if isinstance(values, tuple):
        values = values[0]
    if isinstance(values, list) and values and not isinstance(values[0], (int, float, list)):
        return np.concatenate([_to_array(batch) for batch in values])
    if isinstance(values, torch.Tensor):
        values = values.cpu()
    return np.asarray(values)


def _get_confidences(predictions) -> np.ndarray | None:
    """Return the confidences (N,), the second entry of `top_predictions`; None if there are none."""
    if isinstance(predictions, list):
        parts = [part for part in map(_get_confidences, predictions) if part is not None]
        return np.concatenate(parts) if parts and len(parts) == len(predictions) else None
    if not isinstance(predictions, tuple) or len(predictions) < 2:
        return None
    values = predictions[1].cpu().numpy() if isinstance(predictions[1], torch.Tensor) else predictions[1]
    is_confidence = isinstance(values, np.ndarray) and values.ndim == 1 and np.issubdtype(values.dtype, np.floating)
    return values if is_confidence else None
