"""Suggested settings from measurements that are made up."""

from hf_tokenmixup.evaluation.forecasts import EasyForecast, HorizontalForecast, LayerCalibration, VerticalForecast
from hf_tokenmixup.evaluation.suggestions import suggest_settings


def make_layer(index, contrast=1.0, replaced=(0.4, 0.25, 0.18, 0.02), mixed=1.0, easy=(0.1, 0.45, 0.9), **changes):
    rho = [
        HorizontalForecast(0.5 * (i + 1), 0.01 * (i + 1), mixed, fraction, 0.1, 0.2, 0.1)
        for i, fraction in enumerate(replaced)
    ]
    tau = [EasyForecast(0.2 * (i + 1), 1.0 * (i + 1), fraction) for i, fraction in enumerate(easy)]
    kappa = [VerticalForecast(kappa, kappa * index, 0.01 * kappa) for kappa in (1, 3, 5)] if index else []
    values = {
        "layer": index, "saliency_mean": 0.1, "saliency_std": 0.1 * contrast, "saliency_mean_relative": 1.0,
        "saliency_std_relative": contrast, "patch_attention": 0.9, "scorenet": "trained", "difficulty": 1.0,
        "rho": tuple(rho), "tau": tuple(tau), "kappa": tuple(kappa),
    }  # fmt: skip
    return LayerCalibration(**values | changes)


def test_suggest_settings_chooses_early_layer_with_highest_contrast():
    layers = [make_layer(index, contrast) for index, contrast in enumerate((9.0, 0.2, 0.7, 0.6, 8.0, 8.0))]
    suggestion = suggest_settings(layers, num_layers=6)
    assert (suggestion.horizontal_layer, suggestion.vertical_layer) == (2, 3)
    assert suggest_settings(layers[4:], num_layers=6).horizontal_layer == 4
    last = suggest_settings(layers[2:3], num_layers=6)
    assert (last.horizontal_layer, last.vertical_layer) == (2, 2)


def test_suggest_settings_of_layer_0_alone_has_no_vertical_layer():
    suggestion = suggest_settings([make_layer(0)], num_layers=6)
    assert suggestion.vertical_layer is None and suggestion.vertical_kappa is None
    assert suggestion.to_settings() == {
        "horizontal_layers": [0], "horizontal_rho_relative": 1.5, "horizontal_tau_relative": 0.4,
    }  # fmt: skip


def test_suggest_settings_rho_replaces_about_a_fifth_of_the_tokens():
    assert suggest_settings([make_layer(1)], 2).horizontal_rho_relative == 1.5
    assert suggest_settings([make_layer(1, replaced=(0.9, 0.6, 0.04))], 2).horizontal_rho_relative is None
    assert suggest_settings([make_layer(1, mixed=0.3)], 2).horizontal_rho_relative is None
    settings = suggest_settings([make_layer(1, mixed=0.3)], 2).to_settings()
    assert "horizontal_rho_relative" not in settings and settings["vertical_layers"] == [1]


def test_suggest_settings_tau_makes_half_of_the_images_easy_and_is_limited_for_a_fitted_scorenet():
    assert suggest_settings([make_layer(1)], 2).horizontal_tau_relative == 0.4
    easy = (0.0, 0.1, 0.5)
    assert suggest_settings([make_layer(1, easy=easy)], 2).horizontal_tau_relative == 0.2 * 3
    assert suggest_settings([make_layer(1, easy=easy, scorenet="fitted")], 2).horizontal_tau_relative == 0.43
    assert suggest_settings([make_layer(1, scorenet="fitted")], 2).horizontal_tau_relative == 0.4


def test_suggest_settings_tau_without_easy_images_is_limited_highest_value():
    for scorenet in ("fitted", "trained"):
        layer = make_layer(1, easy=(0.0, 0.0, 0.0), scorenet=scorenet)
        assert suggest_settings([layer], 2).horizontal_tau_relative == 0.43


def test_suggest_settings_kappa_is_lowest_with_enough_attention():
    assert suggest_settings([make_layer(1)], 2).vertical_kappa == 3
    weak = make_layer(1, kappa=(VerticalForecast(1, 1, 0.001), VerticalForecast(9, 9, 0.01)))
    assert suggest_settings([weak], 2).vertical_kappa == 9
