"""Tiny CLIP and MetaCLIP 2."""

from . import Family, read_patch_mean
from .vision_text import nest_settings, rest_of_layer


def embed(model, images):
    return model.vision_model.pre_layrnorm(model.vision_model.embeddings(images))


def classify(model, hidden, num_prefix_tokens):
    return model.classifier(read_patch_mean(hidden, num_prefix_tokens))


CLIP = Family(
    own={"initializer_factor": 2.0},
    translate=nest_settings,
    submodule="mlp.fc1",
    rest_of_layer=rest_of_layer,
    output_projection="out_proj",
    embed=embed,
    classify=classify,
)
CASES = {"clip": CLIP, "metaclip_2": CLIP}
