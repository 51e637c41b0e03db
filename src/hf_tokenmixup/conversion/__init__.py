"""Conversion of released weights to folders that `from_pretrained` loads."""

from .convert import convert_weights
from .released_weights import read_weights, recognise

__all__ = ["convert_weights", "read_weights", "recognise"]
