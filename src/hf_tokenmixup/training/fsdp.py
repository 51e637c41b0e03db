"""FSDP2: the module classes to wrap."""

from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from transformers import PreTrainedModel

from ..models import FAMILIES, describe_unsupported


def set_transformer_layer_cls_to_wrap(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """Set the module classes that FSDP wraps, unless the user set them.

    They are the model's `_no_split_modules`, with the class of its transformer layers, without classes that the model
    does not contain, for which accelerate raises an error, and without the parents of its input embedding. Accelerate
    1.15 wraps the embedding too, and torch rejects a parameter that is sharded twice.
    """
    embedding = _get_input_embedding(model)
    names = {*(getattr(model, "_no_split_modules", None) or ()), *_get_layer_names(model)}
    if plugin.transformer_cls_names_to_wrap is not None or not names:
        return
    parents = {type(module).__name__ for module in model.modules() if embedding in module.children()}
    present = {type(module).__name__ for module in model.modules()}
    plugin.transformer_cls_names_to_wrap = sorted(names & present - parents)


def _get_input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the input embedding. If the model has none, it returns None from now on where it raised an error."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        # Accelerate calls this method, and does not expect the error that models of transformers raise.
        model.get_input_embeddings = _no_embedding
        return None


def _no_embedding() -> None:
    return None


def _get_layer_names(model: nn.Module) -> set[str]:
    """Return the class names of the transformer layers of a family, of a plain model too."""
    if not isinstance(model, PreTrainedModel) or describe_unsupported(model.config.to_dict()) is not None:
        return set()
    model_class = FAMILIES[model.config.model_type][1]
    return {type(layer).__name__ for layer in model_class.get_transformer_layers(model)}
