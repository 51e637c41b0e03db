"""TokenMixup (Choi, Choi and Kim, NeurIPS 2022) for Hugging Face Transformers.

The equations are in `hf_tokenmixup.functional`, the models in `hf_tokenmixup.models`, the trainer in
`hf_tokenmixup.training`, images and labels in `hf_tokenmixup.data`.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from transformers.utils.versions import require_version

# Before the models, whose imports an older version fails at without a word of the reason.
require_version("transformers>=5.9", "hf_tokenmixup needs it: pip install -U 'transformers>=5.9,<6'")

from .models import (  # noqa: E402
    TokenMixupViTConfig,
    TokenMixupViTForImageClassification,
    TokenMixupViTLayer,
    add_tokenmixup,
    load_classifier,
    remove_tokenmixup,
)

if TYPE_CHECKING:
    from .training import TokenMixupCallback

__all__ = [
    "TokenMixupCallback",
    "TokenMixupViTConfig",
    "TokenMixupViTForImageClassification",
    "TokenMixupViTLayer",
    "add_tokenmixup",
    "load_classifier",
    "remove_tokenmixup",
]
__version__ = version("hf_tokenmixup")


def __getattr__(name: str) -> Any:
    # The imports of `training` (timm, datasets, matplotlib) take seconds, and models do not need them.
    if name == "TokenMixupCallback":
        from .training import TokenMixupCallback

        return TokenMixupCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
