"""Number of parameters and multiply-accumulate operations (MACs) of a classifier."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..saliency import eval_mode

# Products of two activations. Layers with weights use `mm` and `addmm`.
_BATCHED_PRODUCTS = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


def count_parameters(model: nn.Module) -> int:
    """Count parameters, trainable or not. Shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: PreTrainedModel, image_size: Sequence[int], *, exclude_attention_products: bool = False) -> int:
    """Count the multiply-accumulate operations of a forward pass for one image: half of torch's FLOP count.

    Matrix products and convolutions count, including those of attention with any implementation. Biases,
    normalization, activations and softmax do not. The model is not changed, and it may be on the meta device.

    Args:
        model: An image classifier.
        image_size: Channels, height and width of the model's input.
        exclude_attention_products: Do not count the products of queries with keys and of attention with values. FLOP
            counters that count per layer give this number, and so do Tables 1 and 2 of the paper.

    Raises:
        ValueError: The model does not accept images of this size.
    """
    image = torch.zeros(1, *image_size, device=model.device, dtype=model.dtype)
    counter = FlopCounterMode(display=False)
    # Some versions of torch do not count fused attention kernels (torch 2.6 on CPU), so use plain matrix products.
    with eval_mode(model), use_eager_attention(model), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        try:
            model(pixel_values=image)
        except (RuntimeError, ValueError, LookupError, ArithmeticError) as error:
            raise ValueError(
                f"{type(model).__name__} does not accept images of shape (channels, height, width) = "
                f"{tuple(image_size)}, which the image processor returns: {' '.join(str(error).split())} Use an image "
                "processor, image_size and patch_size that match."
            ) from error
    flops = counter.get_total_flops()
    if exclude_attention_products:
        flops -= sum(counter.get_flop_counts()["Global"].get(product, 0) for product in _BATCHED_PRODUCTS)
    return flops // 2


@contextmanager
def use_eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Replace attention implementations other than `eager` and `sdpa` by `eager` inside the context."""
    original = getattr(model.config, "_attn_implementation", None)
    if original in (None, "eager", "sdpa"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(original)
