"""Opens the reference values under tests/golden."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_tokenmixup.models import TokenMixupViTConfig, TokenMixupViTForImageClassification

FOLDER = Path(__file__).parent / "golden"


def names(prefix: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.json"))


def load(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((FOLDER / f"{name}.json").read_text()), load_file(FOLDER / f"{name}.safetensors")


def vit(case: dict, **changes) -> TokenMixupViTForImageClassification:
    """The model of a ``vit_*`` case, with the reference weights, in training mode."""
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
    model = TokenMixupViTForImageClassification(TokenMixupViTConfig(**case["config"] | settings | changes))
    weights = load_file(FOLDER / "vit_weights.safetensors")
    scorenet = {name: weights.pop(name) for name in list(weights) if name.startswith("scorenet.")}
    for layer in model.config.horizontal_layers:
        for name, tensor in scorenet.items():
            weights[f"vit.layers.{layer}.{name.replace('scorenet.', 'scorenet.classifier.')}"] = tensor
    model.load_state_dict(weights)
    return model.train()
