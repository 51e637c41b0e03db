"""A user of published models who has transformers but not this package."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from fake_hub.server import Hub

# Imports of hf_tokenmixup fail in this process.
CONSUMER = """
import sys
sys.modules["hf_tokenmixup"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

for name, reference in torch.load("expected.pt").items():
    requires_remote_code = {"trust_remote_code": True} if reference["remote_code"] else {}
    model, report = AutoModelForImageClassification.from_pretrained(
        name, output_loading_info=True, **requires_remote_code
    )
    assert not any(report.values()), report
    assert type(model).__module__.startswith("transformers")
    weights = model.state_dict()
    assert weights.keys() == reference["weights"].keys()
    for key, tensor in weights.items():
        assert torch.equal(tensor, reference["weights"][key]), key
    with torch.no_grad():
        torch.testing.assert_close(model(reference["pixels"]).logits, reference["logits"])
    answers = pipeline("image-classification", model=name, top_k=10, **requires_remote_code)(Image.open("image.png"))
    scores = torch.zeros(10)
    for answer in answers:
        scores[int(answer["label"])] = answer["score"]
    torch.testing.assert_close(scores, reference["logits"][0].softmax(0), rtol=1e-4, atol=1e-5)
print("done")
"""


def describe(model: torch.nn.Module, pixels: torch.Tensor, *, remote_code: bool = False) -> dict[str, Any]:
    """Return what a published model must reproduce.

    Args:
        model: the exported plain model of ten digits.
        pixels: (1, 3, height, width) image.
        remote_code: whether the repository has the code of the model.
    """
    with torch.no_grad():
        logits = model.eval()(pixels).logits
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {"weights": weights, "pixels": pixels, "logits": logits, "remote_code": remote_code}


def open_without_package(hub: Hub, folder: Path, image: Any, expected: dict[str, dict[str, Any]]) -> None:
    """Open published models in a process without this package, and compare them.

    Args:
        hub: where the models are.
        folder: working folder of the process.
        image: image of a digit.
        expected: result of `describe` by repository.
    """
    torch.save(expected, folder / "expected.pt")
    image.save(folder / "image.png")
    environment = hub.environment(cache=folder / "cache") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CONSUMER]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
