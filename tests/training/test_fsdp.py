"""Trainings under FSDP2 and DeepSpeed on two processes, compared with DDP's."""

from importlib.util import find_spec

import pytest
import torch
from helpers.families import TESTED
from helpers.process_worker import launch
from transformers import ViTForImageClassification

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 shards on accelerators alone"),
]

SOME_EASY = {"settings": {"horizontal_tau": 1.3}, "scorenet_bias": {1: [2.0, 2.0, 0.0, 0.0]}, "images": 24}
MODELS = {
    "both": SOME_EASY,
    "chained": {"settings": {"horizontal_layers": [0, 2], "vertical_layers": [1, 2]}, "images": 24},
    "rollout": SOME_EASY | {"settings": {"rollout_steps": 1}},
    "gradient": SOME_EASY | {"settings": {"saliency_detector": "gradient"}},
    "cct": {
        "model": "cct",
        "settings": {"horizontal_tau": None, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0},
        "images": 24,
    },
}
STEPS = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "optim": "adamw_torch", "learning_rate": 1e-3}
ACCUMULATED = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}


def cases(sharding: dict) -> list[dict]:
    found = [{"name": name, **model, "arguments": STEPS | sharding} for name, model in MODELS.items()]
    return [*found, {"name": "accumulated", **SOME_EASY, "arguments": STEPS | ACCUMULATED | sharding}]


def saved_and_resumed(kind: str) -> list[dict]:
    sharding = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": kind}, "save_strategy": "steps"}
    case = SOME_EASY | {"arguments": STEPS | sharding | {"save_steps": 2}, "outputs": kind, "publish": True}
    return [{"name": f"{kind}-whole", **case}, {"name": f"{kind}-resumed", **case, "resume": "checkpoint-2"}]


def zero(stage: int) -> dict:
    """DeepSpeed with its optimizer's state in parts, and from stage 2 on the gradients too."""
    # accelerate clips gradients at 1 where the configuration says nothing of it.
    own = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    torch_adam = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {"deepspeed": {**dict.fromkeys(own, "auto"), **torch_adam, "zero_optimization": {"stage": stage}}}


def assert_trains_as_ddp(got, expected):
    """The sharded processes have the losses, gradients and weights of DDP."""
    for name, ranks in expected.items():
        assert ranks[0]["gradients"] and any(count["mixed_samples"] for seen in ranks for count in seen["counts"])
        for seen, other in zip(got[name], ranks, strict=True):
            assert seen["sharded"] and not other["sharded"]
            losses = [[line["loss"] for line in found["log"]] for found in (seen, other)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-6)
            torch.testing.assert_close(seen["gradients"], other["gradients"], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(seen["weights"], other["weights"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", [name for name in TESTED if name not in ("vit", "cct")])
def test_fsdp2_trains_family_as_ddp(tmp_path, model_type):
    case = {"name": model_type, "model": model_type, "settings": {"horizontal_tau": None}, "images": 16}
    case["arguments"] = STEPS | {"optim": "sgd", "learning_rate": 0.1}
    sharded = case | {"arguments": case["arguments"] | {"fsdp": True, "fsdp_config": {"version": 2}}}
    assert_trains_as_ddp(launch(2, [sharded], tmp_path / "fsdp"), launch(2, [case], tmp_path / "ddp"))


def test_fsdp2_trains_and_resumes_as_ddp(tmp_path):
    sharded = cases({"fsdp": True, "fsdp_config": {"version": 2}})
    kinds = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
    got = launch(2, [*sharded, *(case for kind in kinds for case in saved_and_resumed(kind))], tmp_path / "fsdp")
    expected = launch(2, cases({}), tmp_path / "ddp")
    assert_trains_as_ddp(got, expected)

    for kind in kinds:
        (complete, _), (resumed, _) = got[f"{kind}-whole"], got[f"{kind}-resumed"]
        assert len(complete["gradients"]) == 3 and len(resumed["gradients"]) == 1
        assert any("scorenet" in name for name in complete["weights"])
        torch.testing.assert_close(resumed["weights"], complete["weights"], atol=0, rtol=0)
        exported, report = ViTForImageClassification.from_pretrained(
            tmp_path / "fsdp" / "outputs" / kind, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for name, tensor in exported.state_dict().items():
            assert torch.equal(tensor, complete["weights"][name]), name


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_trains_and_resumes_as_ddp(tmp_path):
    def kinds(sharding):
        accumulated = SOME_EASY | {"arguments": STEPS | ACCUMULATED | sharding}
        return [{"name": "both", **SOME_EASY, "arguments": STEPS | sharding}, {"name": "accumulated", **accumulated}]

    expected = launch(2, kinds({}), tmp_path / "ddp")
    for stage in (1, 2):
        case = SOME_EASY | {"arguments": STEPS | zero(stage) | {"save_strategy": "steps", "save_steps": 2}}
        case |= {"outputs": "whole", "publish": True}
        resumed = [{"name": "whole", **case}, {"name": "resumed", **case, "resume": "checkpoint-2"}]
        got = launch(2, kinds(zero(stage)) + resumed, tmp_path / f"zero-{stage}")
        for name, ranks in expected.items():
            for seen, other in zip(got[name], ranks, strict=True):
                assert seen["zero_stage"] == stage and other["zero_stage"] is None
                losses = [[line["loss"] for line in found["log"]] for found in (seen, other)]
                assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) > 1
                torch.testing.assert_close(seen["weights"], other["weights"], atol=1e-5, rtol=1e-4)
        (complete, _), (again, _) = got["whole"], got["resumed"]
        assert (len(complete["batches"]), len(again["batches"])) == (3, 1)
        torch.testing.assert_close(again["weights"], complete["weights"], atol=0, rtol=0)
        exported = ViTForImageClassification.from_pretrained(tmp_path / f"zero-{stage}" / "outputs" / "whole")
        for name, tensor in exported.state_dict().items():
            assert torch.equal(tensor, complete["weights"][name]), name
