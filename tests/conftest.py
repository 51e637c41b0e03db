"""The tests' Hub as the one that the client talks to in this process."""

import pytest
from fake_hub.server import Hub
from huggingface_hub import constants

TOKENS = {"hf_alice": "alice", "hf_bob": "bob", "hf_reader": ("alice", "read")}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub(TOKENS) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # The client's 10 seconds are for a network, not for a busy machine.
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 600)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 600)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
    # The client asks the Hub about coding tools around it, if it is run by one.
    assert not [request for request in server.unknown_requests if request.path != "/api/agent-harnesses"]
