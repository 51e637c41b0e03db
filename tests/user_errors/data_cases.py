"""Mistakes in data sets: folders, columns, splits, labels, images."""

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from user_errors.harness import Bench, Mistake, encoded, picture

from hf_tokenmixup.data import loading

GOOD = [0, 1, 0, 1]


def labels(name: str, values: list, *told: str, kind: object = None, arguments: tuple = ()) -> Mistake:
    def provoke(bench: Bench):
        return bench.on(bench.parquet([picture()] * len(values), values, kind), *arguments)

    return Mistake(name, provoke, ValueError, told)


def image(name: str, content: bytes | None, *told: str) -> Mistake:
    """One image among good ones, decoded when it is put into the cache."""

    def provoke(bench: Bench):
        images = [encoded(picture()), encoded(picture()), content, encoded(picture())]
        return bench.on(bench.parquet(images, GOOD, Value("int64")))

    return Mistake(name, provoke, ValueError, ("Image 2 of split 'train'", *told))


def good(bench: Bench, *arguments: object):
    return bench.on(bench.parquet([picture()] * 4, GOOD), *arguments)


def file_of(name: str, content: str, *told: str) -> Mistake:
    return Mistake(
        f"a data folder with {name}", lambda bench: bench.on(bench.holding(name, content)), ValueError, told
    )


def folders(name: str, train: list[str], validation: list[str] | None, *told: str, count: int = 2) -> Mistake:
    def provoke(bench: Bench):
        arguments = ["--train_dir", bench.class_folders("train", *train, count=count), "--do_train"]
        if validation is not None:
            arguments += ["--validation_dir", bench.class_folders("other", *validation), "--do_eval"]
        return bench.prepare(*arguments, *bench.network())

    return Mistake(name, provoke, ValueError, told)


def on_good(words: str, *told: str) -> Mistake:
    return Mistake(f"data {words}", lambda bench: good(bench, *words.split()), ValueError, told)


def two_splits(name: str, train: list, evaluation: list, *told: str) -> Mistake:
    def provoke(bench: Bench):
        bench.parquet([picture()] * len(evaluation), evaluation, split="test")
        return bench.on(bench.parquet([picture()] * len(train), train), "--do_eval")

    return Mistake(name, provoke, ValueError, told)


def unlike_splits(name: str, train: object, evaluation: object, *told: str) -> Mistake:
    """Splits whose labels have different types, as a data set of the Hub can have them."""

    def provoke(bench: Bench):
        splits = {
            split: Dataset.from_dict(
                {"image": [picture()] * 2, "label": ["a", "b"] if kind == Value("string") else [0, 1]},
                features=Features({"image": ImageFeature(), "label": kind}),
            )
            for split, kind in {"train": train, "test": evaluation}.items()
        }
        bench.monkeypatch.setattr(loading, "load_dataset", lambda *args, **kwargs: DatasetDict(splits))
        return bench.on("somebody/something", "--do_eval")

    return Mistake(name, provoke, ValueError, told)


def too_large(bench: Bench):
    bench.monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    return good(bench)


def no_label_column(bench: Bench):
    return bench.on(bench.parquet([picture()] * 2, None))


def a_csv_file(bench: Bench):
    return bench.on(bench.holding("train.csv", "width,height\n1,2\n"))


def nested(bench: Bench):
    train = bench.class_folders("train", "a", "b", "held out/a", "held out/b")
    return bench.prepare("--train_dir", train, "--validation_dir", train / "held out", "--do_train", "--do_eval",
                         *bench.network())  # fmt: skip


def empty_files(bench: Bench):
    train = bench.class_folders("train", "a", "b")
    for name in ("a/0.png", "b/1.png"):
        (train / name).write_bytes(b"")
    return bench.prepare("--train_dir", train, "--do_train", *bench.network())


def lost_paths(bench: Bench):
    table = bench.holding("train.csv", "path,label\na.png,cat\nb.png,dog\n")
    return bench.on(table, "--image_column_name", "path")


def only_validation(bench: Bench):
    return bench.prepare("--validation_dir", bench.class_folders("other", "a", "b"), "--do_train", *bench.network())


def output_inside(name: str):
    """The start of a run that writes into its own data."""

    def provoke(bench: Bench):
        data = (
            bench.class_folders("train", "a", "b") if name == "--train_dir" else bench.parquet([picture()] * 2, [0, 1])
        )
        return bench.prepare(name, data, "--do_train", *bench.network(), output_dir=data / "out")

    return provoke


def empty_stream(bench: Bench):
    kind = ClassLabel(names=["a", "b"])
    bench.parquet([], [], kind, split="test")
    data = bench.parquet([picture()] * 2, [0, 1], kind)
    return bench.on(data, "--streaming", "--do_eval", "--max_steps", 2)


def a_file_for_a_folder(bench: Bench):
    return bench.prepare("--train_dir", bench.holding("a.txt", "x") / "a.txt", "--do_train", *bench.network())


DATA = [
    labels("a label of -1", [0, 1, -1, 0], "label -1 at index 2", "expected 0 to 1", "choose another split"),
    labels("a label of None", [0, 1, None, 0], "no label at index 2", "None", "label_column_name"),
    labels("a blank label", ["a", "b", " "], "no label at index 2", "(' ')", "Remove the rows"),
    labels("a label that is an identifier", [0, 1, 2**40, 0], str(2**40), "0 to 999999", "label_column_name"),
    labels("labels in floating point", [0.0, 0.5], "ClassLabel, integer or string", "float64", "label_column_name"),
    labels("lists of labels", [[0], [1]], "ClassLabel, integer or string", "List", "label_column_name"),
    labels("true and false as labels", [True, False], "ClassLabel, integer or string", "bool", "label_column_name"),
    labels("one class", [0, 0], "at least two classes", "1: ['0']", "label_column_name"),
    labels("no row", [], "no images in", "data", "at least one row", kind=ClassLabel(names=["a", "b"])),
    two_splits("strings that were not trained", ["a", "b"], ["a", "c"], "'c' at index 1", "2 classes", "'a', 'b'"),
    two_splits("files that do not go together", [0, 1], ["a", "b"], "cannot be read", "Failed to parse string"),
    unlike_splits(
        "splits of different classes",
        ClassLabel(names=["a", "b"]),
        ClassLabel(names=["b", "a"]),
        "must share the label names",
        "['a', 'b'] and ['b', 'a']",
        "same order",
    ),
    unlike_splits(
        "labels of two types", Value("int64"), Value("string"), "one type in all splits", "'integer'", "'string'"
    ),
    Mistake("no label column", no_label_column, ValueError, ("one label column", "'image' (Image)", "label_column")),
    Mistake("no image column", a_csv_file, ValueError, ("one image column", "'width' (int64)", "image_column_name")),
    on_good("--label_column_name lable", "no column 'lable'", "'label' (int64)", "label_column_name"),
    on_good("--image_column_name img", "no column 'img'", "'image' (Image)", "image_column_name"),
    on_good("--image_column_name label", "'label' of split 'train' has no images", "image_column_name"),
    on_good("--label_column_name image", "ClassLabel, integer or string", "Image", "label_column_name"),
    on_good("--train_split tran", "no split 'tran'", "['train']", "train_split"),
    on_good("--do_eval --eval_split tset", "no split 'tset'", "['train']", "eval_split"),
    on_good("--do_eval --train_val_split 1", "above 0 and below 1", "1.0"),
    on_good("--do_eval --train_val_split 0.9", "Cannot use 4 of 4 training images for evaluation", "eval_split"),
    on_good("--max_train_samples 0", "max_train_samples must be at least 1 (or None", "got 0"),
    on_good("--do_eval --max_eval_samples -1", "max_eval_samples must be at least 1", "got -1"),
    on_good("--train_dir nowhere", "either `dataset_name` or image folders", "'nowhere'"),
    Mistake(
        "strings in the column of the images",
        lambda bench: bench.on(
            bench.parquet([picture()] * 2, ["a", "b"]), "--image_column_name", "label", "--label_column_name", "label"
        ),
        ValueError,
        ("'label' cannot contain both images and labels", "image_column_name"),
    ),
    Mistake(
        "no data set",
        lambda bench: bench.prepare("--do_train", *bench.network()),
        ValueError,
        ("either `dataset_name` or image folders", "digits"),
    ),
    Mistake(
        "a misspelt data set",
        lambda bench: bench.on("digit"),
        ValueError,
        ("Dataset 'digit' not found", "'digits', a dataset of the Hub", "local folder"),
    ),
    Mistake(
        "a configuration of the digits",
        lambda bench: bench.digits("--dataset_config_name", "small"),
        ValueError,
        ("no configurations", "small", "Remove"),
    ),
    file_of("nothing to open", "", "not found", "holding", "local folder with data files"),
    file_of("train.parquet", "no parquet", "holding", "cannot be read", "Parquet", "download or create it again"),
    folders(
        "a folder without class folders", ["."], None, "2 images ('0.png', '1.png')", "no class folders", "per class"
    ),
    folders("a folder of one class", ["a"], None, "one class folder", "'a'", "at least two classes", "subfolder"),
    folders("an empty folder", [], None, "no images in", "one subfolder of images per class", "metadata.csv"),
    folders(
        "empty class folders", ["a", "b"], None, "no images in", "folders without images (2: 'a/', 'b/')", count=0
    ),
    folders("other class folders to evaluate on", ["a", "b"], ["a", "c"], "validation_dir", "'c'", "the same"),
    folders("classes in other case", ["a", "b"], ["A", "b"], "'A'", "Written differently: 'A' and 'a'", "the same"),
    folders("a folder one level too high", ["train/a", "train/b", "Val/a"], None, "too high", "train'", "Val'"),
    folders("splits inside classes", ["a/train", "a/test", "b/train"], None, "'a'", "('test', 'train')", "train/a"),
    Mistake(
        "validation images to train on", only_validation, ValueError, ("no images to train on", "Pass `train_dir`")
    ),
    Mistake(
        "an output folder among the classes", output_inside("--train_dir"), ValueError, ("inside the data", "train")
    ),
    Mistake(
        "an output folder in a dataset", output_inside("--dataset_name"), ValueError, ("inside the data", "outside")
    ),
    Mistake("an empty split of a stream", empty_stream, ValueError, ("Split 'test'", "no images", "eval_split")),
    Mistake("a file for --train_dir", a_file_for_a_folder, ValueError, ("train_dir must be a folder", "a.txt")),
    Mistake(
        "an evaluation folder inside the training folder", nested, ValueError, ("is inside", "next to each other")
    ),
    Mistake(
        "files of zero bytes", empty_files, ValueError, ("2 image files of 0 bytes", "'a/0.png', 'b/1.png'", "delete")
    ),
    Mistake(
        "image paths that lead nowhere", lost_paths, ValueError, ("'path'", "do not exist", "'a.png'", "absolute")
    ),
]
IMAGES = [
    image("no image", None, "None", "remove the row"),
    image("an empty file", b"", "empty or no image", "Repair the file or remove the row"),
    image("a file that is no image", b"something else", "cannot identify", "Repair the file or remove the row"),
    image("a truncated image", encoded(picture(size=(64, 64)), "BMP")[:500], "truncated", "Repair the file"),
    image("an image of zero size", b"P6 0 16 255\n", "cannot be decoded", "Repair the file or remove the row"),
    Mistake("a huge image", too_large, ValueError, ("256 pixels", "exceeds limit", "Downscale")),
]
