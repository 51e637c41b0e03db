"""User errors of datasets: folders, columns, splits, labels and images."""

from collections.abc import Callable

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from user_errors.harness import ErrorCase, Harness, encode_image, solid_image

from hf_tokenmixup.data import loading

VALID_LABELS = [0, 1, 0, 1]


def train_valid_data(harness: Harness, *flags: object):
    return harness.prepare_data(harness.write_parquet([solid_image()] * 4, VALID_LABELS), *flags)


def dataset_flags(name: str, flags: str, *fragments: str) -> ErrorCase:
    """Train on valid data with these flags."""
    return ErrorCase(name, lambda harness: train_valid_data(harness, *flags.split()), ValueError, fragments)


def labels(name: str, values: list, *fragments: str, label_type: object = None) -> ErrorCase:
    """Train on images with these labels."""

    def trigger(harness: Harness):
        return harness.prepare_data(harness.write_parquet([solid_image()] * len(values), values, label_type))

    return ErrorCase(name, trigger, ValueError, fragments)


def image(name: str, content: bytes | None, *fragments: str) -> ErrorCase:
    """Train with one invalid image among valid ones. The image cache decodes all of them."""

    def trigger(harness: Harness):
        valid = encode_image(solid_image())
        return harness.prepare_data(
            harness.write_parquet([valid, valid, content, valid], VALID_LABELS, Value("int64"))
        )

    return ErrorCase(name, trigger, ValueError, ("Image 2 of split 'train'", *fragments))


def data_file(name: str, file_name: str, content: str, *fragments: str) -> ErrorCase:
    """Train on a folder with one data file."""
    return ErrorCase(
        name, lambda harness: harness.prepare_data(harness.write_folder(file_name, content)), ValueError, fragments
    )


def class_folders(
    name: str, train: list[str], validation: list[str] | None, *fragments: str, count: int = 2
) -> ErrorCase:
    """Train on a folder with these subfolders of `count` images, and evaluate on another one."""

    def trigger(harness: Harness):
        flags = ["--train_dir", harness.write_class_folders("train", *train, count=count), "--do_train"]
        if validation is not None:
            flags += ["--validation_dir", harness.write_class_folders("other", *validation), "--do_eval"]
        return harness.prepare(*flags, *harness.vit_flags())

    return ErrorCase(name, trigger, ValueError, fragments)


def split_labels(name: str, train: list, evaluation: list, *fragments: str) -> ErrorCase:
    """Train and evaluate on parquet files with these labels."""

    def trigger(harness: Harness):
        harness.write_parquet([solid_image()] * len(evaluation), evaluation, split="test")
        return harness.prepare_data(harness.write_parquet([solid_image()] * len(train), train), "--do_eval")

    return ErrorCase(name, trigger, ValueError, fragments)


def split_label_types(name: str, train: object, evaluation: object, *fragments: str) -> ErrorCase:
    """Train and evaluate on splits whose labels have these types, as a dataset on the Hub can have them."""

    def trigger(harness: Harness):
        splits = {
            split: Dataset.from_dict(
                {"image": [solid_image()] * 2, "label": ["a", "b"] if label_type == Value("string") else [0, 1]},
                features=Features({"image": ImageFeature(), "label": label_type}),
            )
            for split, label_type in {"train": train, "test": evaluation}.items()
        }
        harness.monkeypatch.setattr(loading, "load_dataset", lambda *args, **kwargs: DatasetDict(splits))
        return harness.prepare_data("somebody/something", "--do_eval")

    return ErrorCase(name, trigger, ValueError, fragments)


def case(name: str, trigger: Callable[[Harness], object], *fragments: str) -> ErrorCase:
    return ErrorCase(name, trigger, ValueError, fragments)


def train_on_huge_images(harness: Harness):
    harness.monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    return train_valid_data(harness)


def train_without_labels(harness: Harness):
    return harness.prepare_data(harness.write_parquet([solid_image()] * 2, None))


def train_without_images(harness: Harness):
    return harness.prepare_data(harness.write_folder("train.csv", "width,height\n1,2\n"))


def train_on_one_column_for_images_and_labels(harness: Harness):
    data = harness.write_parquet([solid_image()] * 2, ["a", "b"])
    return harness.prepare_data(data, "--image_column_name", "label", "--label_column_name", "label")


def train_without_dataset(harness: Harness):
    return harness.prepare("--do_train", *harness.vit_flags())


def validate_inside_train_dir(harness: Harness):
    train = harness.write_class_folders("train", "a", "b", "validation/a", "validation/b")
    flags = ["--train_dir", train, "--validation_dir", train / "validation", "--do_train", "--do_eval"]
    return harness.prepare(*flags, *harness.vit_flags())


def train_on_empty_files(harness: Harness):
    train = harness.write_class_folders("train", "a", "b")
    for name in ("a/0.png", "b/1.png"):
        (train / name).write_bytes(b"")
    return harness.prepare("--train_dir", train, "--do_train", *harness.vit_flags())


def train_on_paths_without_files(harness: Harness):
    table = harness.write_folder("train.csv", "path,label\na.png,cat\nb.png,dog\n")
    return harness.prepare_data(table, "--image_column_name", "path")


def train_on_file(harness: Harness):
    path = harness.write_folder("a.txt", "x") / "a.txt"
    return harness.prepare("--train_dir", path, "--do_train", *harness.vit_flags())


def train_without_train_dir(harness: Harness):
    validation = harness.write_class_folders("other", "a", "b")
    return harness.prepare("--validation_dir", validation, "--do_train", *harness.vit_flags())


def write_output_into_train_dir(harness: Harness):
    data = harness.write_class_folders("train", "a", "b")
    return harness.prepare("--train_dir", data, "--do_train", *harness.vit_flags(), output_dir=data / "out")


def write_output_into_dataset(harness: Harness):
    data = harness.write_parquet([solid_image()] * 2, [0, 1])
    return harness.prepare("--dataset_name", data, "--do_train", *harness.vit_flags(), output_dir=data / "out")


def evaluate_empty_stream(harness: Harness):
    label_type = ClassLabel(names=["a", "b"])
    harness.write_parquet([], [], label_type, split="test")
    data = harness.write_parquet([solid_image()] * 2, [0, 1], label_type)
    return harness.prepare_data(data, "--streaming", "--do_eval", "--max_steps", 2)


DATA_CASES = [
    labels("label -1", [0, 1, -1, 0], "label -1 at index 2", "expected 0 to 1", "choose another split"),
    labels("label None", [0, 1, None, 0], "no label at index 2", "None", "label_column_name"),
    labels("label that is blank", ["a", "b", " "], "no label at index 2", "(' ')", "Remove the rows"),
    labels("label that is an identifier", [0, 1, 2**40, 0], str(2**40), "0 to 999999", "label_column_name"),
    labels("labels of type float", [0.0, 0.5], "ClassLabel, integer or string", "float64", "label_column_name"),
    labels("labels that are lists", [[0], [1]], "ClassLabel, integer or string", "List", "label_column_name"),
    labels("labels of type bool", [True, False], "ClassLabel, integer or string", "bool", "label_column_name"),
    labels("one class", [0, 0], "at least two classes", "1: ['0']", "label_column_name"),
    labels("no rows", [], "no images in", "data", "at least one row", label_type=ClassLabel(names=["a", "b"])),
    split_labels(
        "label of the evaluation split that is not in the training split", ["a", "b"], ["a", "c"],
        "'c' at index 1", "2 classes", "'a', 'b'",
    ),
    split_labels(
        "parquet files with labels of two types", [0, 1], ["a", "b"], "cannot be read", "Failed to parse string"
    ),
    split_label_types(
        "splits with another order of the classes",
        ClassLabel(names=["a", "b"]),
        ClassLabel(names=["b", "a"]),
        "must share the label names",
        "['a', 'b'] and ['b', 'a']",
        "same order",
    ),
    split_label_types(
        "splits with labels of two types", Value("int64"), Value("string"),
        "one type in all splits", "'integer'", "'string'",
    ),
    case("no label column", train_without_labels, "one label column", "'image' (Image)", "label_column"),
    case("no image column", train_without_images, "one image column", "'width' (int64)", "image_column_name"),
    dataset_flags(
        "label_column_name that does not exist", "--label_column_name lable",
        "no column 'lable'", "'label' (int64)", "label_column_name",
    ),
    dataset_flags(
        "image_column_name that does not exist", "--image_column_name img",
        "no column 'img'", "'image' (Image)", "image_column_name",
    ),
    dataset_flags(
        "image_column_name of the labels", "--image_column_name label",
        "'label' of split 'train' has no images", "image_column_name",
    ),
    dataset_flags(
        "label_column_name of the images", "--label_column_name image",
        "ClassLabel, integer or string", "Image", "label_column_name",
    ),
    dataset_flags(
        "train_split that does not exist", "--train_split tran", "no split 'tran'", "['train']", "train_split"
    ),
    dataset_flags(
        "eval_split that does not exist", "--do_eval --eval_split tset",
        "no split 'tset'", "['train']", "eval_split",
    ),
    dataset_flags("train_val_split of 1", "--do_eval --train_val_split 1", "above 0 and below 1", "1.0"),
    dataset_flags(
        "train_val_split that leaves no training image", "--do_eval --train_val_split 0.9",
        "Cannot use 4 of 4 training images for evaluation", "eval_split",
    ),
    dataset_flags(
        "max_train_samples of 0", "--max_train_samples 0",
        "max_train_samples must be at least 1 (or None", "got 0",
    ),
    dataset_flags("class that does not exist", "--classes 0 33", "`classes` has '33'", "Its 2 classes are"),
    dataset_flags(
        "negative max_eval_samples", "--do_eval --max_eval_samples -1", "max_eval_samples must be at least 1", "got -1"
    ),
    dataset_flags(
        "dataset_name together with train_dir", "--train_dir nowhere",
        "either `dataset_name` or image folders", "'nowhere'",
    ),
    case(
        "one column for images and labels", train_on_one_column_for_images_and_labels,
        "'label' cannot contain both images and labels", "image_column_name",
    ),
    case("no dataset", train_without_dataset, "either `dataset_name` or image folders", "digits"),
    case(
        "misspelled dataset_name", lambda harness: harness.prepare_data("digit"),
        "Dataset 'digit' not found", "'digits', a dataset of the Hub", "local folder",
    ),
    case(
        "dataset_config_name for the digits",
        lambda harness: harness.prepare_digits("--dataset_config_name", "small"),
        "no configurations", "small", "Remove",
    ),
    data_file(
        "folder without a data file", "notes", "", "not found", "one_file", "local folder with data files"
    ),
    data_file(
        "text file with the name of a parquet file", "train.parquet", "no parquet",
        "one_file", "cannot be read", "Parquet", "download or create it again",
    ),
    class_folders(
        "folder without class folders", ["."], None, "2 images ('0.png', '1.png')", "no class folders", "per class"
    ),
    class_folders(
        "folder with one class folder", ["a"], None, "one class folder", "'a'", "at least two classes", "subfolder"
    ),
    class_folders(
        "empty folder", [], None, "no images in", "one subfolder of images per class", "metadata.csv"
    ),
    class_folders(
        "empty class folders", ["a", "b"], None, "no images in", "folders without images (2: 'a/', 'b/')", count=0
    ),
    class_folders(
        "validation_dir with other class folders", ["a", "b"], ["a", "c"], "validation_dir", "'c'", "the same"
    ),
    class_folders(
        "class folders that differ in upper and lower case", ["a", "b"], ["A", "b"],
        "'A'", "Written differently: 'A' and 'a'", "the same",
    ),
    class_folders(
        "train_dir one level too high", ["train/a", "train/b", "Val/a"], None, "too high", "train'", "Val'"
    ),
    class_folders(
        "splits inside class folders", ["a/train", "a/test", "b/train"], None, "'a'", "('test', 'train')", "train/a"
    ),
    case("train_dir that is a file", train_on_file, "train_dir must be a folder", "a.txt"),
    case("validation_dir inside train_dir", validate_inside_train_dir, "is inside", "next to each other"),
    case("validation_dir without train_dir", train_without_train_dir, "no images to train on", "Pass `train_dir`"),
    case("output_dir inside train_dir", write_output_into_train_dir, "inside the data", "train"),
    case("output_dir inside the folder of a dataset", write_output_into_dataset, "inside the data", "outside"),
    case("streamed split without images", evaluate_empty_stream, "Split 'test'", "no images", "eval_split"),
    case(
        "image files of 0 bytes", train_on_empty_files,
        "2 image files of 0 bytes", "'a/0.png', 'b/1.png'", "delete",
    ),
    case(
        "image paths without a file", train_on_paths_without_files, "'path'", "do not exist", "'a.png'", "absolute"
    ),
]  # fmt: skip
IMAGE_CASES = [
    image("image None", None, "None", "remove the row"),
    image("empty image file", b"", "empty or no image", "Repair the file or remove the row"),
    image("text instead of an image", b"something else", "cannot identify", "Repair the file or remove the row"),
    image(
        "truncated image", encode_image(solid_image(size=(64, 64)), "BMP")[:500], "truncated", "Repair the file"
    ),
    image("image of width 0", b"P6 0 16 255\n", "cannot be decoded", "Repair the file or remove the row"),
    case("image with too many pixels", train_on_huge_images, "256 pixels", "exceeds limit", "Downscale"),
]  # fmt: skip
