"""Figure of a calibration: what rho, tau and kappa do before each layer."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from ..evaluation.calibration import CalibrationResult
from ..evaluation.forecasts import LayerCalibration
from .figure_utils import PALETTE, SOLID, STYLES, add_title, new_figure

MAX_LAYERS_SHOWN = 6


def plot_calibration(result: CalibrationResult) -> Figure:
    """Plot replaced tokens and label mass against rho, easy images against tau, and attention mass against kappa.

    Of more than `MAX_LAYERS_SHOWN` layers, the suggested ones and the first others are shown. Dotted vertical lines
    are the suggested values.

    Args:
        result: Result of `calibrate`.
    """
    layers, suggestion = _select_layers(result), result.suggestion
    figure = new_figure(17.0, 4.6)
    replaced, label, easy, mass = figure.subplots(1, 4)
    for position, layer in enumerate(layers):
        rho = [forecast.horizontal_rho_relative for forecast in layer.rho]
        is_suggested = layer.layer == suggestion.horizontal_layer
        _plot(replaced, position, layer, rho, [item.tokens_replaced for item in layer.rho], is_suggested)
        _plot(label, position, layer, rho, [item.label_mass for item in layer.rho], is_suggested)
        tau = [forecast.horizontal_tau_relative for forecast in layer.tau]
        _plot(easy, position, layer, tau, [item.easy_images for item in layer.tau], is_suggested)
        kappa = [forecast.vertical_kappa for forecast in layer.kappa]
        is_suggested = layer.layer == suggestion.vertical_layer
        _plot(mass, position, layer, kappa, [item.attention_mass for item in layer.kappa], is_suggested)
    _set_axes(replaced, "Replaced tokens of mixed images", "rho, as a multiple of 1 / number of patch tokens")
    _set_axes(label, "Weight of the partner's label", "rho, as a multiple of 1 / number of patch tokens")
    _set_axes(easy, "Easy images", "tau, as a fraction of ln(number of classes)")
    _set_axes(mass, "Attention to collected tokens", "kappa, tokens of each earlier layer")
    for axes, value in (
        (replaced, suggestion.horizontal_rho_relative),
        (label, suggestion.horizontal_rho_relative),
        (easy, suggestion.horizontal_tau_relative),
        (mass, suggestion.vertical_kappa),
    ):
        if value is not None:
            axes.axvline(value, color="0.4", linestyle=":", linewidth=1.2)
    handles, labels = replaced.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False, fontsize=11)
    add_title(
        figure,
        f"Forecast for {result.num_images} images in batches of {result.batch_size}, {result.num_patch_tokens} patch "
        f"tokens, {result.num_labels} classes",
        "For rho, every image is easy. Thick lines: suggested layers. Dotted lines: suggested values.",
    )
    return figure


def _select_layers(result: CalibrationResult) -> Sequence[LayerCalibration]:
    suggested = {result.suggestion.horizontal_layer, result.suggestion.vertical_layer}
    others = [layer for layer in result.layers if layer.layer not in suggested]
    shown = [layer for layer in result.layers if layer.layer in suggested]
    return sorted([*shown, *others[: MAX_LAYERS_SHOWN - len(shown)]], key=lambda layer: layer.layer)


def _plot(
    axes: Axes, position: int, layer: LayerCalibration, x: Sequence[float], y: Sequence[float], is_suggested: bool
) -> None:
    if not x:
        return
    axes.plot(
        x,
        y,
        label=f"layer {layer.layer}",
        color=PALETTE[position % len(PALETTE)],
        linestyle=STYLES[position % len(STYLES)] if len(x) > 1 else SOLID,
        linewidth=3.0 if is_suggested else 1.5,
        marker="o",
        markersize=4,
    )


def _set_axes(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.9", linewidth=0.8)
    values = sorted({float(value) for line in axes.lines for value in line.get_xdata()})
    if values and values[0] > 0:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
