"""`ModelEma` without a trainer: updates, shared tensors, precision, and its state."""

import pytest
import torch
from helpers.state_dicts import assert_same, copied
from helpers.tiny_training import plain_vit, tokenmixup_vit

from hf_tokenmixup.training.ema import ModelEma


class Shared(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_model_ema_shared_tensor_is_updated_once(tmp_path):
    model = Shared()
    average = ModelEma(model, 0.5)
    start = model.a.weight.detach().clone()
    average.update(model)
    with torch.no_grad():
        model.a.weight += 1
        model.norm.running_mean += 4
        model.norm.num_batches_tracked += 7
    average.update(model)
    stored_tensors = average.tensors()
    torch.testing.assert_close(stored_tensors["a.weight"], start + 0.5)
    assert "b.weight" not in stored_tensors and "scratch" not in stored_tensors
    assert (
        stored_tensors["norm.running_mean"].tolist() == [2.0] * 3
        and stored_tensors["norm.num_batches_tracked"].item() == 7
    )
    with average.swap_into(model):
        assert model.b.weight is model.a.weight
        torch.testing.assert_close(model.b.weight.detach(), start + 0.5)
    torch.testing.assert_close(model.b.weight.detach(), start + 1)

    average.save(tmp_path / "average.safetensors")
    other = ModelEma(Shared(), 0.5)
    other.load(tmp_path / "average.safetensors")
    assert other.updates == 2
    assert_same(other.tensors(), stored_tensors)


def test_model_ema_half_precision_weights_are_averaged_in_float32():
    model = torch.nn.Linear(4, 4).bfloat16()
    average = ModelEma(model, 0.999)
    average.update(model)
    with torch.no_grad():
        before = model.weight.clone()
        model.weight.mul_(2)
    for _ in range(10):
        average.update(model)
    # In bfloat16, each of these steps would round to nothing.
    torch.testing.assert_close(average.tensors()["weight"], before.float() * (2 - 0.999**10))
    with average.swap_into(model):
        assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight, before * 2)


def test_model_ema_update_does_not_synchronize(monkeypatch):
    model, reads = tokenmixup_vit(), []
    average = ModelEma(model, 0.9, warmup=True)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, n=name, o=original, **k: (reads.append(n), o(*a, **k))[1])
    for _ in range(3):
        average.update(model)
    assert reads == []


def test_model_ema_loaded_state_continues_bit_for_bit():
    torch.manual_seed(0)
    model = plain_vit()
    weights = [copied(model.state_dict()) for _ in range(3)]
    for number, state in enumerate(weights):
        for tensor in state.values():
            tensor.add_(torch.randn_like(tensor) * (number + 1))

    def update(ema, states):
        for state in states:
            model.load_state_dict(state)
            ema.update(model)
        return ema

    complete = update(ModelEma(model, 0.9, warmup=True), weights)
    resumed = ModelEma(model, 0.9, warmup=True)
    resumed.load_state_dict(update(ModelEma(model, 0.9, warmup=True), weights[:2]).state_dict())
    update(resumed, weights[2:])
    assert resumed.updates == complete.updates == 3
    assert_same(resumed.tensors(), complete.tensors())


def test_model_ema_state_of_another_model_raises_and_loads_nothing():
    torch.manual_seed(0)
    ema = ModelEma(plain_vit(), 0.9)
    before = copied(ema.tensors())
    state = ema.state_dict()
    state = {"tensors": {name: tensor[:1] + 1 for name, tensor in state["tensors"].items()}, "updates": 7}
    with pytest.raises(ValueError, match="tensors differ in name or shape"):
        ema.load_state_dict(state)
    assert_same(ema.tensors(), before)
    assert ema.updates == 0
