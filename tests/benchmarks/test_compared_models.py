"""Models of the paper's tables against its figures and against counts of the original code."""

import json
from pathlib import Path

import pytest
import torch

from hf_tokenmixup.benchmarks.compared_models import IMAGE_SIZES, NUM_LABELS, PAPER_BASELINES, PaperModel, count_costs
from hf_tokenmixup.benchmarks.model_presets import MODEL_PRESETS
from hf_tokenmixup.benchmarks.tables import parameter_table
from hf_tokenmixup.cli.recipes import load_recipe
from hf_tokenmixup.evaluation.flops import count_macs, count_parameters
from hf_tokenmixup.models import CctConfig, CctForImageClassification

ROOT = Path(__file__).parents[2]
BUILT = [model for model in PAPER_BASELINES if model.build]


@pytest.fixture(scope="module")
def reference():
    return json.loads((ROOT / "tests" / "golden" / "param_counts.json").read_text())


def parse_figure(text):
    """A printed figure and the unit of its last digit. The paper rounds some figures and truncates others."""
    number = text.split()[0]
    return float(number), 10.0 ** -len(number.partition(".")[2])


@pytest.mark.parametrize("paper_model", BUILT, ids=[f"{model.table}-{model.name}" for model in BUILT])
def test_baseline_parameters_match_the_paper(paper_model):
    with torch.device("meta"):
        counts = [count_parameters(paper_model.build(num_labels)) for num_labels in NUM_LABELS[paper_model.table]]
    if paper_model.parameters == "-":
        assert all(20e6 < count < 100e6 for count in counts)
        return
    figure, unit = parse_figure(paper_model.parameters)
    assert any(abs(count / 1e6 - figure) <= unit for count in counts), counts


@pytest.mark.parametrize("name", ["ViT-Lite-6/4", "CVT-6/4", "CCT-7/3x1 (as published)", "MobileNetV2/2.0"])
def test_baseline_macs_match_the_paper(name):
    (paper_model,) = [model for model in PAPER_BASELINES if model.name == name]
    costs = count_costs(paper_model)
    figure, unit = parse_figure(paper_model.macs)
    assert any(abs(macs / 1e9 - figure) <= unit for macs in (costs.macs, costs.macs_weights_only))
    shape = (3, IMAGE_SIZES[1], IMAGE_SIZES[1])
    model = paper_model.build(NUM_LABELS[1][0])
    assert model.device.type == "cpu" and costs.macs == count_macs(model, shape)
    assert costs.parameters[NUM_LABELS[1][0]] == count_parameters(model)


def test_count_costs_weights_only_excludes_attention_products():
    tokens, width, layers = 256, 256, 7
    costs = count_costs(
        PaperModel(1, "CCT", "", "", lambda count: CctForImageClassification(CctConfig(num_labels=count)))
    )
    assert costs.macs - costs.macs_weights_only == layers * 2 * tokens**2 * width + tokens * width  # sequence pooling


def test_parameter_table_shows_models_that_cannot_be_built():
    missing = PaperModel(1, "WRN-28-10", "36.5 M", "-")
    assert count_costs(missing) is None
    small = PaperModel(1, "small", "1 M", "0.1 G", lambda count: MODEL_PRESETS["cct-2-3x2"].build(num_labels=count))
    counted = [(missing, None), (small, count_costs(small)), (PaperModel(2, "other", "", ""), None)]
    rows = [line.split() for line in parameter_table(1, counted).splitlines()]
    assert len(rows) == 3 and rows[1] == "WRN-28-10 36.5 M not built not built -".split()
    parameters = [f"{counted[1][1].parameters[count] / 1e6:.2f}" for count in (100, 10)]
    assert rows[2][:7] == ["small", "1", "M", parameters[0], "M", parameters[1], "M"]
    assert rows[2][-4:] == [*f"{counted[1][1].macs / 1e9:.2f} G".split(), *f"{small_weights(counted):.2f} G".split()]


def small_weights(counted):
    return counted[1][1].macs_weights_only / 1e9


@pytest.mark.parametrize("method, key", [(None, "baseline"), ("HTM", "htm"), ("VTM", "vtm"), ("HTM + VTM", "htm_vtm")])
def test_presets_have_the_parameters_of_the_original_code(reference, method, key):
    for size, name in (("cct-7-3x1", "cct_7_3x1_32/100cls"), ("vit-base", "ViT-B_16/224/1000cls")):
        preset = MODEL_PRESETS[size]
        with torch.device("meta"):
            model = preset.build(**preset.tokenmixup_configs.get(method, {}))
        assert count_parameters(model) == reference[f"{name}/{key}"]["total"]


@pytest.mark.parametrize(
    "size, method, recipe",
    [
        ("cct-7-3x1", "HTM", "cct-7-3x1-cifar10-htm"),
        ("cct-7-3x1", "VTM", "cct-7-3x1-cifar10-vtm"),
        ("cct-7-3x1", "HTM + VTM", "cct-7-3x1-cifar100-htm-vtm"),
        ("cct-2-3x2", "HTM + VTM", "cct-2-3x2-cifar10-cpu"),
        ("vit-base", "HTM", "vit-b16-imagenet1k-htm"),
        ("vit-base", "VTM", "vit-b16-imagenet1k-vtm"),
        ("vit-base", "HTM + VTM", "vit-b16-imagenet1k-htm-vtm"),
    ],
)
def test_presets_have_the_settings_of_the_recipes(size, method, recipe):
    options = load_recipe(recipe)
    preset = MODEL_PRESETS[size]
    with torch.device("meta"):
        config = preset.build(**preset.tokenmixup_configs[method]).config
    names = ["horizontal_layers", "vertical_layers", "vertical_kappa", "scorenet_loss_weight", "scorenet_detach"]
    compared = {name: options[name] for name in names if name in options}
    overrides = options.get("config_overrides", {})
    # The short CPU recipe turns off dropout and stochastic depth.
    compared |= {name: value for name, value in overrides.items() if "rate" not in name and "prob" not in name}
    assert {name: getattr(config, name) for name in compared} == compared and len(compared) >= 2
