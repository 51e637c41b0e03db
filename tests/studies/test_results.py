"""Results of a study: mean and standard deviation over seeds, differences, and the written files."""

import csv
import json
from dataclasses import replace

import pytest

from hf_tokenmixup.studies.definitions import Study, StudyRow
from hf_tokenmixup.studies.results import format_table, save_results, summarize

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
