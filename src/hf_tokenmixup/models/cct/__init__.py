"""Compact Transformers as a transformers model, without and with TokenMixup."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_cct import CctConfig
from .modeling_cct import CctForImageClassification, CctModel
from .modeling_tokenmixup_cct import TokenMixupCctConfig, TokenMixupCctForImageClassification, TokenMixupCctLayer

AutoConfig.register("cct", CctConfig, exist_ok=True)
AutoModel.register(CctConfig, CctModel, exist_ok=True)
AutoModelForImageClassification.register(CctConfig, CctForImageClassification, exist_ok=True)

# `save_pretrained` then copies the two files of the base model, which `trust_remote_code=True` loads.
CctConfig.register_for_auto_class()
CctModel.register_for_auto_class("AutoModel")
CctForImageClassification.register_for_auto_class("AutoModelForImageClassification")

MODEL_TYPES = {"cct": (TokenMixupCctConfig, TokenMixupCctForImageClassification)}

__all__ = [
    "CctConfig",
    "CctForImageClassification",
    "CctModel",
    "TokenMixupCctConfig",
    "TokenMixupCctForImageClassification",
    "TokenMixupCctLayer",
]
