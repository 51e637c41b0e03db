"""torch.compile: graph breaks and recompilations."""

import pytest
import torch
from torch import _dynamo as dynamo
from torch._dynamo.utils import counters
from transformers import set_seed

from hf_tokenmixup.benchmarks.model_presets import MODEL_PRESETS
from hf_tokenmixup.models import (
    TokenMixupCctConfig,
    TokenMixupCctForImageClassification,
    TokenMixupViTConfig,
    TokenMixupViTForImageClassification,
)
from hf_tokenmixup.saliency import received_attention

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="plain ViT does not compile either: a host decorator"
)

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 12,
    "num_labels": 5,
    "initializer_range": 0.2,
    "attention_probs_dropout_prob": 0.0,
}
MIXING = {"horizontal_layers": [0], "horizontal_rho": 0.002, "vertical_layers": [1], "vertical_kappa": 2}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def vit(**settings):
    set_seed(0)
    return TokenMixupViTForImageClassification(TokenMixupViTConfig(**SIZE | {"patch_size": 3} | settings)).train()


def cct(**settings):
    set_seed(0)
    size = SIZE | {"tokenizer": "patch", "patch_size": 3, "drop_path_rate": 0.0}
    return TokenMixupCctForImageClassification(TokenMixupCctConfig(**size | settings)).train()


def batch(number, size):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(size, 3, 12, 12, generator=generator)
    labels = torch.randint(5, (size,), generator=generator)
    return images, labels


def graphs():
    return counters["stats"]["unique_graphs"]


def train(model, sizes, varying=True):
    """A few steps of SGD in batches of these sizes, each seeded; the losses."""
    losses = []
    for number, size in enumerate(sizes):
        images, labels = batch(number, size)
        if varying:
            dynamo.mark_dynamic(images, 0)
            dynamo.mark_dynamic(labels, 0)
        set_seed(number)
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
        model.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "build, backend",
    [(vit, "aot_eager"), (cct, "eager"), pytest.param(cct, "aot_eager", marks=pytest.mark.slow)],
)
def test_compiled_epochs_match_eager(build, backend):
    """Other data, other numbers of easy images, shorter last batches: compiled for once."""
    plain, model = build(**MIXING, horizontal_tau=1.6), build(**MIXING, horizontal_tau=1.6)
    sizes = [6, 6, 5, 6, 6, 3]
    expected = train(plain, sizes)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with dynamo.config.patch(error_on_recompile=True):
        losses = train(compiled, sizes)
    assert graphs() == 1 and losses == pytest.approx(expected, rel=1e-5)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


RANDOM = {"saliency_detector": "random", "assignment": "random", "token_selection": "random", "relabel": "count"}
SETTINGS = {
    # The host notes the problem type at the first loss, which is one more graph if it is not known.
    "nothing mixed": {
        "horizontal_layers": [],
        "vertical_layers": [],
        "problem_type": "single_label_classification",
    },
    "full maps": {"saliency_route": "output_attentions", "rollout_steps": 1},
    "random choices": RANDOM,
    "groups": {"assignment_group_size": 2, "horizontal_tau": None},
    "manifold mixup alone": {"manifold_mixup_layers": [0, 1], "horizontal_layers": [], "vertical_layers": []},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_compiled_settings_have_no_graph_break(name):
    settings = MIXING | SETTINGS[name]
    expected = train(vit(**settings), [6, 5, 4, 6, 3])
    compiled = torch.compile(vit(**settings), backend="eager", fullgraph=True)
    with dynamo.config.patch(error_on_recompile=True):
        assert train(compiled, [6, 5, 4, 6, 3]) == pytest.approx(expected, rel=1e-5)
    assert graphs() == 1


def test_compiled_gradient_detector_breaks_graph_once():
    images, labels = batch(0, 6)
    found = dynamo.explain(vit(**MIXING, saliency_detector="gradient"))(images, labels=labels)
    assert (found.graph_count, found.graph_break_count) == (2, 1)
    assert "_gradient_saliency" in found.break_reasons[0].reason


@pytest.mark.slow
def test_compiled_gradient_detector_recompiles_for_other_batch_size():
    settings = MIXING | {"saliency_detector": "gradient"}
    expected = train(vit(**settings), [6, 6, 5])
    compiled = torch.compile(vit(**settings), backend="eager")
    assert train(compiled, [6, 6, 5], varying=False) == pytest.approx(expected, rel=1e-5)
    with dynamo.config.patch(error_on_recompile=True):
        train(compiled, [6, 5, 4, 3], varying=False)


@pytest.mark.slow
def test_compiled_batch_size_change_recompiles_once():
    model = torch.compile(vit(**MIXING), backend="eager", fullgraph=True)
    train(model, [6, 4, 6, 3, 5], varying=False)
    assert graphs() == 2


@pytest.mark.slow
def test_compiled_evaluation_adds_one_graph():
    model = vit(**MIXING)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    train(compiled, [6, 5])
    for number, size in enumerate([6, 4]):
        images, _ = batch(number, size)
        dynamo.mark_dynamic(images, 0)
        model.eval()
        with torch.no_grad():
            logits = compiled(pixel_values=images).logits
            torch.testing.assert_close(logits, model(images).logits)
        model.train()
        train(compiled, [6])
    assert graphs() == 2


def test_compiled_attention_chunks_do_not_recompile():
    scale, most = 0.5, 2 * 5 * 8 * 4  # four images' map of two heads and five queries

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(query, key):
        return received_attention(query, key, scale, max_elements=most)

    with dynamo.config.patch(error_on_recompile=True):
        for size in (32, 8, 2):
            query, key = torch.randn(size, 2, 5, 3), torch.randn(size, 2, 8, 3)
            dynamo.mark_dynamic(query, 0)
            dynamo.mark_dynamic(key, 0)
            complete = (query @ key.transpose(2, 3) * scale).softmax(dim=-1).mean(dim=(1, 2))
            torch.testing.assert_close(compiled(query, key), complete)


@pytest.mark.slow
def test_compiled_autocast_mixes_like_eager():
    images, labels = batch(0, 6)
    model = vit(**MIXING, horizontal_tau=None)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, output = model(images, labels=labels), compiled(images, labels=labels)
    assert output.horizontal[0].saliency.dtype == torch.float32
    assert torch.equal(output.horizontal[0].partner, expected.horizontal[0].partner)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-tiny", "cct-2-3x2"])
def test_compiled_with_inductor(name):
    """By inductor, at the sizes that are trained."""
    network = MODEL_PRESETS[name]
    settings = network.tokenmixup_configs["HTM + VTM"] | {"horizontal_tau": None, "horizontal_rho": 0.0}
    set_seed(0)
    fewer = {"drop_path_rate": 0.0} if "cct" in name else {"num_hidden_layers": 5}
    model = network.build(**settings, **fewer).train()
    if "cct" in name:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    size = model.config.image_size
    compiled = torch.compile(model, fullgraph=True)
    with dynamo.config.patch(error_on_recompile=True):
        # On a CPU, inductor takes other code for sums of more than 4096 values.
        for number, count in enumerate((24, 21)):
            images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(number))
            labels = torch.arange(count) % 10
            dynamo.mark_dynamic(images, 0)
            dynamo.mark_dynamic(labels, 0)
            gradients = []
            for one in (model, compiled):
                one.zero_grad()
                output = one(pixel_values=images, labels=labels)
                output.loss.backward()
                gradients.append((output.loss, model.classifier.weight.grad, output.targets))
            for expected, got in zip(*gradients, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch cannot split a CUDA graph")
def test_optimal_assignment_has_cudagraph_unsafe_tag():
    assert torch.Tag.cudagraph_unsafe in torch.ops.hf_tokenmixup.optimal_assignment.default.tags
