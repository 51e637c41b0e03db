"""Model cards and uploads to the Hugging Face Hub."""

from .card_metadata import build_eval_results
from .model_card import TrainingCardData, build_model_card, build_untrained_model_card, update_model_card
from .upload import HubUploadError, create_and_check_repo, upload_model_folder

__all__ = [
    "HubUploadError",
    "TrainingCardData",
    "build_eval_results",
    "build_model_card",
    "build_untrained_model_card",
    "create_and_check_repo",
    "update_model_card",
    "upload_model_folder",
]
