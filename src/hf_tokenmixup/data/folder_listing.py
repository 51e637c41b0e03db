"""Listing of an image folder: its classes, their images, and validation of the class folders."""

import functools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..utils.class_names import normalize_class_name
from ..utils.text import format_list
from .ignored_files import SYSTEM_FILES, IgnoreReason, describe_ignored, is_hidden_folder

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_COLUMN = "file_name"
TABLE_EXTENSIONS = frozenset({".csv", ".tsv", ".json", ".jsonl"})
# Formats that Pillow only identifies, or decodes with another program.
UNREADABLE_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
# Digits and words after the name of a split: train2017, val_images, test-set.
SPLIT_SUFFIX = r"[\s_-]*(\d*|set|data|split|images|imgs|folder)"
SPLIT_PATTERNS = {
    "train": re.compile(rf"(train|training){SPLIT_SUFFIX}", re.IGNORECASE),
    "validation": re.compile(rf"(val|valid|validation|dev){SPLIT_SUFFIX}", re.IGNORECASE),
    "test": re.compile(rf"(test|testing|eval|evaluation){SPLIT_SUFFIX}", re.IGNORECASE),
}

ImageFile = tuple[str, int]


@dataclass
class FolderListing:
    """Content of an image folder.

    Args:
        source: parameter and folder, for messages.
        root: absolute path of the folder.
        classes: images of each first-level folder, sorted: path relative to `root` (with `/`) and size in bytes.
        loose: images in `root` itself.
        files: names of the other files in `root` itself.
        ignored: relative paths of ignored files and folders, by reason.
    """

    source: str
    root: str
    classes: dict[str, list[ImageFile]] = field(default_factory=dict)
    loose: list[ImageFile] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    ignored: dict[IgnoreReason, list[str]] = field(default_factory=lambda: defaultdict(list))

    def count_nested_images(self) -> Counter[str]:
        """Count the images of each folder inside class folders."""
        return Counter(
            path.rpartition("/")[0] for images in self.classes.values() for path, _ in images if path.count("/") > 1
        )


@functools.cache
def image_extensions() -> frozenset[str]:
    """Lower-case extensions, with the dot, of files that Pillow opens."""
    extensions = Image.registered_extensions()
    return frozenset(
        extension
        for extension, format in extensions.items()
        if format in Image.OPEN and format not in UNREADABLE_FORMATS
    )


def list_images(folder: str, parameter: str) -> FolderListing:
    """List the images of a folder by first-level folder.

    Args:
        folder: path of the folder.
        parameter: name of the parameter with the folder (`train_dir`), for messages.

    Raises:
        ValueError: if the folder does not exist or cannot be read, or if first-level folders have invalid names or are
            the same folder.
    """
    if not os.path.isdir(folder):
        raise ValueError(
            f"{parameter} must be a folder with one subfolder of images per class, but {folder!r} is no folder."
        )
    root = os.path.abspath(folder)
    listing = FolderListing(f"{parameter} {folder!r}", root)
    _validate_utf8(root, listing)
    listing.loose, entries = _split_entries(root, "", listing)
    # A link to a parent folder or to another class would add images with a wrong label.
    parents = {_identity(root), *(_identity(str(parent)) for parent in Path(os.path.realpath(root)).parents)}
    first_level: dict[tuple[int, int], str] = {}
    for entry in entries:
        identity = _identity(entry.path)
        if identity in parents:
            listing.ignored[IgnoreReason.LINK_TO_PARENT].append(entry.name)
        elif identity in first_level:
            raise ValueError(
                f"Class folders {first_level[identity]!r} and {entry.name!r} of {listing.source} are the same folder, "
                "so each image would have two labels. Remove one of the links."
            )
        else:
            first_level[identity] = entry.name
    excluded = parents | first_level.keys()
    for name in sorted(first_level.values()):
        _validate_utf8(name, listing)
        images = sorted(_images_below(os.path.join(root, name), name, listing, excluded))
        if not images:
            listing.ignored[IgnoreReason.EMPTY_FOLDER].append(name + "/")
            continue
        # macOS stores accents as separate characters. Normalization makes class names equal on all systems.
        label = unicodedata.normalize("NFC", name)
        if label in listing.classes:
            raise ValueError(
                f"Two class folders of {listing.source} have the name {label!r}, in different Unicode forms. Move "
                "their images to one folder."
            )
        listing.classes[label] = images
    return listing


def _images_below(path: str, name: str, listing: FolderListing, excluded: Set[tuple[int, int]]) -> Iterator[ImageFile]:
    """Yield the images of a class folder and its subfolders. Each folder is read once; excluded ones are skipped."""
    seen = {_identity(path)}
    pending = [(path, name + "/")]
    while pending:
        path, prefix = pending.pop()
        images, folders = _split_entries(path, prefix, listing)
        yield from images
        for entry in folders:
            identity = _identity(entry.path)
            if identity in seen or identity in excluded:
                listing.ignored[IgnoreReason.LINK_TO_KNOWN_FOLDER].append(f"{prefix}{entry.name}")
            else:
                seen.add(identity)
                pending.append((entry.path, f"{prefix}{entry.name}/"))


def _split_entries(path: str, prefix: str, listing: FolderListing) -> tuple[list[ImageFile], list[os.DirEntry]]:
    """Return the images and subfolders of one folder. All other entries are added to `listing`."""
    try:
        with os.scandir(path) as found:
            # Links come last, so that a folder is read by its own name first.
            entries = sorted(found, key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        raise ValueError(f"Folder {path!r} of {listing.source} cannot be read: {error.strerror}.") from error
    images, folders, extensions, ignored = [], [], image_extensions(), listing.ignored
    for entry in entries:
        name = entry.name
        relative = prefix + name
        is_folder, is_file = _get_entry_type(entry)
        if is_folder:
            if is_hidden_folder(name):
                ignored[IgnoreReason.HIDDEN_FOLDER].append(relative + "/")
            else:
                folders.append(entry)
        elif name.lower() in SYSTEM_FILES:
            continue
        elif not is_file:
            ignored[IgnoreReason.BROKEN_LINK].append(relative)
        elif name.startswith("."):
            ignored[IgnoreReason.HIDDEN_FILE].append(relative)
        elif os.path.splitext(name)[1].lower() not in extensions:
            if prefix:
                ignored[IgnoreReason.NO_IMAGE_EXTENSION].append(relative)
            else:
                listing.files.append(name)
        elif not _is_utf8(relative):
            ignored[IgnoreReason.NAME_NOT_UTF8].append(relative)
        else:
            images.append((relative, entry.stat().st_size))
    return images, folders


def _get_entry_type(entry: os.DirEntry) -> tuple[bool, bool]:
    """Return whether an entry is a folder, and whether it is a file. A link to itself is neither."""
    try:
        is_folder = entry.is_dir()
        return is_folder, not is_folder and entry.is_file()
    except OSError:
        return False, False


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_utf8(name: str) -> bool:
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _validate_utf8(name: str, listing: FolderListing) -> None:
    if not _is_utf8(name):
        raise ValueError(f"The folder name {name!r} of {listing.source} is not valid UTF-8. Rename the folder.")


def iterate_files_by_folder(folder: str, depth: int = 5) -> Iterator[list[str]]:
    """Yield the names of the files of each folder, level by level, without hidden folders."""
    level = [folder]
    while level and (depth := depth - 1) >= 0:
        next_level = []
        for path in level:
            try:
                with os.scandir(path) as found:
                    entries = sorted(
                        (entry for entry in found if not is_hidden_folder(entry.name)), key=lambda e: e.name
                    )
            except OSError:
                continue
            yield [entry.name for entry in entries if _get_entry_type(entry)[1]]
            next_level += [entry.path for entry in entries if _get_entry_type(entry)[0]]
        level = next_level


def match_split_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names that are names of splits, by split: `{"train": ["train2017"], "validation": ["val2017"]}`."""
    names = list(names)
    splits = {split: [name for name in names if pattern.fullmatch(name)] for split, pattern in SPLIT_PATTERNS.items()}
    return {split: found for split, found in splits.items() if found}


def validate_classes(listing: FolderListing, parameter: str, min_classes: int) -> None:
    """Validate the class folders of a folder.

    Args:
        listing: content of the folder.
        parameter: name of the parameter with the folder, for messages.
        min_classes: minimum number of classes.

    Raises:
        ValueError: if there are no images, too few class folders, or splits instead of classes.
    """
    source, names = listing.source, sorted(listing.classes)
    tables = [name for name in listing.files if os.path.splitext(name)[1].lower() in TABLE_EXTENSIONS]
    hint = (
        f"Expected one subfolder of images per class, or a metadata.csv with the columns '{FILE_COLUMN}' and 'label'."
    )
    also = ""
    if tables and parameter == "dataset_name":
        also = f" To read the images that {format_list(tables)} lists, set `image_column_name` to its path column."
    elif tables:
        also = f" Found the table {format_list(tables)}."
    if not names and not listing.loose:
        ignored = describe_ignored(listing.ignored, listing.files)
        raise ValueError(f"There are no images in {source}. {hint}" + (f" Found {ignored}." if ignored else ""))
    if not names:
        raise ValueError(
            f"{source} has {len(listing.loose)} images ({format_list(path for path, _ in listing.loose)}) and no "
            f"class folders. {hint}{also}"
        )
    _validate_no_splits(listing)
    if len(names) < min_classes:
        inner_names = sorted({path.split("/")[1] for path in listing.count_nested_images()})
        inner = os.path.join(listing.root, names[0])
        if inner_names and not tables:
            also = f" If its subfolders {format_list(inner_names)} are the classes, pass {parameter}={inner!r}."
        raise ValueError(
            f"{source} has one class folder with images, {names[0]!r}, but training needs at least two classes. "
            f"Expected one subfolder of images per class.{also}"
        )


def _validate_no_splits(listing: FolderListing) -> None:
    """Validate that neither the first-level folders nor the folders inside a class are splits.

    Raises:
        ValueError: if they are. A folder of splits is one level too high.
    """
    names = sorted(listing.classes)
    nested = {path.split("/")[0] for path in listing.count_nested_images()}
    splits = match_split_names(names)
    split_names = {name for found in splits.values() for name in found}
    has_several = "train" in splits and len(splits) > 1
    only_splits = len(split_names) == len(names)
    splits_have_classes = all(any(name in nested for name in found) for found in splits.values())
    if splits and (has_several and (only_splits or splits_have_classes) or only_splits and split_names <= nested):
        evaluation = splits.get("validation") or splits.get("test")
        chosen = {"train_dir": splits.get("train"), "validation_dir": evaluation}
        advice = " and ".join(
            f"{name}={os.path.join(listing.root, found[0])!r}" for name, found in chosen.items() if found
        )
        raise ValueError(
            f"{listing.source} is one level too high: its subfolders are splits ({format_list(sorted(split_names))}), "
            f"not classes. Pass {advice}."
        )
    for name, images in listing.classes.items():
        inside = match_split_names({path.split("/")[1] for path, _ in images if path.count("/") > 1})
        if "train" in inside and len(inside) > 1:
            found = sorted(name for names in inside.values() for name in names)
            raise ValueError(
                f"Class folder {name!r} of {listing.source} contains splits ({format_list(found)}), which would be "
                f"combined. Move them to train/{name} and validation/{name}, and pass the folders train and "
                "validation as `train_dir` and `validation_dir`."
            )


def validate_eval_classes(train: FolderListing, other: FolderListing) -> None:
    """Validate that all classes of a split have training images.

    Args:
        train: content of the training folder.
        other: content of the folder of the other split.

    Raises:
        ValueError: if `other` has a class folder that `train` does not have.
    """
    unknown = sorted(set(other.classes) - set(train.classes))
    if not unknown:
        return
    known = {normalize_class_name(name): name for name in train.classes}
    pairs = [(name, known.get(normalize_class_name(name))) for name in unknown]
    similar = [f"{name!r} and {train_name!r}" for name, train_name in pairs if train_name is not None]
    also = f" Written differently: {format_list(similar, formatter=str)}." if similar else ""
    raise ValueError(
        f"{other.source} has classes that {train.source} has no images of: {format_list(unknown)}.{also} Use the same "
        "subfolders in both."
    )
