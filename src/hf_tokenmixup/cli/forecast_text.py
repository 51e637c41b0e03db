"""Text of a calibration and of the forecast of a run, with the flags of finetune.py."""

import math
from collections.abc import Iterator, Mapping
from itertools import islice

import torch

from ..configuration import TokenMixupConfigMixin
from ..evaluation.calibration import CalibrationResult, SettingsForecast
from ..evaluation.forecasts import LayerCalibration
from ..training import TokenMixupTrainer
from ..training.batches import normalize_images
from ..utils.tables import format_text_table

DEFAULT_NUM_IMAGES = 256
HEADER = (
    *("rho x T", "rho", "mixed", "replaced", "label", "gain", "random"),
    *("tau / ln C", "tau", "easy", "kappa", "attention"),
)
LEGEND = """\
T          number of patch tokens; C: number of classes
mixed      images with a replaced token, if all images are easy
replaced   tokens replaced in mixed images
label      weight of the partner's label in mixed images
gain       saliency above rho that an image gains from its matched partner; random: from a random partner
easy       images with a ScoreNet loss below tau, in nats
attention  attention of the layer to the kappa most salient tokens of each earlier layer"""


def first_batches(trainer: TokenMixupTrainer, num_images: int | None = None) -> Iterator[Mapping[str, torch.Tensor]]:
    """The first batches of training, without the mixup of the input images.

    Args:
        trainer: of the run.
        num_images: minimum number of images, if the split has them. None: `DEFAULT_NUM_IMAGES`.
    """
    num_batches = -(-(num_images or DEFAULT_NUM_IMAGES) // trainer.args.train_batch_size)
    for batch in islice(trainer.get_train_dataloader(), num_batches):
        yield normalize_images(dict(batch), trainer.device_transform)


def format_calibration(result: CalibrationResult) -> str:
    """A table for each layer, the suggestion, and the flags to paste."""
    parts = [
        f"{_format_images(result)}, {result.num_labels} classes",
        *(_format_layer(layer) for layer in result.layers),
        LEGEND,
        _format_suggestion(result),
        "Flags: " + format_flags(result),
    ]
    return "\n\n".join(parts)


def format_flags(result: CalibrationResult) -> str:
    """The suggested settings as flags of finetune.py."""
    words = []
    for name, value in result.suggestion.to_settings().items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(f"{item:g}" for item in values)]
    return " ".join(words)


def format_forecast(forecast: SettingsForecast, config: TokenMixupConfigMixin) -> str:
    """The settings of a run, and what they do in its first batches."""
    lines = [f"{_format_images(forecast)}, {config.num_labels} classes"]
    for index, horizontal in forecast.horizontal.items():
        rho = f"rho {horizontal.horizontal_rho:.4g} ({horizontal.horizontal_rho_relative:.3g} / T)"
        lines += [
            f"layer {index}, HTM: {rho}, {_format_tau(config)}",
            f"  if all images are easy: {horizontal.images_mixed:.1%} of the images are mixed, "
            f"{horizontal.tokens_replaced:.1%} of their tokens are replaced, and their partners' labels have a weight "
            f"of {horizontal.label_mass:.1%}",
        ]
    for index, vertical in forecast.vertical.items():
        lines += [
            f"layer {index}, VTM: kappa {vertical.vertical_kappa}",
            f"  {vertical.attention_mass:.1%} of the attention goes to {vertical.collected_tokens} tokens of earlier "
            "layers",
        ]
    if not (forecast.horizontal or forecast.vertical):
        lines.append("HTM and VTM are off: --horizontal_layers and --vertical_layers are empty.")
    return "\n".join(lines)


def _format_tau(config: TokenMixupConfigMixin) -> str:
    tau = config.effective_tau
    if tau is None:
        return "tau none (all images are easy)"
    return f"tau {tau:.3g} nats ({tau / math.log(config.num_labels):.3g} ln C)"


def _format_images(result: CalibrationResult | SettingsForecast) -> str:
    batches = f"batches of {result.batch_size} (--per_device_train_batch_size; HTM finds partners within a batch)"
    return f"{result.num_images} images in {batches}, {result.num_patch_tokens} patch tokens"


def _format_layer(layer: LayerCalibration) -> str:
    rows = []
    for index in range(max(len(layer.rho), len(layer.tau), len(layer.kappa))):
        cells = [""] * len(HEADER)
        if index < len(layer.rho):
            item = layer.rho[index]
            cells[:7] = [
                f"{item.horizontal_rho_relative:g}",
                f"{item.horizontal_rho:.4g}",
                f"{item.images_mixed:.1%}",
                f"{item.tokens_replaced:.1%}",
                f"{item.label_mass:.1%}",
                f"{item.matched_gain:.4f}",
                f"{item.random_gain:.4f}",
            ]
        if index < len(layer.tau):
            easy = layer.tau[index]
            cells[7:10] = [
                f"{easy.horizontal_tau_relative:g}",
                f"{easy.horizontal_tau:.3g}",
                f"{easy.easy_images:.1%}",
            ]
        if index < len(layer.kappa):
            vertical = layer.kappa[index]
            cells[10:] = [str(vertical.vertical_kappa), f"{vertical.attention_mass:.1%}"]
        rows.append(cells)
    return (
        f"Layer {layer.layer}: saliency {layer.saliency_mean:.4g} ({layer.saliency_mean_relative:.3g} / T), standard "
        f"deviation {layer.saliency_std:.4g} ({layer.saliency_std_relative:.3g} / T), sum over patch tokens "
        f"{layer.patch_attention:.3f}; {layer.scorenet} ScoreNet, loss {layer.difficulty:.3g}\n"
        + format_text_table([HEADER, *rows])
    )


def _format_suggestion(result: CalibrationResult) -> str:
    suggestion = result.suggestion
    by_index = {layer.layer: layer for layer in result.layers}
    layer = by_index[suggestion.horizontal_layer]
    lines = [
        f"HTM before layer {layer.layer}"
        + (", which has the highest contrast of saliency of the early layers." if len(by_index) > 1 else ".")
    ]
    rho = {item.horizontal_rho_relative: item for item in layer.rho}.get(suggestion.horizontal_rho_relative)
    if rho is None:
        lines.append(
            "rho: no value replaces 5% to 50% of the tokens in at least half of the images. The attention of new "
            "weights is nearly uniform. Use the default, and calibrate again with a checkpoint after some epochs."
        )
    else:
        lines.append(
            f"rho: {rho.horizontal_rho_relative:g} / T = {rho.horizontal_rho:.4g} replaces {rho.tokens_replaced:.1%} "
            f"of the tokens of mixed images (aim: 20%), and the partner's label has a weight of {rho.label_mass:.1%}."
        )
    relative = suggestion.horizontal_tau_relative
    tau = relative * math.log(result.num_labels)
    limited = {item.horizontal_tau_relative: item.easy_images for item in layer.tau}
    easy = f"; {limited[relative]:.1%} of the images are easy" if relative in limited else ""
    note = (
        " with the trained ScoreNet (aim: 50%)."
        if layer.scorenet == "trained"
        else f" with a ScoreNet fitted to {result.num_images // 2} images, and more will be during training."
    )
    lines.append(f"tau: {relative:g} ln C = {tau:.3g} nats{easy}{note if easy else '.'}")
    if suggestion.vertical_layer is not None:
        vertical = next(
            item
            for item in by_index[suggestion.vertical_layer].kappa
            if item.vertical_kappa == suggestion.vertical_kappa
        )
        lines.append(
            f"kappa: {vertical.vertical_kappa} from each earlier layer; layer {suggestion.vertical_layer} gives these "
            f"{vertical.collected_tokens} tokens {vertical.attention_mass:.1%} of its attention (aim: at least 3%)."
        )
    lines.append("These values aim at fractions of images, tokens and attention. They do not predict accuracy.")
    return "Suggestion\n" + "\n".join(f"  {line}" for line in lines)
