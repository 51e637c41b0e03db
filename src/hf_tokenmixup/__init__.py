"""TokenMixup (Choi, Choi and Kim, NeurIPS 2022) for Hugging Face Transformers.

The equations are in :mod:`~hf_tokenmixup.functional`, the models in :mod:`~hf_tokenmixup.models`, training in
:mod:`~hf_tokenmixup.training`, images and labels in :mod:`~hf_tokenmixup.data`.
"""

from .models import TokenMixupViTConfig, TokenMixupViTForImageClassification, TokenMixupViTLayer, load_classifier

__all__ = [
    "TokenMixupViTConfig",
    "TokenMixupViTForImageClassification",
    "TokenMixupViTLayer",
    "load_classifier",
]
__version__ = "0.1.0"
