"""Small trainings under a launcher: `torchrun --nproc_per_node N process_worker.py CASES.json FOLDER`.

Trains the cases of the file one after the other, by the trainer itself. Every process writes what it saw of each to
``FOLDER/NAME-RANK.pt``, for the tests to compare.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from helpers.commands import HANG_S
from helpers.families import TESTED
from helpers.tiny_training import Images, tokenmixup_cct, tokenmixup_family, tokenmixup_vit
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import SequentialSampler, WeightedRandomSampler
from transformers import TrainerCallback, set_seed

from hf_tokenmixup.training import TokenMixupTrainer, TokenMixupTrainingArguments

MODELS = {model_type: partial(tokenmixup_family, model_type) for model_type in TESTED}
MODELS |= {"vit": tokenmixup_vit, "cct": tokenmixup_cct}
ARGUMENTS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
}


class Watch(TrainerCallback):
    """Keeps the gradients of each optimizer step as they are before it: those of all processes."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.steps = []
        self.initial = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append({name: full_tensor(parameter.grad) for name, parameter in self.model.named_parameters()})


class InOrder(TokenMixupTrainer):
    """Trains on the images in their order, and keeps each micro-batch of this process with its counts."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.counts, self.reached = [], [], []
        self.targets, self.dropped = [], []
        self.order = "sequential"
        mix = self.input_mixing
        self.input_mixing = Keeping(mix, self.targets)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout) and module.p > 0:
                module.register_forward_hook(self._keep_mask)
                break
        for name, parameter in self.model.named_parameters():
            # Called with this process's own gradient, before it is averaged with the others'.
            parameter.register_hook(lambda gradient, name=name: self.reached[-1].add(name))

    def _keep_mask(self, module, inputs, output):
        if module.training:
            self.dropped.append(output == 0)

    def _get_train_sampler(self, *args, **kwargs):
        if self.order == "random":
            return super()._get_train_sampler(*args, **kwargs)
        if self.order == "weighted":
            size = len(self.train_dataset)
            return WeightedRandomSampler(torch.arange(1.0, size + 1), size, replacement=False)
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self.batches.append({name: tensor.clone() for name, tensor in inputs.items()})
            counts = getattr(outputs, "mixing_metrics", None) or {}
            self.counts.append({name: value.item() for name, value in counts.items()})
            self.reached.append(set())
        return (loss, outputs) if return_outputs else loss


class Keeping:
    """Input mixing that keeps the targets (B, C) it gives."""

    def __init__(self, mixing, targets: list):
        self.mixing, self.targets = mixing, targets

    @property
    def enabled(self) -> bool:
        return self.mixing.enabled

    def __call__(self, pixel_values, labels):
        images, targets = self.mixing(pixel_values, labels)
        self.targets.append(targets.clone())
        return images, targets


def full_tensor(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy, put together if it is sharded."""
    if tensor is None:
        return None
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def launch(world: int, cases: list[dict], folder: Path) -> dict[str, list[dict]]:
    """What each process saw of each case, by the case's name."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if world > 1 else []
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__)), str(folder / "cases.json"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    names = [case["name"] for case in cases]
    found = {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(world)] for name in names}
    assert all(seen["world_size"] == world for ranks in found.values() for seen in ranks)
    return found


def build(case: dict) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[], enabled=case.get("unseeded", False)):
        model = MODELS[case.get("model", "vit")](**case["settings"])
    if case.get("unseeded"):
        # From the random numbers that come next in this process.
        model = type(model)(model.config)
    for layer, bias in case.get("scorenet_bias", {}).items():
        model.get_transformer_layers()[int(layer)].scorenet.classifier.bias.data.copy_(torch.tensor(bias))
    return model


def train(case: dict, folder: Path) -> None:
    model = build(case)
    images = Images(case["images"])
    if "labels" in case:
        images.labels = torch.tensor(case["labels"])
    arguments = ARGUMENTS | case["arguments"]
    outputs = folder / "outputs" / case.get("outputs", case["name"])
    args = TokenMixupTrainingArguments(str(outputs), **arguments)
    if args.fsdp:
        # On CPUs accelerate passes over FSDP without a word, though torch shards there too.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = InOrder(model, args, train_dataset=images, eval_dataset=Images(case.get("eval_images", 4)))
    trainer.order = case.get("order", "sequential")
    watch = Watch(model)
    trainer.add_callback(watch)
    if case.get("reseeded"):
        torch.manual_seed(args.process_index)
    trainer.train(str(outputs / case["resume"]) if "resume" in case else None)
    if case.get("publish"):
        trainer.save_model()
    found = {
        "world_size": args.world_size,
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "evaluation": trainer.evaluate() if "eval_images" in case else None,
        "weights": {name: full_tensor(tensor) for name, tensor in model.state_dict().items()},
        "initial": watch.initial,
        "gradients": watch.steps,
        "targets": trainer.targets,
        "dropped": trainer.dropped,
        "batches": trainer.batches,
        "counts": trainer.counts,
        "reached": trainer.reached,
        "sharded": isinstance(model, FSDPModule),
        "zero_stage": trainer.model_wrapped.zero_optimization_stage() if trainer.is_deepspeed_enabled else None,
        "find_unused_parameters": getattr(trainer.model_wrapped, "find_unused_parameters", None),
    }
    torch.save(found, folder / f"{case['name']}-{args.process_index}.pt")


def main() -> None:
    torch.set_num_threads(1)
    set_seed(0)
    cases, folder = Path(sys.argv[1]), Path(sys.argv[2])
    for case in json.loads(cases.read_text()):
        train(case, folder)


if __name__ == "__main__":
    main()
