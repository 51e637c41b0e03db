"""FSDP2: the module classes to wrap."""

from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn


def set_transformer_layer_cls_to_wrap(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """Set the module classes that FSDP wraps, unless the user set them.

    They are the model's `_no_split_modules` without the parents of its input embedding. Accelerate 1.15 wraps the
    embedding too, and torch rejects a parameter that is sharded twice.
    """
    names = getattr(model, "_no_split_modules", None)
    if plugin.transformer_cls_names_to_wrap is not None or not names:
        return
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        # transformers raises it for a model without an input embedding, so there is nothing to exclude.
        return
    parents = {type(module).__name__ for module in model.modules() if embedding in module.children()}
    plugin.transformer_cls_names_to_wrap = sorted(set(names) - parents)
