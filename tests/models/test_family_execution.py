"""Compilation, precision, attention implementations and threads of all model families."""

import threading

import pytest
import torch
from helpers.families import BOTH
from helpers.family_steps import step
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def fresh_compiler():
    """All families share the code of a forward pass, and only a few versions of one code object are compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="plain ViT does not compile either: a host decorator")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_forward_is_one_graph(build, images, labels):
    model = build(**BOTH)
    expected_output, expected = step(model, images, labels)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, gradients = step(compiled, images, labels)
    torch.testing.assert_close(output.loss, expected_output.loss)
    assert torch.equal(output.horizontal[0].replaced, expected_output.horizontal[0].replaced)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[f"_orig_mod.{name}"], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="plain ViT does not compile either: a host decorator")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_forward_validates_labels(build, images, labels):
    compiled = torch.compile(build(**BOTH), fullgraph=True, backend="aot_eager")
    assert compiled(images, labels=labels).loss.isfinite()
    with pytest.raises(ValueError, match="got 5 for image 1"):
        compiled(images, labels=torch.tensor([0, 5, 2, 3, 4, 0]))


class NoWaiting(TorchDispatchMode):
    """Refuses the operations that make a host wait for an accelerator; custom operators count as one."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "item", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.seen.append(name)
        if any(name.startswith(word) for word in self.waiting):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("changes", [{}, {"assignment": "random", "token_selection": "random", "relabel": "count"}])
def test_training_forward_has_single_device_sync(build, changes, images, labels):
    model = build(**{**BOTH, "horizontal_layers": [1, 3], **changes})
    with NoWaiting() as log:
        model(images, labels=labels).loss.backward()
    assert log.seen.count("optimal_assignment") == (0 if changes else 2)
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        bool(labels.sum() > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_selects_same_tokens(build, dtype, images, labels):
    model = build(**{**BOTH, "horizontal_layers": [0]})
    expected = model(images, labels=labels).horizontal[0]
    embeddings = build.case.embed(model, images)
    model.get_transformer_layers()[0].register_forward_pre_hook(lambda module, args: (embeddings, *args[1:]))
    with torch.autocast("cpu", dtype):
        output = model(images, labels=labels)
    got = output.horizontal[0]
    assert torch.equal(got.saliency, expected.saliency) and got.saliency.dtype == torch.float32
    assert torch.equal(got.scorenet_logits, expected.scorenet_logits)
    assert torch.equal(got.partner, expected.partner) and torch.equal(got.replaced, expected.replaced)
    assert output.loss.dtype == torch.float32 and output.loss.isfinite()
    output.loss.backward()


def test_attention_implementations_agree(build, images, labels):
    model = build(**BOTH)
    eager = build(**BOTH, attn_implementation="eager")
    assert model.config._attn_implementation == "sdpa"
    output, expected = step(model, images, labels), step(eager, images, labels)
    torch.testing.assert_close(output[0].loss, expected[0].loss)
    for name in expected[1]:
        torch.testing.assert_close(output[1][name], expected[1][name], atol=1e-5, rtol=1e-4)


def test_interleaved_forwards_are_independent(build, images, labels):
    """Nested and threaded forwards of two models give what each gives alone."""
    first, second = build(**BOTH), build(**{**BOTH, "vertical_layers": [1]})
    alone = first(images, labels=labels).logits, second(images.flip(0), labels=labels).logits
    nested = []
    first.get_transformer_layers()[2].register_forward_hook(
        lambda *a: nested.append(second(images.flip(0), labels=labels).logits)
    )
    assert torch.equal(first(images, labels=labels).logits, alone[0]) and torch.equal(nested[0], alone[1])
    results = {}

    def work(name, model, batch):
        for _ in range(5):
            results.setdefault(name, []).append(model(batch, labels=labels).logits)

    third = build(**BOTH)
    threads = [
        threading.Thread(target=work, args=("third", third, images)),
        threading.Thread(target=work, args=("second", second, images.flip(0))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(logits, alone[0]) for logits in results["third"])
    assert all(torch.equal(logits, alone[1]) for logits in results["second"])
