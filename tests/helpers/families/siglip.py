"""Tiny SigLIP."""

from . import Family
from .vision_text import nest_settings, rest_of_layer


def classify(model, hidden, num_prefix_tokens):
    return model.classifier(model.vision_model.post_layernorm(hidden).mean(dim=1))


CASES = {
    "siglip": Family(
        translate=nest_settings,
        submodule="mlp.fc1",
        num_prefix_tokens=0,
        rest_of_layer=rest_of_layer,
        output_projection="out_proj",
        embed=lambda model, images: model.vision_model.embeddings(images),
        classify=classify,
    )
}
