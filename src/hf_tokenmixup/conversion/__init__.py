"""Conversion of released weights to folders that `from_pretrained` loads."""

from .convert import convert_weights
from .released_weights import detect_format, load_released_weights

__all__ = ["convert_weights", "detect_format", "load_released_weights"]
