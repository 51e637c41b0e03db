"""scripts/benchmark.py: networks, recipes, tables, JSON and errors."""

import json
import os
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from helpers.commands import SCRIPTS, import_command
from helpers.tiny_training import VIT

from hf_tokenmixup.benchmarks.compared_models import PAPER_BASELINES
from hf_tokenmixup.benchmarks.model_presets import ModelPreset
from hf_tokenmixup.models import TokenMixupViTConfig, TokenMixupViTForImageClassification
from hf_tokenmixup.utils.environment import describe_hardware

SCRIPT = SCRIPTS / "benchmark.py"
BRIEF = ["--rounds", "2", "--warmup", "1", "--device", "cpu"]
SALIENCY_DETECTORS = ["attention", "full maps", "full rollout", "gradient", "random"]


def build(**settings):
    return TokenMixupViTForImageClassification(TokenMixupViTConfig(**VIT | settings))


SYSTEMS = {
    "HTM": {"horizontal_layers": [1]},
    "VTM": {"vertical_layers": [2], "vertical_kappa": 1},
    "HTM + VTM": {"horizontal_layers": [1], "vertical_layers": [2], "vertical_kappa": 1},
}


VARIANTS = ("gradient", "random", "random partners", "full rollout", "rho 0.01", "groups of 4", "full maps")


@pytest.fixture(scope="module")
def module():
    return import_command("benchmark")


@pytest.fixture
def script(module, monkeypatch):
    """The command with a tiny network and without a minimum run time."""
    monkeypatch.setitem(module.MODEL_PRESETS, "tiny", ModelPreset("tiny ViT", build, 8, SYSTEMS))
    monkeypatch.setattr(module, "MIN_RUN_TIME", 0.0)
    return module


@pytest.fixture
def recipe(tmp_path):
    """A recipe with a small network on the digits."""
    options = {
        "dataset_name": "digits", "eval_split": "test", "model_type": "vit", "from_scratch": True, "do_train": True,
        "config_overrides": {key: value for key, value in VIT.items() if key != "num_labels"}, "bf16": True,
        "horizontal_layers": [1], "horizontal_tau": 0.5, "horizontal_rho": 0.1, "per_device_train_batch_size": 12,
        "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "do_eval": True,
        "saliency_detector": "random", "hflip": 0.0, "crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0],
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def run(script, folder, *arguments):
    script.main([*map(str, arguments), *BRIEF, "--json", str(folder / "new" / "costs.json")])
    return json.loads((folder / "new" / "costs.json").read_text())


def table(text, title):
    """The rows below a title, by their first column."""
    rows = text.split(f"\n{title}\n")[1].split("\n\n")[0].splitlines()[1:]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in row.split("   ") if cell] for row in rows)}


def test_benchmark_of_network_writes_tables_and_json(script, tmp_path, capsys):
    parts = ["--part", "training", "detection", "step"]
    result = run(script, tmp_path, "--model", "tiny", *parts, "--group_size", 4, 100, "--dtype", "bf16")
    text = capsys.readouterr().out
    assert text.startswith(f"tiny ViT, batch 8, bf16, {describe_hardware(device='cpu')}, rho 0 and 0.01\n")
    assert {"setting", "detection", "step", "training", "command", "versions"} == set(result)

    detection, training = result["detection"], result["training"]
    assert list(result["step"]) == ["0", "0.01"]
    step = result["step"]["0.01"]
    assert list(detection["timings"]) == SALIENCY_DETECTORS and detection["difference_to_full_maps"] < 1e-6
    pieces = ["gain", "transfer", "assignment", "assignment, groups of 4", "mixing", "complete step"]
    assert list(step["timings"]) == pieces and list(step["relative_gain"]) == ["assignment, groups of 4"]
    assert 0 < step["relative_gain"]["assignment, groups of 4"] <= 1
    variants = [f"HTM, {name}" for name in VARIANTS]
    assert list(training["timings"]) == ["plain", *SYSTEMS, *variants] == list(training["peak_memory"])
    assert training["peak_memory"]["HTM"] > training["peak_memory"]["plain"] > 4 * build().num_parameters()

    for part, title in (
        (detection, "saliency detection"),
        (step, "horizontal step, rho 0.01"),
        (training, "training step"),
    ):
        shown = table(text, title)
        for name, timing in part["timings"].items():
            assert float(shown[name][0]) == pytest.approx(1000 * timing["seconds"]["median"], rel=0.02, abs=1e-4)
            assert (timing["ratio"] is None) == (part.get("reference") in (name, None))
            if timing["ratio"]:
                assert float(shown[name][2]) == pytest.approx(timing["ratio"]["median"], rel=0.02, abs=1e-4)
    assert table(text, "horizontal step, rho 0.01")["assignment, groups of 4"][-1].endswith("%")
    plain, htm = (training["peak_memory"][name] for name in ("plain", "HTM"))
    assert table(text, "training step")["HTM"][-4] == f"{htm / plain:.3f}"
    work = training["work"]
    plain, htm = work["plain"], work["HTM"]
    assert table(text, "training step")["HTM"][-3:] == [
        f"+{htm['operators'] - plain['operators']}",
        f"{htm['flops'] / plain['flops']:.3f}",
        f"{htm['moved_bytes'] / plain['moved_bytes']:.3f}",
    ]
    for count in plain:
        assert work["HTM, full maps"][count] > htm[count] > plain[count] > 100


def test_benchmark_without_variants_trains_the_systems_only(script, tmp_path):
    result = run(script, tmp_path, "--model", "tiny", "--part", "training", "--systems_only")
    assert list(result["training"]["timings"]) == ["plain", *SYSTEMS]


def test_benchmark_with_compile_modes_has_a_table_of_each(script, tmp_path, capsys, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode) or model)
    arguments = ["--model", "tiny", "--part", "training", "--systems_only"]
    result = run(script, tmp_path, *arguments, "--compile_mode", "eager", "default")["training"]
    text, compiled = capsys.readouterr().out, result["compiled"]["default"]
    assert modes == ["default"] * 4 and list(result["compiled"]) == ["default"]
    assert list(result["timings"]) == list(compiled["timings"]) == ["plain", *SYSTEMS]
    assert "work" in result and "work" not in compiled  # operators are counted without compiler
    for title, part in (("training step", result), ("training step, compiled, mode default", compiled)):
        shown = float(table(text, title)["HTM"][0])
        assert shown == pytest.approx(1000 * part["timings"]["HTM"]["seconds"]["median"], rel=0.02)


def test_benchmark_with_easy_fraction_mixes_a_part_of_the_images(script, tmp_path, monkeypatch, capsys):
    easy, build_models = {}, script.training_models

    def training_models(*args, **kwargs):
        models = build_models(*args, **kwargs)
        for name, model in models.items():
            forward = model.forward

            def record(name=name, forward=forward, **batch):
                output = forward(**batch)
                for layer in getattr(output, "horizontal", None) or ():
                    if len(layer.easy) == 8:  # operators are counted with two images
                        easy.setdefault(name, []).append(layer.easy.float().mean().item())
                return output

            model.forward = record
        return models

    monkeypatch.setattr(script, "training_models", training_models)
    arguments = ["--model", "tiny", "--part", "training", "--systems_only", "--easy_fraction", "0.25"]
    assert run(script, tmp_path, *arguments)["setting"]["easy_fraction"] == 0.25
    assert ", rho 0 and 0.01, about 25% easy images\n" in capsys.readouterr().out
    assert list(easy) == ["HTM", "HTM + VTM"]
    # The first step sets tau. This network has no dropout, so the others mix the same images.
    assert all(fractions[0] == 1 and set(fractions[1:]) == {0.25} for fractions in easy.values())


def test_benchmark_on_device_has_its_idle_time(script, tmp_path, monkeypatch, capsys):
    """The trace of a device is simulated, since its table needs no device."""
    arguments = ["--model", "tiny", "--part", "training", "--systems_only", *BRIEF, "--json", tmp_path / "costs.json"]
    args, others = script.parse_options(list(map(str, arguments)))
    setup = script.build_setup(args, others)
    idle = iter([0.1, 0.2, 0.3, 0.4])
    monkeypatch.setattr(script, "device_idle_fraction", lambda step, device: next(idle))
    for name in ("peak_memory", "count_work"):
        on_cpu = getattr(script, name)
        monkeypatch.setattr(script, name, lambda step, *args, on_cpu=on_cpu: on_cpu(step))
    args.device = "cuda"
    result = script.measure_training(setup, args, {"rounds": 2, "warmup": 1})
    assert result["device_idle"] == {"plain": 0.1, "HTM": 0.2, "VTM": 0.3, "HTM + VTM": 0.4}
    shown = table(capsys.readouterr().out, "training step")
    assert [row[-1] for row in shown.values()] == ["10.0%", "20.0%", "30.0%", "40.0%"]


def run_make(folder, has_device):
    """Run `make benchmark-gpu` with programs that write their arguments to a file. Measurements fail."""
    log = folder / "calls"
    for program, code in (("python", 1), ("pytest", 0)):
        path = folder / program
        check = f'if [ "$1" = -c ]; then exit {int(not has_device)}; fi'
        path.write_text(
            f'#!/usr/bin/env bash\n{check}\nprintf "%s " {program} "$@" >>"{log}"\necho >>"{log}"\nexit {code}\n'
        )
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["make", "benchmark-gpu"]
    done = subprocess.run(command, cwd=SCRIPTS.parent, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stdout, log.read_text().splitlines() if log.exists() else []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_benchmark_gpu_measures_what_the_command_accepts(script, tmp_path, monkeypatch):
    output, calls = run_make(tmp_path, has_device=True)
    *calls, tests = [line.split() for line in calls]
    assert tests == ["pytest", "-m", "gpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    parsed = [script.parse_options(call[2:])[0] for call in calls if call[:2] == ["python", "scripts/benchmark.py"]]
    assert len(parsed) == len(calls) and len({args.json for args in parsed}) == len(calls)
    # A failed measurement does not stop the others, and is named at the end.
    assert output.splitlines()[-1] == f"These failed: {' '.join(args.json.stem for args in parsed)}"
    measured = {(args.model, args.batch_size, part, args.dtype) for args in parsed for part in args.part}
    assert measured >= {("vit-base", batch, "training", dtype) for batch in (126, 504) for dtype in ("bf16", "tf32")}
    assert measured >= {("vit-base", 504, "copies", "bf16"), ("cct-7-3x1", 128, "training", "tf32")}
    (launches,) = [args for args in parsed if args.compile_mode != ["eager"]]
    assert launches.compile_mode == ["eager", "default", "reduce-overhead"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_benchmark_gpu_without_device_measures_nothing(tmp_path):
    assert run_make(tmp_path, has_device=False) == ("", [])


def test_parse_options_default_parts_are_those_of_the_device(script, monkeypatch):
    assert script.parse_options(["--device", "cpu"])[0].part == [part for part in script.PARTS if part != "copies"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert script.parse_options([])[0].part == list(script.PARTS)


def test_benchmark_of_optimizations_skips_unsupported(script, tmp_path, capsys):
    result = run(
        script, tmp_path, "--model", "tiny", "--part", "optimizations", "--optimization", "ema", "fp16", "foreach"
    )
    optimizations, text = result["optimizations"], capsys.readouterr().out
    assert optimizations["system"] == "HTM + VTM" and list(optimizations["timings"]) == ["plain", "ema", "foreach"]
    shown = table(text.replace("\nfp16 was", "\n\nfp16 was"), "optimizations of HTM + VTM")
    memory = optimizations["peak_memory"]
    assert shown["ema"][-1] == f"{memory['ema'] / memory['plain']:.3f}" and memory["ema"] > memory["plain"]
    assert "fp16 was skipped: a CPU has no fp16 arithmetic" in text and list(optimizations["left_out"]) == ["fp16"]


def test_benchmark_record_has_no_paths(script, tmp_path):
    result = run(script, tmp_path, "--model", "tiny", "--part", "step", "--rho", 0.01, "--batch_size", 5)
    assert result["command"].startswith("python scripts/benchmark.py --model tiny --part step --rho 0.01")
    assert str(tmp_path) not in json.dumps(result) and "torch" in result["versions"]
    assert (result["setting"]["rho"], result["setting"]["batch_size"]) == ([0.01], 5)


def prepare(script, *arguments):
    return script.build_setup(*script.parse_options([*map(str, arguments), *BRIEF]))


def test_build_setup_with_recipe_has_images_of_recipe(script, recipe):
    setup = prepare(script, "--recipe", recipe, "--rho", 0.02)
    assert setup.name == "mine" and list(setup.systems) == ["HTM"] and setup.mixed_layer == 1
    assert setup.model.training and setup.images.shape == (12, 3, 8, 8)
    # Most pixels of digits are black, unlike those of noise.
    assert (setup.images == setup.images.min()).float().mean() > 0.2 and len(set(setup.labels.tolist())) > 2
    config = script.training_models(setup.model, setup.systems)["HTM"].config
    assert (config.horizontal_tau, config.horizontal_rho, config.saliency_detector) == (None, 0.02, "attention")
    assert config.horizontal_layers == [1] and config.vertical_layers == [] and config.num_labels == 10


@pytest.mark.parametrize(
    "options, systems, layer",
    [
        (["--vertical_layers", 2], {"HTM": ([1], []), "VTM": ([], [2]), "HTM + VTM": ([1], [2])}, 1),
        (["--vertical_layers", 2, "--horizontal_layers"], {"VTM": ([], [2])}, 0),
        (["--horizontal_layers", 2, "--batch_size", 9], {"HTM": ([2], [])}, 2),
    ],
)
def test_build_setup_with_training_options_overrides_recipe(script, recipe, options, systems, layer):
    setup = prepare(script, "--recipe", recipe, *options)
    models = script.training_models(setup.model, setup.systems)
    layers = {name: (models[name].config.horizontal_layers, models[name].config.vertical_layers) for name in systems}
    assert list(setup.systems) == list(systems) and layers == systems and setup.mixed_layer == layer
    assert len(setup.labels) == (9 if "--batch_size" in options else 12)


def test_benchmark_of_recipe_writes_tables_and_json(script, recipe, tmp_path, capsys):
    result = run(script, tmp_path, "--recipe", recipe, "--part", "detection", "training", "--vertical_layers", 2)
    assert list(result["detection"]["timings"]) == SALIENCY_DETECTORS
    systems = ["plain", "HTM", "VTM", "HTM + VTM", "HTM, gradient", "HTM, random"]
    systems += ["HTM, random partners", "HTM, full rollout"]
    systems += ["HTM, rho 0.01", "HTM, full maps"]
    assert list(result["training"]["timings"]) == systems
    assert "mine, batch 12, fp32" in capsys.readouterr().out and "--recipe mine.yaml" in result["command"]
    assert not (tmp_path / "outputs").exists()


def test_benchmark_of_parameters_matches_paper(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "PAPER_BASELINES", [PAPER_BASELINES[2], PAPER_BASELINES[8]])
    result = run(script, tmp_path, "--part", "parameters")
    rows = {row["system"]: row for row in result["parameters"]}
    assert "setting" not in result and rows["ResNet1001-v2"]["counted"] is None
    assert rows["CCT-7/3x1 + HTM"]["counted"]["parameters"] == {"100": 3809226, "10": 3762966}
    assert rows["CCT-7/3x1 + HTM"]["paper"] == {"parameters": "3.81 M", "macs": "0.95 G"}
    assert rows["ViT-B/16 + HTM + VTM"]["counted"]["parameters"] == {"1000": 87336656}
    assert [row["table"] for row in result["parameters"]] == [1] * 6 + [2] * 4
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "ViT-B/16 + VTM 86.6 M 86.57 M 16.9 G 17.56 G 16.85 G".split() in shown
    assert "ViT-Lite-6/4 3.19 M 3.21 M 3.19 M 0.22 G 0.22 G 0.21 G".split() in shown
    for name in ("CCT-7/3x1", "ViT-B/16"):
        own = rows[name]["counted"]["macs_weights_only"]
        assert own / 1e9 == pytest.approx(float(rows[name]["paper"]["macs"].split()[0]), rel=0.005)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--part", "speed"], "invalid choice: 'speed'"),
        (["--optimization", "ema", "sleep"], "invalid choice: 'sleep'"),
        (["--model", "vit-huge"], "invalid choice: 'vit-huge'"),
        (
            ["--horizontal_layers", "2"],
            "Unknown arguments: --horizontal_layers 2. Options of finetune.py need",
        ),
        (["--model", "vit-tiny", "--recipe", "x"], "not allowed with argument --model"),
        (["--batch_size", "1"], "--batch_size must be at least 2, got 1"),
        (["--rounds", "1"], "--rounds must be at least 2, got 1"),
        (["--warmup", "0"], "--warmup must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--rho", "-0.1"], "--rho must be at least 0 and below 1, got -0.1"),
        (["--rho", "nan"], "--rho must be at least 0 and below 1, got nan"),
        (["--group_size", "8", "1"], "--group_size must be at least 2, got 1"),
        (["--easy_fraction", "0"], "--easy_fraction must be above 0 and at most 1, got 0"),
        (["--easy_fraction", "1.5"], "--easy_fraction must be above 0 and at most 1, got 1.5"),
        (["--part", "step", "--easy_fraction", "0.5"], "--easy_fraction changes --part training, which is not"),
        (["--part", "detection", "step", "--compile_mode", "default"], "--compile_mode changes --part training"),
        (["--device", "cpu", "--compile_mode", "reduce-overhead"], "On a CPU, pass --compile_mode default"),
        (["--compile_mode", "fast"], "invalid choice: 'fast'"),
        (["--device", "cpu", "--dtype", "tf32"], "--dtype tf32 needs a CUDA device. Use fp32 or bf16"),
        (["--device", "cpu", "--part", "copies"], "--part copies measures copies to a CUDA device. Omit it"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:NUMBER, got tpu"),
        (["--json", "."], "--json must name a file"),
    ],
)
def test_parse_options_with_wrong_value_raises(script, arguments, message):
    with pytest.raises(ValueError) as error:
        script.parse_options(arguments)
    assert message in str(error.value)


def test_parse_options_with_missing_device_raises(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device for --device cuda:1. Pass --device cpu"):
        script.parse_options(["--device", "cuda:1"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--horizontal_layers"], "mixes no tokens. Pass --horizontal_layers, --vertical_layers or both"),
        (["--batch_size", 5000], "The batch size is 5000, but there are 1437 images to train on"),
        (["--horizontal_layer", 1], "did you mean --horizontal_layers?"),
    ],
)
def test_build_setup_with_unsuitable_recipe_raises(script, recipe, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(script, "--recipe", recipe, *options)


def test_benchmark_error_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--rounds", "1"])
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == "benchmark.py: --rounds must be at least 2, got 1."
