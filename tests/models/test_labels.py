"""Validation of labels, and their conversion to class distributions."""

import pytest
import torch
from torch.nn import functional as F

from hf_tokenmixup.models.labels import to_soft_targets, validate_label_shape, validate_label_values

SOFT = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]])


def test_to_soft_targets_class_indices_match_one_hot():
    labels = torch.tensor([2, 0, 1])
    expected = F.one_hot(labels, 4).float()
    assert torch.equal(to_soft_targets(labels, 4), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_to_soft_targets_distributions_are_copied_in_float32_or_wider(dtype):
    labels = SOFT.to(dtype)
    targets = to_soft_targets(labels, 3)
    assert targets.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(targets, SOFT.to(targets.dtype))
    targets.zero_()
    assert torch.equal(labels, SOFT.to(dtype))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), r"between 0 and 2 .* got 3 for image 1"),
        (torch.tensor([-1, 0]), r"between 0 and 2 .* got -1 for image 0"),
        (torch.tensor([[0.5, 0.4, 0.0], [1.0, 0.0, 0.0]]), "Row 0 has sum 0.9"),
        (torch.tensor([[1.0, 0.0, 0.0], [1.5, -0.5, 0.0]]), "Row 1 has sum 1 and minimum -0.5"),
        (torch.tensor([[float("nan"), 0.5, 0.5]]), "Row 0 has sum nan"),
    ],
)
def test_validate_label_values_invalid_values_raise_with_position(labels, message):
    with pytest.raises(ValueError, match=message):
        validate_label_values(labels, 3)
    with pytest.raises(ValueError, match=message):
        to_soft_targets(labels, 3)


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.bool)],
    ids=["other batch size", "integers of two dimensions", "bool"],
)
def test_validate_label_shape_invalid_indices_raise(labels):
    with pytest.raises(ValueError, match=r"class indices, integers of shape \(B,\) = \(2,\)"):
        validate_label_shape(labels, 2, 3)


def test_validate_label_shape_distributions_of_other_classes_raise():
    with pytest.raises(ValueError, match=r"\(B, C\) = \(2, 4\), got \(2, 3\)"):
        validate_label_shape(SOFT, 2, 4)


# Tensors on the meta device have no values, so reading one raises.
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.tensor([0, 2], dtype=torch.uint8), SOFT, SOFT.half()])
def test_validate_label_shape_valid_labels_are_accepted_without_reading_values(labels, device):
    assert validate_label_shape(labels.to(device), 2, 3) is None
