"""Load the reference values in tests/golden, and build the models with the reference weights."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_tokenmixup.models import (
    TokenMixupCctConfig,
    TokenMixupCctForImageClassification,
    TokenMixupViTConfig,
    TokenMixupViTForImageClassification,
)

FOLDER = Path(__file__).parents[1] / "golden"


def list_cases(prefix: str) -> list[str]:
    """List the names of the cases that start with `prefix`."""
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.json"))


def load_case(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Load the settings and the tensors of a case."""
    return json.loads((FOLDER / f"{name}.json").read_text()), load_file(FOLDER / f"{name}.safetensors")


def tokenmixup_settings(case: dict) -> dict:
    """Return the settings of a case as config attributes. `tau` is in nats."""
    settings = {}
    horizontal, vertical = case.get("horizontal_layer"), case.get("vertical_layer")
    if horizontal is not None:
        settings |= {
            "horizontal_layers": [horizontal],
            "horizontal_tau": case["tau"] * 10,
            "horizontal_rho": case["rho"],
            "scorenet_detach": case["scorenet_stopgrad"],
            "scorenet_loss_weight": case["scorenet_lambda"],
        }
    if vertical is not None:
        settings |= {
            "vertical_layers": [vertical],
            "vertical_kappa": case["kappa"],
            "vertical_detach": case["vertical_stopgrad"],
        }
    return settings


def build_vit(case: dict, **config_changes) -> TokenMixupViTForImageClassification:
    """Build the model of a `vit_*` case with the reference weights, in training mode."""
    model = TokenMixupViTForImageClassification(
        TokenMixupViTConfig(**case["config"] | tokenmixup_settings(case) | config_changes)
    )
    weights = load_file(FOLDER / "vit_weights.safetensors")
    scorenet = {name: weights.pop(name) for name in list(weights) if name.startswith("scorenet.")}
    for layer in model.config.horizontal_layers:
        for name, tensor in scorenet.items():
            weights[f"vit.layers.{layer}.{name.replace('scorenet.', 'scorenet.classifier.')}"] = tensor
    model.load_state_dict(weights)
    return model.train()


def build_cct(case: dict, **config_changes) -> TokenMixupCctForImageClassification:
    """Build the model of a `cct_*` case with the reference weights, in training mode."""
    released = case["config"]
    config = TokenMixupCctConfig(
        hidden_size=released["embedding_dim"],
        num_hidden_layers=released["num_layers"],
        num_attention_heads=released["num_heads"],
        intermediate_size=released["embedding_dim"] * released["mlp_ratio"],
        image_size=released["img_size"],
        num_labels=released["num_classes"],
        pooling="sequence" if released["seq_pool"] else "cls",
        scorenet_pooling="attention" if released["seq_pool"] else "cls",
        saliency_query="mean" if released["seq_pool"] else "cls",
        position_embedding={"learnable": "learned", "sine": "sinusoidal"}[released["positional_embedding"]],
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
        **tokenmixup_settings(case) | config_changes,
    )
    model = TokenMixupCctForImageClassification(config)
    weights = {}
    for released_name, tensor in load_file(FOLDER / case["weights_file"]).items():
        name, part = convert_cct_name(released_name)
        weights.setdefault(name, {})[part] = tensor
    weights = {name: torch.cat([parts[part] for part in sorted(parts)]) for name, parts in weights.items()}
    parameter_names = set(model.state_dict())
    # Sinusoidal positions are computed, and a model with a CLS token does not use the attention pooling of ScoreNet.
    unused = weights.keys() - parameter_names
    assert all("position_embeddings" in name or "scorenet.attention" in name for name in unused)
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in parameter_names})
    return model.train()


def convert_cct_name(released_name: str) -> tuple[str, int]:
    """Convert the name of a released parameter.

    Returns:
        The name in this package, and the index of the part if it is a part of the fused QKV projection (0 otherwise).
    """
    name = re.sub(r"^tokenizer\.conv_layers\.(\d+)\.0\.", r"cct.embeddings.tokenizer.layers.\1.", released_name)
    name = re.sub(r"^classifier\.blocks\.", "cct.layers.", name)
    name = re.sub(r"^classifier\.(norm|attention_pool)\.", r"cct.\1.", name)
    name = name.replace("classifier.fc.", "classifier.").replace("self_attn", "attention")
    name = name.replace("classifier.positional_emb", "cct.embeddings.position_embeddings")
    name = name.replace("classifier.class_emb", "cct.embeddings.cls_token")
    name = name.replace("small_h_attention_pool", "scorenet.attention").replace("small_h_fc", "scorenet.classifier")
    for index, part in enumerate(("query", "key", "value")):
        if name.endswith(f"attention.{part}.weight"):
            return name.replace(f".{part}.", ".qkv."), index
    return name, 0
