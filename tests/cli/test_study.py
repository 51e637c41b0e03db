"""scripts/study.py, mostly with a launcher that writes results without training."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
from helpers.commands import SCRIPTS, import_command
from kill_and_resume import OBSERVED
from observed_training import Moment, Order

SCRIPT = SCRIPTS / "study.py"
HTM = "cct-7-3x1-cifar100-htm"
TABLE_4 = [HTM] + [f"{HTM}-{name}" for name in ("all-easy", "random-assignment", "random-tokens", "count-labels")]
# A launcher, called with -m, the module of finetune and its options. Its top-1 depends on recipe and seed. With the
# module of evaluate, its top-1 on corrupted images is half of the other one.
FAKE = """
import json, os, pathlib, sys
if sys.argv[2] == "hf_tokenmixup.cli.evaluate":
    if "FAILING_EVALUATION" in os.environ:
        sys.exit("evaluate.py: No such noise.")
    with open(os.environ["EVALUATIONS"], "a") as calls:
        calls.write(json.dumps(sys.argv[3:]) + "\\n")
    top1 = json.loads((pathlib.Path(sys.argv[3]) / "all_results.json").read_text())["eval_top1"]
    result = {"corruption_mean": {"top1": top1 / 2}}
    sys.exit(pathlib.Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(result)) * 0)
options = dict(zip(sys.argv[3:], sys.argv[4:]))
folder = pathlib.Path(options["--output_dir"])
name, seed = options["--recipe"], int(options["--seed"])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(sys.argv[3:]) + "\\n")
if os.environ.get("STOPPING") in ("every run", name) and not list(folder.glob("checkpoint-*")):
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "trainer_state.json").write_text("{}")
    sys.exit()
if os.environ.get("FAILING") == name:
    sys.exit("finetune.py: No such luck.")
if "FAILING_ALL" in os.environ:
    sys.exit("finetune.py: " + os.environ["FAILING_ALL"].format(name=name, folder=folder))
top1 = (len(name) + seed) / 1000
if "-small-htm-seed" in folder.name:
    top1 += 0.01 + 0.001 * seed
if "-small-vtm-seed" in folder.name:
    top1 += 0.01 * (seed - 2)
results = {"eval_top1": top1, "eval_loss": 2 - 10 * top1, "eval_calibration_error": 0.1 + top1}
if "--vertical_layers" in options and "--horizontal_layers" not in options:
    results["train_mixed_fraction"] = 0.25
(folder / "all_results.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def script():
    return import_command("study")


@pytest.fixture
def study(script, tmp_path, monkeypatch):
    """Run the command with the launcher above, and return the launched commands."""
    fake, calls, evaluations = tmp_path / "fake.py", tmp_path / "calls.txt", tmp_path / "evaluations.txt"
    fake.write_text(FAKE)
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("EVALUATIONS", str(evaluations))
    # This machine may have an accelerator.
    monkeypatch.setattr(script.torch.accelerator, "is_available", lambda: False)

    def run(*arguments):
        calls.write_text("")
        evaluations.write_text("")
        own, separator, overrides = " ".join(map(str, arguments)).partition(" -- ")
        where = ["--output_dir", str(tmp_path / "out"), "--launcher", f"python {fake}"]
        given = [] if "--report_only" in own else ["--", "--use_cpu", "true", *overrides.split()]
        try:
            script.main([*own.split(), *where, *given])
        finally:
            run.launched = [json.loads(line) for line in calls.read_text().splitlines()]
            run.evaluated = [json.loads(line) for line in evaluations.read_text().splitlines()]
        return run.launched

    return run


def launched_recipes(calls):
    return [call[call.index("--recipe") + 1] for call in calls]


def top1(name, seed):
    return (len(name) + seed) / 10


def test_study_of_table_trains_missing_rows_of_each_seed(study, tmp_path, capsys):
    calls = study("4 --seeds 7 -- --num_train_epochs 3")
    assert launched_recipes(calls) == TABLE_4
    for call in calls:
        assert call[2:6] == ["--use_cpu", "true", "--num_train_epochs", "3"]
        folder = str(tmp_path / "out" / f"{call[1]}-seed-7")
        assert call[6:] == ["--seed", "7", "--output_dir", folder, "--resume_from_checkpoint", "auto"]
    record = json.loads((tmp_path / "out" / f"{TABLE_4[1]}-seed-7" / "study.json").read_text())["options"]
    assert (record["seed"], record["horizontal_tau"], record["num_train_epochs"]) == (["7"], ["none"], ["3"])
    output = capsys.readouterr().out
    assert "[1/5] HTM, seed 7\n  starts; log:" in output and "±" not in output

    assert launched_recipes(study("4 --seeds 7 9 -- --num_train_epochs 3")) == TABLE_4
    output = capsys.readouterr().out
    assert output.count("already finished") == 5 and "[6/10] HTM, seed 9\n  starts" in output
    lines = [line.split() for line in output.splitlines()]
    assert ["HTM", "2", f"{top1(HTM, 8):.2f}", "±", "0.14", "83.56"] in lines
    assert f"{top1(TABLE_4[2], 8):.2f} ± 0.14  +1.80 ± 0.00*  82.61  -0.95\n" in output
    assert "options  --use_cpu true --num_train_epochs 3\n" in output
    results = json.loads((tmp_path / "out" / "table4.json").read_text())
    assert results["overrides"] == {"use_cpu": "true", "num_train_epochs": "3"}
    assert [row["top1"] for row in results["rows"]] == [
        {str(seed): pytest.approx(top1(name, seed)) for seed in (7, 9)} for name in TABLE_4
    ]
    with (tmp_path / "out" / "table4.csv").open(newline="") as file:
        assert [row["recipe"] for row in csv.DictReader(file)] == TABLE_4


def test_study_small_reports_paired_differences_with_intervals(study, tmp_path, capsys):
    calls = study("small --seeds 1 2 3")
    assert len(calls) == 21 and set(launched_recipes(calls)) == {"cct-2-3x2-cifar10-cpu"}
    off = ["--horizontal_layers", "--vertical_layers"]
    options = [[word for word in call if word in (*off, "--mixup_alpha", "--cutmix_alpha")] for call in calls[:7]]
    mixing = ["--mixup_alpha", "--cutmix_alpha"]
    assert options[:4] == [off, off[1:], off[:1], []]
    assert options[4:] == [off + mixing, off[1:] + mixing, off[:1] + mixing]
    output = capsys.readouterr().out.rpartition("CCT-2/3x2 on CIFAR-10")[2]
    result = {row["row"]: row for row in json.loads((tmp_path / "out" / "small.json").read_text())["rows"]}
    # The differences are 1.1, 1.2 and 1.3 percent, and the quantile of Student's t is 4.3027.
    assert result["HTM"]["paired_difference"] == pytest.approx(1.2)
    assert result["HTM"]["paired_difference_high"] == pytest.approx(1.2 + 4.302653 * 0.1 / 3**0.5)
    assert result["HTM"]["loss_paired_difference"] == pytest.approx(-0.12)
    assert result["HTM"]["calibration_error"] == {str(n): pytest.approx(0.131 + 0.002 * n) for n in (1, 2, 3)}
    assert "+1.20 ± 0.25*" in output and "-0.1200 ± 0.0248*" in output and "+0.0120 ± 0.0025  " in output
    assert "*: best mean, and the interval does not contain 0" in output
    # The interval of VTM contains 0.
    assert "+0.00 ± 2.48  " in output and result["VTM"]["paired_difference_low"] == pytest.approx(-2.484, abs=1e-3)
    assert result["plain"]["paired_difference"] is None and result["HTM"]["mixed_fraction"] == 0.25


def test_study_with_compare_to_reports_differences_to_that_row(study, tmp_path, capsys):
    study("small --seeds 1 2 3")
    capsys.readouterr()
    assert study("small --report_only --compare_to HTM") == []
    content = json.loads((tmp_path / "out" / "small.json").read_text())
    result = {row["row"]: row for row in content["rows"]}
    assert content["compared_with"] == "HTM" and result["HTM"]["paired_difference"] is None
    assert result["plain"]["paired_difference"] == pytest.approx(-1.2)
    # VTM differs from plain by -1.0, 0.0 and 1.0 percent, HTM by 1.1, 1.2 and 1.3.
    assert result["VTM"]["paired_difference"] == pytest.approx(-1.2)
    output = capsys.readouterr().out
    assert "differences to HTM" in output and "-1.20 ± 0.25  " in output


def test_study_transfer_evaluates_rows_on_corrupted_images(study, tmp_path, capsys):
    study("transfer --seeds 1 2 -- --bf16 --max_eval_samples 9 --cache_dir=files")
    assert len(study.launched) == 9 and len(study.evaluated) == 8
    folder = tmp_path / "out" / "vit-cifar100-fine-tuning-cpu-htm-seed-2"
    words = next(words for words in study.evaluated if words[0] == str(folder))
    data, args = import_command("evaluate").parse_options(words)
    assert (data.dataset_name, data.label_column_name, data.eval_split) == ("uoft-cs/cifar100", "fine_label", "test")
    assert len(data.classes) == 50 and data.max_eval_samples == 9
    assert (args.seed, args.dtype, args.use_cpu, args.cache_dir) == (2, "bf16", True, "files")
    assert len(args.corruptions) == 6 and args.json == folder / "corruptions.json"
    output = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "transfer.json").read_text())["rows"]
    assert all(row["corruption_top1"][seed] == pytest.approx(row["top1"][seed] / 2) for row in rows for seed in "12")
    assert "corrupted: mean top-1 in percent on corrupted images" in output
    study("transfer --seeds 1 2 -- --bf16 --max_eval_samples 9 --cache_dir=files")
    assert study.launched == [] and study.evaluated == []


def test_study_of_table_evaluates_corruptions_only_if_asked(study, tmp_path, capsys):
    study("3 --seeds 1")
    assert study.evaluated == [] and "corruption_top1" not in (tmp_path / "out" / "table3.json").read_text()
    # The runs are trained, and only evaluated now.
    study("3 --seeds 1 --corruptions")
    assert study.launched == [] and len(study.evaluated) > 1
    capsys.readouterr()
    study("3 --report_only --corruptions")
    assert "corrupted" in capsys.readouterr().out and study.evaluated == []


def test_study_reports_an_evaluation_that_fails_and_repeats_it(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAILING_EVALUATION", "1")
    with pytest.raises(SystemExit, match="(?s)4 of 4 runs are not.*plain, seed 1: not evaluated on corrupted"):
        study("transfer --seeds 1")
    output = capsys.readouterr().out
    assert "the evaluation on corrupted images failed with status 1: evaluate.py: No such noise." in output
    # The other results are reported.
    assert "loss" in output and "n  top-1" in output
    monkeypatch.delenv("FAILING_EVALUATION")
    study("transfer --seeds 1")
    assert study.launched == [] and len(study.evaluated) == 4


def test_study_with_max_time_stops_in_a_run_and_continues(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STOPPING", "every run")
    names = [f"cct-7-3x1-cifar100-{system}-300" for system in ("baseline", "htm", "vtm", "htm-vtm")]
    for finished in range(4):
        calls = study("1 --part cifar100 --max_time 9")
        # The run that was stopped before, if any, and the next one.
        assert launched_recipes(calls) == names[max(finished - 1, 0) : finished + 1]
        for call in calls:
            assert 8.5 < float(call[call.index("--max_time") + 1]) <= 9
        output = capsys.readouterr().out
        stopped = ["plain", "HTM", "VTM", "HTM, VTM"][finished]
        assert "  stopped at checkpoint-5, after 0 s" in output and f"\n{4 - finished} of 4 runs are not" in output
        assert f"\n{stopped}, seed 42: stopped at checkpoint-5\n" in output
        assert output.count(", seed 42: not started\n") == 3 - finished
        assert output.endswith("--max_time is over. Run the same command to continue.\n")
    assert launched_recipes(study("1 --part cifar100 --max_time 9")) == names[3:]
    assert "not finished" not in capsys.readouterr().out


def test_study_with_max_time_and_a_failing_row_has_an_error_status(study, monkeypatch):
    monkeypatch.setenv("FAILING", TABLE_4[0])
    monkeypatch.setenv("STOPPING", TABLE_4[1])
    with pytest.raises(SystemExit) as caught:
        study("4 --max_time 9")
    assert "5 of 5 runs are not finished" in caught.value.code and "stopped at checkpoint-5" in caught.value.code
    assert launched_recipes(study.launched) == TABLE_4[:2] and caught.value.code.count("not started") == 3


def test_study_with_little_time_starts_nothing(study, capsys):
    assert study("4 --max_time 0.4") == []
    assert capsys.readouterr().out.count("not started") == 5


PRETRAINING = "vit-cifar100-pretraining-cpu"


def base_models(calls):
    return [call[call.index("--model_name_or_path") + 1] for call in calls if "--model_name_or_path" in call]


def test_study_transfer_trains_its_base_once_and_starts_all_rows_from_it(study, tmp_path, capsys):
    base = tmp_path / "out" / f"{PRETRAINING}-seed-42"
    calls = study("transfer --seeds 1 2 -- --num_train_epochs 3")
    assert launched_recipes(calls) == [PRETRAINING] + ["vit-cifar100-fine-tuning-cpu"] * 8
    assert base_models(calls) == [str(base)] * 8 and "--model_name_or_path" not in calls[0]
    assert all(call[call.index("--num_train_epochs") :][:2] == ["--num_train_epochs", "3"] for call in calls)
    assert capsys.readouterr().out.startswith("[pretraining] seed 42\n  starts; log: ")
    calls = study("transfer --seeds 1 2 3 -- --num_train_epochs 3")
    assert len(calls) == 4 and base_models(calls) == [str(base)] * 4
    assert "[pretraining] seed 42\n  top-1 7.00%, already finished" in capsys.readouterr().out
    assert study("transfer --report_only") == []
    rows = json.loads((tmp_path / "out" / "transfer.json").read_text())["rows"]
    assert [(row["row"], row["n"]) for row in rows] == [("plain", 3), ("HTM", 3), ("VTM", 3), ("HTM, VTM", 3)]
    with pytest.raises(ValueError, match=f"{base.name} contains a run with other options: num_train_epochs was '3'"):
        study("transfer --seeds 4 -- --num_train_epochs 5")


def test_study_transfer_with_a_given_model_trains_no_base(study):
    calls = study("transfer -- --model_name_or_path mine")
    assert PRETRAINING not in launched_recipes(calls) and base_models(calls) == ["mine"] * 4


def test_study_transfer_without_its_base_trains_no_row(study, monkeypatch):
    monkeypatch.setenv("FAILING", PRETRAINING)
    with pytest.raises(SystemExit) as caught:
        study("transfer")
    assert launched_recipes(study.launched) == [PRETRAINING]
    assert ": the model that the rows start from is not finished: status 1, see " in caught.value.code


def test_study_with_failing_row_trains_other_rows(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAILING", TABLE_4[1])
    with pytest.raises(SystemExit) as caught:
        study("4")
    assert launched_recipes(study.launched) == TABLE_4
    message = caught.value.code
    assert ": 1 of 5 runs are not finished.\nwithout difficulty assessment, seed 42: " in message
    output = capsys.readouterr().out
    assert "  failed with status 1: finetune.py: No such luck.\n" in output
    assert "without difficulty assessment  0                82.85  -0.71\n" in output
    monkeypatch.delenv("FAILING")
    assert launched_recipes(study("4")) == [TABLE_4[1]]


@pytest.mark.parametrize(
    ("arguments", "trained", "reason"),
    [
        ("rho --values -1 0.1", [HTM], "Row 'rho -1': horizontal_rho must be a finite number of at least 0"),
        ("kappa --values 80 999", [HTM.replace("htm", "vtm")], "Row 'kappa 999': vertical_kappa must be an integer"),
    ],
)
def test_study_with_rejected_row_trains_other_rows(study, capsys, arguments, trained, reason):
    with pytest.raises(SystemExit) as caught:
        study(arguments)
    assert launched_recipes(study.launched) == trained
    assert ": 1 of 2 runs are not finished." in caught.value.code and reason in caught.value.code
    output = capsys.readouterr().out
    # The reason is shown before anything runs, and the table has a line for the row.
    assert output.startswith(f"not trained: {reason}") and "[1/1] " in output
    assert f"{reason.split(chr(39))[1]}  " in output.rpartition("top-1")[2]


def test_study_with_override_for_some_rows_trains_only_matching_rows(study):
    with pytest.raises(SystemExit) as caught:
        study('5 -- --config_overrides {"num_hidden_layers":2}')
    assert "Row 'manifold mixup': manifold_mixup_layers must be between" in caught.value.code
    recipes = launched_recipes(study.launched)
    assert recipes == ["cct-7-3x1-cifar100-baseline-no-input-mixing", "cct-7-3x1-cifar100-baseline"]


def test_study_with_shared_failure_stops_with_one_message(study, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILING_ALL", "There is no dataset in {folder}.")
    with pytest.raises(SystemExit) as caught:
        study("4 --seeds 1 2")
    assert launched_recipes(study.launched) == TABLE_4[:2]
    message = caught.value.code
    assert message.count("There is no dataset in FOLDER.") == 1 and "\n" not in message
    assert "'HTM' and 'without difficulty assessment' fail for the same reason" in message
    assert str(tmp_path / "out" / f"{TABLE_4[1]}-seed-1" / "finetune.log") in message


def test_study_with_different_failures_tries_every_row(study, monkeypatch):
    monkeypatch.setenv("FAILING_ALL", "No {name}.")
    with pytest.raises(SystemExit, match="5 of 5 runs are not finished"):
        study("4")
    assert launched_recipes(study.launched) == TABLE_4


def test_study_tables_and_sweeps_share_equal_runs(study, tmp_path):
    study("4")
    calls = study("3")
    assert launched_recipes(calls) == [f"{HTM}-gradient-saliency", f"{HTM}-random-saliency"]
    calls = study("rho --values 0.001 0.005")
    assert [call[1:4] for call in calls] == [[HTM, "--horizontal_rho", "0.001"]]
    rows = json.loads((tmp_path / "out" / f"rho-{HTM}.json").read_text())
    assert rows["compared_with"] == "rho 0.005"
    assert [row["n"] for row in rows["rows"]] == [1, 1] and rows["rows"][1]["paper_top1"] == 83.56
    (call,) = study("kappa --values 3 --recipe digits-quickstart")
    assert call[:2] == ["--recipe", "digits-quickstart"] and "--vertical_kappa" not in call


def test_study_with_runs_of_other_options_raises(study, tmp_path):
    study("4 -- --num_train_epochs 3")
    with pytest.raises(ValueError, match=f"{HTM}-seed-42 contains a run with other .* was '3' and is now '4'"):
        study("5 -- --num_train_epochs 4")
    assert study.launched == []


def test_study_with_report_only_trains_nothing(study, tmp_path, capsys):
    checkpoint = tmp_path / "out" / f"{TABLE_4[1]}-seed-42" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="No run of this study is finished in .*, and 1 have a checkpoint. Start or"):
        study("4 --report_only")
    checkpoint.joinpath("trainer_state.json").unlink()
    study("rho --values 0.1 0.2 --seeds 1 -- --num_train_epochs 3")
    study("rho --values 0.1 --seeds 2 -- --num_train_epochs 3")
    (tmp_path / "out" / f"rho-{HTM}.json").unlink()
    capsys.readouterr()
    assert study("rho --values 0.1 0.2 --report_only") == []
    output = capsys.readouterr().out
    assert "seeds 1, 2;" in output and "rho 0.1  2  " in output and "rho 0.2  1  " in output
    assert "options  --use_cpu true --num_train_epochs 3\n" in output
    assert (tmp_path / "out" / f"rho-{HTM}.json").exists()
    study("rho --values 0.1 0.2 --report_only --seeds 2")
    assert "rho 0.2  0\n" in capsys.readouterr().out

    study("rho --values 0.3 --seeds 1 -- --num_train_epochs 4")
    with pytest.raises(ValueError, match="num_train_epochs was '4' and is now '3'"):
        study("rho --values 0.1 0.3 --report_only")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("7", "There is no study '7'. Studies: 1, 3, 4, 5, small, transfer, rho, tau, kappa."),
        ("1", "--part must be one of cifar100, cifar100-1500, cifar10-1500 for Table 1, got None"),
        ("4 --part cifar100", "--part is for Table 1, and 4 has no parts"),
        ("4 --max_time 0", "--max_time must be a finite number of minutes above 0, got 0.0"),
        ("4 -- --max_time 3", "--max_time cannot be passed after `--`. Pass --max_time before `--`."),
        ("4 -- --compare_to HTM", "--compare_to cannot be passed after `--`. Pass --compare_to before `--`."),
        ("4 --values 3", "--values and --recipe are for rho, tau, kappa"),
        ("small --recipe x", "--values and --recipe are for rho, tau, kappa; the rows of the other studies are fixed"),
        ("small --compare_to htm", '--compare_to must name a row of the study, got \'htm\'. Rows: "plain", "HTM", '),
        ("rho --values 1 2 --compare_to HTM", 'got \'HTM\'. Rows: "rho 1", "rho 2".'),
        ("4 --seeds 1 1", "--seeds must be different numbers of at least 0, got 1 1"),
        ("4 --seeds x", "argument --seeds: invalid int value: 'x'"),
        ("4 --num_train_epochs 3", "Unknown arguments: --num_train_epochs 3. Pass options of finetune.py after `--`."),
        ("4 -- --seed=3", "--seed cannot be passed after `--`. Pass --seeds before `--`."),
        ("4 --report_only -- --num_train_epochs 3", "--report_only runs no training. Remove the options after"),
        ("4 --launcher nothing-such", "--launcher must begin with a program that is installed, got 'nothing-such'"),
        ("4 -- --learning_rat 1", "Row 'HTM': There is no option --learning_rat: did you mean --learning_rate?"),
        ("4 -- --learning_rate x", "Row 'HTM': argument --learning_rate/--learning-rate: invalid float value: 'x'"),
        ("4 -- --mixup_alpha -1", "Row 'HTM': `mixup_alpha` must be a finite number"),
        ("4 -- --horizontal_tau 1", "'HTM' and 'without difficulty assessment' are identical with"),
        ("4 -- --do_eval false --eval_strategy no", "a study needs both --do_train and --do_eval"),
        ('5 -- --config_overrides {"hiden_size":3}', "no attribute 'hiden_size': did you mean 'hidden_size'?"),
        ("rho --values -2 -1", "Row 'rho -2': horizontal_rho must be a finite number of at least 0"),
        ("kappa --values 999", "Row 'kappa 999': vertical_kappa must be an integer between 0 and 256"),
        ("tau --recipe cct-7-3x1-cifar100-vtm", "tau has no effect in cct-7-3x1-cifar100-vtm, which has no horizon"),
        ("tau --recipe cct-7-3x1-cifar100-htn", "There is no recipe 'cct-7-3x1-cifar100-htn': did you mean"),
    ],
)
def test_study_with_wrong_option_raises(script, arguments, message, tmp_path):
    own, _, overrides = arguments.partition(" -- ")
    launcher = [] if "--launcher" in own else ["--launcher", "python -c pass"]
    given = [] if "report_only" in own and not overrides else ["--", "--use_cpu", *overrides.split()]
    with pytest.raises(ValueError) as caught:
        script.main([*own.split(), *launcher, "--output_dir", str(tmp_path / "out"), *given])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


TOY = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
TOY |= {"intermediate_size": 16}


@pytest.mark.slow
def test_study_ended_by_signal_resumes(tmp_path):
    """A study with real training, ended by a signal during its second row."""
    out, second = tmp_path / "out", tmp_path / "out" / "digits-quickstart-seed-1"
    command = [sys.executable, str(SCRIPT), "rho", "--values", "0.3", "0.02", "--recipe", "digits-quickstart"]
    command += ["--launcher", f"accelerate launch --num_processes 1 {OBSERVED} {tmp_path / 'order.json'}"]
    command += ["--seeds", "1", "--output_dir", str(out), "--", "--use_cpu", "--config_overrides", json.dumps(TOY)]
    command += "--num_train_epochs 10 --max_train_samples 64 --max_eval_samples 50 --eval_strategy no".split()
    command += "--save_strategy steps --save_steps 5 --logging_steps 1 --per_device_train_batch_size 32".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    order = Order(str(second), str(tmp_path / "events"))
    at = Moment("checkpoint", "trainer_state.json")
    (tmp_path / "order.json").write_text(
        json.dumps(order._replace(at=at, number=2, action="terminate study")._asdict())
    )
    run = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(command, **run)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "[2/2] rho 0.02, seed 1" in done.stdout and not (second / "all_results.json").exists()
    assert (second / "checkpoint-10").exists()
    first = (out / "digits-quickstart-rho-0.3-seed-1" / "all_results.json").stat().st_mtime_ns

    (tmp_path / "order.json").write_text(json.dumps(order._asdict()))
    output = subprocess.run(command, check=True, **run).stdout
    assert "already finished\n[2/2] rho 0.02, seed 1\n  resumes from checkpoint-" in output
    assert (out / "digits-quickstart-rho-0.3-seed-1" / "all_results.json").stat().st_mtime_ns == first
    steps = [json.loads(line) for line in (second / "training_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if "loss" in record] == list(range(1, 21))
    rows = json.loads((out / "rho-digits-quickstart.json").read_text())["rows"]
    assert [row["top1_mean"] for row in rows] == [
        100 * json.loads((out / f"digits-quickstart{name}-seed-1" / "all_results.json").read_text())["eval_top1"]
        for name in ("-rho-0.3", "")
    ]


@pytest.mark.slow
def test_study_in_pieces_equals_an_unbroken_study(tmp_path):
    """Real training of Table 1 with a small CCT, in pieces of a few seconds."""
    network = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    options = f"--config_overrides {json.dumps(network, separators=(',', ':'))}"
    options += (
        " --dataset_name digits --label_column_name label"
        " --num_train_epochs 3 --max_train_samples 320 --per_device_train_batch_size 32 --warmup_steps 5 --use_cpu"
    )
    options += (
        " --max_eval_samples 50 --eval_strategy no --logging_steps 1 --dataloader_num_workers 0 --save_steps 1000"
    )
    options += " --dataloader_persistent_workers false --vertical_kappa 5"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(folder, *own):
        command = [
            sys.executable,
            str(SCRIPT),
            "1",
            "--part",
            "cifar100",
            "--launcher",
            "python",
            "--output_dir",
            folder,
        ]
        done = subprocess.run(
            [*command, *own, "--", *options.split()], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("unbroken")
    outputs = [run("pieces", "--max_time", "0.51")]
    while "is over" in outputs[-1]:
        outputs.append(run("pieces", "--max_time", "0.51"))
        assert len(outputs) < 40
    assert len(outputs) > 1
    for system in ("baseline", "htm", "vtm", "htm-vtm"):
        name = f"cct-7-3x1-cifar100-{system}-300-seed-42/model.safetensors"
        assert (tmp_path / "unbroken" / name).read_bytes() == (tmp_path / "pieces" / name).read_bytes(), system
