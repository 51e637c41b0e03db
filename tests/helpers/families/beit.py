"""Tiny BEiT with a relative position bias in each layer and mean pooling, as released fine-tuned models have them."""

import torch

from . import Family


def score_bias(table, rows=4, columns=4):
    """Relative position bias (H, N, N), from the entry of the table for each pair of tokens."""
    num_tokens = rows * columns + 1
    bias = torch.empty(table.shape[1], num_tokens, num_tokens)
    bias[:, 0, :], bias[:, :, 0], bias[:, 0, 0] = table[-3][:, None], table[-2][:, None], table[-1]
    for query in range(rows * columns):
        for key in range(rows * columns):
            down, right = query // columns - key // columns, query % columns - key % columns
            bias[:, query + 1, key + 1] = table[(down + rows - 1) * (2 * columns - 1) + right + columns - 1]
    return bias


def rest_of_layer(layer, hidden, attn_output):
    hidden = hidden + 0.7 * attn_output
    return hidden + 0.7 * layer.mlp(layer.layernorm_after(hidden))


def classify(model, hidden, num_prefix_tokens):
    return model.classifier(model.base_model.pooler.layernorm(hidden[:, num_prefix_tokens:].mean(dim=1)))


CASES = {
    "beit": Family(
        own={"use_relative_position_bias": True, "layer_scale_init_value": 0.7, "drop_path_rate": 0.0},
        rest_of_layer=rest_of_layer,
        score_bias=lambda model, layer: score_bias(layer.relative_position_bias.relative_position_bias_table),
        classify=classify,
        # The kernel of "sdpa" on CPUs depends on whether the bias needs a gradient.
        reproducible_attention="eager",
    ),
}
