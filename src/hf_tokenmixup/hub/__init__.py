"""Released weights in, folders that ``from_pretrained`` opens out; model cards and uploads of what was trained."""

from .cards import TrainingFacts, build_card, build_recipe_card, eval_results, update_card
from .convert import convert_weights
from .paper import BENCHMARKS, PaperBenchmark, PaperRow, paper_benchmark
from .publish import PublishingError, claim_repository, publish_folder
from .released import read_weights, recognise

__all__ = [
    "BENCHMARKS",
    "PaperBenchmark",
    "PaperRow",
    "PublishingError",
    "TrainingFacts",
    "build_card",
    "build_recipe_card",
    "claim_repository",
    "convert_weights",
    "eval_results",
    "paper_benchmark",
    "publish_folder",
    "read_weights",
    "recognise",
    "update_card",
]
