"""User errors of all commands but finetune, and a version of transformers that is too old."""

import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from user_errors.harness import ErrorCase, Harness
from user_errors.model_cases import (
    with_other_architecture,
    with_other_image_size,
    with_truncated_weights,
    without_image_processor,
)

import hf_tokenmixup


def evaluate(name: str, model: Callable[[Harness], Path], *fragments: str, flags: tuple = ()) -> ErrorCase:
    """Evaluate the model of a folder on the digits."""
    return ErrorCase(
        f"evaluate: {name}", lambda harness: harness.evaluate(model(harness), *flags), ValueError, fragments
    )


def visualize(name: str, arguments: str, *fragments: str) -> ErrorCase:
    """Plot the trained model on the digits."""
    return ErrorCase(
        f"visualize: {name}", lambda harness: harness.visualize(*arguments.split()), ValueError, fragments
    )


def publish(name: str, model: Callable[[Harness], Path], *fragments: str, repo_id: str = "user/model") -> ErrorCase:
    """Upload the model of a folder."""
    return ErrorCase(
        f"publish: {name}",
        lambda harness: harness.run_command("publish", model(harness), repo_id),
        ValueError,
        fragments,
    )


def command(command_name: str, name: str, arguments: str, *fragments: str) -> ErrorCase:
    """Run a command. {folder} is an empty folder, {trained} the folder of a model, and {file} a text file."""

    def trigger(harness: Harness):
        paths = {
            "folder": harness.folder,
            "trained": harness.trained,
            "file": harness.write_folder("notes.txt", "x") / "notes.txt",
        }
        return harness.run_command(command_name, *(argument.format(**paths) for argument in arguments.split()))

    return ErrorCase(f"{command_name}: {name}", trigger, ValueError, fragments)


def trained_model(harness: Harness) -> Path:
    return harness.trained


def empty_folder(harness: Harness) -> Path:
    return harness.folder


def missing_folder(harness: Harness) -> Path:
    return harness.folder / "no"


def without_classifier(harness: Harness) -> Path:
    path = harness.copy_trained_model() / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if "classifier" not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    return path.parent


def with_file(name: str, content: str | bytes) -> Callable[[Harness], Path]:
    """Return a function that copies the trained model and writes one file of its folder."""

    def copy(harness: Harness) -> Path:
        folder = harness.copy_trained_model()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return copy


def update_binary_card(harness: Harness):
    folder = with_file("README.md", b"\xff\xfe")(harness)
    return harness.run_command("evaluate", folder, "--dataset_name", "digits", "--update_card")


def plot_binary_log(harness: Harness):
    folder = harness.write_folder("training_log.jsonl", b"\xff\xfe")
    return harness.run_command("visualize", "curves", folder, "--output", harness.folder / "figure.png")


def import_with_old_transformers(harness: Harness):
    installed = importlib.metadata.version
    harness.monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "4.57.1" if name == "transformers" else installed(name)
    )
    importlib.reload(hf_tokenmixup)


COMMAND_CASES = [
    evaluate("folder that does not exist", missing_folder, "not found", "config.json"),
    evaluate("folder without a model", empty_folder, "no config.json that names a model_type"),
    evaluate("truncated weights", with_truncated_weights, "cannot be read", "download it again"),
    evaluate("weights without a classifier", without_classifier, "2 of 56 tensors", "classifier.weight"),
    evaluate("weights of another architecture", with_other_architecture, "do not fit a DeiT"),
    evaluate("image processor of another size", with_other_image_size, "(3, 20, 20)", "(16*16)", "patch_size"),
    evaluate(
        "batch_size of 0", trained_model, "--batch_size must be at least 1", "got 0", flags=("--batch_size", 0)
    ),
    evaluate("unknown dtype", trained_model, "--dtype", "'fp8'", "'bf16'", flags=("--dtype", "fp8")),
    evaluate("negative seed", trained_model, "seed must be at least 0", "-1", flags=("--seed", -1)),
    evaluate("misspelled flag", trained_model, "--batchsize", "did you mean --batch_size?", flags=("--batchsize", 3)),
    evaluate(
        "eval_split that does not exist", trained_model, "no split 'tset'", "eval_split",
        flags=("--eval_split", "tset"),
    ),
    evaluate(
        "revision of a local folder", trained_model, "--revision is for models on the Hub", flags=("--revision", "x")
    ),
    command(
        "evaluate", "no dataset", "{trained} --use_cpu", "either --dataset_name or --validation_dir", "got neither"
    ),
    evaluate(
        "no image processor", without_image_processor, "has no image processor", "preprocessor_config.json next to"
    ),
    evaluate(
        "image processor that is not JSON", with_file("preprocessor_config.json", "{"),
        "has no image processor", "not a valid JSON",
    ),
    evaluate(
        "train_val_split above 1", trained_model, "--train_val_split must be above 0 and below 1", "1.5",
        flags=("--train_val_split", 1.5),
    ),
    ErrorCase(
        "evaluate: model card that is not text", update_binary_card, ValueError,
        ("must be text in UTF-8", "README.md"),
    ),
    ErrorCase(
        "visualize: training log that is not text", plot_binary_log, ValueError,
        ("must be text in UTF-8", "log.jsonl"),
    ),
    command(
        "evaluate", "file instead of a model folder", "{trained}/config.json --dataset_name digits",
        "is a file, not a model", "a config.json",
    ),
    command(
        "evaluate", "json path inside a file", "{trained} --dataset_name digits --json {file}/x.json",
        "--json must name a file", "is a file,",
    ),
    command(
        "evaluate", "json path that is a folder", "{trained} --dataset_name digits --json {folder}",
        "--json must name a file", "is a folder",
    ),
    command(
        "visualize", "output path inside a file", "curves {trained} --output {file}/figure.png",
        "--output must name a file", "is a file, not",
    ),
    command(
        "visualize", "file without a training log", "curves {file} --output {folder}/figure.png",
        "does not exist", "output folder of a run",
    ),
    visualize(
        "one image for the pairs of horizontal", "horizontal --max_samples 1",
        "No image is mixed", "An image needs a partner",
    ),
    command("visualize", "misspelled figure", "salency {trained}", "invalid choice: 'salency'", "'saliency'"),
    command(
        "visualize", "folder without a training log", "curves {folder} --output {folder}/figure.png",
        "does not exist", "output folder of a run",
    ),
    command(
        "visualize", "model that does not exist", "saliency {folder}/no --images x --output {folder}/figure.png",
        "not found", "config.json",
    ),
    command(
        "visualize", "images that do not exist",
        "saliency {trained} --images {folder}/no --output {folder}/figure.png",
        "no file or folder", "/no",
    ),
    command(
        "visualize", "text file instead of an image",
        "saliency {trained} --images {file} --output {folder}/figure.png",
        "--images", "cannot be decoded",
    ),
    command(
        "visualize", "unknown file format of the figure",
        "saliency {trained} --images {file} --output {folder}/figure.jpg",
        ".png or .pdf", "'figure.jpg'",
    ),
    command(
        "visualize", "output path that is a folder", "saliency {trained} --images {file} --output {folder}",
        "must be a file", "is a folder",
    ),
    visualize("layer above the last one", "saliency --layer 3", "layer must be between 0 and 2", "got 3"),
    visualize(
        "layer 0 for vertical", "vertical --layer 0",
        "layer must be between 1 and 2", "layer 0 has no earlier layers",
    ),
    visualize(
        "kappa above the number of tokens", "vertical --kappa 17",
        "kappa must be between 1 and", "16", "got 17",
    ),
    visualize("rho of nan", "horizontal --rho nan", "rho must be at least 0", "nan"),
    visualize("tau of nan", "horizontal --tau nan", "--tau must be at least 0, or none", "nan"),
    visualize("tau that is not a number", "horizontal --tau x", "--tau", "expected a number or none", "'x'"),
    visualize("max_samples of 0", "saliency --max_samples 0", "--max_samples must be at least 1", "got 0"),
    command("study", "unknown study", "7", "no study '7'", "1, 3, 4, 5, small, transfer, rho, tau, kappa"),
    command("study", "values for a table", "4 --values 1", "--values and --recipe are for rho, tau, kappa"),
    command("study", "negative seed", "4 --seeds -1", "--seeds must be different numbers of at least 0", "-1"),
    command("study", "unknown recipe", "rho --recipe nope", "no recipe 'nope'", "Recipes:"),
    command("study", "flag of another command", "4 --seed 3", "no option --seed. Pass --seeds before"),
    command(
        "study", "value that is not a number", "rho --values a --output_dir {folder}",
        "a sweep over rho", "--values", "'a'",
    ),
    command(
        "study", "launcher with an unclosed quotation mark",
        "rho --recipe digits-quickstart --values 0.1 --launcher ' --output_dir {folder} -- --use_cpu",
        "--launcher must be a command line", "No closing quotation",
    ),
    command(
        "study", "output_dir that is a file",
        "rho --recipe digits-quickstart --values 0.1 --launcher true --output_dir {file} -- --use_cpu",
        "output_dir", "is not writable", "Not a directory",
    ),
    command(
        "study", "report without a finished run", "4 --report_only --output_dir {folder}",
        "No run of this study is finished in",
    ),
    command(
        "throughput", "rounds of 0", "--rounds 0 --recipe digits-quickstart", "--rounds must be at least 1", "got 0"
    ),
    command(
        "throughput", "batch larger than the training split",
        "--recipe digits-quickstart --use_cpu --per_device_train_batch_size 2000 --warmup 1 --steps 1 --rounds 1",
        "A step needs 2000 images", "the training split has ", "smaller per_device_train_batch_size",
    ),
    command(
        "benchmark", "json path inside a file", "--json {file}/x.json",
        "--json must name a file", "is a file, not a folder",
    ),
    command(
        "convert", "label_names file that does not exist",
        "{trained}/model.safetensors {folder}/new --label_names {folder}/no",
        "--label_names must be",
    ),
    command("convert", "folder instead of a file", "{folder} {folder}/new", "is a folder", "a downloaded weight file"),
    command("benchmark", "batch_size of 1", "--batch_size 1", "--batch_size must be at least 2", "got 1"),
    command("benchmark", "unknown device", "--device tpu", "--device must be cpu, cuda or cuda:NUMBER", "tpu"),
    command("benchmark", "rho that is nan", "--rho nan", "--rho must be at least 0", "nan"),
    command("benchmark", "misspelled model", "--model vit-hug", "--model", "'vit-hug'", "'vit-small'"),
    command("benchmark", "unknown flag", "--rows 3", "Unknown arguments", "--rows"),
    command(
        "benchmark", "recipe", "--recipe digits-quickstart --part parameters --rh 1", "reads no --recipe. Omit it"
    ),
    command(
        "convert", "file that does not exist", "{folder}/no.pth {folder}/new",
        "no.pth does not exist", "path of a downloaded weight file",
    ),
    command("convert", "unknown file format", "{file} {folder}/new", ".npz, .safetensors", "Rename the file"),
    command(
        "convert", "weights in the format of transformers", "{trained}/model.safetensors {folder}/new",
        "names of transformers", "from_pretrained",
    ),
    command(
        "convert", "output folder that is not empty", "{trained}/model.safetensors {trained}",
        "must be new or empty", "Choose another folder",
    ),
    publish(
        "folder without a model", empty_folder, "contains no model", "config.json is missing",
        repo_id="somebody/something",
    ),
    publish(
        "config.json that is not JSON", with_file("config.json", "{"), "config.json is not valid JSON", "again"
    ),
    publish("config.json that is a list", with_file("config.json", "[]"), "must be a JSON object, got list"),
    publish("truncated weights", with_truncated_weights, "model.safetensors is corrupted or truncated", "again"),
    publish(
        "weight index without a weight map", with_file("model.safetensors.index.json", "{}"), "must have a weight_map"
    ),
    command(
        "publish", "swapped arguments", "user/model {trained}",
        "There is no folder user/model", "Pass the folder first",
    ),
    command("publish", "token under another name", "{trained} user/model --hub_token x", "--hub_token", "--token."),
    command(
        "publish", "unknown license", "{trained} user/model --license Apache",
        "license must be a lowercase identifier", "'Apache'",
    ),
    command(
        "publish", "URL instead of a repository id", "{trained} https://huggingface.co/user/model",
        "is not a valid repository name", "USER/NAME",
    ),
    publish(
        "invalid repository id", trained_model, "'a b c' is not a valid repository name",
        "Repo id must use alphanumeric chars", repo_id="a b c",
    ),
]  # fmt: skip
VERSION_CASES = [
    ErrorCase(
        "transformers 4",
        import_with_old_transformers,
        ImportError,
        ("transformers>=5.9", "transformers==4.57.1", "hf_tokenmixup needs it: pip install -U 'transformers>=5.9"),
    )
]
