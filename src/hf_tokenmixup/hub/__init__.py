"""Model cards and uploads to the Hugging Face Hub."""

from .model_card import TrainingFacts, build_card, build_recipe_card, eval_results, update_card
from .paper_results import BENCHMARKS, PaperBenchmark, PaperRow, paper_benchmark
from .upload import PublishingError, claim_repository, publish_folder

__all__ = [
    "BENCHMARKS",
    "PaperBenchmark",
    "PaperRow",
    "PublishingError",
    "TrainingFacts",
    "build_card",
    "build_recipe_card",
    "claim_repository",
    "eval_results",
    "paper_benchmark",
    "publish_folder",
    "update_card",
]
