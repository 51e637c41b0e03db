"""Training steps and loading reports for the tests of all model families."""

import torch
from transformers import set_seed

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.2}


def layer_path(model):
    """Name of the list of transformer layers."""
    layers = model.get_transformer_layers()
    return next(name for name, module in model.named_modules() if module is layers)


def plain_classes(model):
    return model.base_model_class, model.base_model_class.config_class


def step(model, images, labels, seed=2, **kwargs):
    """Outputs and gradients of a training step."""
    model.zero_grad()
    set_seed(seed)
    output = model(images, labels=labels, **kwargs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(first, second):
    (output, gradients), (other, other_gradients) = first, second
    assert torch.equal(output.loss, other.loss) and torch.equal(output.logits, other.logits)
    assert gradients.keys() == other_gradients.keys()
    for name in gradients:
        assert torch.equal(gradients[name], other_gradients[name]), name


def loading_info(model_class, folder, **settings):
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **settings)
    return model, {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


CLEAN = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
