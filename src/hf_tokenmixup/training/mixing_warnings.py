"""Warnings about settings of TokenMixup that have no effect, or a much larger effect than intended."""

import logging
from collections.abc import Mapping

from ..configuration import TokenMixupConfigMixin
from .metrics import MixingTotals

logger = logging.getLogger(__name__)

# A stretch of steps over which the metrics are judged: an epoch, within these limits.
MIN_STEPS, MAX_STEPS = 10, 200
# Fractions of images or tokens from which a warning is due.
MIN_EASY, ALL_EASY, MOST_TOKENS, RARELY_MIXED = 0.05, 0.99, 0.9, 0.01
# ScoreNet learns more slowly than the model, so images are expected to be easy once the model's loss is below this
# fraction of tau.
LOSS_BELOW_TAU = 0.5


def find_mixing_problems(
    metrics: Mapping[str, float], config: TokenMixupConfigMixin, *, is_first: bool, can_have_partners: bool = True
) -> dict[str, str]:
    """Find settings that do not act as intended.

    Args:
        metrics: metrics of a stretch of steps as `summarize_mixing_metrics` returns them, with `easy_fraction`.
        config: model configuration.
        is_first: whether the stretch is the first one of the run.
        can_have_partners: whether a forward pass has more than one image.

    Returns:
        A warning for each problem, by the name of the problem.
    """
    if "mixed_fraction" not in metrics or not can_have_partners:
        return {}
    rho, tau = config.effective_rho(config.num_patch_tokens), config.effective_tau
    easy, difficulty = metrics["easy_fraction"], metrics["difficulty"]
    # With mixed or smoothed labels, the smallest possible loss is the entropy of the targets.
    excess_loss = metrics["classification_loss"] - metrics["target_entropy"]
    problems = {}
    if metrics["mixed_fraction"] == 0 and easy >= MIN_EASY:
        problems["no token replaced"] = (
            f"Nothing was mixed, although {easy:.0%} of the images were easy: no token's saliency gain exceeded rho = "
            f"{rho:.4g}, {rho * config.num_patch_tokens:.3g} times the mean saliency. Lower {_name(config, 'rho')}."
        )
    elif easy == 0 and tau is not None and excess_loss < LOSS_BELOW_TAU * tau:
        problems["no easy image"] = (
            f"Nothing was mixed, because no image was easy: ScoreNet's mean loss is {difficulty:.3g} nats, above tau "
            f"= {tau:.3g}, while the model's is {excess_loss:.3g}. Raise {_name(config, 'tau')}, or mix before a "
            "later layer, where ScoreNet learns more."
        )
    if is_first and tau is not None and easy > ALL_EASY:
        problems["all easy"] = (
            f"{easy:.0%} of the images are easy from the start: ScoreNet's mean loss is {difficulty:.3g} nats, below "
            f"tau = {tau:.3g}, so tau selects nothing. Lower {_name(config, 'tau')}, or set it to None to mix all "
            "images on purpose."
        )
    replaced = metrics.get("replaced_fraction", 0.0)
    if replaced > MOST_TOKENS and metrics["mixed_fraction"] > RARELY_MIXED:
        problems["most tokens replaced"] = (
            f"{replaced:.0%} of the tokens of mixed images are replaced, so little of the image is left: rho = "
            f"{rho:.4g} is {rho * config.num_patch_tokens:.3g} times the mean saliency. Raise {_name(config, 'rho')}."
        )
    return problems


class MixingWarnings:
    """Judge the metrics of stretches of steps, and log each problem once per run.

    Args:
        config: configuration of a TokenMixup model; None disables the warnings.
        steps_per_epoch: number of optimizer steps of an epoch.
        can_have_partners: whether a forward pass has more than one image.
        is_first: whether the first stretch begins with the first step of the run.
    """

    def __init__(
        self,
        config: TokenMixupConfigMixin | None,
        steps_per_epoch: int = MAX_STEPS,
        can_have_partners: bool = True,
        is_first: bool = True,
    ) -> None:
        self._config = config
        self._can_have_partners = can_have_partners
        self._num_steps = min(max(steps_per_epoch, MIN_STEPS), MAX_STEPS)
        self._is_first = is_first
        self._stretch = MixingTotals()
        self._reported: set[str] = set()

    def add(self, totals: MixingTotals) -> None:
        """Add the metrics of further steps."""
        self._stretch += totals
        if self._config is None or self._stretch.steps < self._num_steps:
            return
        problems = find_mixing_problems(
            self._stretch.summarize(),
            self._config,
            is_first=self._is_first,
            can_have_partners=self._can_have_partners,
        )
        for name in problems.keys() - self._reported:
            logger.warning("In the last %d steps: %s", self._stretch.steps, problems[name])
        self._reported |= problems.keys()
        self._stretch, self._is_first = MixingTotals(), False


def _name(config: TokenMixupConfigMixin, threshold: str) -> str:
    """The form of a threshold that is set, with its value."""
    names = (f"horizontal_{threshold}_relative", f"horizontal_{threshold}")
    name = next(name for name in names if getattr(config, name) is not None)
    return f"`{name}={getattr(config, name):g}`"
