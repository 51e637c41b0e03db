"""What a classifier costs: parameters, and multiply-accumulate operations of an image."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..saliency import eval_mode

# Both factors differ from image to image; a layer's weights go into a plain matrix product.
_BATCHED_PRODUCTS = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, trained or not; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: PreTrainedModel, image_size: Sequence[int], *, weights_only: bool = False) -> int:
    """Multiply-accumulate operations of one image's forward pass in evaluation: half of torch's count of its flops.

    Matrix products and convolutions count, attention's among them with any implementation; biases, normalisation,
    activations and softmax do not. The model is left as it was; it may lie on the meta device.

    Args:
        image_size: (3, H, W), as the model reads it.
        weights_only: leave out products of activations with each other, which are attention's: what counters of layers
            find, and what the paper's Tables 1 and 2 hold.

    Raises:
        ValueError: the model takes no images of this size.
    """
    image = torch.zeros(1, *image_size, device=model.device, dtype=model.dtype)
    counter = FlopCounterMode(display=False)
    # Fused kernels are not counted by every torch (on a CPU by 2.6, say), or not at all: take the plain products.
    with eval_mode(model), use_eager_attention(model), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        try:
            model(pixel_values=image)
        except (RuntimeError, ValueError, LookupError, ArithmeticError) as error:
            raise ValueError(
                f"{type(model).__name__} cannot read images of shape (channels, height, width) = {tuple(image_size)}, "
                f"as the image processor makes them: {' '.join(str(error).split())} Give it an image processor, an "
                "image_size and a patch_size that belong together."
            ) from error
    flops = counter.get_total_flops()
    if weights_only:
        flops -= sum(counter.get_flop_counts()["Global"].get(product, 0) for product in _BATCHED_PRODUCTS)
    return flops // 2


@contextmanager
def use_eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `eager` in place of an attention that is neither that nor torch's `scaled_dot_product_attention`."""
    chosen = getattr(model.config, "_attn_implementation", None)
    if chosen in (None, "eager", "sdpa"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)
