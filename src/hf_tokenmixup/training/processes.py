"""Common decisions and errors of the processes of a run, and a random seed for each process.

The files on the disk of a process can differ from those of another process. If the run depends on them, the main
process decides or all processes compare their files, and all processes raise the same error.
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
# Maximum number of seconds until a new file appears on another machine that shares the folder.
MAX_DELAY_S = 2.0


def is_distributed() -> bool:
    """Return whether the process group of `torch.distributed` has several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(value: T) -> list[T]:
    """Gather a value that can be pickled from all processes, in the order of their ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main_process(function: Callable[[], T]) -> T:
    """Call a function in the main process only, and return its value in all processes.

    Args:
        function: Function without arguments that uses no collective operation. Its value can be pickled.

    Raises:
        ValueError, OSError: The function raised this error in the main process. All processes raise it.
    """
    if not is_distributed():
        return function()
    outcomes = [_get_outcome(function) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcomes, src=0)
    outcome = outcomes[0]
    if outcome.error_type is not None:
        raise outcome.build_error()
    return outcome.value


def on_all_processes(function: Callable[[], T]) -> T:
    """Call a function in all processes. If one call raises an error, all processes raise it.

    Args:
        function: Function without arguments.

    Returns:
        The value of the function in this process.

    Raises:
        ValueError, OSError: The function raised an error. It is that of the lowest rank in all processes. The message
            names this rank, unless all processes raised the same error.
    """
    if not is_distributed():
        return function()
    outcome = _get_outcome(function)
    # The values stay in their processes, as they may be large or impossible to pickle.
    outcomes = gather(outcome._replace(value=None))
    failed_ranks = [rank for rank, other in enumerate(outcomes) if other.error_type is not None]
    if not failed_ranks:
        return outcome.value
    first = outcomes[failed_ranks[0]]
    if any(other.message != first.message for other in outcomes):
        first = first._replace(message=f"In process {failed_ranks[0]} of {len(outcomes)}: {first.message}")
    raise first.build_error()


def check_equal(subject: str, values: Mapping[str, Any], hint: str) -> None:
    """Check that values are the same in all processes.

    Args:
        subject: Subject of the error message, such as `The dataset`.
        values: Values by their names in the message. They can be pickled, and are compared with `==`.
        hint: Last sentence of the message.

    Raises:
        ValueError: A process has another value than the main process. All processes raise this error.
    """
    if not is_distributed():
        return
    values_by_rank = gather(dict(values))
    for name, expected in values_by_rank[0].items():
        for rank, found in enumerate(values_by_rank):
            if found.get(name) != expected:
                raise ValueError(
                    f"{subject} differs between the {len(values_by_rank)} processes of this run: {name} is "
                    f"{expected!s:.200} in process 0 and {found.get(name)!s:.200} in process {rank}. {hint}"
                )


def folder_is_shared(folder: str | Path) -> bool:
    """Return whether all processes see the files that the main process writes to a folder.

    They do not if the processes have separate disks, or different names of the folder.

    Args:
        folder: Existing folder.
    """
    if not is_distributed():
        return True
    # A network file system may cache that a name does not exist, so the name is new.
    name = on_main_process(lambda: _create_file(Path(folder) / f".{uuid.uuid4().hex}"))
    probe = Path(folder) / name
    deadline = time.monotonic() + MAX_DELAY_S
    while not (is_visible := probe.is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    is_shared = all(gather(is_visible))
    if dist.get_rank() == 0:
        probe.unlink(missing_ok=True)
    return is_shared


def _create_file(file: Path) -> str:
    file.touch()
    return file.name


def is_data_parallel(args: TrainingArguments) -> bool:
    """Return whether each process of a run has different images, and therefore a different random seed.

    A single process does not, nor do processes that share images: those of tensor, context or sequence parallelism.
    """
    parallelism = getattr(args, "parallelism_config", None)
    return args.world_size > 1 and getattr(parallelism, "non_data_parallel_size", 1) == 1


class RankSeedCallback(TrainerCallback):
    """Seed each process with `seed + rank` when training begins, as timm and the paper's code do.

    The model is built with the common seed, so that all processes have the same initial weights. During training,
    dropout, `lam` of mixup, the CutMix box and the random choices of TokenMixup differ between the processes. In a
    resumed run, Trainer restores the random state of each process before its first step.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if is_data_parallel(args):
            set_seed((args.seed + args.process_index) % NUM_SEEDS)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # Random numbers after the run, such as the weights of another model, are the same in all processes again.
        if is_data_parallel(args):
            set_seed(args.seed)


@contextmanager
def common_seed(args: TrainingArguments) -> Iterator[None]:
    """Seed torch's CPU generator with the common seed inside of a context, if processes have different seeds.

    accelerate draws the seed of the sampler from this generator. The processes read disjoint images only if the seed
    is the same.
    """
    if not is_data_parallel(args):
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)
        yield


class CommonSampler(Sampler[int]):
    """Sampler whose order depends on seed and epoch only, so that it is the same in all processes.

    It wraps a sampler that draws from a global generator, such as `WeightedRandomSampler`. Each process selects its
    batches from the order, and these are disjoint only if the order is the same.

    Args:
        sampler: Sampler of indices.
        seed: Seed that is the same in all processes.
        epoch_fn: Function that returns the current epoch.
    """

    def __init__(self, sampler: Sampler[int], seed: int, epoch_fn: Callable[[], int]) -> None:
        self.sampler = sampler
        self.seed = seed
        self.epoch_fn = epoch_fn

    def __iter__(self) -> Iterator[int]:
        with fork_rngs():
            seed_rngs(True, self.seed, self.epoch_fn())
            indices = list(self.sampler)
        return iter(indices)

    def __len__(self) -> int:
        return len(self.sampler)

    @classmethod
    def wrap(cls, sampler: Any, seed: int, epoch_fn: Callable[[], int]) -> Any:
        """Wrap a sampler that may draw from a global generator. Other samplers are returned unchanged."""
        # accelerate seeds a RandomSampler. A sampler with `set_epoch` or a generator does not use a global generator.
        is_standard = sampler is None or type(sampler) in (RandomSampler, SequentialSampler)
        if is_standard or hasattr(sampler, "set_epoch") or getattr(sampler, "generator", None) is not None:
            return sampler
        return cls(sampler, seed, epoch_fn)


class _Outcome(NamedTuple):
    """Value of a function, or type and message of its error. Not every error can be pickled, but these can."""

    value: Any = None
    error_type: type[Exception] | None = None
    message: str = ""

    def build_error(self) -> Exception:
        with contextlib.suppress(TypeError):
            return self.error_type(self.message)
        # Some types, such as `json.JSONDecodeError`, require other arguments too.
        return ValueError(self.message) if issubclass(self.error_type, ValueError) else OSError(self.message)


def _get_outcome(function: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(value=function())
    except (ValueError, OSError) as error:
        return _Outcome(error_type=type(error), message=str(error))
