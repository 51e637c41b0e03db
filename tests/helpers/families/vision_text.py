"""Parts of the tiny models of images and texts."""

from typing import Any

from hf_tokenmixup.configuration import TokenMixupConfigMixin

_TEXT = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
# Dropout that the image encoders do not have.
_ABSENT = ("hidden_dropout_prob", "drop_path_rate")


def nest_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Convert settings with names of `ViTConfig`: sizes belong to `vision_config`."""
    settings = {name: value for name, value in settings.items() if name not in _ABSENT}
    vision = {"attention_dropout": settings.pop("attention_probs_dropout_prob")}
    for name in [*settings]:
        if name not in TokenMixupConfigMixin.__dataclass_fields__ and name != "num_labels":
            vision[name] = settings.pop(name)
    return settings | {"vision_config": vision, "text_config": dict(_TEXT)}


def rest_of_layer(layer, hidden, attn_output):
    hidden = hidden + attn_output
    return hidden + layer.mlp(layer.layer_norm2(hidden))
