"""Results of a study: mean and standard deviation over seeds, differences, and the written files."""

import csv
import json
from dataclasses import replace

import pytest
from scipy.stats import ttest_rel

from hf_tokenmixup.studies.definitions import Study, StudyRow
from hf_tokenmixup.studies.results import find_best, format_table, paired_difference, save_results, summarize

STUDY = Study(
    "small",
    "A small study",
    (StudyRow("first", "a/one.yaml", 80.0), StudyRow("second", "two", 79.5), StudyRow("third", "t")),
)


TOP1 = {"one": {42: 70.0, 43: 74.0}, "two": {43: 71.0}}


def test_summarize_returns_mean_std_and_differences():
    results = summarize(STUDY, TOP1)
    assert [(len(result.top1), result.mean, result.std) for result in results] == [
        (2, 72.0, pytest.approx(8**0.5)),
        (1, 71.0, None),
        (0, None, None),
    ]
    assert [result.difference for result in results] == [None, -1.0, None]
    assert [result.paper_difference for result in results] == [None, -0.5, None]
    other_reference = summarize(replace(STUDY, reference=1), {"one": {42: 70.0}, "two": {43: 71.0}})
    assert [result.difference for result in other_reference] == [-1.0, None, None]


def test_format_table_shows_std_and_paper_columns_where_present():
    results = summarize(STUDY, TOP1)
    lines = format_table(STUDY, results).splitlines()
    assert lines[0] == "A small study"
    assert "mean ± standard deviation, seeds 42, 43; differences to first" in lines[1]
    assert [line.split() for line in lines[3:]] == [
        "n top-1 diff paper diff".split(),
        "first 2 72.00 ± 2.83 80.00".split(),
        "second 1 71.00 -1.00 79.50 -0.50".split(),
        "third 0".split(),
    ]
    one_seed = format_table(STUDY, summarize(STUDY, {"one": {42: 70.0}}))
    assert "±" not in one_seed and "seed 42;" in one_seed
    unfinished = replace(STUDY, reference=2)
    assert "to third, which has no finished run" in format_table(unfinished, summarize(unfinished, TOP1))
    without_paper = replace(STUDY, rows=STUDY.rows[2:])
    assert "paper" not in format_table(without_paper, summarize(without_paper, {}))


def test_save_results_writes_json_and_csv(tmp_path):
    results = summarize(STUDY, TOP1)
    save_results(STUDY, results, tmp_path / "out", launcher="python")
    content = json.loads((tmp_path / "out" / "small.json").read_text())
    assert content["launcher"] == "python" and content["compared_with"] == "first" and content["unit"] == "percent"
    first = content["rows"][0]
    assert (first["top1"], first["top1_mean"], first["paper_top1"]) == ({"42": 70.0, "43": 74.0}, 72.0, 80.0)
    with (tmp_path / "out" / "small.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["top1_mean"] for row in rows] == ["72.0", "71.0", ""] and rows[1]["top1_std"] == ""
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["small.csv", "small.json"]


def test_format_table_shows_what_htm_did_and_rows_in_which_nothing_was_mixed():
    mixing = {
        "one": {"mixed_fraction": 0.5, "replaced_fraction": 0.125, "label_mass_moved": 0.25},
        "two": {"mixed_fraction": 0.0},
    }
    lines = format_table(STUDY, summarize(STUDY, TOP1, mixing)).splitlines()
    assert "HTM: images mixed, tokens replaced in them, label weight moved" in lines[1]
    assert [line.split() for line in lines[3:]] == [
        "n top-1 diff paper diff images tokens labels".split(),
        "first 2 72.00 ± 2.83 80.00 50.0% 12.5% 25.0%".split(),
        "second 1 71.00 nothing mixed 79.50 -0.50 0.0%".split(),
        "third 0".split(),
    ]


def test_save_results_writes_what_htm_did(tmp_path):
    mixing = {"one": {"mixed_fraction": 0.5, "replaced_fraction": 0.125, "label_mass_moved": 0.25}}
    save_results(STUDY, summarize(STUDY, TOP1, mixing), tmp_path)
    rows = json.loads((tmp_path / "small.json").read_text())["rows"]
    assert [row["mixed_fraction"] for row in rows] == [0.5, None, None]
    assert (rows[0]["replaced_fraction"], rows[0]["label_mass_moved"]) == (0.125, 0.25)


def test_paired_difference_equals_paired_t_test():
    values, reference = {1: 70.5, 2: 72.0, 3: 69.0, 4: 10.0}, {3: 68.5, 2: 70.0, 1: 70.0, 9: 1.0}
    result = paired_difference(values, reference)
    expected = ttest_rel([70.5, 72.0, 69.0], [70.0, 70.0, 68.5]).confidence_interval(0.95)
    assert result.mean == pytest.approx(1.0)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))
    assert paired_difference({1: 1.0, 2: 3.0}, {2: 1.0, 3: 1.0}) is None
    same = paired_difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0})
    assert (same.low, same.high) == (1.0, 1.0)


def best_name(one, two, three, metric="top1"):
    study = replace(STUDY, metrics=("loss", "corruption_top1"))
    by_row = {key: dict(enumerate(values)) for key, values in zip(("one", "two", "t"), (one, two, three), strict=True)}
    metrics = {key: {name: values for name in study.metrics} for key, values in by_row.items()}
    best = find_best(summarize(study, by_row, metrics=metrics), metric)
    return best and best.row.name


def test_find_best_needs_an_interval_without_0():
    assert best_name([1.0, 2.0, 3.0], [2.0, 3.1, 4.0], [1.5, 2.5, 3.5]) == "second"
    # The mean of the second row is the best one, but its differences are 5, 0 and 1.
    assert best_name([1.0, 2.0, 3.0], [6.0, 2.0, 4.0], [1.5, 2.5, 3.5]) is None
    # The reference row is the best one.
    assert best_name([9.0, 9.5, 9.0], [2.0, 3.0, 4.0], [1.5, 2.5, 3.5]) is None
    assert best_name([1.0], [2.0], [3.0]) is None and best_name([], [], []) is None


def test_find_best_of_loss_is_the_lowest():
    assert best_name([1.0, 2.0, 3.0], [2.0, 3.1, 4.0], [0.5, 1.4, 2.5], "loss") == "third"
    assert best_name([1.0, 2.0, 3.0], [2.0, 3.1, 4.0], [0.5, 2.9, 2.5], "loss") is None


def test_find_best_of_corruption_top1_is_the_highest():
    assert best_name([1.0, 2.0, 3.0], [2.0, 3.1, 4.0], [0.5, 1.4, 2.5], "corruption_top1") == "second"


def test_format_table_shows_metrics_with_paired_differences(tmp_path):
    study = replace(
        STUDY, rows=(StudyRow("first", "one"), StudyRow("second", "two")), metrics=("loss", "corruption_top1")
    )
    top1 = {"one": {1: 70.0, 2: 71.0, 3: 72.0}, "two": {1: 71.0, 2: 72.1, 3: 73.0}}
    metrics = {"one": {"loss": {1: 0.5, 2: 0.6, 3: 0.7}}, "two": {"loss": {1: 0.45, 2: 0.6, 3: 0.66}}}
    results = summarize(study, top1, metrics=metrics)
    lines = format_table(study, results).splitlines()
    assert "differences to first, paired by seed, ± half of the 95 % interval (Student t); *: best" in lines[1]
    assert [line.split() for line in lines[3:]] == [
        "n top-1 diff loss diff".split(),
        "first 3 71.00 ± 1.00 0.6000 ± 0.1000".split(),
        "second 3 72.03 ± 1.00 +1.03 ± 0.14* 0.5700 ± 0.1082 -0.0300 ± 0.0657".split(),
    ]
    save_results(study, results, tmp_path)
    row = json.loads((tmp_path / "small.json").read_text())["rows"][1]
    assert row["loss"] == {"1": 0.45, "2": 0.6, "3": 0.66} and row["loss_mean"] == pytest.approx(0.57)
    assert row["paired_difference_low"] == pytest.approx(1.0333 - 4.30265 * 0.057735 / 3**0.5, abs=1e-3)
    assert row["corruption_top1_mean"] is None and row["corruption_top1"] == {}
