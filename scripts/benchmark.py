#!/usr/bin/env python
"""Step time of HTM, VTM and both over the same ViT with TokenMixup off, measured side by side in one run.

  python scripts/benchmark.py                       # ViT-S/16, batch 16, on whatever device there is
  python scripts/benchmark.py --size base --batch_size 128 --dtype bf16 --device cuda

Every image is easy (the dearest case). Every step of a system stands between two steps of the plain model and is
divided by their mean, so that a slow moment of the machine hits both; the ratio is the median of these.
"""

import argparse
import time
from contextlib import nullcontext
from statistics import median, quantiles

import torch

from hf_tokenmixup.models import TokenMixupViTConfig, TokenMixupViTForImageClassification

SIZES = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
HORIZONTAL = {"horizontal_layers": [3], "horizontal_tau": None, "horizontal_rho": 0.0}
SYSTEMS = {
    "off": {},
    "HTM": HORIZONTAL,
    "VTM": {"vertical_layers": [3]},
    "HTM + VTM": HORIZONTAL | {"vertical_layers": [4]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20, help="Timed steps of each system.")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="bf16 and fp16: autocast.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    labels = torch.randint(1000, (args.batch_size,), device=args.device)
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    models = {}
    for name, settings in SYSTEMS.items():
        config = TokenMixupViTConfig(num_labels=1000, **SIZES[args.size], **settings)
        models[name] = TokenMixupViTForImageClassification(config).to(args.device).train()

    def step(model: torch.nn.Module) -> float:
        synchronise(args.device)
        start = time.perf_counter()
        with torch.autocast(args.device, autocast) if autocast else nullcontext():
            loss = model(images, labels=labels).loss
        loss.backward()
        synchronise(args.device)
        seconds = time.perf_counter() - start
        model.zero_grad()
        return seconds

    for model in models.values():
        step(model)
        step(model)
    seconds = {name: [] for name in models}
    ratios = {name: [] for name in models if name != "off"}
    before = step(models["off"])
    for _ in range(args.rounds):
        for name in ratios:
            own, after = step(models[name]), step(models["off"])
            seconds[name].append(own)
            seconds["off"].append(after)
            ratios[name].append(2 * own / (before + after))
            before = after

    print(
        f"ViT-{args.size}/16, batch {args.batch_size}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads"
    )
    print(f"{'off':10} {1000 * median(seconds['off']):8.1f} ms")
    for name, values in ratios.items():
        low, _, high = quantiles(values, n=4)
        spread = f"quartiles {low:.3f} to {high:.3f}"
        print(f"{name:10} {1000 * median(seconds[name]):8.1f} ms   {median(values):.3f} of off ({spread})")


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
