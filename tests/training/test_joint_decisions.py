"""Common decisions of processes: values, errors and checkpoints, in two processes that gloo connects."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.forked_group import run_in_processes
from torch.utils.data import RandomSampler, WeightedRandomSampler
from transformers import TrainerControl, TrainerState

from hf_tokenmixup.training.checkpointing.disk_space import OutputDirError
from hf_tokenmixup.training.checkpointing.resuming import resolve_resume_checkpoint
from hf_tokenmixup.training.processes import (
    CommonSampler,
    RankSeedCallback,
    check_equal,
    common_seed,
    folder_is_shared,
    on_all_processes,
    on_main_process,
)


def failing_in(rank: int, number: int, error: Exception):
    def function():
        if rank == number:
            raise error
        return rank

    return function


def test_on_main_process_returns_value_or_error_of_main_process(tmp_path):
    assert run_in_processes(lambda rank: on_main_process(lambda: f"chosen by {rank}"), tmp_path) == ["chosen by 0"] * 2


@pytest.mark.parametrize(
    "error, kind",
    [
        (OutputDirError("no room"), "OutputDirError"),
        (FileNotFoundError("no room"), "FileNotFoundError"),
        (json.JSONDecodeError("no room", "{", 1), "ValueError"),
    ],
)
def test_on_main_process_error_raises_in_every_process(tmp_path, error, kind):
    found = run_in_processes(lambda rank: on_main_process(failing_in(rank, 0, error)), tmp_path)
    assert [name for name, _ in found] == [kind] * 2 and all("no room" in message for _, message in found)


def test_on_all_processes_returns_own_values_and_raises_one_error(tmp_path):
    assert run_in_processes(lambda rank: on_all_processes(lambda: rank + 10), tmp_path) == [10, 11]
    (tmp_path / "store").unlink(missing_ok=True)
    found = run_in_processes(lambda rank: on_all_processes(failing_in(rank, 1, OutputDirError("no room"))), tmp_path)
    assert found == [("OutputDirError", "In process 1 of 2: no room")] * 2


def test_on_all_processes_same_error_is_unchanged(tmp_path):
    found = run_in_processes(lambda rank: on_all_processes(failing_in(rank, rank, ValueError("no room"))), tmp_path)
    assert found == [("ValueError", "no room")] * 2


def test_check_equal_different_values_raises_with_name(tmp_path):
    def check(rank):
        check_equal("The dataset", {"classes": ["a", "b"], "images": 5 + rank}, "Copy it.")

    message = "The dataset differs between the 2 processes of this run: images is 5 in process 0 and 6 in process 1."
    assert run_in_processes(check, tmp_path) == [("ValueError", f"{message} Copy it.")] * 2


def test_folder_is_shared_on_separate_disks_is_false(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    assert run_in_processes(lambda rank: folder_is_shared(folders[0]), tmp_path) == [True, True]
    (tmp_path / "store").unlink(missing_ok=True)
    assert run_in_processes(lambda rank: folder_is_shared(folders[rank]), tmp_path) == [False, False]
    assert not list(folders[0].iterdir())


def test_single_process_needs_no_collective():
    assert on_main_process(lambda: 3) == on_all_processes(lambda: 3) == 3
    check_equal("The dataset", {"images": 5}, "")
    with pytest.raises(OutputDirError):
        on_all_processes(failing_in(0, 0, OutputDirError("no room")))


def write_checkpoints(folder: Path, steps: list[int]) -> Path:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


@pytest.mark.parametrize(
    "disks, given, found",
    [
        ([[3, 6], [3, 6]], "last", "checkpoint-6"),
        ([[3, 6], [3, 6]], "{}/checkpoint-3", "checkpoint-3"),
        ([[], []], "auto", None),
        ([[3], [3, 6]], "auto", "checkpoint-3"),
        (
            [[3, 6], [3]],
            "auto",
            "process 1 of 2 cannot be resumed from: there is no such folder. Resume from checkpoint-3, which",
        ),
        ([[3, 6], [3]], "{}/checkpoint-6", "process 1 of 2 cannot be resumed from: there is no such folder"),
        ([[3, 6], []], "last", "there is no such folder. Copy it there, or start a new run"),
        ([[], [3]], "auto", "of process 1 of 2 contains checkpoint-3, and the main process"),
        ([[], [3]], "last", "There is no complete checkpoint in"),
    ],
)
def test_checkpoint_to_resume_separate_disks_agree_or_raise_together(tmp_path, disks, given, found):
    folders = [write_checkpoints(tmp_path / str(rank), steps) for rank, steps in enumerate(disks)]
    chosen = run_in_processes(
        lambda rank: resolve_resume_checkpoint(given.format(folders[rank]), folders[rank]), tmp_path
    )
    if found is None or found.startswith("checkpoint-"):
        assert chosen == [found and str(folder / found) for folder in folders]
    else:
        assert chosen[0] == chosen[1] and chosen[0][0] == "ValueError" and re.search(found, chosen[0][1]), chosen


def test_checkpoint_to_resume_same_name_of_another_step_raises_in_both(tmp_path):
    folders = [write_checkpoints(tmp_path / str(rank), [3]) for rank in range(2)]
    (folders[1] / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({"global_step": 4}))
    first, second = run_in_processes(lambda rank: resolve_resume_checkpoint("last", folders[rank]), tmp_path)
    assert first == second and "it is of step 4, and that of the main process of step 3" in first[1]


def arguments_of(rank: int, world: int = 2, **more) -> SimpleNamespace:
    return SimpleNamespace(seed=7, process_index=rank, world_size=world, **more)


def draws() -> list[float]:
    return [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002


def after_begin(args) -> list[float]:
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    RankSeedCallback().on_train_begin(args, TrainerState(), TrainerControl())
    return draws()


def test_rank_seed_differs_by_rank_and_is_repeatable():
    first, second = after_begin(arguments_of(0)), after_begin(arguments_of(1))
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert second == after_begin(arguments_of(1))
    # As `seed + rank` of another run, as timm has it.
    assert second == after_begin(SimpleNamespace(seed=8, process_index=0, world_size=2))
    largest = SimpleNamespace(seed=2**32 - 1, process_index=1, world_size=2)
    assert after_begin(largest) == after_begin(SimpleNamespace(seed=0, process_index=0, world_size=2))


@pytest.mark.parametrize(
    "args",
    [arguments_of(0, 1), arguments_of(1, 2, parallelism_config=SimpleNamespace(non_data_parallel_size=2))],
    ids=["one process", "processes that share their images"],
)
def test_rank_seed_in_single_process_changes_nothing(args):
    found = after_begin(args)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    assert found == draws()


def test_rank_seed_after_training_is_common():
    found = []
    for rank in range(2):
        after_begin(arguments_of(rank))
        RankSeedCallback().on_train_end(arguments_of(rank), TrainerState(), TrainerControl())
        found.append(draws())
    assert found[0] == found[1]


def test_common_seed_restores_random_state_of_rank():
    seeds, following = [], []
    for rank in range(2):
        after_begin(arguments_of(rank))
        state = torch.get_rng_state()
        with common_seed(arguments_of(rank)):
            seeds.append(torch.random.initial_seed())
            torch.rand(3)
        assert torch.equal(torch.get_rng_state(), state)
        following.append(torch.random.initial_seed())
    assert seeds == [7, 7] and following == [7, 8]


def test_common_sampler_order_depends_on_seed_and_epoch():
    orders = []
    for rank, epoch in ((0, 0), (1, 0), (0, 1)):
        after_begin(arguments_of(rank))
        expected = draws()
        after_begin(arguments_of(rank))
        weighted = WeightedRandomSampler([1.0, 2.0, 3.0] * 10, 30)
        sampler = CommonSampler.wrap(weighted, 7, lambda epoch=epoch: epoch)
        assert isinstance(sampler, CommonSampler) and len(sampler) == 30
        orders.append(list(sampler))
        assert draws() == expected
    assert orders[0] == orders[1] != orders[2]


def test_common_sampler_with_seeded_sampler_returns_it_unchanged():
    for sampler in (
        None,
        RandomSampler(range(3)),
        WeightedRandomSampler([1.0], 1, generator=torch.Generator()),
    ):
        assert CommonSampler.wrap(sampler, 7, int) is sampler
