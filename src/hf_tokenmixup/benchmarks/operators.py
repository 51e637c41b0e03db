"""What a training step computes, free of noise: operators (kernel launches), floating-point operations and bytes."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Operators that launch no kernel, besides those that return views.
FREE_OPERATORS = frozenset({"detach", "_unsafe_view", "empty", "scalar_tensor"})


@dataclass(frozen=True)
class Work:
    """What a call computes.

    Attributes:
        operators: number of operators, without those that launch no kernel.
        flops: floating-point operations of matrix products, convolutions and attention.
        moved_bytes: bytes of the tensors that operators read and write.
    """

    operators: int
    flops: int
    moved_bytes: int


# `FlopCounterMode` of torch follows the modules of a model by gradient hooks, which fail where a forward pass computes
# a gradient, as the gradient detector does.
class CountOperators(TorchDispatchMode):
    """Context manager that counts the operators of torch, without those that launch no kernel.

    Attributes:
        counts: number of calls by the name of the operator.
        flops: floating-point operations, by torch's formulas.
        moved_bytes: bytes of all tensors that the operators take and return; an expanded tensor has at most those of
            its memory. Within an operator, temporary tensors and repeated reads do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.flops = 0
        self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        name = func.__name__.partition(".")[0]
        if not (func.is_view or name in FREE_OPERATORS):
            self.counts[name] += 1
            tensors = _tensors_in([*args, *(kwargs or {}).values(), result])
            self.moved_bytes += sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)
        return result


def count_work(
    call: Callable[[], object], small_call: Callable[[], object] | None = None, device: torch.device | str = "cpu"
) -> Work:
    """Count what a function computes.

    Args:
        call: function without arguments. It is called twice.
        small_call: the same with few images, whose operators are counted instead. On a CPU, saliency by several
            queries is detected in chunks of images, whose number depends on the batch size. None: those of `call`.
        device: device of the tensors.
    """
    with CountOperators() as counter:
        call()
    # Some versions of torch do not count the fused attention of a CPU (torch 2.6). On an accelerator, complete maps
    # could need more memory than there is.
    attention = sdpa_kernel(SDPBackend.MATH) if torch.device(device).type == "cpu" else nullcontext()
    with attention, CountOperators() as flop_counter:
        call()
    counts = counter.counts
    if small_call is not None:
        with CountOperators() as small_counter:
            small_call()
        counts = small_counter.counts
    return Work(counts.total(), flop_counter.flops, counter.moved_bytes)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Tensors among arguments or results of an operator, which may be in lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
