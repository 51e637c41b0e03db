"""The command `demo`: options, errors and the folder of a Space. No server is started."""

import json
import socket
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from helpers.commands import import_command

from hf_tokenmixup.demo import space


@pytest.fixture
def demo():
    return import_command("demo")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--port 0", "--port must be between 1 and 65535, got 0"),
        ("--port 70000", "got 70000"),
        ("--run {empty}", "--run must be the output folder of a run, but .* has no training_log.jsonl"),
        ("--space new --share", "starts no server and loads no model. Remove --share"),
        ("--space new --port 80 --run x", "Remove --run, --port"),
        ("--space new --model {empty}", "loads its model from the Hub, but --model .* is a folder"),
        ("--no-such-option", "unrecognized arguments: --no-such-option"),
    ],
)
def test_demo_with_wrong_option_raises(demo, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        demo.main(arguments.format(empty=tmp_path / "empty").split())
    assert not (tmp_path / "new").exists()


def test_demo_without_gradio_names_the_extra(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r'not installed: pip install -e "\.\[demo\]"'):
        demo.main([])


def test_demo_with_unsupported_model_raises(demo, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(ValueError, match="cannot be shown: .*Choose a model"):
        demo.load_demo_classifier(str(tmp_path))


def test_space_has_header_requirements_and_package(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "version", lambda name: {"gradio": "6.31.0"}[name])
    folder = space.write_space(tmp_path / "space", "user/model")
    header = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert "sdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\n" in header
    requirements = (folder / "requirements.txt").read_text(encoding="utf-8")
    assert "torch>=2.6\n" in requirements and "pytest" not in requirements and "gradio" not in requirements
    assert (folder / "hf_tokenmixup" / "cli" / "demo.py").is_file()
    assert (folder / "hf_tokenmixup" / "recipes" / "digits-quickstart.yaml").is_file()
    assert 'create_app("user/model")' in (folder / "app.py").read_text(encoding="utf-8").replace("'", '"')
    with pytest.raises(ValueError, match="is not empty"):
        space.write_space(folder)


def test_space_app_can_be_imported(tmp_path):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    path = space.write_space(tmp_path / "space") / "app.py"
    spec = spec_from_file_location("space_app", path)
    app = module_from_spec(spec)
    spec.loader.exec_module(app)
    assert isinstance(app.demo, gradio.Blocks)
    labels = {block.label for block in app.demo.blocks.values() if getattr(block, "label", None)}
    assert {"Model", "Layer", "rho", "tau", "kappa", "Detector", "Output folder of a run"} <= labels


@pytest.mark.parametrize("local_paths", [False, True])
def test_public_demo_reads_no_other_folders(tmp_path, local_paths):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from hf_tokenmixup.demo.app import build_app

    run = tmp_path / "run"
    run.mkdir()
    (run / "training_log.jsonl").write_text('{"epoch": 1, "loss": 2.5}\n')
    app = build_app(lambda name: None, local_paths=local_paths)
    (show_run,) = {function.fn for function in app.fns.values() if function.fn.__name__ == "show_run"}
    _, table, version = show_run(str(run), None)
    assert ("2.5" in table, version is not None) == (local_paths, local_paths)
    assert ("cannot be read in a public demo" in table) != local_paths


def test_demo_with_used_port_raises(demo):
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot start at 127.0.0.1, port {port}: the port is in use"):
            demo.main(["--port", str(port)])
