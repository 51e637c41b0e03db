"""LoRA (Hu et al., 2022), by peft: low-rank adapters train in place of the network's own weights.

The classifier and ScoreNet belong to the task and not to the network that is adapted: they train in full.
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

from ..models import TokenMixupModelMixin, find_adapter_layers

if TYPE_CHECKING:
    from peft import PeftModel

ALL_LINEAR = "all-linear"
# What peft puts in front of the names in its files.
_PREFIX = "base_model.model."


@dataclass
class LoraArguments:
    """Options of LoRA on the command line.

    Raises:
        ValueError: for a negative rank, and for settings of LoRA without a rank.
    """

    _argument_group_name = "LoRA (needs peft)"

    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train adapters of this rank, classifier and ScoreNet alone (0: off)."},
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "The adapters' share is scaled by this over the rank (twice the rank)."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "What to adapt, if not q_proj v_proj (vit) or qkv (cct); or all-linear."},
    )

    def __post_init__(self):
        if self.lora_rank is not None and self.lora_rank < 0:
            raise ValueError(f"--lora_rank must be at least 1, or 0 for no LoRA; got {self.lora_rank}.")
        without_effect = [name for name, value in vars(self).items() if value and name != "lora_rank"]
        if not self.lora_rank and without_effect:
            raise ValueError(f"--{without_effect[0]} belongs to LoRA, which is off: give --lora_rank too, 8 say.")

    def apply(self, model: PreTrainedModel) -> "PreTrainedModel | PeftModel":
        """`model` with adapters, see :func:`add_lora`; as it is if LoRA is off."""
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
    """Put adapters into a classifier, so that they, the classifier and ScoreNet train and nothing else.

    The first forward is that of the model without adapters, which start as zeros.

    Args:
        model: any image classifier of transformers whose last part is called `classifier`. It is changed in place.
        rank: r, of each adapter.
        alpha: an adapter's output is scaled by alpha / r; None: twice the rank.
        dropout: probability, in front of the adapters.
        target_modules: what is adapted, by the ends of names; `["all-linear"]`: every linear layer. None: attention's
            projections to queries and values, for the families that mix tokens.

    Raises:
        ValueError: without peft; for a setting out of its range; for a name that no linear layer or convolution has,
            and for None where the family has no default.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        missing = 'LoRA needs peft, which is not installed: pip install -e ".[lora]", or pip install peft.'
        raise ValueError(missing) from error
    alpha = 2 * rank if alpha is None else alpha
    if not (isinstance(rank, int) and rank >= 1):
        raise ValueError(f"LoRA's rank must be an integer of at least 1, got {rank!r}.")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"LoRA's alpha must be a finite number above 0, got {alpha!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA's dropout must be a probability below 1, got {dropout!r}.")
    if not hasattr(model, "classifier"):
        raise ValueError(f"LoRA trains the `classifier` in full, and {type(model).__name__} has no part of this name.")
    targets, in_full = _resolve_target_modules(model, target_modules), get_modules_to_save(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=in_full,
    )
    adapted = get_peft_model(model, config)
    # With a name, peft would ask the Hub about it at every checkpoint, and write a folder of this machine into it.
    config.base_model_name_or_path = ""
    return adapted


def get_modules_to_save(model: PreTrainedModel) -> list[str]:
    """The `modules_to_save` of peft for a classifier: the parts of the classifier and of ScoreNet.

    peft goes by the ends of names: `classifier` is ScoreNet's too. `scorenet` beside it would be wrong: peft would
    freeze the one classifier inside it and train another that nothing reads.
    """
    config = model.config
    pools = getattr(config, "horizontal_layers", None) and config.scorenet_pooling == "attention"
    return ["classifier", "scorenet.attention"] if pools else ["classifier"]


def check_scorenet_trainable(model: nn.Module) -> None:
    """
    Raises:
        ValueError: `model` has adapters, and a part of ScoreNet that is asked for difficulties stays as it is.
    """
    adapters = find_adapter_layers(model)
    if not isinstance(model, TokenMixupModelMixin) or not adapters:
        return
    active = set(adapters[0].active_adapters)
    for index, layer in enumerate(model.get_transformer_layers()):
        if not layer.is_horizontal or layer.config.horizontal_tau is None:
            continue
        parameters = layer.scorenet.named_parameters()
        frozen = [name for name, parameter in parameters if not parameter.requires_grad and _is_active(name, active)]
        if frozen:
            raise ValueError(
                f"ScoreNet in front of layer {index} would not train ({', '.join(frozen)}), and could not tell easy "
                f"images: give the adapters' configuration modules_to_save={get_modules_to_save(model)}, without "
                "'scorenet', as hf_tokenmixup.training.add_lora does."
            )


def _is_active(name: str, active: set[str]) -> bool:
    """Whether a parameter of this name is one that a forward with the `active` adapters reads."""
    parts = set(name.split("."))
    return "original_module" not in parts and ("modules_to_save" not in parts or bool(active & parts))


def get_adapter_hyperparameters(model: nn.Module) -> dict[str, Any]:
    """The adapters' settings as hyperparameters for a model card; empty without adapters.

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
    """Whether peft has written a checkpoint: the adapters and what trains in full, without the network."""
    return any(Path(checkpoint).glob(f"**/{ADAPTER_CONFIG_NAME}"))


def load_adapter_state_dicts(
    checkpoint: str | Path, model: nn.Module
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    """For each adapter of `model` its name, and its tensors by name: those in `checkpoint` and those of the model.

    Raises:
        ValueError: `checkpoint` lacks one.
    """
    from peft import get_peft_model_state_dict

    inner = unwrap_peft_model(model)
    # peft writes all adapters, transformers' own models the one that is in use.
    names = list(inner.peft_config) if inner is not model else [find_adapter_layers(model)[0].active_adapters[0]]
    for name in names:
        folder = Path(checkpoint) / name if inner is not model and name != "default" else Path(checkpoint)
        file = folder / ADAPTER_SAFE_WEIGHTS_NAME
        if not file.is_file():
            raise ValueError(
                f"{folder} holds no adapters ({ADAPTER_SAFE_WEIGHTS_NAME}), as a model with LoRA needs them: name a "
                "checkpoint of the same training, or train without --lora_rank."
            )
        held = {key.removeprefix(_PREFIX): tensor for key, tensor in load_file(file).items()}
        yield name, held, get_peft_model_state_dict(inner, adapter_name=name, save_embedding_layers=False)


def _resolve_target_modules(model: PreTrainedModel, names: Sequence[str] | None) -> str | list[str]:
    names = list(names or getattr(model, "lora_target_modules", ()))
    if names == [ALL_LINEAR]:
        return ALL_LINEAR
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    missing = [target for target in names if not any(f".{layer}".endswith(f".{target}") for layer in layers)]
    if missing or not names:
        said = f"{', '.join(missing)} is no layer" if missing else "There is no default of what LoRA is to adapt"
        known = sorted({layer.rpartition(".")[2] for layer in layers})
        raise ValueError(
            f"{said} in {type(model).__name__}: name some of {', '.join(known)}, or {ALL_LINEAR}, as "
            "--lora_target_modules."
        )
    return names
