"""Warnings about settings that do not act, and the sentence that describes a run."""

import logging

import pytest
from helpers.tiny_training import VIT

from hf_tokenmixup.models import TokenMixupViTConfig
from hf_tokenmixup.training.metrics import MixingTotals
from hf_tokenmixup.training.mixing_summary import describe_mixing
from hf_tokenmixup.training.mixing_warnings import MixingWarnings, find_mixing_problems

# 400 images in 10 steps, of which 100 are easy and 50 are mixed, with 20 % of their tokens replaced.
GOOD = {
    "classification_loss": 1.5 * 400,
    "target_entropy": 0.5 * 400,
    "difficulty": 1.2 * 400,
    "scorenet_loss": 1.2 * 400,
    "easy_samples": 100.0,
    "mixed_samples": 50.0,
    "replaced_tokens": 0.2 * 16 * 50,
    "mixed_sample_tokens": 16 * 50.0,
    "partner_label_weight": 12.0,
    "saliency_gain": 1.0,
    "random_saliency_gain": 0.5,
}
NOTHING = {"mixed_samples": 0.0, "replaced_tokens": 0.0, "mixed_sample_tokens": 0.0, "partner_label_weight": 0.0}
NOT_EASY = NOTHING | {"easy_samples": 0.0}


def config(**settings):
    return TokenMixupViTConfig(**VIT | {"image_size": 32, "patch_size": 8, "horizontal_layers": [1]} | settings)


def totals(steps=10, images=400, **changes):
    return MixingTotals(GOOD | changes, images, steps)


def problems(settings=None, is_first=False, can_have_partners=True, **changes):
    return find_mixing_problems(
        totals(**changes).summarize(),
        config(**settings or {"horizontal_rho": 0.02, "horizontal_tau": 1.1}),
        is_first=is_first,
        can_have_partners=can_have_partners,
    )


def test_find_mixing_problems_of_a_good_stretch_finds_none():
    assert problems(is_first=True) == {}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"horizontal_rho": 0.25, "horizontal_tau": 1.1}, "`horizontal_rho=0.25`"),
        ({"horizontal_rho_relative": 4.0, "horizontal_tau": 1.1}, "`horizontal_rho_relative=4`"),
    ],
)
def test_find_mixing_problems_easy_images_without_replaced_token_advises_lower_rho(settings, name):
    found = problems(settings, **NOTHING)
    assert found.keys() == {"no token replaced"}
    assert "25% of the images were easy" in found["no token replaced"]
    assert f"rho = 0.25, 4 times the mean saliency. Lower {name}." in found["no token replaced"]


def test_find_mixing_problems_no_easy_image_below_the_models_loss_advises_higher_tau():
    low = NOT_EASY | {"classification_loss": 0.9 * 400, "difficulty": 2.0 * 400}
    found = problems(**low)
    assert found.keys() == {"no easy image"}
    assert "mean loss is 2 nats, above tau = 1.1, while the model's is 0.4." in found["no easy image"]
    assert "Raise `horizontal_tau=1.1`" in found["no easy image"]
    relative = problems({"horizontal_tau_relative": 0.8}, **low)
    assert "Raise `horizontal_tau_relative=0.8`" in relative["no easy image"]


def test_find_mixing_problems_early_training_without_easy_images_is_normal():
    # Without the entropy of the targets, the model's loss is 1.0. ScoreNet's follows with a delay.
    assert problems(**NOT_EASY, is_first=True) == {}


def test_find_mixing_problems_all_easy_from_the_start_advises_lower_tau():
    every = {"easy_samples": 399.0, "difficulty": 0.3 * 400}
    found = problems(**every, is_first=True)
    assert found.keys() == {"all easy"} and "100% of the images are easy" in found["all easy"]
    assert "0.3 nats, below tau = 1.1" in found["all easy"] and "Lower `horizontal_tau=1.1`" in found["all easy"]
    assert problems(**every, is_first=False) == {}
    assert problems({"horizontal_tau": None}, **every, is_first=True) == {}


def test_find_mixing_problems_most_tokens_replaced_advises_higher_rho():
    found = problems(replaced_tokens=0.95 * 16 * 50)
    assert found.keys() == {"most tokens replaced"}
    assert "95% of the tokens" in found["most tokens replaced"]
    assert "rho = 0.02 is 0.32 times the mean saliency. Raise `horizontal_rho=0.02`." in found["most tokens replaced"]
    # One image among 400 is no problem.
    assert problems(mixed_samples=1.0, mixed_sample_tokens=16.0, replaced_tokens=16.0) == {}


def test_find_mixing_problems_without_htm_or_partners_finds_none():
    assert problems(**NOTHING, can_have_partners=False) == {}
    assert find_mixing_problems({"classification_loss": 1.0}, config(), is_first=True) == {}


def test_mixing_warnings_report_each_problem_once_and_judge_complete_stretches(caplog):
    warnings = MixingWarnings(config(horizontal_rho=0.25, horizontal_tau=1.1), steps_per_epoch=20)
    with caplog.at_level(logging.WARNING):
        warnings.add(totals(**NOTHING))
        assert caplog.records == []
        warnings.add(totals(**NOTHING))
        assert [record.getMessage()[:42] for record in caplog.records] == [
            "In the last 20 steps: Nothing was mixed, a"
        ]
        warnings.add(totals(steps=20, **NOTHING))
        assert len(caplog.records) == 1
        warnings.add(totals(steps=20, replaced_tokens=16 * 50.0))
        assert len(caplog.records) == 2 and "100% of the tokens" in caplog.text


def test_mixing_warnings_a_stretch_with_some_mixed_images_is_no_problem(caplog):
    warnings = MixingWarnings(config(horizontal_rho=0.25, horizontal_tau=1.1), steps_per_epoch=20)
    warnings.add(totals(**NOTHING))
    warnings.add(totals())
    assert caplog.records == []


def test_mixing_warnings_of_a_resumed_run_do_not_judge_the_start(caplog):
    for is_first, count in ((False, 0), (True, 1)):
        caplog.clear()
        warnings = MixingWarnings(config(horizontal_rho=0.02, horizontal_tau=1.1), 10, is_first=is_first)
        warnings.add(totals(easy_samples=400.0))
        assert len(caplog.records) == count


def test_describe_mixing_reports_fractions_or_why_nothing_was_mixed():
    metrics = totals().run_metrics()
    assert describe_mixing(metrics, config()) == (
        "12.5% of the images were mixed, with 20.0% of their tokens replaced and 24.0% of their label weight moved"
    )
    settings = config(horizontal_rho=0.25, horizontal_tau=1.1)
    assert describe_mixing(totals(**NOTHING).run_metrics(), settings) == (
        "nothing was mixed, because no token's saliency gain exceeded rho = 0.25, although 25.0% of the images were "
        "easy"
    )
    assert describe_mixing(totals(**NOT_EASY).run_metrics(), settings) == (
        "nothing was mixed, because no image was easy: ScoreNet's mean loss was 1.2 nats, and tau is 1.1"
    )
    assert describe_mixing({"train_loss": 1.0}, config()) is None
    partial = describe_mixing(metrics, config(), complete=False)
    assert partial.endswith("moved (since the run was resumed from a checkpoint without totals)")


def test_mixing_totals_sum_equals_totals_of_all_steps():
    first, second = totals(), totals(steps=30, images=1200, mixed_samples=150.0, mixed_sample_tokens=16 * 150.0)
    together = (first + second).summarize()
    assert together["mixed_fraction"] == pytest.approx((50 + 150) / 1600)
    assert together["mixed_samples"] == pytest.approx((50 + 150) / 40)
    assert together["replaced_fraction"] == pytest.approx(2 * GOOD["replaced_tokens"] / (16 * 200))
    assert not (MixingTotals(complete=False) + first).complete
