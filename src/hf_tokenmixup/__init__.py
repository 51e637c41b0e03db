"""TokenMixup (Choi, Choi and Kim, NeurIPS 2022) for Hugging Face Transformers.

The equations are in `hf_tokenmixup.functional`, the models in `hf_tokenmixup.models`, the trainer in
`hf_tokenmixup.training`, images and labels in `hf_tokenmixup.data`.
"""

from importlib.metadata import version

from transformers.utils.versions import require_version

# Before the models, whose imports an older version fails at without a word of the reason.
require_version("transformers>=5.9", "hf_tokenmixup needs it: pip install -U 'transformers>=5.9,<6'")

from .models import (  # noqa: E402
    TokenMixupViTConfig,
    TokenMixupViTForImageClassification,
    TokenMixupViTLayer,
    load_classifier,
)

__all__ = [
    "TokenMixupViTConfig",
    "TokenMixupViTForImageClassification",
    "TokenMixupViTLayer",
    "load_classifier",
]
__version__ = version("hf_tokenmixup")
