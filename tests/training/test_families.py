"""Options of a run that do not depend on the family, for every family: EMA, and LoRA on all linear layers."""

import pytest
import torch
from helpers.families import TESTED
from helpers.state_dicts import copied
from helpers.tiny_training import CLASSES, Images, tokenmixup_family
from transformers import TrainerCallback

from hf_tokenmixup.models import FAMILIES
from hf_tokenmixup.training import TokenMixupTrainer, add_lora


class Weights(TrainerCallback):
    """Record the weights after each step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(copied(model.state_dict()))


@pytest.mark.parametrize("model_type", TESTED)
def test_ema_of_family_is_averaged_by_hand_and_exported(arguments, tmp_path, model_type):
    model, record = tokenmixup_family(model_type), Weights()
    args = arguments(ema_decay=0.75, max_steps=2, bf16=True, activation_checkpointing=True)
    trainer = TokenMixupTrainer(model, args, train_dataset=Images(8), callbacks=[record])
    trainer.train()
    trainer.save_model()
    exported = model.base_model_class.from_pretrained(tmp_path / "out").state_dict()
    first, second = record.steps
    moved = {name for name in exported if not torch.equal(first[name], second[name])}
    assert {name for name, _ in model.named_parameters() if name in exported} - moved == {
        name for name, _ in model.named_parameters() if model.is_unused_parameter(name)
    }
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * second[name], msg=name)


@pytest.mark.parametrize("model_type", TESTED)
def test_lora_all_linear_of_family_trains_and_exports(arguments, tmp_path, model_type):
    pytest.importorskip("peft", reason="peft is optional")
    model = tokenmixup_family(model_type)
    layers = FAMILIES[model_type][1].get_transformer_layers(model)
    linear = {
        name
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith("scorenet")
    }
    adapted = add_lora(model, rank=2, target_modules=["all-linear"])
    args = arguments(max_steps=2, activation_checkpointing=True)
    trainer = TokenMixupTrainer(adapted, args, train_dataset=Images(8))
    before = copied(adapted.state_dict())
    trainer.train()
    moved = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    for layer in layers:
        found = {name for name, module in layer.named_modules() if hasattr(module, "lora_A")}
        assert found == linear
    assert moved and all(".lora_" in name or ".modules_to_save." in name for name in moved)
    assert any(".scorenet." in name for name in moved)
    # A first step moves only the second matrix of an adapter, which starts at zero.
    adapters = {name for name in before if ".lora_B." in name}
    unused = {name for name in adapters if model.is_unused_parameter(name.removeprefix("base_model.model."))}
    assert len(adapters - unused) >= len(linear) * len(layers)
    assert {name for name in moved if ".lora_B." in name} == adapters - unused

    trainer.save_model()
    exported, report = FAMILIES[model_type][1].base_model_class.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    images = Images(4).pixels
    with torch.no_grad():
        logits = exported.eval()(images).logits
        torch.testing.assert_close(logits, adapted.eval()(images).logits, atol=1e-4, rtol=1e-4)
    assert logits.shape == (4, CLASSES)
