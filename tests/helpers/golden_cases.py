"""Opens the reference values under tests/golden."""

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


def names(prefix: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.json"))


def load(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((FOLDER / f"{name}.json").read_text()), load_file(FOLDER / f"{name}.safetensors")


def tokenmixup_settings(case: dict) -> dict:
    """The settings of a case under our names, tau in nats."""
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


def vit(case: dict, **changes) -> TokenMixupViTForImageClassification:
    """The model of a ``vit_*`` case, with the reference weights, in training mode."""
    model = TokenMixupViTForImageClassification(
        TokenMixupViTConfig(**case["config"] | tokenmixup_settings(case) | changes)
    )
    weights = load_file(FOLDER / "vit_weights.safetensors")
    scorenet = {name: weights.pop(name) for name in list(weights) if name.startswith("scorenet.")}
    for layer in model.config.horizontal_layers:
        for name, tensor in scorenet.items():
            weights[f"vit.layers.{layer}.{name.replace('scorenet.', 'scorenet.classifier.')}"] = tensor
    model.load_state_dict(weights)
    return model.train()


def cct(case: dict, **changes) -> TokenMixupCctForImageClassification:
    """The model of a ``cct_*`` case, with the reference weights, in training mode."""
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
        **tokenmixup_settings(case) | changes,
    )
    model = TokenMixupCctForImageClassification(config)
    weights = {}
    for name, tensor in load_file(FOLDER / case["weights_file"]).items():
        own, part = cct_name(name)
        weights.setdefault(own, {})[part] = tensor
    weights = {name: torch.cat([parts[key] for key in sorted(parts)]) for name, parts in weights.items()}
    known = model.state_dict()
    # Positions that are computed, and a ScoreNet pooling that a CLS token leaves without use.
    unused = {name for name in weights if name not in known}
    assert all("position_embeddings" in name or "scorenet.attention" in name for name in unused)
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in known})
    return model.train()


def cct_name(name: str) -> tuple[str, int]:
    """Our name of a released parameter, and its place in the fused projection where it is a part of one."""
    own = re.sub(r"^tokenizer\.conv_layers\.(\d+)\.0\.", r"cct.embeddings.tokenizer.layers.\1.", name)
    own = re.sub(r"^classifier\.blocks\.", "cct.layers.", own)
    own = re.sub(r"^classifier\.(norm|attention_pool)\.", r"cct.\1.", own)
    own = own.replace("classifier.fc.", "classifier.").replace("self_attn", "attention")
    own = own.replace("classifier.positional_emb", "cct.embeddings.position_embeddings")
    own = own.replace("classifier.class_emb", "cct.embeddings.cls_token")
    own = own.replace("small_h_attention_pool", "scorenet.attention").replace("small_h_fc", "scorenet.classifier")
    for place, part in enumerate(("query", "key", "value")):
        if own.endswith(f"attention.{part}.weight"):
            return own.replace(f".{part}.", ".qkv."), place
    return own, 0
