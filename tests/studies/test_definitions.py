"""Studies: the paper's figures, recipes that differ by what their row says, sums over seeds, folders of trainings."""

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.commands import HANG_S

from hf_tokenmixup.cli.recipes import RECIPES, load_recipe
from hf_tokenmixup.hub import find_paper_results
from hf_tokenmixup.studies import runner as study_runs
from hf_tokenmixup.studies.definitions import TABLES, Row, Study, sweep_study
from hf_tokenmixup.studies.results import format_table, save_results, summarize
from hf_tokenmixup.studies.runner import (
    Request,
    check_run_spec,
    failure_reason,
    find_seeds,
    last_checkpoint,
    parse_option_words,
    run_dir,
    train,
)

CCT = "cct-7-3x1-cifar100"
# What a recipe has instead of, or beside, what that of a paper's system has.
NO_INPUT_MIXING = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "mixup_prob": "gone", "mixup_switch_prob": "gone"}
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
STUDY = Study(
    "small", "A small study", (Row("first", "a/one.yaml", 80.0), Row("second", "two", 79.5), Row("third", "t"))
)
REQUEST = Request(["python"], {"num_train_epochs": ["3"], "seed": ["1"]}, {})


@pytest.mark.parametrize("name", DERIVED)
def test_recipes_differ_from_those_of_the_paper_s_systems_by_what_their_row_says(name):
    base, changes = DERIVED[name]
    expected = load_recipe(f"{CCT}-{base}") | changes | {"output_dir": f"outputs/{CCT}-{name}"}
    assert load_recipe(f"{CCT}-{name}") == {key: value for key, value in expected.items() if value != "gone"}


def test_rows_have_the_figures_of_the_paper_and_of_their_recipes():
    for number, study in TABLES.items():
        for row in study.rows:
            told = re.search(r"\(paper: Table (\d), ([\d.]+) top-1\)", (RECIPES / f"{row.recipe}.yaml").read_text())
            assert told and float(told[2]) == row.paper and told[1] in (number, "1")
            system = row.recipe.removeprefix(f"{CCT}-")
            if system not in DERIVED:
                assert float(find_paper_results(row.recipe).rows[system].top1) == row.paper
    assert {row.recipe for study in TABLES.values() for row in study.rows} >= {f"{CCT}-{name}" for name in DERIVED}
    # As differences, the paper gives those of Table 4.
    differences = [result.paper_difference for result in summarize(TABLES["4"], {})]
    assert differences == [None, -0.71, -0.95, -0.51, -0.94]


def test_a_sweep_shares_the_training_of_its_recipe():
    study = sweep_study("rho", f"{CCT}-htm", ["0.001", "5e-3", "0.01"], own="0.005")
    assert [row.key for row in study.rows] == [f"{CCT}-htm-rho-0.001", f"{CCT}-htm", f"{CCT}-htm-rho-0.01"]
    assert [row.options for row in study.rows] == [("--horizontal_rho", "0.001"), (), ("--horizontal_rho", "0.01")]
    assert study.reference == 1 and study.rows[1].paper == 83.56 and study.rows[0].paper is None
    study = sweep_study("tau", "folder/mine.yaml", ["none", "1"])
    assert [row.key for row in study.rows] == ["mine-tau-none", "mine-tau-1"] and study.reference == 0
    assert study.rows[0].options == ("--horizontal_tau", "none")
    with pytest.raises(ValueError, match="values of a sweep must differ, got 1 2 1.0"):
        sweep_study("kappa", "mine", ["1", "2", "1.0"])


def test_mean_deviation_and_differences(tmp_path):
    results = summarize(STUDY, {"one": {42: 70.0, 43: 74.0}, "two": {43: 71.0}})
    assert [(len(result.top1), result.mean, result.deviation) for result in results] == [
        (2, 72.0, pytest.approx(8**0.5)),
        (1, 71.0, None),
        (0, None, None),
    ]
    assert [result.difference for result in results] == [None, -1.0, None]
    assert [result.paper_difference for result in results] == [None, -0.5, None]
    moved = summarize(replace(STUDY, reference=1), {"one": {42: 70.0}, "two": {43: 71.0}})
    assert [result.difference for result in moved] == [-1.0, None, None]

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
    plain = replace(STUDY, rows=STUDY.rows[2:])
    assert "paper" not in format_table(plain, summarize(plain, {}))

    save_results(STUDY, results, tmp_path / "out", launcher="python")
    content = json.loads((tmp_path / "out" / "small.json").read_text())
    assert content["launcher"] == "python" and content["compared_with"] == "first" and content["unit"] == "percent"
    first = content["rows"][0]
    assert (first["top1"], first["top1_mean"], first["paper_top1"]) == ({"42": 70.0, "43": 74.0}, 72.0, 80.0)
    with (tmp_path / "out" / "small.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["top1_mean"] for row in rows] == ["72.0", "71.0", ""] and rows[1]["top1_std"] == ""
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["small.csv", "small.json"]


def test_options_by_name():
    words = "--recipe x --learning-rate 1 --mixup_alpha=0.5 --horizontal_layers --crop_scale 0.5 1 --learning_rate -2"
    assert parse_option_words([*words.split(), "--token", "hf_secret", "--use_cpu"]) == {
        "learning_rate": ["-2"],
        "mixup_alpha": ["0.5"],
        "horizontal_layers": [],
        "crop_scale": ["0.5", "1"],
        "use_cpu": [],
    }


def write_checkpoint(folder: Path, step: int, state: str) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(state)
    return path


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    write_checkpoint(tmp_path, 9, '{"step": 9}')
    newest = write_checkpoint(tmp_path, 10, '{"step": 10}')
    write_checkpoint(tmp_path, 11, '{"st')
    (tmp_path / "checkpoint-12").mkdir()
    write_checkpoint(tmp_path / "checkpoint-best", 13, "{}")
    assert last_checkpoint(tmp_path) == newest


def test_folders_by_row_and_seed(tmp_path):
    for row, seed in ((STUDY.rows[0], 3), (STUDY.rows[0], 12), (STUDY.rows[1], 3)):
        run_dir(tmp_path, row, seed).mkdir()
    (tmp_path / "one-seed-x").mkdir()
    (tmp_path / "other-seed-7").mkdir()
    assert find_seeds(tmp_path, STUDY) == [3, 12]


def command(code: str) -> list[str]:
    return [sys.executable, "-c", f"import json, os, sys, time\nfolder = sys.argv[1]\n{code}"]


FINISH = "open(f'{folder}/all_results.json', 'w').write(json.dumps({'eval_top1': 0.25}))\nprint(sys.argv[2:])"


def run(folder, code, request=REQUEST):
    told = []
    unfinished = train(folder, request, [*command(code), str(folder)], told.append)
    return unfinished and unfinished.reason, told


def test_a_training_goes_on_from_its_checkpoint_and_is_not_repeated(tmp_path):
    folder = tmp_path / "row"
    reason, told = run(folder, "open(f'{folder}/all_results.json', 'w').write('{\"train_loss\"')\nsys.exit('Why.')")
    assert told == [f"starts; log: {folder}/finetune.log", "failed with status 1: Why."]
    assert reason == f"status 1, see {folder}/finetune.log"
    checkpoint = write_checkpoint(folder, 5, '{"step": 5}')
    reason, told = run(folder, FINISH)
    assert reason is None and told[0].startswith("goes on from checkpoint-5;") and told[1].startswith("top-1 25.00%")
    assert f"['--resume_from_checkpoint', '{checkpoint}']" in (folder / "finetune.log").read_text()
    before = (folder / "finetune.log").read_text()
    assert run(folder, FINISH) == (None, ["top-1 25.00%, finished before"])
    assert (folder / "finetune.log").read_text() == before


def test_an_end_without_evaluation_is_no_end(tmp_path):
    reason, told = run(tmp_path, "open(f'{folder}/all_results.json', 'w').write('{\"train_loss\": 1}')")
    assert reason.startswith("status 0") and told[1] == "failed with status 0: it printed nothing"


def test_other_options_are_never_mixed(tmp_path):
    run(tmp_path, FINISH)
    check_run_spec(tmp_path, REQUEST)
    other = replace(REQUEST, options={"num_train_epochs": ["5"], "seed": ["1"], "use_cpu": []})
    differences = "num_train_epochs is '3' there and '5' now; use_cpu is not given there and '' now"
    with pytest.raises(ValueError, match=f"with other options: {differences}. Repeat .* --output_dir"):
        run(tmp_path, FINISH, other)
    with pytest.raises(ValueError, match="launcher is 'python' there and 'torchrun -n 2' now"):
        check_run_spec(tmp_path, replace(REQUEST, launcher=["torchrun", "-n", "2"]))
    (tmp_path / "all_results.json").unlink()
    check_run_spec(tmp_path, other)  # nothing is there to be mixed
    write_checkpoint(tmp_path, 5, '{"step": 5}')
    with pytest.raises(ValueError, match="num_train_epochs"):
        check_run_spec(tmp_path, other)
    (tmp_path / "study.json").unlink()
    with pytest.raises(ValueError, match="not started by this script. Give another --output_dir"):
        check_run_spec(tmp_path, REQUEST)


def test_a_folder_is_trained_in_by_one_process(tmp_path):
    with (tmp_path / "finetune.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        reason, told = run(tmp_path, FINISH)
    assert "another process" in reason and len(told) == 1 and not (tmp_path / "all_results.json").exists()
    assert run(tmp_path, FINISH)[0] is None


def until(condition):
    """Wait for what another process does; the limit is for one that hangs."""
    deadline = time.monotonic() + HANG_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_killed_study_leaves_its_folder_held_by_the_training(tmp_path):
    """The study alone is killed: what it started trains on, and must not meet a second training."""
    training = f"print(os.getpid(), file=open(f'{{folder}}/pid', 'w'), flush=True)\ntime.sleep({HANG_S})"
    code = f"import fcntl, subprocess, sys\nlog = open({str(tmp_path / 'finetune.log')!r}, 'ab')\n"
    code += f"fcntl.flock(log, fcntl.LOCK_EX)\nsubprocess.Popen({[*command(training), str(tmp_path)]!r}, stdout=log)"
    subprocess.run([sys.executable, "-c", code], check=True)
    file = tmp_path / "pid"
    process = int(until(lambda: file.exists() and file.read_text().endswith("\n") and file.read_text()))
    try:
        assert "another process" in run(tmp_path, FINISH)[0]
    finally:
        os.kill(process, signal.SIGKILL)
    until(lambda: run(tmp_path, FINISH)[0] is None)


# A training that sends a signal to the study once that waits, and then waits for its own end.
INTERRUPTING = "import signal\n{first}\nwhile not os.path.exists(f'{{folder}}/study-waits'):\n    time.sleep(0.01)\n"
INTERRUPTING += "os.kill({study}, signal.SIGUSR1)\ntime.sleep({limit})"


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Runs a launcher of a training that interrupts the study; `{training}` in its code is the training's command."""

    class Waiting(subprocess.Popen):
        def wait(self, *args, **kwargs):
            (tmp_path / "study-waits").touch()
            return super().wait(*args, **kwargs)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    def run_interrupted(launcher, first=""):
        training = INTERRUPTING.format(first=first, study=os.getpid(), limit=HANG_S)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, launcher.format(training=[*command(training), str(tmp_path)]))
        return run(tmp_path, FINISH)[0]

    monkeypatch.setattr(subprocess, "Popen", Waiting)
    before = signal.signal(signal.SIGUSR1, interrupt)
    yield run_interrupted
    signal.signal(signal.SIGUSR1, before)


def test_an_interruption_ends_the_training(interrupted, tmp_path, monkeypatch):
    """Also one that outlives the first signal, as its launcher does."""
    launcher = "import signal, subprocess\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    launcher += f"subprocess.Popen({{training}}).wait()\ntime.sleep({HANG_S})"
    monkeypatch.setattr(study_runs, "TERMINATE_TIMEOUT_S", 0.5)
    interrupted(launcher)
    until(lambda: run(tmp_path, FINISH)[0] is None)


def test_an_interruption_waits_for_a_training_that_outlives_its_launcher(interrupted, tmp_path):
    """As accelerate's does: it writes a checkpoint, and a study that is started again at once must find it."""
    ending = "def end(*args):\n    time.sleep(0.5)\n    open(f'{folder}/saved', 'w')\n    os._exit(0)\n"
    launcher = "import subprocess\nsubprocess.Popen({training}).wait()"
    assert interrupted(launcher, first=f"{ending}signal.signal(signal.SIGTERM, end)") is None
    assert (tmp_path / "saved").exists()


def test_the_reason_of_a_failure():
    launcher = "Traceback (most recent call last):\n  raise\nsubprocess.CalledProcessError: returned status 1.\n"
    assert failure_reason("Loading\nfinetune.py: No data.\n" + launcher) == "finetune.py: No data."
    assert failure_reason("x\ntorch.OutOfMemoryError: CUDA out of memory.\n" + launcher).startswith(
        "torch.OutOfMemory"
    )
    assert failure_reason("Loading\nKilled\n\n") == "Killed"
    assert failure_reason("") == "it printed nothing"
