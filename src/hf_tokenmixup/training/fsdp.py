"""FSDP2: what a model is sharded by."""

from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn


def set_transformer_layer_cls_to_wrap(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """Name the classes of modules that are sharded each by itself, where the user named none.

    They are the model's own `_no_split_modules`, without those around its input embedding: accelerate (seen in 1.15)
    shards that one by itself as well, and torch refuses to shard a parameter twice.
    """
    names = getattr(model, "_no_split_modules", None)
    if plugin.transformer_cls_names_to_wrap is not None or not names:
        return
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return
    around = {type(module).__name__ for module in model.modules() if embedding in module.children()}
    plugin.transformer_cls_names_to_wrap = sorted(set(names) - around)
