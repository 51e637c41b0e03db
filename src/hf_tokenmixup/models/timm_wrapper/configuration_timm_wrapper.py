"""Configuration of a timm model with the settings of TokenMixup."""

from collections.abc import Mapping
from typing import Any

from transformers import TimmWrapperConfig

from ...configuration import TokenMixupConfigMixin
from ...network import Network
from ..cct.configuration_cct import height_and_width
from .network_timm_wrapper import create_without_weights, describe_unsupported_model, get_network


class TokenMixupTimmWrapperConfig(TokenMixupConfigMixin, TimmWrapperConfig):
    """`TimmWrapperConfig` with the settings of TokenMixup.

    `image_size` is `img_size` in `model_args`. The default architecture is a ViT, which supports TokenMixup.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `TimmWrapperConfig`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model, or timm has no such architecture, or its
            layers do not support TokenMixup.
    """

    architecture: str = "vit_base_patch16_224"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Create a configuration, as in `TimmWrapperConfig.from_dict`."""
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        if "label_names" in vars(config):
            # `kwargs` may have other classes. `to_dict` of the base class would write the names of the checkpoint.
            config.label_names = list(config.id2label.values())
        return result

    @classmethod
    def describe_unsupported(cls, attributes: Mapping[str, Any]) -> str | None:
        """See `TokenMixupConfigMixin.describe_unsupported`."""
        architecture = attributes.get("architecture", cls.architecture)
        model = create_without_weights(architecture, attributes.get("model_args"))
        return describe_unsupported_model(architecture, model)

    @property
    def network(self) -> Network:
        """Sizes of the network, and what its classifier reads."""
        return get_network(self.architecture, self.model_args)

    @property
    def image_size(self) -> tuple[int, int]:
        """Configured height and width in pixels."""
        return self.network.image_size

    @image_size.setter
    def image_size(self, size: int | list[int] | tuple[int, int]) -> None:
        height, width = height_and_width(size)
        self.model_args = {**(self.model_args or {}), "img_size": [height, width]}
        if getattr(self, "pretrained_cfg", None):
            # The image processor of transformers reads the size here.
            self.pretrained_cfg = {**self.pretrained_cfg, "input_size": [3, height, width]}

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.network.patch_size

    @property
    def architecture_name(self) -> str:
        """Name of the architecture for model cards."""
        return f"`{self.architecture}` of timm"

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patch tokens for an image size in pixels."""
        model = create_without_weights(self.architecture, self.model_args)
        return tuple(model.patch_embed.dynamic_feat_size((height, width)))
