"""User errors of models, checkpoints and output folders."""

import json
from collections.abc import Callable
from pathlib import Path

from user_errors.harness import DIGITS, TOKENMIXUP, ErrorCase, Harness, solid_image

RESNET = ["--from_scratch", "--model_type", "resnet", "--config_overrides"]
RESNET += ['{"depths": [1], "hidden_sizes": [8], "embedding_size": 8}']


def model(name: str, get_model: Callable[[Harness], Path | str], *fragments: str, flags: tuple = ()) -> ErrorCase:
    """Train the model of a folder or a name on the digits."""

    def trigger(harness: Harness):
        return harness.prepare(*DIGITS, "--do_train", "--model_name_or_path", get_model(harness), *flags)

    return ErrorCase(name, trigger, ValueError, fragments)


def digits(name: str, *fragments: str, flags: tuple = ()) -> ErrorCase:
    """Train on the digits with these flags alone."""
    return ErrorCase(name, lambda harness: harness.prepare(*DIGITS, "--do_train", *flags), ValueError, fragments)


def vit_config(name: str, *fragments: str, **config_changes) -> ErrorCase:
    """Train a ViT with these changes of its configuration from scratch."""
    return ErrorCase(name, lambda harness: harness.prepare_digits(**config_changes), ValueError, fragments)


def config_overrides(name: str, text: str, *fragments: str, model_type: str = "vit") -> ErrorCase:
    """Train a model with these overrides from scratch."""
    return digits(name, *fragments, flags=("--from_scratch", "--model_type", model_type, "--config_overrides", text))


def cct_config(name: str, *fragments: str, **config_changes) -> ErrorCase:
    """Train a CCT with these changes of its configuration from scratch."""
    return config_overrides(f"CCT: {name}", json.dumps(config_changes), *fragments, model_type="cct")


def resume(name: str, flags: list, *fragments: str, config_changes: dict | None = None) -> ErrorCase:
    """Resume the trained model with other flags or with changes of its configuration."""

    def trigger(harness: Harness):
        return harness.resume(*harness.vit_flags(**config_changes or {}), *flags)

    return ErrorCase(name, trigger, ValueError, fragments)


def trained_model(harness: Harness) -> Path:
    return harness.trained


def with_truncated_weights(harness: Harness) -> Path:
    folder = harness.copy_trained_model()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


def without_image_processor(harness: Harness) -> Path:
    folder = harness.copy_trained_model()
    (folder / "preprocessor_config.json").unlink()
    return folder


def with_other_image_size(harness: Harness) -> Path:
    folder = harness.copy_trained_model()
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 20, "width": 20}}))
    return folder


def with_other_architecture(harness: Harness) -> Path:
    return harness.copy_trained_model(model_type="deit")


def with_other_hidden_size(harness: Harness) -> Path:
    return harness.copy_trained_model(hidden_size=32)


def with_quantization(harness: Harness) -> Path:
    return harness.copy_trained_model(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def with_unknown_model_type(harness: Harness) -> Path:
    return harness.copy_trained_model(model_type="vti")


def with_cct_config(harness: Harness) -> Path:
    return harness.copy_trained_model(model_type="cct", saliency_query="mean", scorenet_pooling="mean")


def with_config(text: str) -> Callable[[Harness], Path]:
    """Return a function that writes a folder with this config.json and nothing else."""
    return lambda harness: harness.write_folder("config.json", text)


def use_three_classes(harness: Harness, *flags: str, model: Path | None = None):
    data = harness.write_parquet([solid_image()] * 6, ["x", "y", "z"] * 2)
    return harness.prepare("--dataset_name", data, "--model_name_or_path", model or harness.trained, *flags)


def train_other_classes(harness: Harness):
    return use_three_classes(harness, "--do_train", model=harness.write_untrained_vit("car", "bus", "van"))


def train_classes_counted_from_1(harness: Harness):
    model = harness.write_untrained_vit("x", "y", "z", first_index=1)
    return use_three_classes(harness, "--do_train", model=model)


def train_into_a_file(harness: Harness):
    path = harness.write_folder("notes.txt", "x") / "notes.txt"
    return harness.train(*DIGITS, *harness.vit_flags(), output_dir=path)


def train_into_the_folder_of_another_run(harness: Harness):
    return harness.train(*DIGITS, *harness.vit_flags(), output_dir=harness.trained)


def train_into_model_folder(harness: Harness):
    output_dir = harness.copy_trained_model()
    return harness.prepare(*DIGITS, "--do_train", *harness.vit_flags(), output_dir=output_dir)


MODEL_CASES = [
    model(
        "model folder that does not exist", lambda harness: harness.folder / "no",
        "not found", "/no'", "a folder with a config.json",
    ),
    model(
        "model name that does not exist", lambda harness: "outputs/no",
        "'outputs/no' not found", "the name of a model on the Hub",
    ),
    model("empty model name", lambda harness: "", "There is no model"),
    model(
        "model_revision of a local folder", trained_model, "--model_revision is for models on the Hub",
        flags=("--model_revision", "x"),
    ),
    model("folder without config.json", lambda harness: harness.folder, "no config.json that names a model_type"),
    model("truncated config.json", with_config("{"), "config.json", "not a valid JSON"),
    model("config.json without model_type", with_config("{}"), "names a model_type"),
    model("config.json that is a list", with_config("[]"), "must contain a JSON object", "save_pretrained"),
    model("unknown model_type", with_unknown_model_type, "type 'vti'", "did you mean 'vit'?"),
    model("text model", with_config('{"model_type": "bert"}'), "no image classifier of type 'bert'"),
    model("truncated weights", with_truncated_weights, "cannot be read", "truncated", "download it again"),
    model(
        "no image processor", without_image_processor,
        "has no image processor", "preprocessor_config.json", "--image_processor",
    ),
    model(
        "image_processor_name that does not exist", trained_model, "/no has no image processor",
        flags=("--image_processor_name", "/no"),
    ),
    model(
        "image processor of another size",
        with_other_image_size,
        "makes images of 20x20 pixels, and the model is for 16x16",
        "--image_size 20 to set the model",
        "--image_size 16 to set the image processor",
    ),
    model(
        "image_size below patch_size", trained_model, "image_size 2 is smaller than the patch size",
        flags=("--image_size", 2),
    ),
    model(
        "two different values of image_size",
        trained_model,
        "image_size is 20, but config_overrides has image_size 24",
        flags=("--image_size", 20, "--config_overrides", '{"image_size": 24}'),
    ),
    model(
        "problem_type for regression",
        trained_model,
        "problem_type must be 'single_label_classification'",
        flags=("--config_overrides", '{"problem_type": "regression"}'),
    ),
    model("quantized weights", with_quantization, "quantized weights", "Choose the model before quantization"),
    model("hidden_size of other weights in config.json", with_other_hidden_size, "other shapes", "config.json"),
    model(
        "hidden_size of other weights in config_overrides",
        trained_model,
        "other shapes",
        "Remove {'hidden_size': 32}",
        flags=("--config_overrides", '{"hidden_size": 32}'),
    ),
    model(
        "ignore_mismatched_sizes with another hidden_size",
        with_other_hidden_size,
        "do not fit a TokenMixupViT",
        "52 of 56 tensors",
        "from_scratch",
        flags=("--ignore_mismatched_sizes",),
    ),
    model("CCT configuration with ViT weights", with_cct_config, "do not fit a TokenMixupCct", "from_scratch"),
    model(
        "weights of another architecture", with_other_architecture, "do not fit a TokenMixupDeiT", "initialized",
    ),
    model(
        "model_type that differs from the model", trained_model, "type is 'vit'", "'cct'", "Remove",
        flags=("--model_type", "cct"),
    ),
    model(
        "unknown attribute in config_overrides", trained_model, "'depth'",
        flags=("--config_overrides", '{"depth": 3}'),
    ),
    model(
        "num_labels in config_overrides", trained_model, "Remove num_labels",
        flags=("--config_overrides", '{"num_labels": 3}'),
    ),
    model(
        "unknown hidden_act for a pretrained model",
        trained_model,
        "config_overrides {'hidden_act': 'foo'}",
        "Correct or remove",
        flags=("--config_overrides", '{"hidden_act": "foo"}', "--ignore_mismatched_sizes"),
    ),
    model(
        "num_attention_heads that the weights do not match",
        trained_model,
        "num_attention_heads",
        "another shape",
        "would be initialized randomly",
        flags=("--config_overrides", '{"num_attention_heads": 3}', "--ignore_mismatched_sizes"),
    ),
    ErrorCase(
        "dataset with another number of classes than the model",
        lambda harness: use_three_classes(harness, "--do_train"),
        ValueError,
        ("trained for 10 classes", "3 classes", "ignore_mismatched_sizes"),
    ),
    ErrorCase(
        "dataset with other classes than the model",
        train_other_classes,
        ValueError,
        ("'car', 'bus', 'van'", "'x', 'y', 'z'", "ignore_mismatched_sizes", "correct id2label"),
    ),
    ErrorCase(
        "id2label that starts at 1",
        train_classes_counted_from_1,
        ValueError,
        ("id2label", "must name the classes 0 to 2", "got 1, 2, 3"),
    ),
    ErrorCase(
        "evaluation split with other classes than the model",
        lambda harness: use_three_classes(harness, "--do_eval", "--eval_split", "train"),
        ValueError,
        ("has 10 classes and the dataset has 3", "label_mapping=name"),
    ),
    digits("no model", "There is no model", "from_scratch"),
    digits(
        "misspelled model_type", "no image classifier of type 'vti'", "did you mean 'vit'?",
        flags=("--from_scratch", "--model_type", "vti"),
    ),
    digits(
        "TokenMixup settings for a ResNet",
        "supports the model types ", "cct, ", ", got 'resnet'", "Remove horizontal_layers",
        flags=("--from_scratch", "--model_type", "resnet", *TOKENMIXUP),
    ),
    config_overrides("config_overrides that is a list", "[1]", "--config_overrides", "JSON object", "'[1]'"),
    config_overrides(
        "config_overrides that is not JSON", "hidden_size=8",
        "--config_overrides", "JSON object", "'hidden_size=8'",
    ),
    config_overrides(
        "misspelled attribute in config_overrides", '{"hiden_size": 8}',
        "no attribute 'hiden_size'", "did you mean 'hidden_size'?",
    ),
    config_overrides("model_type in config_overrides", '{"model_type": "cct"}', "not allowed", "Pass `model_type`"),
    vit_config(
        "hidden_size that is a string", "config_overrides", "'big'", "expected int", "Correct or remove",
        hidden_size="big",
    ),
    vit_config("hidden_size of 0", "config_overrides", "'hidden_size': 0", "Correct or remove", hidden_size=0),
    vit_config("num_hidden_layers of 0", "num_hidden_layers must be at least 1", "got 0", num_hidden_layers=0),
    vit_config(
        "vertical layer in a model of one layer", "vertical_layers must be empty in a model of 1 layer", "[1]",
        num_hidden_layers=1, vertical_layers=[1],
    ),
    vit_config(
        "num_attention_heads of 0", "config_overrides", "'num_attention_heads': 0", num_attention_heads=0
    ),
    vit_config("unknown hidden_act", "config_overrides", "'gelo'", "Correct or remove", hidden_act="gelo"),
    vit_config("negative intermediate_size", "config_overrides", "'intermediate_size': -3", intermediate_size=-3),
    vit_config(
        "patch_size above image_size", "(3, 16, 16)", "(32 x 32)", "patch_size that belong", patch_size=32
    ),
    vit_config("num_channels of 1", "(3, 16, 16)", "Expected 1 but got 3", num_channels=1),
    cct_config("unknown tokenizer", "tokenizer must be one of", "'patches'", tokenizer="patches"),
    cct_config("num_conv_layers of 0", "num_conv_layers must be at least 1", "got 0", num_conv_layers=0),
    cct_config("pooling_stride of 0", "pooling_stride must be at least 1", "got 0", pooling_stride=0),
    cct_config("drop_path_rate of 2", "drop_path_rate must be at least 0 and below 1", "got 2", drop_path_rate=2),
    cct_config("patch_size above image_size", "image_size 32 is too small", tokenizer="patch", patch_size=64),
    cct_config(
        "hidden_size that is not a multiple of num_attention_heads",
        "hidden_size must be a multiple of num_attention_heads", "15 and 4",
        hidden_size=15,
    ),
]  # fmt: skip
CHECKPOINT_CASES = [
    ErrorCase(
        "output_dir that is a file", train_into_a_file, ValueError, ("is not writable", "notes.txt", "choose another")
    ),
    ErrorCase(
        "output_dir of another run", train_into_the_folder_of_another_run, ValueError,
        ("contains checkpoint-2 of an earlier run", "resume_from_checkpoint=last", "another `output_dir`"),
    ),
    ErrorCase(
        "output_dir that contains a model", train_into_model_folder, ValueError,
        ("contains a model", "overwrite", "Choose"),
    ),
    ErrorCase(
        "output_dir without a checkpoint to resume from",
        lambda harness: harness.prepare_digits("--resume_from_checkpoint", "last"),
        ValueError,
        ("no complete checkpoint in", "resume_from_checkpoint=auto", "the `output_dir` of the run"),
    ),
    ErrorCase(
        "checkpoint that does not exist",
        lambda harness: harness.prepare_digits("--resume_from_checkpoint", harness.trained / "checkpoint-9"),
        ValueError,
        ("checkpoint-9 cannot be resumed from", "no such folder", "Resume from", "checkpoint-2"),
    ),
    resume(
        "resume with other horizontal_layers", ["--horizontal_layers", 2, "--vertical_layers", 2],
        "checkpoint-2 does not match", "missing: vit.layers.2.scorenet",
        "settings that the checkpoint was trained with",
    ),
    resume(
        "resume with another learning_rate", [*TOKENMIXUP, "--learning_rate", 0.5],
        "`learning_rate` cannot change on resume", "0.5", "model_name_or_path",
    ),
    resume(
        "resume with another batch size", [*TOKENMIXUP, "--per_device_train_batch_size", 8],
        "steps of 16 images", "this run has 8", "the same product",
    ),
    resume(
        "resume a finished run", [*TOKENMIXUP, "--max_steps", 1],
        "this run has 1 steps", "Increase `num_train_epochs`",
    ),
    resume(
        "resume without TokenMixup", [], "does not match", "unexpected: vit.layers.1.scorenet", "its config.json"
    ),
    resume(
        "resume with other vertical_layers", ["--horizontal_layers", 1, "--vertical_layers", 1], "does not match",
        "vertical_layers: [2] there, [1] here", "settings that the checkpoint was trained with",
    ),
    resume(
        "resume with another intermediate_size", TOKENMIXUP, "does not match", "of another shape: ",
        config_changes={"intermediate_size": 64},
    ),
    resume(
        "resume with another optimizer", [*TOKENMIXUP, "--optim", "sgd"],
        "another optimizer than `optim=sgd`", "resume",
    ),
    ErrorCase(
        "resume with another architecture",
        lambda harness: harness.resume(*RESNET, "--image_size", 16),
        ValueError,
        ("does not match this ResNet", "missing: ", "unexpected: "),
    ),
]  # fmt: skip
