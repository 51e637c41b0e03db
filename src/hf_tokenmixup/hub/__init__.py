"""Released weights in, folders that ``from_pretrained`` opens out."""

from .convert import convert_weights
from .released import read_weights, recognise

__all__ = ["convert_weights", "read_weights", "recognise"]
