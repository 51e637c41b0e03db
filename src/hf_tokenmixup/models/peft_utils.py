"""Adapters of peft (LoRA and its kin) inside a model, told by what they offer: peft is an optional library."""

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
    """`add_adapter` of a `PreTrainedModel`, which this class precedes among the bases."""

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`.

        Raises:
            ValueError: this version of transformers needs another version of peft.
        """
        with _explained_peft_version():
            return super().add_adapter(*args, **kwargs)


@contextmanager
def _explained_peft_version() -> Iterator[None]:
    """Explain which versions are installed, and what helps, where transformers refuses the installed peft."""
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
    """The modules of peft that adapt a layer; each holds that layer as ``base_layer``."""
    return [module for module in model.modules() if hasattr(module, "base_layer")]


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with the adapters merged into the weights that they adapt; all other weights are shared.

    Where peft trains a copy of a module in full, that copy takes the module's place. The model itself stays as it is;
    one that has no adapters is returned.
    """
    adapters = find_adapter_layers(model)
    if not adapters and not any(map(_is_modules_to_save_wrapper, model.modules())):
        return model
    # Merging writes into the weights below an adapter, so those are copied.
    adapted = {id(tensor) for layer in adapters for tensor in layer.parameters()}
    shared = {id(tensor): nn.Parameter(tensor.detach()) for tensor in model.parameters() if id(tensor) not in adapted}
    merged = copy.deepcopy(model, shared)
    done: tuple[str, ...] = ()
    for name, module in list(merged.named_modules()):
        if name.startswith(done):
            continue
        if _is_modules_to_save_wrapper(module):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        elif hasattr(module, "base_layer"):
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        else:
            continue
        merged.set_submodule(name, plain)
        done += (f"{name}.",)
    merged.peft_config = None
    merged._hf_peft_config_loaded = False
    return merged.requires_grad_(True)


def _is_modules_to_save_wrapper(module: nn.Module) -> bool:
    """Whether this is peft's way to train a module in full beside the adapters."""
    return hasattr(module, "unload_and_optionally_merge_module")
