"""Attention of vertical layers to the tokens that they collect from earlier layers."""

import torch

from ..functional import select_salient_tokens
from ..models import TokenMixupModelMixin
from ..models.layer_inputs import layer_inputs, layer_saliency
from ..saliency import eval_mode
from .forecasts import collected_attention


def vertical_attention(model: TokenMixupModelMixin, pixel_values: torch.Tensor) -> torch.Tensor | None:
    """Measure how much attention vertical layers pay to collected tokens, in evaluation mode and without mixing.

    Args:
        model: a TokenMixup classifier.
        pixel_values: (B, 3, H, W), normalized. One or two images are enough for a mean over queries and heads.

    Returns:
        () attention to collected tokens as a multiple of what uniform attention would pay to them, mean over vertical
        layers, images, queries and heads. None without vertical layers, with a kappa of 0, and for the gradient
        detector, which needs labels.
    """
    config = model.config
    if not config.vertical_layers or config.vertical_kappa == 0 or config.saliency_detector == "gradient":
        return None
    # Also the dropout of adapters must not draw random numbers, which would change the run.
    with eval_mode(model), torch.no_grad():
        inputs, layers = layer_inputs(model, pixel_values), model.get_transformer_layers()
        generator = torch.Generator(pixel_values.device).manual_seed(0)
        collected, positions, relative = [], [], []
        for index, layer_input in enumerate(inputs):
            hidden = layer_input.hidden
            if index in config.vertical_layers:
                memory = torch.stack(collected, dim=1)  # (B, L, kappa, D)
                attention = collected_attention(
                    layers[index],
                    hidden,
                    memory,
                    torch.stack(positions, dim=1),
                    [config.vertical_kappa],
                    layer_input.kwargs,
                ).mean()
                num_memory = memory.shape[1] * memory.shape[2]
                relative.append(attention * (hidden.shape[1] + num_memory) / num_memory)
            if index < config.num_collected_layers:
                saliency = layer_saliency(model, layer_input, index, gradient_fn=_no_gradient, generator=generator)
                collected.append(
                    select_salient_tokens(hidden, saliency, config.vertical_kappa, config.num_prefix_tokens)
                )
                positions.append(saliency.topk(config.vertical_kappa, dim=1).indices)
    return torch.stack(relative).mean()


def _no_gradient() -> torch.Tensor:
    raise AssertionError("The gradient detector is handled before.")
