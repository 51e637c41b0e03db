"""Use the fake Hub with transformers and datasets, in a new process: they read HF_ENDPOINT at import."""

import io
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
from fake_hub.server import Hub

SCRIPT = """
import sys
import huggingface_hub, torch
from datasets import load_dataset
from huggingface_hub import ModelCard, metadata_update
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

assert load_dataset("alice/data", split="train")["x"][:] == [1, 2, 3]
assert [row["x"] for row in load_dataset("alice/data", split="train", streaming=True)] == [1, 2, 3]

sizes = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
sizes |= dict(image_size=8, patch_size=4)
model = ViTForImageClassification(ViTConfig(**sizes))
model.push_to_hub("alice/vit", private=True)
loaded = AutoModelForImageClassification.from_pretrained("alice/vit", revision="main")
assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), loaded.state_dict().values()))

config = AutoConfig.from_pretrained("alice/custom", trust_remote_code=True, revision=sys.argv[1])
assert (type(config).__name__, config.x) == ("Custom", 5)
try:
    AutoConfig.from_pretrained("alice/none")
    raise AssertionError
except OSError as error:
    assert "not a valid model identifier" in str(error)

assert ModelCard.load("alice/vit").data.library_name == "transformers"
# Older clients send every card to huggingface.co for validation.
if int(huggingface_hub.__version__.split(".")[0]) >= 2:
    metadata_update("alice/vit", {"license": "mit"})
    assert ModelCard.load("alice/vit").data.license == "mit"
    try:
        ModelCard("---\\nlicense: none\\n---\\n").push_to_hub("alice/vit")
        raise AssertionError
    except ValueError as error:
        assert "must be one of" in str(error)
print("done")
"""

CUSTOM_CONFIG = """
from transformers import PretrainedConfig

class Custom(PretrainedConfig):
    model_type = "custom"

    def __init__(self, x=0, **kwargs):
        self.x = x
        super().__init__(**kwargs)
"""


def test_fake_hub_serves_transformers_and_datasets(tmp_path):
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"x": [1, 2, 3]}), parquet)
    config = {"model_type": "custom", "x": 5, "auto_map": {"AutoConfig": "custom.Custom"}}
    with Hub({"hf_alice": "alice"}) as hub:
        hub.add_repo("alice/data", {"data/train.parquet": parquet.getvalue()}, repo_type="dataset", private=True)
        first_commit = hub.add_repo("alice/custom", {"config.json": json.dumps(config), "custom.py": CUSTOM_CONFIG})
        hub.add_commit("alice/custom", {"config.json": json.dumps(config | {"x": 6})})
        environment = hub.environment("hf_alice", cache=tmp_path) | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SCRIPT, first_commit]
        process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert process.stdout.endswith("done\n"), process.stderr
        assert set(hub.files("alice/vit")) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
        assert not hub.requests_containing(str(tmp_path))
        assert not hub.requests_containing("hf_alice")
        assert not hub.unknown_requests
