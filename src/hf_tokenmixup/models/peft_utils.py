"""Helpers for adapters of peft. peft is optional, so adapter layers are detected by their attributes."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import is_peft_available


class AdapterMethods:
    """Mixin with `add_adapter` of `PreTrainedModel`. Precedes `PreTrainedModel` among the base classes."""

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Call `PreTrainedModel.add_adapter`.

        Raises:
            ValueError: if this version of transformers needs another version of peft.
        """
        with _explain_peft_version():
            return super().add_adapter(*args, **kwargs)


@contextmanager
def _explain_peft_version() -> Iterator[None]:
    """Add installed versions and a hint to the error of transformers for an unsupported version of peft."""
    try:
        yield
    except ValueError as error:
        if "version of PEFT" not in str(error) or not is_peft_available():
            raise
        raise ValueError(
            f"transformers {version('transformers')} needs peft {MIN_PEFT_VERSION} or newer for `add_adapter`, "
            f"and peft {version('peft')} is installed. Run `pip install 'peft>={MIN_PEFT_VERSION}'`, or use "
            "`hf_tokenmixup.training.add_lora(model)`, which works with the installed version."
        ) from error


def find_adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Find the adapter layers of peft in a model. Each has the adapted layer as `base_layer`."""
    return [module for module in model.modules() if hasattr(module, "base_layer")]


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model with its adapters merged into the adapted weights. Other weights are shared.

    Modules that peft trains completely (`modules_to_save`) are replaced by their trained copies.

    Args:
        model: model; it is not changed.

    Returns:
        The merged copy, or the model itself if it has no adapters.
    """
    adapters = find_adapter_layers(model)
    if not adapters and not any(map(_is_modules_to_save_wrapper, model.modules())):
        return model
    # Merging changes the adapted weights, so these are copied.
    adapted = {id(tensor) for layer in adapters for tensor in layer.parameters()}
    shared = {id(tensor): nn.Parameter(tensor.detach()) for tensor in model.parameters() if id(tensor) not in adapted}
    merged = copy.deepcopy(model, shared)
    done: tuple[str, ...] = ()
    for name, module in list(merged.named_modules()):
        if name.startswith(done):
            continue
        if _is_modules_to_save_wrapper(module):
            merged_module = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        elif hasattr(module, "base_layer"):
            module.merge(safe_merge=True)
            merged_module = module.get_base_layer()
        else:
            continue
        merged.set_submodule(name, merged_module)
        done += (f"{name}.",)
    merged.peft_config = None
    merged._hf_peft_config_loaded = False
    return merged.requires_grad_(True)


def _is_modules_to_save_wrapper(module: nn.Module) -> bool:
    """Whether a module is peft's wrapper of a completely trained module (`modules_to_save`)."""
    return hasattr(module, "unload_and_optionally_merge_module")
