"""Number of operators of a training step, which is its cost where kernel launches are the limit."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operators that launch no kernel, besides those that return views.
FREE_OPERATORS = frozenset({"detach", "_unsafe_view", "empty", "scalar_tensor"})


class CountOperators(TorchDispatchMode):
    """Context manager that counts the operators of torch, without those that launch no kernel.

    Attributes:
        counts: number of calls by the name of the operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.__name__.partition(".")[0]
        if not (func.is_view or name in FREE_OPERATORS):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_operators(call: Callable[[], object]) -> int:
    """Return the number of operators in a call."""
    with CountOperators() as counter:
        call()
    return counter.counts.total()
