"""Models sharded by FSDP2 in one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers.tiny_training import Images, tokenmixup_cct, tokenmixup_vit
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

STILL = {"attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.get_transformer_layers():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.full_tensor() if isinstance(model, FSDPModule) else parameter.grad
        for name, parameter in model.named_parameters()
    }


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 shards on accelerators alone")
@pytest.mark.parametrize(
    "model",
    [
        tokenmixup_vit(horizontal_layers=[0, 2], vertical_layers=[1, 2], scorenet_detach=False),
        tokenmixup_vit(horizontal_layers=[0], rollout_steps=2),
        tokenmixup_vit(saliency_detector="gradient"),
        tokenmixup_vit(horizontal_layers=[0, 1], saliency_route="output_attentions"),
        tokenmixup_cct(horizontal_layers=[0, 2], horizontal_tau=None, rollout_steps=0, **STILL),
    ],
    ids=["chained", "rollout", "gradient", "maps", "cct"],
)
def test_sharded_checkpoint_matches_single_file(model):
    images, twin = Images(6), sharded(copy.deepcopy(model)).train()
    outputs = [net(pixel_values=images.pixels, labels=images.labels) for net in (model.train(), twin)]
    assert outputs[0].mixing_metrics["mixed_samples"] > 0
    for output in outputs:
        output.loss.backward()
    for name in ("loss", "targets", "scorenet_loss"):
        torch.testing.assert_close(outputs[1][name], outputs[0][name])
    assert len(outputs[1].horizontal) == len(outputs[0].horizontal)
    torch.testing.assert_close(gradients(twin), gradients(model))


def test_no_split_modules_are_modules_of_model():
    for model in (tokenmixup_vit(), tokenmixup_cct(), tokenmixup_vit().to_plain_model()):
        assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}
        assert any(name.endswith("Layer") for name in model._no_split_modules)
