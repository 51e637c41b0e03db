"""Mistakes with models, checkpoints and output folders."""

import json

from user_errors.harness import DIGITS, MIXING, Bench, Mistake, picture

RESNET = ["--from_scratch", "--model_type", "resnet", "--config_overrides"]
RESNET += ['{"depths": [1], "hidden_sizes": [8], "embedding_size": 8}']


def model(name: str, find, *told: str, arguments: tuple = ()) -> Mistake:
    def provoke(bench: Bench):
        return bench.prepare(*DIGITS, "--do_train", "--model_name_or_path", find(bench), *arguments)

    return Mistake(name, provoke, ValueError, told)


def built(name: str, *told: str, **changes) -> Mistake:
    return Mistake(name, lambda bench: bench.digits(**changes), ValueError, told)


def overrides(text: str, *told: str, model_type: str = "vit") -> Mistake:
    words = ["--from_scratch", "--model_type", model_type, "--config_overrides", text]
    return Mistake(
        f"{model_type} {text}", lambda bench: bench.prepare(*DIGITS, "--do_train", *words), ValueError, told
    )


def cct(*told: str, **changes) -> Mistake:
    return overrides(json.dumps(changes), *told, model_type="cct")


def resumed(name: str, arguments: list, *told: str, network: dict | None = None) -> Mistake:
    def provoke(bench: Bench):
        return bench.resume(*bench.network(**network or {}), *arguments)

    return Mistake(name, provoke, ValueError, told)


def trained(bench: Bench):
    return bench.trained


def cut_weights(bench: Bench):
    folder = bench.model_like()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


def without_processor(bench: Bench):
    folder = bench.model_like()
    (folder / "preprocessor_config.json").unlink()
    return folder


def other_size(bench: Bench):
    folder = bench.model_like()
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 20, "width": 20}}))
    return folder


def three_classes(bench: Bench, *arguments, model=None):
    data = bench.parquet([picture()] * 6, ["x", "y", "z"] * 2)
    return bench.prepare("--dataset_name", data, "--model_name_or_path", model or bench.trained, *arguments)


def cct_of_a_vit(bench: Bench):
    return bench.model_like(model_type="cct", saliency_query="mean", scorenet_pooling="mean")


def output_with_a_model(bench: Bench):
    return bench.prepare(*DIGITS, "--do_train", *bench.network(), output_dir=bench.model_like())


def output_file(bench: Bench):
    path = bench.holding("it.txt", "x") / "it.txt"
    return bench.train(*DIGITS, *bench.network(), output_dir=path)


MODELS = [
    model(
        "no such model folder", lambda bench: bench.folder / "no", "No model", "/no'", "a folder with a config.json"
    ),
    model("no such model", lambda bench: "outputs/no", "No model 'outputs/no'", "the name of a model on the Hub"),
    model("a folder without config.json", lambda bench: bench.folder, "no config.json that names a model_type"),
    model(
        "a config.json cut short", lambda bench: bench.holding("config.json", "{"), "config.json", "not a valid JSON"
    ),
    model("a config.json without type", lambda bench: bench.holding("config.json", "{}"), "names a model_type"),
    model(
        "a config.json that is a list",
        lambda bench: bench.holding("config.json", "[]"),
        "must hold a JSON object",
        "save_pretrained",
    ),
    model("an unknown type", lambda bench: bench.model_like(model_type="vti"), "type 'vti'", "did you mean 'vit'?"),
    model(
        "no classifier of images",
        lambda bench: bench.holding("config.json", '{"model_type": "bert"}'),
        "no image classifier of type 'bert'",
    ),
    model("weights cut short", cut_weights, "cannot be read", "cut short", "Copy or download it anew"),
    model(
        "no image processor",
        without_processor,
        "has no image processor",
        "preprocessor_config.json",
        "--image_processor",
    ),
    model("another processor", trained, "/no has no image processor", arguments=("--image_processor_name", "/no")),
    model(
        "a processor of another size",
        other_size,
        "makes images of 20x20 pixels, and the model is for 16x16",
        "--image_size 20 to set the model",
        "--image_size 16 to set the image processor",
    ),
    model(
        "--image_size below a patch", trained, "image_size 2 is smaller than a patch", arguments=("--image_size", 2)
    ),
    model("an empty name", lambda bench: "", "No model was named"),
    model(
        "a revision of a folder",
        trained,
        "--model_revision is for models on the Hub",
        arguments=("--model_revision", "x"),
    ),
    model(
        "an activation that there is not",
        trained,
        "config_overrides {'hidden_act': 'foo'}",
        "correct or leave out",
        arguments=("--config_overrides", '{"hidden_act": "foo"}', "--ignore_mismatched_sizes"),
    ),
    model(
        "heads that the weights do not fit",
        trained,
        "num_attention_heads",
        "another shape",
        "would be random",
        arguments=("--config_overrides", '{"num_attention_heads": 3}', "--ignore_mismatched_sizes"),
    ),
    built(
        "a vertical layer in a model of one",
        "vertical_layers must be empty in a model of 1 layer",
        "[1]",
        num_hidden_layers=1,
        vertical_layers=[1],
    ),
    model(
        "two image sizes",
        trained,
        "image_size is 20, but config_overrides has image_size 24",
        arguments=("--image_size", 20, "--config_overrides", '{"image_size": 24}'),
    ),
    model(
        "a multi-label loss",
        trained,
        "problem_type must be 'single_label_classification'",
        arguments=("--config_overrides", '{"problem_type": "regression"}'),
    ),
    model(
        "quantized weights",
        lambda bench: bench.model_like(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantized weights",
        "Name the model that was quantized",
    ),
    model("weights of another size", lambda bench: bench.model_like(hidden_size=32), "other shapes", "config.json"),
    model(
        "another size by override",
        trained,
        "other shapes",
        "{'hidden_size': 32}: leave that out",
        arguments=("--config_overrides", '{"hidden_size": 32}'),
    ),
    model(
        "weights of another size, ignored",
        lambda bench: bench.model_like(hidden_size=32),
        "not those of a TokenMixupViT",
        "52 of 56 tensors",
        "from_scratch",
        arguments=("--ignore_mismatched_sizes",),
    ),
    model("a CCT's configuration of a ViT's weights", cct_of_a_vit, "not those of a TokenMixupCct", "from_scratch"),
    model(
        "another architecture",
        lambda bench: bench.model_like(model_type="deit"),
        "not those of a DeiT",
        "would be random",
    ),
    model(
        "another type beside a model", trained, "of type 'vit'", "'cct'", "leave", arguments=("--model_type", "cct")
    ),
    model("an unknown attribute", trained, "'depth'", arguments=("--config_overrides", '{"depth": 3}')),
    model(
        "a number of classes", trained, "leave out num_labels", arguments=("--config_overrides", '{"num_labels": 3}')
    ),
    Mistake(
        "training on with other classes",
        lambda bench: three_classes(bench, "--do_train"),
        ValueError,
        ("trained for 10 classes", "3 classes", "ignore_mismatched_sizes"),
    ),
    Mistake(
        "other classes of the same number",
        lambda bench: three_classes(bench, "--do_train", model=bench.model_of("car", "bus", "van")),
        ValueError,
        ("'car', 'bus', 'van'", "'x', 'y', 'z'", "ignore_mismatched_sizes", "correct id2label"),
    ),
    Mistake(
        "class numbers that do not begin at 0",
        lambda bench: three_classes(bench, "--do_train", model=bench.model_of("x", "y", "z", first=1)),
        ValueError,
        ("id2label", "must name the classes 0 to 2", "got 1, 2, 3"),
    ),
    Mistake(
        "evaluation on other classes",
        lambda bench: three_classes(bench, "--do_eval", "--eval_split", "train"),
        ValueError,
        ("knows 10 classes and the dataset has 3", "--label_mapping name"),
    ),
    Mistake(
        "no model",
        lambda bench: bench.prepare(*DIGITS, "--do_train"),
        ValueError,
        ("No model was named", "from_scratch"),
    ),
    Mistake(
        "a misspelt type",
        lambda bench: bench.prepare(*DIGITS, "--do_train", "--from_scratch", "--model_type", "vti"),
        ValueError,
        ("no image classifier of type 'vti'", "did you mean 'vit'?"),
    ),
    Mistake(
        "TokenMixup for a ResNet",
        lambda bench: bench.prepare(*DIGITS, "--do_train", "--from_scratch", "--model_type", "resnet", *MIXING),
        ValueError,
        ("there for the model types cct, vit", "'resnet'", "leave out horizontal_layers"),
    ),
    overrides("[1]", "--config_overrides", "JSON object", "'[1]'"),
    overrides("hidden_size=8", "--config_overrides", "JSON object", "'hidden_size=8'"),
    overrides('{"hiden_size": 8}', "no attribute 'hiden_size'", "did you mean 'hidden_size'?"),
    overrides('{"model_type": "cct"}', "no override", "give model_type"),
    built("a word for a size", "config_overrides", "'big'", "expected int", "correct or leave out", hidden_size="big"),
    built("a size of zero", "config_overrides", "'hidden_size': 0", "correct or leave out", hidden_size=0),
    built("no layers", "num_hidden_layers must be at least 1", "got 0", num_hidden_layers=0),
    built("no heads", "config_overrides", "'num_attention_heads': 0", num_attention_heads=0),
    built("an unknown activation", "config_overrides", "'gelo'", "correct or leave out", hidden_act="gelo"),
    built("a negative size", "config_overrides", "'intermediate_size': -3", intermediate_size=-3),
    built("a patch larger than the image", "(3, 16, 16)", "(32 x 32)", "patch_size that belong", patch_size=32),
    built("images of one channel", "(3, 16, 16)", "Expected 1 but got 3", num_channels=1),
    cct("tokenizer must be one of", "'patches'", tokenizer="patches"),
    cct("num_conv_layers must be at least 1", "got 0", num_conv_layers=0),
    cct("pooling_stride must be at least 1", "got 0", pooling_stride=0),
    cct("drop_path_rate must be at least 0 and below 1", "got 2", drop_path_rate=2),
    cct("image_size 32 are too small", tokenizer="patch", patch_size=64),
    cct("hidden_size must be a multiple of num_attention_heads", "15 and 4", hidden_size=15),
]
CHECKPOINTS = [
    Mistake(
        "an output folder with a model", output_with_a_model, ValueError, ("contains a model", "overwrite", "Choose")
    ),
    Mistake("an output folder that is a file", output_file, ValueError, ("is not writable", "it.txt", "choose another")),
    Mistake(
        "an output folder with another run in it",
        lambda bench: bench.train(*DIGITS, *bench.network(), output_dir=bench.trained),
        ValueError,
        ("contains checkpoint-2 of an earlier run", "resume_from_checkpoint=last", "another output_dir"),
    ),
    Mistake(
        "nothing to resume from",
        lambda bench: bench.digits("--resume_from_checkpoint", "last"),
        ValueError,
        ("no complete checkpoint in", "resume_from_checkpoint=auto", "the output_dir of the run"),
    ),
    Mistake(
        "no such checkpoint",
        lambda bench: bench.digits("--resume_from_checkpoint", bench.trained / "checkpoint-9"),
        ValueError,
        ("checkpoint-9 cannot be resumed from", "no such folder", "Resume from", "checkpoint-2"),
    ),
    resumed(
        "another horizontal layer", ["--horizontal_layers", 2, "--vertical_layers", 2], "checkpoint-2 does not match",
        "missing: vit.layers.2.scorenet", "settings that the checkpoint was trained with",
    ),
    resumed(
        "another learning rate", [*MIXING, "--learning_rate", 0.5],
        "`learning_rate` cannot change on resume", "0.5", "model_name_or_path",
    ),
    resumed(
        "other images per step", [*MIXING, "--per_device_train_batch_size", 8],
        "steps of 16 images", "this run has 8", "the same product",
    ),
    resumed("nothing left to train", [*MIXING, "--max_steps", 1], "this run has 1 steps", "Increase num_train_epochs"),
    resumed("without TokenMixup", [], "does not match", "unexpected: vit.layers.1.scorenet", "its config.json"),
    resumed(
        "another vertical layer", ["--horizontal_layers", 1, "--vertical_layers", 1], "does not match",
        "vertical_layers: [2] there, [1] here", "settings that the checkpoint was trained with",
    ),
    resumed("a wider network", MIXING, "does not match", "of another shape: ", network={"intermediate_size": 64}),
    resumed("another optimizer", [*MIXING, "--optim", "sgd"], "another optimizer than optim=sgd", "resume"),
    Mistake(
        "another architecture resumed",
        lambda bench: bench.resume(*RESNET, "--image_size", 16),
        ValueError,
        ("does not match this ResNet", "missing: ", "unexpected: "),
    ),
]  # fmt: skip
