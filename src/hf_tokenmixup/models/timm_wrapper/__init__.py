"""TokenMixup for vision transformers of timm behind `TimmWrapperForImageClassification` of transformers.

The model type exists only where timm is installed.
"""

from transformers.utils import is_timm_available

MODEL_TYPES = {}
if is_timm_available():
    from .configuration_timm_wrapper import TokenMixupTimmWrapperConfig
    from .modeling_timm_wrapper import TokenMixupTimmWrapperForImageClassification

    MODEL_TYPES = {"timm_wrapper": (TokenMixupTimmWrapperConfig, TokenMixupTimmWrapperForImageClassification)}
