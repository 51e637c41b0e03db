"""With `full_determinism`, two runs end with the same weights, bit for bit."""

import pytest
import torch
from helpers.tiny_training import Images, tokenmixup_cct, tokenmixup_vit

from hf_tokenmixup.training import TokenMixupTrainer


@pytest.fixture
def restored_determinism(monkeypatch):
    """`full_determinism` changes settings of torch and of CUDA for the process."""
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic


@pytest.mark.usefixtures("restored_determinism")
@pytest.mark.parametrize("use_cpu", [True, pytest.param(False, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
@pytest.mark.parametrize("make_model", [tokenmixup_vit, tokenmixup_cct], ids=["vit", "cct"])
def test_full_determinism_two_runs_have_equal_weights(arguments, make_model, use_cpu):
    settings = {"full_determinism": True, "max_steps": 4, "mixup_alpha": 0.5, "seed": 3, "use_cpu": use_cpu}
    ends = []
    for _ in range(2):
        trainer = TokenMixupTrainer(make_model(), arguments(**settings), train_dataset=Images(24))
        trainer.train()
        assert torch.are_deterministic_algorithms_enabled()
        ends.append({name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()})
    start = make_model().state_dict()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in ends[0].items())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
