"""Compact Transformers as a plain transformers model, and with TokenMixup."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_cct import CctConfig
from .modeling_cct import CctForImageClassification, CctModel
from .modeling_tokenmixup_cct import TokenMixupCctConfig, TokenMixupCctForImageClassification, TokenMixupCctLayer

AutoConfig.register("cct", CctConfig, exist_ok=True)
AutoModel.register(CctConfig, CctModel, exist_ok=True)
AutoModelForImageClassification.register(CctConfig, CctForImageClassification, exist_ok=True)

__all__ = [
    "CctConfig",
    "CctForImageClassification",
    "CctModel",
    "TokenMixupCctConfig",
    "TokenMixupCctForImageClassification",
    "TokenMixupCctLayer",
]
