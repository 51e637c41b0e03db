"""Images, labels and other arguments of the forward pass of all model families."""

import logging

import pytest
import torch
from helpers.families import BOTH
from helpers.family_steps import assert_same_step, step


def only(family):
    return pytest.mark.parametrize("build", [family], indirect=True)


# For code that does not depend on the family.
general = pytest.mark.parametrize("build", ["vit", "cct"], indirect=True)


@pytest.mark.parametrize("batch", [1, 5])
def test_forward_odd_batch_size(build, batch, images, labels):
    output = build(**BOTH)(images[:batch], labels=labels[:batch])
    assert output.logits.shape == (batch, 5) and output.loss.isfinite()
    torch.testing.assert_close(output.targets.sum(dim=1), torch.ones(batch))


def test_forward_other_image_sizes(build, labels):
    model = build(**BOTH)
    output = model(torch.randn(6, 3, 30, 25), labels=labels, interpolate_pos_encoding=True)
    assert output.horizontal[0].replaced.shape == (6, 30) and output.loss.isfinite()
    few = build(**{**BOTH, "vertical_kappa": 10})
    with pytest.raises(ValueError, match=r"number of patch tokens \(4\), got 10"):
        few(torch.randn(6, 3, 10, 10), labels=labels, interpolate_pos_encoding=True)


def test_forward_soft_labels_in_both_modes(build, images, labels):
    model = build(**BOTH)
    one_hot = torch.nn.functional.one_hot(labels, 5)
    assert_same_step(step(model, images, labels), step(model, images, one_hot.float()))
    smooth = 0.9 * one_hot + 0.02
    output = model.eval()(images, labels=smooth)
    by_hand = -(smooth * output.logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(output.loss, by_hand)
    off = build()
    torch.testing.assert_close(off(images, labels=smooth).loss, off.eval()(images, labels=smooth).loss)
    assert off.config.problem_type is None and model.config.problem_type is None


def test_forward_num_items_in_batch_divides_loss(build, images, labels):
    model = build(**BOTH)
    mean = model(images, labels=labels).loss
    torch.testing.assert_close(model(images, labels=labels, num_items_in_batch=24).loss, mean / 4)
    torch.testing.assert_close(model(images, labels=labels, num_items_in_batch=torch.tensor(12)).loss, mean / 2)


@general
@pytest.mark.parametrize(
    "wrong, message",
    [
        (torch.tensor([0, 1, 5, 3, 4, 0]), "between 0 and 4 .* got 5 for image 2"),
        (torch.tensor([0, 1, 2, -1, 4, 0]), "got -1 for image 3"),
        (torch.zeros(4, dtype=torch.long), r"shape \(B,\) = \(6,\)"),
        (torch.zeros(6, 4), r"\(6, 5\), got \(6, 4\)"),
        (torch.full((6, 5), 0.3), "Row 0 has sum 1.5"),
        (torch.tensor([[1.2, -0.2, 0, 0, 0]] * 6), "minimum -0.2"),
        (torch.full((6, 5), float("nan")), "Row 0 has sum nan"),
        (torch.zeros(6, dtype=torch.bool), "got torch.bool"),
    ],
)
def test_forward_invalid_labels_raise(build, wrong, message, images):
    with pytest.raises(ValueError, match=message):
        build(**BOTH)(images, labels=wrong)


@only("vit")
def test_forward_attention_mask_raises(build, images, labels):
    mask = torch.ones(6, 17, dtype=torch.long)
    model = build(**BOTH)
    with pytest.raises(ValueError, match="attention_mask is not supported while tokens are mixed"):
        model(images, labels=labels, attention_mask=mask)
    torch.testing.assert_close(model.eval()(images, attention_mask=mask).logits, model(images).logits)


def test_forward_without_labels_warns_once(build, images, caplog):
    model = build(**BOTH)
    logging.Logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_tokenmixup.models.modeling_tokenmixup"):
        first = model(images)
        model(images)
    torch.testing.assert_close(first.logits, model.eval()(images).logits)
    assert sum("No tokens are mixed" in record.message for record in caplog.records) == 1


def test_forward_one_patch_token(build, images, labels):
    build(patch_size=20)  # fewer than the default kappa, which nothing uses
    model = build(
        patch_size=20,
        horizontal_layers=[1],
        horizontal_tau=None,
        horizontal_rho=0.0,
        vertical_layers=[2],
        vertical_kappa=1,
    )
    output = model(images, labels=labels)
    assert output.horizontal[0].replaced.shape == (6, 1) and output.mixing_metrics["vertical_tokens"] == 12
    # Without a CLS token, a single token receives all attention in every image: there is nothing to gain.
    assert bool(output.mixing_metrics["replaced_tokens"] > 0) == bool(model.config.num_prefix_tokens)


def test_forward_return_dict_false(build, images, labels):
    model = build(**BOTH)
    output = model(images, labels=labels)
    as_tuple = model(images, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
