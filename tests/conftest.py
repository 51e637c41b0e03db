"""Fixtures of all tests."""

import os

import pytest
import torch
from fake_hub.server import Hub
from huggingface_hub import constants

TOKENS = {"hf_alice": "alice", "hf_bob": "bob", "hf_reader": ("alice", "read")}


def pytest_configure():
    # Parallel workers of pytest-xdist share the cores.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Start a fake Hub, and make the client of this process use it."""
    with Hub(TOKENS) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # The default of 10 seconds is too short for a busy machine.
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 600)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 600)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
    # Some versions of the client request this path by themselves.
    assert not [request for request in server.unknown_requests if request.path != "/api/agent-harnesses"]


@pytest.fixture
def separate_projections(monkeypatch):
    """Project the input of CCT layers for saliency and for attention separately, as gradient checkpointing does.

    One projection for both adds its gradient in another order, so that gradients are equal to rounding only.
    """
    layer = "hf_tokenmixup.models.cct.modeling_tokenmixup_cct.TokenMixupCctLayer"
    monkeypatch.setattr(f"{layer}.project_input", lambda self, hidden: None)
