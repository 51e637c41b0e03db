"""Facts about a vision transformer that TokenMixup depends on."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Network:
    """Sizes of a vision transformer and what its classifier reads.

    Attributes:
        hidden_size: D.
        num_layers: number of transformer layers.
        num_heads: number of attention heads H.
        mlp_size: hidden size of the MLP of a layer.
        image_size: configured height and width in pixels.
        patch_size: height and width of a patch in pixels; None if tokens are no patches.
        num_prefix_tokens: P, the number of leading tokens that are not patch tokens.
        classifier_pooling: what the classifier reads: `"cls"`, `"mean"`, `"attention"` (sequence pooling), or
            `"cls_mean"`, the CLS token and the mean of the patch tokens.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int] | None
    num_prefix_tokens: int
    classifier_pooling: str
