"""Numbers and figures of the demo, without Gradio."""

import dataclasses

import pytest
import torch
from transformers import ViTConfig, ViTImageProcessor

from hf_tokenmixup.demo import mixing
from hf_tokenmixup.demo.classifier import DemoClassifier, digit_images
from hf_tokenmixup.demo.mixing import MixingSettings, format_numbers, mix_images
from hf_tokenmixup.evaluation import forecast_settings
from hf_tokenmixup.models import load_classifier
from hf_tokenmixup.visualization import predicted_classes

SETTINGS = MixingSettings(layer=1, rho_relative=0.2, tau_relative=None, kappa=3)
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"image_size": 16, "patch_size": 4, "num_labels": 10, "initializer_range": 0.5}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A ViT with random weights and a ScoreNet before layer 1 only."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    ViTConfig(**SIZES).save_pretrained(folder)
    model = load_classifier(str(folder), from_scratch=True, tokenmixup={"horizontal_layers": [1]})
    torch.nn.init.normal_(model.get_transformer_layers()[1].scorenet.classifier.weight)
    return DemoClassifier.from_model(model, ViTImageProcessor(size={"height": 16, "width": 16}))


@pytest.fixture(scope="module")
def images():
    return [image for image, _ in digit_images(6)]


def test_numbers_equal_forecast_of_calibration(classifier, images):
    result = mix_images(classifier, images, SETTINGS)
    pixel_values = classifier.transform.batch(images)
    config = classifier.model.config
    config.vertical_layers, config.horizontal_rho_relative = [1], 0.2
    try:
        batch = {"pixel_values": pixel_values, "labels": predicted_classes(classifier.model, pixel_values)}
        forecast = forecast_settings(classifier.model, [batch])
    finally:
        config.vertical_layers = []
    horizontal, vertical = forecast.horizontal[1], forecast.vertical[1]
    assert result.numbers.images_mixed == horizontal.images_mixed * 6 > 0
    assert result.numbers.tokens_replaced == pytest.approx(horizontal.tokens_replaced)
    assert result.numbers.label_mass == pytest.approx(horizontal.label_mass)
    assert result.numbers.attention_mass == pytest.approx(vertical.attention_mass)
    assert result.numbers.rho == pytest.approx(0.2 / 16) and result.numbers.num_patch_tokens == 16


def test_figures_show_saliency_pairs_and_tokens(classifier, images):
    result = mix_images(classifier, images, SETTINGS)
    titles = [figure.get_suptitle() for figure in (result.horizontal, result.vertical, result.saliency)]
    assert f"{result.numbers.images_mixed} of 6 images are mixed" in " ".join(titles[0].split())
    assert "tokens that layer 1 also attends to" in titles[1] and "before layer 1" in titles[2]
    assert result.message == ""


@pytest.mark.parametrize("change", [{"rho_relative": 0.0}, {"kappa": 9}, {"detector": "random"}, {"layer": 2}])
def test_settings_change_the_numbers(classifier, images, change):
    before = mix_images(classifier, images, SETTINGS).numbers
    after = mix_images(classifier, images, dataclasses.replace(SETTINGS, **change)).numbers
    assert after != before


def test_tau_limits_mixing_to_easy_images(classifier, images):
    numbers = {}
    for tau in (0.01, 0.8, None):
        numbers[tau] = mix_images(classifier, images, dataclasses.replace(SETTINGS, tau_relative=tau)).numbers
        assert numbers[tau].images_mixed <= numbers[tau].images_easy
    assert numbers[0.01].images_easy < numbers[None].images_easy == 6
    with pytest.raises(ValueError, match="layer 2 has none"):
        mix_images(classifier, images, dataclasses.replace(SETTINGS, layer=2, tau_relative=0.8))


def test_without_mixed_images_there_is_a_message(classifier, images):
    result = mix_images(classifier, images, dataclasses.replace(SETTINGS, rho_relative=100.0))
    assert result.horizontal is None and "No image is mixed" in result.message
    assert (result.numbers.images_mixed, result.numbers.tokens_replaced, result.numbers.label_mass) == (0, 0.0, 0.0)


def test_layer_0_has_no_collected_tokens(classifier, images):
    result = mix_images(classifier, images, dataclasses.replace(SETTINGS, layer=0))
    assert result.vertical is None and result.numbers.attention_mass is None
    assert dict(format_numbers(result.numbers))["Attention to collected tokens"] == "–"


def test_settings_of_the_model_are_unchanged(classifier, images):
    before = classifier.model.config.to_dict()
    mix_images(classifier, images, dataclasses.replace(SETTINGS, detector="gradient"))
    with pytest.raises(ValueError, match="kappa must be between 1 and"):
        mix_images(classifier, images, dataclasses.replace(SETTINGS, kappa=99))
    assert classifier.model.config.to_dict() == before


@pytest.mark.parametrize("number, hint", [(0, "Add"), (1, "Add"), (mixing.MAX_IMAGES + 1, "Remove")])
def test_wrong_number_of_images_raises(classifier, images, number, hint):
    with pytest.raises(ValueError, match=f"2 to 12 images, got {number}. {hint} images"):
        mix_images(classifier, [images[0]] * number, SETTINGS)
