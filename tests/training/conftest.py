"""Small arguments for the tests of training."""

from pathlib import Path

import pytest
import torch

from hf_tokenmixup.training import TokenMixupTrainingArguments


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def arguments(tmp_path: Path):
    """Makes training arguments for a folder of this test, without reports and progress bars."""

    def make(**settings) -> TokenMixupTrainingArguments:
        settings = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "save_strategy": "no"} | settings
        settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.1} | settings
        settings = {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "optim": "sgd"} | settings
        return TokenMixupTrainingArguments(**{"max_grad_norm": 0.0} | settings)

    return make
