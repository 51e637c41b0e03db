"""Write a model card for each system of the paper and each baseline, from the
template and the recipe.

  python scripts/model_cards.py
  # writes nothing, and fails if a card is out of date
  python scripts/model_cards.py --check
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..configuration import TokenMixupConfigMixin
from ..hub import TrainingCardData, build_untrained_model_card
from ..models import FAMILIES
from ..paper_results import PAPER_RESULTS, PaperTable
from ..utils.text import format_list
from .arguments import DataArguments, ModelArguments
from .parser import CliParser
from .program import exit_with, run_command
from .recipes import load_recipe

# Options that do not affect the trained model. Those of model, data and TokenMixup have sections of their own.
EXCLUDED_OPTIONS = (
    "do_train",
    "do_eval",
    "output_dir",
    "per_device_eval_batch_size",
    "eval_strategy",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "report_to",
)


def field_names(*groups: type) -> set[str]:
    return {item.name for group in groups for item in dataclasses.fields(group)}


def card_text(name: str, benchmark: PaperTable, num_devices: int) -> str:
    """The card of the model that the recipe `name` trains."""
    recipe = load_recipe(name)
    settings = field_names(TokenMixupConfigMixin)
    excluded = settings | field_names(ModelArguments, DataArguments) - {"from_scratch"} | set(EXCLUDED_OPTIONS)
    # The only pretrained model of the recipes, ViT-B/16, has the default configuration.
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
        hyperparameters={key: value for key, value in recipe.items() if key not in excluded},
    )
    return str(build_untrained_model_card(config, recipe["output_dir"], training, benchmark))


def build_cards() -> dict[str, str]:
    """The texts of all cards by file name."""
    return {
        f"{prefix}-{system}.md": card_text(f"{prefix}-{system}", benchmark, row.num_devices)
        for prefix, benchmark in PAPER_RESULTS.items()
        for system, row in benchmark.rows.items()
    }


def find_outdated_cards(cards: dict[str, str], folder: Path) -> list[str]:
    """The names of files in `folder` that are missing, differ, or do not belong there."""
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in cards.keys() | found.keys() if cards.get(name) != found.get(name))


def main(arguments: Sequence[str]) -> None:
    parser = CliParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Write nothing, and fail if a card is out of date.")
    parser.add_argument("--folder", type=Path, default=Path("model_cards"), help="Folder of the cards (%(default)s).")
    args = parser.parse_args(arguments)
    cards = build_cards()
    if not args.check:
        args.folder.mkdir(parents=True, exist_ok=True)
        for name, text in cards.items():
            (args.folder / name).write_bytes(text.encode())
    if outdated := find_outdated_cards(cards, args.folder):
        hint = "run python scripts/model_cards.py" if args.check else "remove it"
        exit_with(f"model cards are out of date: {format_list(outdated)}; {hint}")


def entry_point() -> None:
    run_command(main)


if __name__ == "__main__":
    entry_point()
