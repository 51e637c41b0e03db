"""Facts about a vision transformer that TokenMixup depends on."""

from dataclasses import dataclass

# Usual names of vision transformers, by hidden size and number of layers.
_SIZE_NAMES = {
    (192, 12): "Ti",
    (384, 12): "S",
    (768, 12): "B",
    (1024, 24): "L",
    (1152, 27): "So400m",
    (1280, 32): "H",
    (1408, 40): "g",
    (1536, 40): "g",
    (1664, 48): "G",
}


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

    @property
    def size_name(self) -> str | None:
        """Usual name of the size with the patch size in pixels, such as `B/16`; None if it has none."""
        size = _SIZE_NAMES.get((self.hidden_size, self.num_layers))
        if size is None or self.patch_size is None:
            return None
        height, width = self.patch_size
        return f"{size}/{height}" if height == width else f"{size}/{height}x{width}"
