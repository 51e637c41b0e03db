"""Trainings on 1, 2 and 4 CPU processes under a launcher (DDP), compared by what each process saw."""

import pytest
import torch
from helpers.process_worker import build, launch
from helpers.tiny_training import Images, tokenmixup_vit
from torch.nn import functional as F

WORLDS = (1, 2, 4)
OFF = {"horizontal_layers": [], "vertical_layers": []}
# Half of the classes are easy: ScoreNet takes an image for one of the first two.
SOME_EASY = {"settings": {"horizontal_tau": 1.3}, "scorenet_bias": {1: [2.0, 2.0, 0.0, 0.0]}}
# Of two processes each reads every second batch: the first's images are easy, the second's never.
HARD_RANK = {
    "settings": {"horizontal_tau": 1.0},
    "scorenet_bias": {1: [4.0, 0.0, 0.0, 0.0]},
    "images": 24,
    "labels": ([0] * 4 + [1, 2, 3, 1]) * 3,
    "arguments": {"per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-3},
}


def off_cases(world: int) -> list[dict]:
    """TokenMixup off, steps of 8 images; the last of an epoch has 7, of which every process has some."""
    uneven = {"per_device_train_batch_size": 8 // world, "accelerator_config": {"even_batches": False}}
    complete = {"settings": OFF, "images": 23, "arguments": uneven | {"num_train_epochs": 2}}
    accumulated = complete["arguments"] | {"per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": 2}
    cases = [{"name": "off", **complete}]
    if world < 4:
        cases.append({"name": "off-accumulated", **complete, "arguments": accumulated})
    evaluated = {"max_steps": 1, "per_device_train_batch_size": 8 // world, "per_device_eval_batch_size": 4}
    cases.append({"name": "evaluated", "settings": OFF, "images": 16, "eval_images": 11, "arguments": evaluated})
    return cases


def drawn_cases() -> list[dict]:
    """TokenMixup on, with much that draws random numbers."""
    settings = SOME_EASY["settings"] | {"assignment": "random", "token_selection": "random"}
    settings |= {"hidden_dropout_prob": 0.1}
    arguments = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    return [{"name": "drawn", **SOME_EASY, "settings": settings, "images": 30, "arguments": arguments}]


def own_cases() -> list[dict]:
    """Three steps without any such draw."""
    own = {"per_device_train_batch_size": 4, "num_train_epochs": 1}
    accumulated = own | {"gradient_accumulation_steps": 2, "logging_steps": 3}
    return [
        {"name": "own", **SOME_EASY, "images": 24, "arguments": own},
        {"name": "own-accumulated", **SOME_EASY, "images": 48, "arguments": accumulated},
    ]


def hard_cases() -> list[dict]:
    settings, arguments = HARD_RANK["settings"], HARD_RANK["arguments"]
    still = {"attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}
    return [
        {"name": "hard", **HARD_RANK},
        {"name": "hard-static", **HARD_RANK, "arguments": arguments | {"ddp_static_graph": True}},
        {"name": "hard-gradient", **HARD_RANK, "settings": settings | {"saliency_detector": "gradient"}},
        {"name": "hard-cct", **HARD_RANK, "model": "cct", "settings": settings | still},
    ]


def rank_cases() -> list[dict]:
    """Everything that draws, in a real order of the images; and resumed in the middle of the second epoch."""
    (case,) = drawn_cases()
    settings = case["settings"] | {
        "saliency_detector": "random",
        "manifold_mixup_layers": [1],
        "horizontal_layers": [2],
    }
    settings |= {"vertical_layers": []}
    arguments = case["arguments"] | {"save_strategy": "steps", "save_steps": 2, "seed": 7}
    case |= {
        "unseeded": True,
        "reseeded": True,
        "settings": settings,
        "images": 24,
        "scorenet_bias": {},
        "arguments": arguments,
    }
    cases = []
    for order in ("random", "weighted"):
        cases.append(case | {"name": f"ranks-{order}", "order": order})
        cases.append(
            cases[-1] | {"name": f"ranks-{order}-resumed", "outputs": f"ranks-{order}", "resume": "checkpoint-4"}
        )
    return cases


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, dict[str, list[dict]]]:
    folder = tmp_path_factory.mktemp("runs")
    more = {1: [], 2: drawn_cases() + own_cases() + hard_cases() + rank_cases(), 4: drawn_cases()}
    return {world: launch(world, off_cases(world) + more[world], folder / str(world)) for world in WORLDS}


pytestmark = pytest.mark.slow


def assert_close(got: dict, expected: dict, atol: float = 1e-6) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor, atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("world, case", [(1, "off-accumulated"), (2, "off"), (2, "off-accumulated"), (4, "off")])
def test_processes_with_tokenmixup_off_match_one_process_with_full_batch(runs, world, case):
    (expected,) = runs[1]["off"]
    for got in runs[world][case]:
        assert_close(got["weights"], expected["weights"])
        assert len(got["log"]) == 6
        for line, other in zip(got["log"], expected["log"], strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_evaluation_counts_each_image_once(runs, world):
    (one,) = runs[1]["evaluated"]
    model, images = tokenmixup_vit(**OFF).eval(), Images(11)
    model.load_state_dict(one["weights"])
    with torch.no_grad():
        expected = F.cross_entropy(model(images.pixels).logits, images.labels).item()
    assert one["evaluation"]["eval_loss"] == pytest.approx(expected, rel=1e-6)
    for seen in runs[world]["evaluated"]:
        assert seen["evaluation"]["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_run_repeats_bit_for_bit(runs, world, tmp_path):
    first, second = runs[world]["drawn"], launch(world, drawn_cases(), tmp_path / "again")["drawn"]
    assert any(counts["mixed_samples"] for seen in first for counts in seen["counts"])
    weights = first[0]["weights"]
    assert any("scorenet" in name for name in weights)
    for seen in (*first, *second):
        assert seen["weights"].keys() == weights.keys()
        assert all(torch.equal(seen["weights"][name], tensor) for name, tensor in weights.items())
        assert [line["loss"] for line in seen["log"]] == [line["loss"] for line in first[0]["log"]]
    # The processes had images of their own.
    assert not torch.equal(first[0]["batches"][0]["pixel_values"], first[1]["batches"][0]["pixel_values"])


@pytest.mark.parametrize("case, micro_batches", [("own", 1), ("own-accumulated", 2)])
def test_processes_gradients_are_mean_over_processes(runs, case, micro_batches):
    """A second route: the same batches one by one in this process, each mixed within itself."""
    ranks = runs[2][case]
    model, rate = build(SOME_EASY).train(), 0.1
    steps = len(ranks[0]["gradients"])
    mixed = 0
    for step in range(steps):
        here = slice(step * micro_batches, (step + 1) * micro_batches)
        batches = [batch for seen in ranks for batch in seen["batches"][here]]
        model.zero_grad()
        for batch in batches:
            output = model(**batch)
            (output.loss / len(batches)).backward()
            mixed += output.mixing_metrics["mixed_samples"].item()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        for seen in ranks:
            assert_close(seen["gradients"][step], expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
    assert steps == 3 and mixed > 0
    assert_close(ranks[0]["weights"], model.state_dict(), atol=1e-5)
    # Mixed over all images of a step at once, the gradient would be another.
    model = build(SOME_EASY).train()
    first = [batch for seen in ranks for batch in seen["batches"][:micro_batches]]
    model(**{name: torch.cat([batch[name] for batch in first]) for name in first[0]}).loss.backward()
    weight = "vit.layers.2.attention.q_proj.weight"
    assert not torch.allclose(model.get_parameter(weight).grad, ranks[0]["gradients"][0][weight], atol=1e-5)


@pytest.mark.parametrize("case", ["hard", "hard-static", "hard-gradient", "hard-cct"])
def test_processes_without_easy_images_have_all_gradients(runs, case):
    easy, hard = runs[2][case]
    assert all(counts["easy_samples"] == 4 for counts in easy["counts"])
    assert all(counts["easy_samples"] == 0 and counts["mixed_samples"] == 0 for counts in hard["counts"])
    names = {name for name in easy["weights"] if name in easy["gradients"][0]}
    assert any("scorenet" in name for name in names)
    for seen in (easy, hard):
        assert seen["find_unused_parameters"] is False
        assert len(seen["reached"]) == 3
        assert all(reached == names for reached in seen["reached"])
        assert all(gradient is not None for step in seen["gradients"] for gradient in step.values())
        assert all(torch.equal(seen["weights"][name], tensor) for name, tensor in easy["weights"].items())


def test_processes_train_families_with_unused_parameters(tmp_path):
    cases = [HARD_RANK | {"name": model_type, "model": model_type} for model_type in ("dinov2", "siglip")]
    for name, ranks in launch(2, cases, tmp_path / "runs").items():
        model = build(HARD_RANK | {"model": name})
        unused = {key for key, _ in model.named_parameters() if model.is_unused_parameter(key)}
        used = dict(model.named_parameters()).keys() - unused
        assert unused
        for seen in ranks:
            assert seen["find_unused_parameters"] is True
            assert len(seen["reached"]) == 3 and all(reached == used for reached in seen["reached"])
            assert all(torch.equal(seen["weights"][key], seen["initial"][key]) for key in unused)
            assert all(torch.equal(seen["weights"][key], tensor) for key, tensor in ranks[0]["weights"].items())
        assert sum(counts["mixed_samples"] for counts in ranks[0]["counts"]) > 0


@pytest.mark.parametrize("case, micro_batches", [("hard", 1), ("own", 1), ("own-accumulated", 2)])
def test_processes_logged_metrics_are_those_of_full_step(runs, case, micro_batches):
    ranks = runs[2][case]
    lines = ranks[0]["log"]
    per_line = len(ranks[0]["counts"]) // len(lines)
    for number, line in enumerate(lines):
        here = slice(number * per_line, (number + 1) * per_line)
        forwards = [counts for seen in ranks for counts in seen["counts"][here]]
        steps = per_line / micro_batches
        for name in ("easy_samples", "mixed_samples", "replaced_tokens", "vertical_tokens"):
            assert line[name] == pytest.approx(sum(counts[name] for counts in forwards) / steps), name
        for name in ("difficulty", "scorenet_loss"):
            assert line[name] == pytest.approx(sum(counts[name] for counts in forwards) / len(forwards), rel=1e-5), (
                name
            )
    if case == "hard":
        assert [line["easy_samples"] for line in lines] == [4, 4, 4]
        assert [line["vertical_tokens"] for line in lines] == [8 * 2 * 2] * 3


def images_of(batch: dict, epoch: int) -> list[int]:
    """The numbers of a batch's images among those of `Images`."""
    every = Images(24).pixels + 0.1 * epoch
    return [int((every - image).abs().amax(dim=(1, 2, 3)).argmin()) for image in batch["pixel_values"]]


@pytest.mark.parametrize("order", ["random", "weighted"])
def test_processes_have_common_weights_and_own_images_and_random_numbers(runs, order):
    first, second = runs[2][f"ranks-{order}"]
    assert_close(second["initial"], first["initial"], atol=0.0)
    orders = []
    for epoch in range(2):
        here = slice(3 * epoch, 3 * (epoch + 1))
        own = [[images_of(batch, epoch) for batch in seen["batches"][here]] for seen in (first, second)]
        assert sorted(sum(own[0] + own[1], [])) == list(range(24))
        orders.append(own)
    assert orders[0] != orders[1]
    # The targets show the mixup ratio or the area of the CutMix box: every row has at most two classes.
    ratios = [[targets.max(dim=1).values for targets in seen["targets"]] for seen in (first, second)]
    assert len(ratios[0]) == 6 and not any(map(torch.equal, *ratios))
    assert len(first["dropped"]) == 6 and not any(map(torch.equal, first["dropped"], second["dropped"]))
    weights = [seen["weights"] for seen in (first, second)]
    assert_close(weights[1], weights[0], atol=0.0)


@pytest.mark.parametrize("order", ["random", "weighted"])
def test_processes_resume_own_random_numbers(runs, order):
    for uninterrupted, resumed in zip(runs[2][f"ranks-{order}"], runs[2][f"ranks-{order}-resumed"], strict=True):
        assert len(resumed["batches"]) == 2
        for name in ("targets", "dropped"):
            assert all(map(torch.equal, uninterrupted[name][4:], resumed[name]))
        for batch, expected in zip(resumed["batches"], uninterrupted["batches"][4:], strict=True):
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert all(torch.equal(resumed["weights"][name], tensor) for name, tensor in uninterrupted["weights"].items())
