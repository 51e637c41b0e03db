"""Write a model card for each system of the paper and each baseline, from the template and the recipe.

  python scripts/model_cards.py
  python scripts/model_cards.py --check

The second writes nothing, and fails if a card is not what the first would write.
"""

import argparse
import dataclasses
from pathlib import Path

import yaml

from ..configuration import TokenMixupConfigMixin
from ..hub import TrainingCardData, build_untrained_model_card
from ..models import FAMILIES
from ..paper_results import PAPER_RESULTS, PaperTable
from .arguments import DataArguments, ModelArguments
from .program import exit_with, run_command
from .recipes import RECIPES

# Options that the trained model does not depend on. Those of model, data and TokenMixup have their own places.
EXCLUDED_OPTIONS = """do_train do_eval output_dir per_device_eval_batch_size eval_strategy save_strategy save_steps
    save_total_limit logging_steps dataloader_num_workers dataloader_persistent_workers report_to""".split()


def names_of(*groups: type) -> set[str]:
    return {item.name for group in groups for item in dataclasses.fields(group)}


def card_text(name: str, benchmark: PaperTable, num_devices: int) -> str:
    """The card of what the recipe `name` trains."""
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    settings = names_of(TokenMixupConfigMixin)
    elsewhere = settings | names_of(ModelArguments, DataArguments) - {"from_scratch"} | set(EXCLUDED_OPTIONS)
    # The one model that recipes start from, ViT-B/16, has the default configuration.
    config = FAMILIES[recipe.get("model_type", "vit")][0](
        num_labels=benchmark.num_labels,
        **recipe.get("config_overrides", {}),
        **{key: value for key, value in recipe.items() if key in settings},
    )
    launch = "accelerate launch" + (f" --num_processes {num_devices}" if num_devices > 1 else "")
    training = TrainingCardData(
        base_model=recipe.get("model_name_or_path"),
        dataset=recipe["dataset_name"],
        train_split=recipe.get("train_split", DataArguments.train_split),
        recipe=name,
        command=f"{launch} scripts/finetune.py --recipe {name} --push_to_hub --hub_model_id YOUR_NAME/{name}",
        hyperparameters={key: value for key, value in recipe.items() if key not in elsewhere},
    )
    return str(build_untrained_model_card(config, recipe["output_dir"], training, benchmark))


def all_cards() -> dict[str, str]:
    """Texts by file name."""
    return {
        f"{start}-{ending}.md": card_text(f"{start}-{ending}", benchmark, row.num_devices)
        for start, benchmark in PAPER_RESULTS.items()
        for ending, row in benchmark.rows.items()
    }


def find_outdated_cards(cards: dict[str, str], folder: Path) -> list[str]:
    """Names of files that are missing, differ, or are no card of ours."""
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in cards.keys() | found.keys() if cards.get(name) != found.get(name))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="Write nothing; name the files that are out of step.")
    parser.add_argument("--folder", type=Path, default=Path("model_cards"), help="Folder of the cards (%(default)s).")
    args = parser.parse_args(arguments)
    cards = all_cards()
    if not args.check:
        args.folder.mkdir(parents=True, exist_ok=True)
        for name, text in cards.items():
            (args.folder / name).write_bytes(text.encode())
    if stale := find_outdated_cards(cards, args.folder):
        remedy = "run python scripts/model_cards.py" if args.check else "remove it"
        exit_with(f"out of step with template and recipes: {', '.join(stale)}; {remedy}")


def entry_point() -> None:
    run_command(main)


if __name__ == "__main__":
    entry_point()
