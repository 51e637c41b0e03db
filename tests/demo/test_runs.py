"""Curves and metrics of a run, while it trains and afterwards."""

import json
import os

import pytest

from hf_tokenmixup.demo.runs import read_run


def write(folder, *records, partial=""):
    text = "".join(json.dumps(record) + "\n" for record in records) + partial
    (folder / "training_log.jsonl").write_text(text)


def test_run_that_trains_shows_its_complete_records(tmp_path):
    write(tmp_path, {"epoch": 1, "step": 5, "loss": 2.5}, {"epoch": 2, "step": 10, "eval_top1": 0.75}, partial='{"ep')
    run = read_run(tmp_path)
    assert run.rows == [("eval_top1", "0.75"), ("loss", "2.5")]
    assert run.status == "The run has not ended: its last record is at epoch 2, step 10."
    assert [line.get_ydata().tolist() for line in run.curves.axes[0].lines] == [[0.75]]


def test_unchanged_run_is_not_read_again(tmp_path):
    write(tmp_path, {"epoch": 1, "loss": 2.5})
    version = read_run(tmp_path).version
    assert read_run(tmp_path, version) is None
    write(tmp_path, {"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": 1.5})
    assert dict(read_run(tmp_path, version).rows)["loss"] == "1.5"


def test_results_count_if_the_run_has_ended(tmp_path):
    write(tmp_path, {"epoch": 1, "eval_top1": 0.5})
    results = tmp_path / "all_results.json"
    results.write_text(json.dumps({"eval_top1": 0.625, "train_runtime": 12.0}))
    os.utime(results, ns=(1, 1))
    assert dict(read_run(tmp_path).rows) == {"eval_top1": "0.5"}
    os.utime(results)
    ended = read_run(tmp_path)
    assert ended.status == "The run has ended." and dict(ended.rows) == {"eval_top1": "0.625", "train_runtime": "12"}


def test_folder_without_log_or_with_wrong_line_raises(tmp_path):
    with pytest.raises(ValueError, match="training_log.jsonl does not exist. Enter the output folder"):
        read_run(tmp_path)
    write(tmp_path, {"epoch": 1}, partial="nonsense\n")
    with pytest.raises(ValueError, match="Line 2 of .* must be a JSON object"):
        read_run(tmp_path)
