"""The notebook runs from its first cell to the publication of its model, and is stored with the outputs of a run."""

import json
import os
import re

import pytest
from helpers.documents import NOTEBOOK, ROOT, notebook_cells
from safetensors.torch import load
from store_notebook import execute_notebook

MAX_BYTES = 300_000


def stream_text(cell) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"] if output["output_type"] == "stream")


@pytest.fixture
def executed_notebook(hub, tmp_path):
    """The notebook after a run of one epoch that publishes its model to the fake Hub."""
    small = {"EPOCHS": "1", "HUB_MODEL_ID": "alice/photographs", "PYTHONPATH": str(ROOT / "src")}
    return execute_notebook(tmp_path, hub.environment("hf_alice", cache=tmp_path / "cache") | small)


def test_notebook_trains_and_publishes_a_model(executed_notebook, hub):
    texts = "\n".join(stream_text(cell) for cell in executed_notebook.cells if cell.cell_type == "code")
    assert "480 images to train on, 120 to evaluate on" in texts
    assert f"published {hub.url}/alice/photographs" in texts
    files = hub.files("alice/photographs")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= set(files)
    assert json.loads(files["config.json"])["horizontal_layers"] == [1]
    assert not any("scorenet" in name for name in load(files["model.safetensors"]))


def test_stored_notebook_has_the_outputs_of_a_complete_run():
    cells = notebook_cells("code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    accuracy = re.search(r"top-1 ([\d.]+)%", "\n".join(stream_text(cell) for cell in cells))
    assert float(accuracy[1]) > 90


def test_stored_notebook_is_small_and_names_no_local_path():
    assert os.path.getsize(NOTEBOOK) < MAX_BYTES
    text = "\n".join(cell["source"] + json.dumps(cell["outputs"]) for cell in notebook_cells("code"))
    assert not re.search(r"/(tmp|root|home)/", text)
