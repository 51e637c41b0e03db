"""What horizontal TokenMixup did in a complete run, in one sentence."""

from collections.abc import Mapping

from transformers import PreTrainedConfig


def describe_mixing(metrics: Mapping[str, float], config: PreTrainedConfig, complete: bool = True) -> str | None:
    """Describe how many images, tokens and labels were mixed, or why none were.

    Args:
        metrics: results of a run, as `MixingTotals.run_metrics` returns them.
        config: configuration of the model.
        complete: whether the results include all steps of the run, see `MixingTotals`.

    Returns:
        A sentence without a capital letter and a full stop; None for a run without horizontal TokenMixup.
    """
    if "train_mixed_fraction" not in metrics:
        return None
    sentence = _describe(metrics, config)
    return sentence if complete else f"{sentence} (since the run was resumed from a checkpoint without totals)"


def _describe(metrics: Mapping[str, float], config: PreTrainedConfig) -> str:
    mixed = metrics["train_mixed_fraction"]
    if mixed > 0:
        return (
            f"{mixed:.1%} of the images were mixed, with {metrics['train_replaced_fraction']:.1%} of their tokens "
            f"replaced and {metrics['train_label_mass_moved']:.1%} of their label weight moved"
        )
    easy, tau = metrics["train_easy_fraction"], getattr(config, "effective_tau", None)
    if easy == 0 and tau is not None:
        return (
            f"nothing was mixed, because no image was easy: ScoreNet's mean loss was "
            f"{metrics['train_difficulty']:.3g} nats, and tau is {tau:.3g}"
        )
    rho = config.effective_rho(config.num_patch_tokens)
    return (
        f"nothing was mixed, because no token's saliency gain exceeded rho = {rho:.4g}, although {easy:.1%} of the "
        "images were easy"
    )
