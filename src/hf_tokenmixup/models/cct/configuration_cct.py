"""Configuration of the Compact Transformers (Hassani et al., "Escaping the Big Data Paradigm", 2021)."""

from collections.abc import Iterable
from typing import Literal

from transformers import PreTrainedConfig


def height_and_width(size: int | Iterable[int]) -> tuple[int, int]:
    """Return height and width of a size.

    This function is here because `push_to_hub` uploads this file without the rest of the package.

    Args:
        size: one number for both, or height and width.

    Raises:
        TypeError: if `size` has more or fewer than two numbers.
    """
    if not isinstance(size, Iterable):
        return size, size
    sides = tuple(size)
    if len(sides) != 2:
        raise TypeError(f"A size must be one number, or height and width, got {sides}.")
    return sides


class CctConfig(PreTrainedConfig):
    r"""
    Configuration of a CCT, CVT or ViT-Lite: a small vision transformer for small images. The defaults are those of
    CCT-7/3x1 for 32x32 images.

    Args:
        hidden_size (`int`, *optional*, defaults to 256): D.
        num_hidden_layers (`int`, *optional*, defaults to 7).
        num_attention_heads (`int`, *optional*, defaults to 4).
        intermediate_size (`int`, *optional*, defaults to 512).
        image_size (`int` or pair, *optional*, defaults to 32): height and width of the learned positions.
        tokenizer (`str`, *optional*, defaults to `"convolution"`):
            `"convolution"`: blocks of convolution, ReLU and max-pooling; `"patch"`: one convolution over patches.
        num_conv_layers, conv_kernel_size, conv_stride, conv_padding, conv_channels:
            Blocks of the convolutional tokenizer; `conv_channels` is the number of channels between two blocks.
        pooling_kernel_size, pooling_stride, pooling_padding: Max-pooling of these blocks.
        patch_size (`int`, *optional*, defaults to 4): side of a patch with `tokenizer="patch"`.
        pooling (`str`, *optional*, defaults to `"sequence"`):
            Input of the classifier: `"sequence"`, an attention-weighted mean of all tokens, or `"cls"`, a CLS token.
        position_embedding (`str`, *optional*, defaults to `"learned"`): `"learned"`, `"sinusoidal"` or `"none"`.
        position_initializer_range (`float`, *optional*, defaults to 0.2).
        drop_path_rate (`float`, *optional*, defaults to 0.1): rate of the last layer, linear from 0 in the first.
    """

    model_type = "cct"

    hidden_size: int = 256
    num_hidden_layers: int = 7
    num_attention_heads: int = 4
    intermediate_size: int = 512
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.1
    drop_path_rate: float = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    position_initializer_range: float = 0.2
    image_size: int | list[int] | tuple[int, int] = 32
    num_channels: int = 3
    tokenizer: Literal["convolution", "patch"] = "convolution"
    num_conv_layers: int = 1
    conv_kernel_size: int = 3
    conv_stride: int = 1
    conv_padding: int = 1
    conv_channels: int = 64
    pooling_kernel_size: int = 3
    pooling_stride: int = 2
    pooling_padding: int = 1
    patch_size: int = 4
    pooling: Literal["sequence", "cls"] = "sequence"
    position_embedding: Literal["learned", "sinusoidal", "none"] = "learned"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        allowed = {
            "tokenizer": ("convolution", "patch"),
            "pooling": ("sequence", "cls"),
            "position_embedding": ("learned", "sinusoidal", "none"),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        positive = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"]
        if self.tokenizer == "patch":
            positive += ["patch_size"]
        else:
            positive += ["num_conv_layers", "conv_kernel_size", "conv_stride", "conv_channels"]
            positive += ["pooling_kernel_size", "pooling_stride"]
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}.")
        if self.num_patch_tokens < 1:
            raise ValueError(
                f"image_size {self.image_size} is too small: the tokenizer makes no token. Increase image_size."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )

    @classmethod
    def cct_7_3x1(cls, **kwargs) -> "CctConfig":
        """CCT-7/3x1 for 32x32 images."""
        return cls(**kwargs)

    @classmethod
    def cct_2_3x2(cls, **kwargs) -> "CctConfig":
        """CCT-2/3x2 for 32x32 images."""
        small = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 128}
        return cls(**{**small, "num_conv_layers": 2, **kwargs})

    @classmethod
    def cvt_6_4(cls, **kwargs) -> "CctConfig":
        """CVT-6/4 for 32x32 images: patches of 4x4 and sequence pooling."""
        return cls(**{"num_hidden_layers": 6, "tokenizer": "patch", **kwargs})

    @classmethod
    def vit_lite_6_4(cls, **kwargs) -> "CctConfig":
        """ViT-Lite-6/4 for 32x32 images: patches of 4x4 and a CLS token."""
        return cls(**{"num_hidden_layers": 6, "tokenizer": "patch", "pooling": "cls", **kwargs})

    @classmethod
    def vit_lite_7_4(cls, **kwargs) -> "CctConfig":
        """ViT-Lite-7/4 for 32x32 images: patches of 4x4 and a CLS token."""
        return cls(**{"tokenizer": "patch", "pooling": "cls", **kwargs})

    @property
    def num_prefix_tokens(self) -> int:
        """P, the number of prefix tokens: 1 with a CLS token, otherwise 0."""
        return int(self.pooling == "cls")

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patch tokens for an image size in pixels."""
        return self._num_tokens_along_axis(height), self._num_tokens_along_axis(width)

    @property
    def num_patch_tokens(self) -> int:
        """T, the number of patch tokens at the configured image size."""
        rows, columns = self.grid_size(*height_and_width(self.image_size))
        return rows * columns

    def uncovered_pixels(self, size: int) -> int:
        """Return the number of pixels at the end of a side of this length that no token covers."""
        if self.tokenizer == "patch":
            return size % self.patch_size
        windows = [
            (self.conv_kernel_size, self.conv_stride, self.conv_padding),
            (self.pooling_kernel_size, self.pooling_stride, self.pooling_padding),
        ] * self.num_conv_layers
        sizes = [size]
        for kernel, stride, padding in windows:
            sizes.append((sizes[-1] + 2 * padding - kernel) // stride + 1)
        covered = sizes.pop()
        for (kernel, stride, padding), available in zip(reversed(windows), reversed(sizes), strict=True):
            covered = min((covered - 1) * stride + kernel - padding, available)
        return size - covered

    def _num_tokens_along_axis(self, size: int) -> int:
        if self.tokenizer == "patch":
            return size // self.patch_size
        for _ in range(self.num_conv_layers):
            size = (size + 2 * self.conv_padding - self.conv_kernel_size) // self.conv_stride + 1
            size = (size + 2 * self.pooling_padding - self.pooling_kernel_size) // self.pooling_stride + 1
        return size


__all__ = ["CctConfig"]
