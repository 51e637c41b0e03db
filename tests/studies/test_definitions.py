"""Definitions of the studies: the paper's figures, and recipes that differ by the setting of their row."""

import re

import pytest
import torch

from hf_tokenmixup.cli.finetune import build_trainer
from hf_tokenmixup.cli.recipes import RECIPES, load_recipe
from hf_tokenmixup.paper_results import find_paper_results, get_paper_top1
from hf_tokenmixup.studies.definitions import SMALL_STUDIES, TABLES, sweep_study
from hf_tokenmixup.studies.results import summarize

CCT = "cct-7-3x1-cifar100"
# Settings that replace those of the recipe of Table 1, or are added to them.
REMOVED = "removed"
NO_INPUT_MIXING = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "mixup_prob": REMOVED, "mixup_switch_prob": REMOVED}
MANIFOLD = {"manifold_mixup_layers": [0, 1, 2], "manifold_mixup_alpha": 2.0}
DERIVED = {
    "htm-gradient-saliency": ("htm", {"saliency_detector": "gradient"}),
    "htm-random-saliency": ("htm", {"saliency_detector": "random"}),
    "htm-all-easy": ("htm", {"horizontal_tau": None}),
    "htm-random-assignment": ("htm", {"assignment": "random"}),
    "htm-random-tokens": ("htm", {"token_selection": "random"}),
    "htm-count-labels": ("htm", {"relabel": "count"}),
    "baseline-no-input-mixing": ("baseline", NO_INPUT_MIXING),
    "manifold-no-input-mixing": ("baseline", NO_INPUT_MIXING | MANIFOLD),
    "htm-no-input-mixing": ("htm", NO_INPUT_MIXING),
    "vtm-no-input-mixing": ("vtm", NO_INPUT_MIXING),
    "manifold": ("baseline", MANIFOLD),
}


@pytest.mark.parametrize("name", DERIVED)
def test_ablation_recipe_differs_from_its_base_in_the_row_settings_only(name):
    base, changes = DERIVED[name]
    expected = load_recipe(f"{CCT}-{base}") | changes | {"output_dir": f"outputs/{CCT}-{name}"}
    assert load_recipe(f"{CCT}-{name}") == {key: value for key, value in expected.items() if value != REMOVED}


def test_tables_have_the_figures_stated_in_their_recipes():
    for number, study in TABLES.items():
        for row in study.rows:
            stated = re.search(r"\(paper: Table (\d), ([\d.]+) top-1\)", (RECIPES / f"{row.recipe}.yaml").read_text())
            assert stated and float(stated[2]) == row.paper and stated[1] in (number, "1")
            suffix = row.recipe.removeprefix(f"{CCT}-")
            if suffix not in DERIVED:
                assert float(find_paper_results(row.recipe).rows[suffix].top1) == row.paper
    assert {row.recipe for study in TABLES.values() for row in study.rows} >= {f"{CCT}-{name}" for name in DERIVED}
    # The paper also prints the differences of Table 4.
    differences = [result.paper_difference for result in summarize(TABLES["4"], {})]
    assert differences == [None, -0.71, -0.95, -0.51, -0.94]


def test_sweep_study_with_recipe_value_reuses_the_recipe_run():
    study = sweep_study("rho", f"{CCT}-htm", ["0.001", "5e-3", "0.01"], recipe_value="0.005")
    assert [row.key for row in study.rows] == [f"{CCT}-htm-rho-0.001", f"{CCT}-htm", f"{CCT}-htm-rho-0.01"]
    assert [row.options for row in study.rows] == [("--horizontal_rho", "0.001"), (), ("--horizontal_rho", "0.01")]
    assert study.reference == 1 and study.rows[1].paper == 83.56 and study.rows[0].paper is None
    study = sweep_study("tau", "folder/mine.yaml", ["none", "1"])
    assert [row.key for row in study.rows] == ["mine-tau-none", "mine-tau-1"] and study.reference == 0
    assert study.rows[0].options == ("--horizontal_tau", "none")
    with pytest.raises(ValueError, match="values of a sweep must differ, got 1 2 1.0"):
        sweep_study("kappa", "mine", ["1", "2", "1.0"])


def test_small_study_rows_have_the_same_initial_weights_and_batches(tmp_path):
    """ScoreNet and the mixing of inputs change neither the other weights nor the order and augmentation of images."""
    rows = {row.name: row for row in SMALL_STUDIES["small"].rows}
    small = "--dataset_name digits --eval_split test --max_train_samples 200 --num_train_epochs 1".split()
    found = {}
    for name in ("plain", "HTM, VTM", "input mixup & CutMix, HTM"):
        folder = str(tmp_path / rows[name].key)
        trainer = build_trainer(["--recipe", rows[name].recipe, *rows[name].options, *small, "--output_dir", folder])
        weights = trainer.model.state_dict()
        assert any("scorenet" in key for key in weights) == (name != "plain")
        found[name] = [tensor for key, tensor in weights.items() if "scorenet" not in key]
        found[name] += [tensor for batch in trainer.get_train_dataloader() for tensor in batch.values()]
    plain = found.pop("plain")
    for name, tensors in found.items():
        assert len(tensors) == len(plain) and all(map(torch.equal, tensors, plain)), name


def test_get_paper_top1_unknown_recipe_raises():
    assert get_paper_top1("cct-7-3x1-cifar10-htm") == 97.57 and get_paper_top1("vit-b16-imagenet1k-vtm") == 82.30
    with pytest.raises(KeyError):
        get_paper_top1("digits-quickstart")
