"""LoRA (Hu et al., 2022) with peft: low-rank adapters are trained, and the network's own weights are frozen.

The classifier and ScoreNet belong to the task. They are trained in full, as peft's `modules_to_save`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from ..models import FAMILIES, TokenMixupModelMixin, find_adapter_layers

if TYPE_CHECKING:
    from peft import PeftModel

ALL_LINEAR = "all-linear"
# Prefix of the names in peft's files.
_PREFIX = "base_model.model."


def _describe_target_modules() -> str:
    """Describe the default target modules of all families: `qkv for cct, q_proj v_proj for vit`."""
    types: dict[tuple[str, ...], list[str]] = {}
    for model_type, (_, model_class) in FAMILIES.items():
        types.setdefault(model_class.lora_target_modules, []).append(model_type)
    return ", ".join(f"{' '.join(names)} for {' '.join(types[names])}" for names in types)


@dataclass
class LoraArguments:
    """Options of LoRA on the command line.

    Raises:
        ValueError: The rank is negative, or another option is given without a rank.
    """

    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Only train adapters of this rank, classifier and ScoreNet (0: off)."},
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Adapter outputs are scaled by alpha / rank (default: twice the rank)."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": f"Layers to adapt, or all-linear (default: {_describe_target_modules()})."},
    )

    def __post_init__(self):
        if self.lora_rank is not None and self.lora_rank < 0:
            raise ValueError(f"`lora_rank` must be at least 1, or 0 for no LoRA, got {self.lora_rank}.")
        unused = [name for name, value in vars(self).items() if value and name != "lora_rank"]
        if not self.lora_rank and unused:
            raise ValueError(f"`{unused[0]}` requires `lora_rank`, such as 8.")

    def apply(self, model: PreTrainedModel) -> "PreTrainedModel | PeftModel":
        """`model` with adapters, see `add_lora`; unchanged if LoRA is off."""
        if not self.lora_rank:
            return model
        return add_lora(model, self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_target_modules)


def add_lora(
    model: PreTrainedModel,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
) -> "PeftModel":
    """Add LoRA adapters to a classifier. Only the adapters, the classifier and ScoreNet are trained.

    The adapters are initialized to zero, so the outputs are at first those of the model without adapters.

    Args:
        model: any image classifier of transformers with a `classifier`. It is changed in place.
        rank: rank r of each adapter.
        alpha: adapter outputs are scaled by alpha / r; None: twice the rank.
        dropout: dropout probability before the adapters.
        target_modules: layers to adapt, by the ends of their names; `["all-linear"]`: every linear layer. None: the
            query and value projections of attention, for the families that mix tokens.

    Returns:
        The model wrapped by peft.

    Raises:
        ValueError: peft is not installed, a value is out of its range, no linear layer or convolution has one of the
            names, or the family has no default.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(
            'LoRA needs peft, which is not installed: pip install -e ".[lora]", or pip install peft.'
        ) from error
    alpha = 2 * rank if alpha is None else alpha
    if not (isinstance(rank, int) and rank >= 1):
        raise ValueError(f"LoRA `rank` must be an integer of at least 1, got {rank!r}.")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"LoRA `alpha` must be a finite number above 0, got {alpha!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA `dropout` must be a probability below 1, got {dropout!r}.")
    if not any(name.rpartition(".")[2] in _get_head_names(model) for name, _ in model.named_modules()):
        raise ValueError(
            f"LoRA trains the `classifier` in full, but {type(model).__name__} has no module of this name."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_resolve_target_modules(model, target_modules),
        modules_to_save=get_modules_to_save(model),
    )
    adapted = get_peft_model(model, config)
    # With a name, peft would request it from the Hub at every checkpoint, and write a local path into the file.
    config.base_model_name_or_path = ""
    return adapted


def get_modules_to_save(model: PreTrainedModel) -> list[str]:
    """The `modules_to_save` of peft for a classifier: the modules of the classifier and of ScoreNet.

    peft matches the ends of names, so `classifier` is also that of ScoreNet. A further `scorenet` would be wrong: peft
    would freeze the classifier inside it and train a copy that is not used.
    """
    config, names = model.config, list(_get_head_names(model))
    if getattr(config, "horizontal_layers", None):
        names += [] if "classifier" in names else ["classifier"]
        names += ["scorenet.attention"] if config.effective_scorenet_pooling == "attention" else []
    return names


def _get_head_names(model: nn.Module) -> tuple[str, ...]:
    return getattr(model, "head_names", ("classifier",))


def check_scorenet_trainable(model: nn.Module) -> None:
    """Check that ScoreNet is trained in a model with adapters.

    Raises:
        ValueError: A parameter of a ScoreNet that assesses difficulty is frozen.
    """
    adapters = find_adapter_layers(model)
    if not isinstance(model, TokenMixupModelMixin) or not adapters:
        return
    active = set(adapters[0].active_adapters)
    for index, layer in enumerate(model.get_transformer_layers()):
        if not layer.is_horizontal or layer.config.effective_tau is None:
            continue
        parameters = layer.scorenet.named_parameters()
        frozen = [name for name, parameter in parameters if not parameter.requires_grad and _is_active(name, active)]
        if frozen:
            raise ValueError(
                f"Parameters of ScoreNet before layer {index} are frozen ({', '.join(frozen)}), so it would not learn "
                f"to assess difficulty. Set modules_to_save={get_modules_to_save(model)} without 'scorenet' in the "
                "LoraConfig, or use hf_tokenmixup.training.add_lora."
            )


def _is_active(name: str, active: set[str]) -> bool:
    """Whether a forward pass with the `active` adapters reads a parameter of this name."""
    parts = set(name.split("."))
    return "original_module" not in parts and ("modules_to_save" not in parts or bool(active & parts))


def get_adapter_hyperparameters(model: nn.Module) -> dict[str, Any]:
    """The settings of the adapters as hyperparameters for a model card; empty without adapters.

    Args:
        model: without the wrapper of peft.
    """
    layers = find_adapter_layers(model)
    if not layers:
        return {}
    config = model.peft_config[layers[0].active_adapters[0]]
    if not hasattr(config, "lora_alpha"):
        return {"adapters": str(config.peft_type.value)}
    targets = config.target_modules
    return {
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
    }


def is_adapter_checkpoint(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is peft's: adapters and `modules_to_save`, without the network."""
    return any(Path(checkpoint).glob(f"**/{ADAPTER_CONFIG_NAME}"))


def load_adapter_state_dicts(
    checkpoint: str | Path, model: nn.Module
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    """Yield the name of each adapter of `model`, with its tensors in `checkpoint` and in the model.

    Raises:
        ValueError: `checkpoint` has no file for one of them.
    """
    from peft import get_peft_model_state_dict

    inner = unwrap_peft_model(model)
    # peft saves all adapters, and models of transformers only the active one.
    names = list(inner.peft_config) if inner is not model else [find_adapter_layers(model)[0].active_adapters[0]]
    for name in names:
        folder = Path(checkpoint) / name if inner is not model and name != "default" else Path(checkpoint)
        file = folder / ADAPTER_SAFE_WEIGHTS_NAME
        if not file.is_file():
            raise ValueError(
                f"{folder} has no adapters ({ADAPTER_SAFE_WEIGHTS_NAME}), which a model with LoRA needs. Name a "
                "checkpoint of the same run, or train without LoRA."
            )
        stored = {key.removeprefix(_PREFIX): tensor for key, tensor in load_file(file).items()}
        yield name, stored, get_peft_model_state_dict(inner, adapter_name=name, save_embedding_layers=False)


def _resolve_target_modules(model: PreTrainedModel, names: Sequence[str] | None) -> str | list[str]:
    """The target modules of peft: `names`, or the default of the model's family."""
    names = list(names or (model.get_lora_target_modules() if isinstance(model, TokenMixupModelMixin) else ()))
    if names == [ALL_LINEAR]:
        return ALL_LINEAR
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    missing = [target for target in names if not any(f".{layer}".endswith(f".{target}") for layer in layers)]
    if missing or not names:
        problem = f"{', '.join(missing)} is not a layer of" if missing else "There are no default target modules for"
        known = sorted({layer.rpartition(".")[2] for layer in layers})
        raise ValueError(
            f"{problem} {type(model).__name__}. Pass some of {', '.join(known)}, or {ALL_LINEAR}, as target modules "
            "of LoRA."
        )
    return names
