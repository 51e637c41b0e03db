"""Mistakes with the scripts beside finetune.py, and a version that is too old."""

import importlib
import importlib.metadata

from safetensors.torch import load_file, save_file
from user_errors.harness import Bench, Mistake
from user_errors.model_cases import cut_weights, other_size, trained

import hf_tokenmixup


def evaluated(name: str, find, *told: str, arguments: tuple = ()) -> Mistake:
    return Mistake(f"evaluate: {name}", lambda bench: bench.evaluate(find(bench), *arguments), ValueError, told)


def main(name: str, words: str, *told: str) -> Mistake:
    """Words of another script; {folder} is an empty one, {trained} that of a model, {file} a text file."""

    def provoke(bench: Bench):
        places = {"folder": bench.folder, "trained": bench.trained, "file": bench.holding("it.txt", "x") / "it.txt"}
        return bench.main(name, *(word.format(**places) for word in words.split()))

    return Mistake(f"{name}: {words}", provoke, ValueError, told)


def seen(words: str, *told: str) -> Mistake:
    return Mistake(f"visualize: {words}", lambda bench: bench.visualize(*words.split()), ValueError, told)


def without_classifier(bench: Bench):
    path = bench.model_like() / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "classifier" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    return path.parent


def without_processor(bench: Bench):
    folder = bench.model_like()
    (folder / "preprocessor_config.json").unlink()
    return folder


def with_text(bench: Bench, name: str, text: str | bytes):
    """The trained model in a folder of its own, with another content of one file."""
    folder = bench.model_like()
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def bad_processor(bench: Bench):
    return with_text(bench, "preprocessor_config.json", "{")


def updated_card(bench: Bench):
    folder = with_text(bench, "README.md", b"\xff\xfe")
    return bench.main("evaluate", folder, "--dataset_name", "digits", "--update_card")


def unreadable_log(bench: Bench):
    folder = bench.holding("training_log.jsonl", b"\xff\xfe")
    return bench.main("visualize", "curves", folder, "--output", bench.folder / "it.png")


def published(name: str, find, *told: str) -> Mistake:
    return Mistake(f"publish: {name}", lambda bench: bench.publish(find(bench), "user/model"), ValueError, told)


def strange_version(bench: Bench):
    installed = importlib.metadata.version
    bench.monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "4.57.1" if name == "transformers" else installed(name)
    )
    importlib.reload(hf_tokenmixup)


SCRIPTS = [
    evaluated("no such folder", lambda bench: bench.folder / "no", "No model", "config.json"),
    evaluated("no model in it", lambda bench: bench.folder, "no config.json that names a model_type"),
    evaluated("weights cut short", cut_weights, "cannot be read", "anew"),
    evaluated("no classifier among the weights", without_classifier, "2 of 56 tensors", "classifier.weight"),
    evaluated("another architecture", lambda bench: bench.model_like(model_type="deit"), "not those of a DeiT"),
    evaluated("a processor of another size", other_size, "(3, 20, 20)", "(16*16)", "belong together"),
    evaluated("a batch of none", trained, "--batch_size must be at least 1", "got 0", arguments=("--batch_size", 0)),
    evaluated("no precision", trained, "--dtype", "'fp8'", "'bf16'", arguments=("--dtype", "fp8")),
    evaluated("a seed below 0", trained, "seed must be at least 0", "-1", arguments=("--seed", -1)),
    evaluated("a misspelt option", trained, "--batchsize", "did you mean --batch_size?", arguments=("--batchsize", 3)),
    evaluated("no split", trained, "No split 'tset'", "--eval_split", arguments=("--eval_split", "tset")),
    evaluated(
        "a revision of a folder", trained, "--revision is for models on the Hub", arguments=("--revision", "x")
    ),
    main("evaluate", "{trained} --use_cpu", "either --dataset_name or --validation_dir", "got neither"),
    evaluated("no image processor", without_processor, "has no image processor", "preprocessor_config.json next to"),
    evaluated("a processor that is no JSON", bad_processor, "has no image processor", "not a valid JSON"),
    evaluated("a share of all", trained, "--train_val_split must be above 0 and below 1", "1.5",
              arguments=("--train_val_split", 1.5)),
    Mistake("evaluate: a card that is no text", updated_card, ValueError, ("must be text in UTF-8", "README.md")),
    Mistake("visualize: a log that is no text", unreadable_log, ValueError, ("must be text in UTF-8", "log.jsonl")),
    main("evaluate", "{trained}/config.json --dataset_name digits", "is a file, not a model", "a config.json"),
    main("evaluate", "{trained} --dataset_name digits --json {file}/x.json", "--json must name a file", "is a file,"),
    main("evaluate", "{trained} --dataset_name digits --json {folder}", "--json must name a file", "is a folder"),
    main("visualize", "curves {trained} --output {file}/it.png", "--output must name a file", "is a file, not"),
    main("visualize", "curves {file} --output {folder}/it.png", "no log", "output folder of a training"),
    seen("horizontal --max_samples 1", "no pair to show", "An image needs a partner"),
    main("visualize", "salency {trained}", "invalid choice: 'salency'", "'saliency'"),
    main("visualize", "curves {folder} --output {folder}/it.png", "no log", "output folder of a training"),
    main("visualize", "saliency {folder}/no --images x --output {folder}/it.png", "No model", "config.json"),
    main("visualize", "saliency {trained} --images {folder}/no --output {folder}/it.png", "no file or folder", "/no"),
    main("visualize", "saliency {trained} --images {file} --output {folder}/it.png", "--images", "cannot be decoded"),
    main("visualize", "saliency {trained} --images {file} --output {folder}/it.jpg", ".png or .pdf", "'it.jpg'"),
    main("visualize", "saliency {trained} --images {file} --output {folder}", "must name a file", "is a folder"),
    seen("saliency --layer 3", "layer must lie between 0 and 2", "got 3"),
    seen("vertical --layer 0", "layer must lie between 1 and 2", "nothing lies before layer 0"),
    seen("vertical --kappa 17", "kappa must lie between 1 and", "16", "got 17"),
    seen("horizontal --rho nan", "rho must be at least 0", "nan"),
    seen("horizontal --tau nan", "--tau must be at least 0, or none", "nan"),
    seen("horizontal --tau x", "--tau", "expected a number or none", "'x'"),
    seen("saliency --max_samples 0", "--max_samples must be at least 1", "got 0"),
    main("study", "7", "no study '7'", "3, 4, 5, rho, tau, kappa"),
    main("study", "4 --seed 3", "no option --seed. Pass --seeds before"),
    main("study", "4 --values 1", "--values and --recipe are for rho, tau, kappa"),
    main("study", "4 --seeds -1", "--seeds must be different numbers of at least 0", "-1"),
    main("study", "rho --recipe nope", "no recipe 'nope'", "Recipes:"),
    main("study", "rho --values a --output_dir {folder}", "rho a", "--horizontal_rho", "'a'"),
    main(
        "study", "rho --recipe digits-quickstart --values 0.1 --launcher ' --output_dir {folder} -- --use_cpu",
        "--launcher must be a command line", "No closing quotation",
    ),
    main(
        "study", "rho --recipe digits-quickstart --values 0.1 --launcher true --output_dir {file} -- --use_cpu",
        "output_dir", "is not writable", "File exists",
    ),
    main("study", "4 --report_only --output_dir {folder}", "No run of this study is finished in"),
    main("throughput", "--rounds 0 --recipe digits-quickstart", "--rounds must be at least 1", "got 0"),
    main(
        "throughput",
        "--recipe digits-quickstart --use_cpu --per_device_train_batch_size 2000 --warmup 1 --steps 1 --rounds 1",
        "A step takes 2000 images", "the training split has ", "smaller per_device_train_batch_size",
    ),
    main("benchmark", "--json {file}/x.json", "--json must name a file", "is a file, not a folder"),
    main("convert", "{trained}/model.safetensors {folder}/new --label_names {folder}/no", "--label_names must be"),
    main("convert", "{folder} {folder}/new", "is a folder", "a downloaded weight file"),
    main("benchmark", "--recipe digits-quickstart --part parameters --rh 1", "reads no --recipe. Omit it"),
    main("benchmark", "--batch_size 1", "--batch_size must be at least 2", "got 1"),
    main("benchmark", "--device tpu", "--device must be cpu, cuda or cuda:NUMBER", "tpu"),
    main("benchmark", "--rho nan", "--rho must be at least 0", "nan"),
    main("benchmark", "--model vit-hug", "--model", "'vit-hug'", "'vit-small'"),
    main("benchmark", "--rows 3", "Unknown arguments", "--rows"),
    main("convert", "{folder}/no.pth {folder}/new", "no file", "no.pth", "path of a downloaded weight file"),
    main("convert", "{file} {folder}/new", ".npz, .safetensors", "rename it"),
    main("convert", "{trained}/model.safetensors {folder}/new", "transformers' own names", "from_pretrained"),
    main("convert", "{trained}/model.safetensors {trained}", "must be new or empty", "name another"),
    Mistake(
        "publish: no model",
        lambda bench: bench.publish(bench.folder, "somebody/something"),
        ValueError,
        ("holds no model", "a folder with config.json in it"),
    ),
    published("no JSON", lambda bench: with_text(bench, "config.json", "{"), "config.json is not valid JSON", "again"),
    published("a list", lambda bench: with_text(bench, "config.json", "[]"), "must be a JSON object, got list"),
    published("weights cut off", cut_weights, "model.safetensors is damaged or incomplete", "again"),
    published(
        "no index", lambda bench: with_text(bench, "model.safetensors.index.json", "{}"), "must have a weight_map"
    ),
    main("publish", "user/model {trained}", "There is no folder user/model", "Pass the folder first"),
    main("publish", "{trained} user/model --hub_token x", "--hub_token", "--token."),
    main("publish", "{trained} user/model --license Apache", "license must be an identifier", "'Apache'"),
    main("publish", "{trained} https://huggingface.co/user/model", "is no name for a repository", "USER/NAME"),
    Mistake(
        "publish: no repository",
        lambda bench: bench.publish(bench.trained, "a b c"),
        ValueError,
        ("'a b c' is no name for a repository", "Repo id must use alphanumeric chars"),
    ),
]  # fmt: skip
VERSIONS = [
    Mistake(
        "an old transformers",
        strange_version,
        ImportError,
        ("transformers>=5.9", "transformers==4.57.1", "hf_tokenmixup needs it: pip install -U 'transformers>=5.9"),
    )
]
