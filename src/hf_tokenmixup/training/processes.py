"""What the processes of a run decide together, and random numbers that are each process's own.

What a process finds on its disk, or in its download, can differ from what the others find. Where the run depends on
it, the main process decides or all processes compare, and all of them raise the same error.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ..data.dataset import fork_rngs, seed_rngs

T = TypeVar("T")

NUM_SEEDS = 2**32
# How long a file may take to appear on another machine that shares the folder.
MAX_DELAY_S = 2.0


def connected() -> bool:
    """Whether this process is one of several that `torch.distributed` connects."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(value: T) -> list[T]:
    """The `value` of every process, in the order of their ranks; it is pickled."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main_process(decide: Callable[[], T]) -> T:
    """Call a function in the main process alone and return its value in every process.

    Args:
        decide: Takes no argument and uses no collective operation. Its value is pickled.

    Raises:
        ValueError, OSError: In every process, what the function raised in the main one.
    """
    if not connected():
        return decide()
    outcomes = [_outcome(decide) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcomes, src=0)
    outcome = outcomes[0]
    if outcome.kind is not None:
        raise outcome.as_error()
    return outcome.value


def on_all_processes(function: Callable[[], T]) -> T:
    """Call a function in every process and return to each its own value, or raise in all of them.

    Args:
        function: Takes no argument.

    Raises:
        ValueError, OSError: In every process, the error of the first process that raised one. Where not all processes
            raised the same, the message names that process.
    """
    if not connected():
        return function()
    own = _outcome(function)
    outcomes = gather(own._replace(value=None))
    failed = [rank for rank, outcome in enumerate(outcomes) if outcome.kind is not None]
    if not failed:
        return own.value
    first = outcomes[failed[0]]
    if any(outcome.message != first.message for outcome in outcomes):
        first = first._replace(message=f"In process {failed[0]} of {len(outcomes)}: {first.message}")
    raise first.as_error()


def check_equal(what: str, values: Mapping[str, Any], hint: str) -> None:
    """Compare values that must be the same in all processes.

    Args:
        what: The subject of the error message.
        values: By the names that the message gives them; pickled and compared with `==`.
        hint: The last sentence of the message.

    Raises:
        ValueError: In every process, if one has another value than the main process.
    """
    if not connected():
        return
    everyone = gather(dict(values))
    for name, expected in everyone[0].items():
        for rank, found in enumerate(everyone):
            if found.get(name) != expected:
                raise ValueError(
                    f"{what} differs between the {len(everyone)} processes of this run: {name} is {expected!s:.200} "
                    f"in process 0 and {found.get(name)!s:.200} in process {rank}. {hint}"
                )


def folder_is_shared(folder: str | Path) -> bool:
    """Whether a file that the main process writes into this folder is there for all processes. The folder must exist.

    Not so with separate disks, or where the name of the folder differs.
    """
    if not connected():
        return True
    # A new name: network file systems may remember that one was not there.
    name = on_main_process(lambda: _touch(Path(folder) / f".{uuid.uuid4().hex}"))
    probe = Path(folder) / name
    deadline = time.monotonic() + MAX_DELAY_S
    while not (seen := probe.is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    shared = all(gather(seen))
    if dist.get_rank() == 0:
        probe.unlink(missing_ok=True)
    return shared


def _touch(file: Path) -> str:
    file.touch()
    return file.name


def draws_by_rank(args: TrainingArguments) -> bool:
    """Whether each process of a run has images, and therefore random numbers, of its own.

    False for a single process, and with tensor, context or sequence parallelism, whose processes share their images.
    """
    parallelism = getattr(args, "parallelism_config", None)
    return args.world_size > 1 and getattr(parallelism, "non_data_parallel_size", 1) == 1


class RankSeedCallback(TrainerCallback):
    """Seed each process with `seed + rank` when training begins, as timm and the paper's code do.

    The model is built from the common seed, so that all processes have the same initial weights. In training, dropout,
    the mixup ratio, the CutMix box and the random choices of TokenMixup then differ between the processes. In a
    resumed run, the Trainer restores the random state of each process before its first step.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if draws_by_rank(args):
            set_seed((args.seed + args.process_index) % NUM_SEEDS)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # What is drawn next, such as the weights of another model, agrees again.
        if draws_by_rank(args):
            set_seed(args.seed)


@contextmanager
def common_seed(args: TrainingArguments) -> Iterator[None]:
    """Let torch's CPU generator have the common seed inside, where processes would have seeds of their own.

    accelerate takes the seed of the sampler from there, which decides who reads which images.
    """
    if not draws_by_rank(args):
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)
        yield


class CommonSampler(Sampler[int]):
    """Draws the order of another sampler from (seed, epoch) alone, so that all processes get the same order.

    For samplers that draw from a global generator, such as `WeightedRandomSampler`: each process keeps its own batches
    of the order, and these are disjoint only if the order is the same.

    Args:
        sampler: Yields indices.
        seed: Common to all processes.
        epoch: Returns the number of the current epoch.
    """

    def __init__(self, sampler: Sampler[int], seed: int, epoch: Callable[[], int]) -> None:
        self.sampler = sampler
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        with fork_rngs():
            seed_rngs(True, self.seed, self.epoch())
            indices = list(self.sampler)
        return iter(indices)

    def __len__(self) -> int:
        return len(self.sampler)

    @classmethod
    def wrap(cls, sampler: Any, seed: int, epoch: Callable[[], int]) -> Any:
        """`sampler`, wrapped if it may draw from a global generator."""
        # accelerate seeds a RandomSampler; with `set_epoch` or a generator, a sampler has a seed of its own.
        known = sampler is None or type(sampler) in (RandomSampler, SequentialSampler)
        if known or hasattr(sampler, "set_epoch") or getattr(sampler, "generator", None) is not None:
            return sampler
        return cls(sampler, seed, epoch)


class _Outcome(NamedTuple):
    """What a function returned, or the kind and the message of its error: all that can be pickled for certain."""

    value: Any = None
    kind: type[Exception] | None = None
    message: str = ""

    def as_error(self) -> Exception:
        with contextlib.suppress(TypeError):
            return self.kind(self.message)
        # Some kinds, such as `json.JSONDecodeError`, take more than a message.
        return ValueError(self.message) if issubclass(self.kind, ValueError) else OSError(self.message)


def _outcome(function: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(value=function())
    except (ValueError, OSError) as error:
        return _Outcome(kind=type(error), message=str(error))
