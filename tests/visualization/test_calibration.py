"""Content of the figure of a calibration, read from its axes."""

import pytest
from helpers.tiny_training import Images, tokenmixup_vit

from hf_tokenmixup.evaluation.calibration import calibrate
from hf_tokenmixup.visualization.calibration import MAX_LAYERS_SHOWN, plot_calibration


@pytest.fixture(scope="module")
def result():
    images = Images(16)
    model = tokenmixup_vit(num_hidden_layers=9, initializer_range=0.3)
    return calibrate(model, [{"pixel_values": images.pixels, "labels": images.labels}])


def test_plot_calibration_shows_forecasts_of_suggested_and_first_layers(result):
    figure = plot_calibration(result)
    replaced, label, easy, mass = figure.axes
    suggestion = result.suggestion
    shown = [line.get_label() for line in replaced.lines if line.get_label().startswith("layer")]
    assert len(shown) == MAX_LAYERS_SHOWN and f"layer {suggestion.horizontal_layer}" in shown
    assert f"layer {suggestion.vertical_layer}" in shown
    for name in shown:
        layer = result.layers[int(name.split()[1])]
        expected = {
            replaced: [(item.horizontal_rho_relative, item.tokens_replaced) for item in layer.rho],
            label: [(item.horizontal_rho_relative, item.label_mass) for item in layer.rho],
            easy: [(item.horizontal_tau_relative, item.easy_images) for item in layer.tau],
            mass: [(item.vertical_kappa, item.attention_mass) for item in layer.kappa],
        }
        for axes, points in expected.items():
            lines = [line for line in axes.lines if line.get_label() == name]
            drawn = [list(zip(*line.get_data(), strict=True)) for line in lines]
            assert drawn == ([points] if points else [])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == shown
    assert "16 images in batches of 16, 4 patch tokens, 4 classes" in " ".join(figure.get_suptitle().split())


def test_plot_calibration_marks_suggested_values_and_layers(result):
    replaced, _, easy, mass = plot_calibration(result).axes
    suggestion = result.suggestion
    for axes, value, layer in (
        (replaced, suggestion.horizontal_rho_relative, suggestion.horizontal_layer),
        (easy, suggestion.horizontal_tau_relative, suggestion.horizontal_layer),
        (mass, suggestion.vertical_kappa, suggestion.vertical_layer),
    ):
        dotted = [line.get_xdata()[0] for line in axes.lines if not line.get_label().startswith("layer")]
        assert dotted == ([] if value is None else [value])
        thick = max((line for line in axes.lines if line.get_label().startswith("layer")), key=lambda x: x.get_lw())
        assert thick.get_label() == f"layer {layer}"
