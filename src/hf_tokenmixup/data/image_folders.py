"""From folders of images to splits: the folders of the first level are the classes.

`load_dataset("imagefolder")` takes the innermost folder for the class, ignores links to folders and names with a
leading underscore, and drops all labels where two files are at different depths. So the files are listed here. Their
paths and labels alone are stored, in an Arrow file in the cache, which DataLoader workers open by its name.
"""

import functools
import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, config
from datasets import Image as ImageFeature
from PIL import Image

from .columns import LABEL_COLUMNS

logger = logging.getLogger(__name__)

SHOWN = 5
ROWS_AT_ONCE = 100_000
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_COLUMN = "file_name"
# Files that contain many images, or a dataset's own format, and tables that may describe image files.
DATASET_ENDINGS = frozenset({".parquet", ".arrow", ".tar", ".zip", ".gz", ".h5", ".hdf5", ".lance"})
TABLE_ENDINGS = frozenset({".csv", ".tsv", ".json", ".jsonl"})
# Written by operating systems: files that nobody misses, and folders that are no classes.
SYSTEM_FILES = frozenset({".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
SYSTEM_FOLDERS = frozenset({"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"})
# Formats that Pillow recognizes without decoding them, or decodes with another program.
UNREADABLE_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
# Numbers and words that follow the name of a split, as in train2017, val_images, test-set.
SUFFIX = r"[\s_-]*(\d*|set|data|split|images|imgs|folder)"
SPLIT_NAMES = {
    "train": re.compile(rf"(train|training){SUFFIX}", re.IGNORECASE),
    "validation": re.compile(rf"(val|valid|validation|dev){SUFFIX}", re.IGNORECASE),
    "test": re.compile(rf"(test|testing|eval|evaluation){SUFFIX}", re.IGNORECASE),
}

ImageFile = tuple[str, int]


@dataclass
class FolderListing:
    """What is in a folder of images.

    Args:
        source: parameter and folder, for messages.
        root: the folder, absolute.
        classes: by first-level folder, path relative to `root` (with `/`) and size in bytes of each image, sorted.
        loose: the images that are in `root` itself.
        files: names of the other files in `root` itself.
        ignored: relative paths that are ignored, by reason.
    """

    source: str
    root: str
    classes: dict[str, list[ImageFile]] = field(default_factory=dict)
    loose: list[ImageFile] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def deeper_folders(self) -> Counter[str]:
        """Number of images by folder, for the folders inside class folders."""
        return Counter(path.rpartition("/")[0] for images in self.classes.values() for path, _ in images
                       if path.count("/") > 1)  # fmt: skip


@functools.cache
def image_endings() -> frozenset[str]:
    """The endings of files that Pillow opens, lower-case with the dot."""
    formats = Image.registered_extensions()
    return frozenset(
        ending for ending, kind in formats.items() if kind in Image.OPEN and kind not in UNREADABLE_FORMATS
    )


def find_image_folders(folder: str) -> dict[str, tuple[str, str]] | None:
    """The splits of a local folder given as `dataset_name`, as `load_image_folders` takes them.

    Returns:
        None where the folder has data files (parquet, say), which `load_dataset` opens. Otherwise its subfolders
        `train`, `validation` and `test` (or names like these), or the folder itself as `train`.
    """
    if not os.path.isdir(folder):
        return None
    endings: Counter[str] = Counter()
    for files in _files_by_folder(folder):
        endings.update(os.path.splitext(name)[1].lower() for name in files if name not in METADATA_FILES)
        if endings.total() > 200:
            break
    images, tables = (sum(endings[e] for e in known) for known in (image_endings(), TABLE_ENDINGS))
    if any(endings[ending] for ending in DATASET_ENDINGS) or images <= tables:
        return None
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not _is_hidden(entry.name))
    splits = _splits_among(names)
    if splits and (len(splits) > 1 and "train" in splits or len(names) == sum(map(len, splits.values()))):
        return {split: ("dataset_name", os.path.join(folder, found[0])) for split, found in splits.items()}
    return {"train": ("dataset_name", folder)}


def find_tables(folder: str) -> dict[str, str]:
    """The tables (csv, json) by split that describe the images of a local folder: `train.csv`, or a single one."""
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        tables = sorted(name for name in names if os.path.splitext(name)[1].lower() in TABLE_ENDINGS)
        splits = _splits_among(os.path.splitext(name)[0] for name in tables)
        if splits:
            stems = {os.path.splitext(name)[0]: name for name in tables}
            return {split: os.path.join(path, stems[found[0]]) for split, found in splits.items()}
        if len(tables) == 1:
            return {"train": os.path.join(path, tables[0])}
    return {}


def load_image_folders(
    folders: Mapping[str, tuple[str, str]],
    *,
    label_column: str | None = None,
    cache_dir: str | None = None,
    training: bool = True,
    required: bool = True,
) -> DatasetDict:
    """Splits from folders with one subfolder per class, or with a metadata file that has the labels.

    Images in deeper folders belong to the class of the first-level folder. Links to folders and to files are
    followed. What is ignored is logged as one warning per folder.

    Args:
        folders: by split, the name of the parameter it came from and the folder.
        label_column: column of a metadata file. A metadata file that has it is preferred to class folders.
        cache_dir: where the lists of files are written; default: that of `datasets`.
        training: whether the split `train` is trained on. It then needs at least two classes, and all of those that
            the other splits have.
        required: whether all splits must be there. Otherwise those after the first that cannot be used are skipped
            with a warning (a test split without labels, say).

    Returns:
        For each split the columns `image` and `label` (ClassLabel, named by the folders in sorted order), or those of
        the metadata file. The fingerprint of a split depends on the relative paths, sizes and labels of its images,
        not on where the folder is.

    Raises:
        ValueError: no folder, no images or no labels in it, splits where classes are expected (`train_dir` one level
            too high), empty files, or folders that are the same or inside each other.
    """
    listings: dict[str, FolderListing] = {}
    metadata: dict[str, tuple[str, pa.Table] | None] = {}
    for split, (parameter, folder) in folders.items():
        try:
            listing = list_images(folder, parameter)
            found = _find_metadata(listing, label_column)
            if found is None:
                _check_classes(listing, parameter, two=training and split == "train")
                if training and "train" in listings and metadata["train"] is None:
                    _refuse_untrained(listings["train"], listing)
        except ValueError as error:
            if required or not listings:
                raise
            logger.warning("Split '%s' is not used: %s", split, error)
            continue
        listings[split], metadata[split] = listing, found
    _refuse_nested(listings, folders)
    by_folder = {split: listing for split, listing in listings.items() if metadata[split] is None}
    names = sorted(set().union(*(listing.classes for listing in by_folder.values())))
    # Where another split has its labels from a file, all are compared as strings.
    label = ClassLabel(names=names) if len(by_folder) == len(listings) else Value("string")
    source = DatasetDict()
    for split, listing in listings.items():
        if metadata[split] is None:
            source[split] = _from_class_folders(listing, label, cache_dir)
        else:
            source[split] = _from_metadata(listing, *metadata[split], cache_dir)
        if ignored := _describe(listing.ignored):
            logger.warning("Ignored in %s: %s.", listing.source, "; ".join(ignored))
    return source


def list_images(folder: str, parameter: str) -> FolderListing:
    """List the images of a folder by first-level folder.

    Args:
        folder: the folder.
        parameter: what it was given as (`train_dir`), for messages.

    Raises:
        ValueError: no such folder, one that cannot be read, or a first-level folder whose name cannot be a class.
    """
    if not os.path.isdir(folder):
        raise ValueError(
            f"{parameter} must be a folder with one subfolder of images per class; there is no folder {folder!r}."
        )
    root = os.path.abspath(folder)
    listing = FolderListing(f"{parameter} {folder!r}", root)
    _require_utf8(root, listing)
    listing.loose, entries = _sort_entries(root, "", listing)
    # A link to a folder that contains this one, or to another class, would add images under a wrong label.
    surroundings = {_identity(root), *(_identity(str(parent)) for parent in Path(os.path.realpath(root)).parents)}
    first_level: dict[tuple[int, int], str] = {}
    for entry in entries:
        identity = _identity(entry.path)
        if identity in surroundings:
            listing.ignored["links to a folder around this one"].append(entry.name)
        elif identity in first_level:
            raise ValueError(
                f"Class folders {first_level[identity]!r} and {entry.name!r} of {listing.source} are the same folder, "
                "so each of its images would have two labels. Remove one of the links."
            )
        else:
            first_level[identity] = entry.name
    elsewhere = surroundings | first_level.keys()
    taken: set[str] = set()
    for name in sorted(first_level.values()):
        _require_utf8(name, listing)
        images = sorted(_images_below(os.path.join(root, name), name, listing, elsewhere))
        if not images:
            listing.ignored["folders without an image"].append(name + "/")
            continue
        # macOS writes accents as characters of their own: the same name must be the same class everywhere.
        label = unicodedata.normalize("NFC", name)
        if label in taken:
            raise ValueError(
                f"Two class folders of {listing.source} have the name {label!r}, in different Unicode forms. Move "
                "their images to one folder."
            )
        taken.add(label)
        listing.classes[label] = images
    return listing


def _images_below(
    path: str, name: str, listing: FolderListing, elsewhere: Set[tuple[int, int]]
) -> Iterator[ImageFile]:
    """The images of a class folder and of the folders in it, each folder once and none of `elsewhere`."""
    seen = {_identity(path)}
    waiting = [(path, name + "/")]
    while waiting:
        path, prefix = waiting.pop()
        images, folders = _sort_entries(path, prefix, listing)
        yield from images
        for entry in folders:
            identity = _identity(entry.path)
            if identity in seen or identity in elsewhere:
                listing.ignored["links to a folder that is read elsewhere"].append(f"{prefix}{entry.name}")
            else:
                seen.add(identity)
                waiting.append((entry.path, f"{prefix}{entry.name}/"))


def _sort_entries(path: str, prefix: str, listing: FolderListing) -> tuple[list[ImageFile], list[os.DirEntry]]:
    """The images and the subfolders of one folder; what is neither goes to `listing`."""
    try:
        with os.scandir(path) as found:
            # Links last: where two ways lead to a folder, its own name counts.
            entries = sorted(found, key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        raise ValueError(f"Folder {path!r} of {listing.source} cannot be read: {error.strerror}.") from error
    images, folders, endings, ignored = [], [], image_endings(), listing.ignored
    for entry in entries:
        name = entry.name
        relative = prefix + name
        is_folder, is_file = _kind(entry)
        if is_folder:
            if _is_hidden(name):
                ignored["hidden and system folders"].append(relative + "/")
            else:
                folders.append(entry)
        elif name.lower() in SYSTEM_FILES:
            continue
        elif not is_file:
            ignored["links without a target"].append(relative)
        elif name.startswith("."):
            ignored["hidden files"].append(relative)
        elif os.path.splitext(name)[1].lower() not in endings:
            if prefix:
                ignored["files that are no images by their ending"].append(relative)
            else:
                listing.files.append(name)
        elif not _is_utf8(relative):
            ignored["files with a name that is not UTF-8"].append(relative)
        else:
            images.append((relative, entry.stat().st_size))
    return images, folders


def _kind(entry: os.DirEntry) -> tuple[bool, bool]:
    """Whether it is a folder, and whether it is a file; neither for a link to itself."""
    try:
        is_folder = entry.is_dir()
        return is_folder, not is_folder and entry.is_file()
    except OSError:
        return False, False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


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


def _require_utf8(name: str, listing: FolderListing) -> None:
    if not _is_utf8(name):
        raise ValueError(f"The folder name {name!r} of {listing.source} is not valid UTF-8. Rename the folder.")


def _files_by_folder(folder: str, depth: int = 5) -> Iterator[list[str]]:
    """Names of the files of a folder and of its subfolders, level by level."""
    level = [folder]
    while level and (depth := depth - 1) >= 0:
        below = []
        for path in level:
            try:
                with os.scandir(path) as found:
                    entries = sorted((entry for entry in found if not _is_hidden(entry.name)), key=lambda e: e.name)
            except OSError:
                continue
            yield [entry.name for entry in entries if _kind(entry)[1]]
            below += [entry.path for entry in entries if _kind(entry)[0]]
        level = below


def _splits_among(names: Iterable[str]) -> dict[str, list[str]]:
    """The names that are those of splits, by split."""
    names = list(names)
    splits = {split: [name for name in names if pattern.fullmatch(name)] for split, pattern in SPLIT_NAMES.items()}
    return {split: found for split, found in splits.items() if found}


def _check_classes(listing: FolderListing, parameter: str, two: bool) -> None:
    """
    Raises:
        ValueError: there are no class folders, one alone (with `two`), or splits instead of classes.
    """
    source, names = listing.source, sorted(listing.classes)
    tables = [name for name in listing.files if os.path.splitext(name)[1].lower() in TABLE_ENDINGS]
    hint = (
        f"Expected one subfolder of images per class, or a metadata.csv with the columns '{FILE_COLUMN}' and 'label'."
    )
    also = ""
    if tables and parameter == "dataset_name":
        also = f" To read the images that {_first(tables)} lists, pass its column of paths as image_column_name."
    elif tables:
        also = f" Found the table {_first(tables)}."
    if not names and not listing.loose:
        ignored = "; ".join(_describe(listing.ignored, listing.files))
        raise ValueError(f"There are no images in {source}. {hint}" + (f" Found {ignored}." if ignored else ""))
    if not names:
        raise ValueError(
            f"{source} has {len(listing.loose)} images ({_first(path for path, _ in listing.loose)}) and no class "
            f"folders. {hint}{also}"
        )
    _refuse_splits(listing, parameter)
    if two and len(names) < 2:
        below = sorted({path.split("/")[1] for path in listing.deeper_folders()})
        inner = os.path.join(listing.root, names[0])
        if below and not tables:
            also = f" If its subfolders {_first(below)} are the classes, pass {parameter}={inner!r}."
        raise ValueError(
            f"{source} has one class folder with images, {names[0]!r}: expected at least two classes to train on, one "
            f"subfolder of images per class.{also}"
        )


def _refuse_splits(listing: FolderListing, parameter: str) -> None:
    """
    Raises:
        ValueError: the first-level folders are splits (the folder is one level too high), or each class has its own.
    """
    names = sorted(listing.classes)
    deeper = {path.split("/")[0] for path in listing.deeper_folders()}
    splits = _splits_among(names)
    split_names = {name for found in splits.values() for name in found}
    both = "train" in splits and len(splits) > 1
    all_are = len(split_names) == len(names)
    with_classes = all(any(name in deeper for name in found) for found in splits.values())
    if splits and (both and (all_are or with_classes) or all_are and split_names <= deeper):
        evaluation = splits.get("validation") or splits.get("test")
        chosen = {"train_dir": splits.get("train"), "validation_dir": evaluation}
        advice = " and ".join(
            f"{name}={os.path.join(listing.root, found[0])!r}" for name, found in chosen.items() if found
        )
        raise ValueError(
            f"{listing.source} is one level too high: its subfolders are splits ({_first(sorted(split_names))}), not "
            f"classes. Pass {advice}."
        )
    for name, images in listing.classes.items():
        inside = _splits_among({path.split("/")[1] for path, _ in images if path.count("/") > 1})
        if "train" in inside and len(inside) > 1:
            found = sorted(name for names in inside.values() for name in names)
            raise ValueError(
                f"Class folder {name!r} of {listing.source} contains splits ({_first(found)}), which would be used "
                f"together. Bring them to train/{name} and validation/{name}, and pass the folders train and "
                "validation as train_dir and validation_dir."
            )


def _refuse_nested(listings: Mapping[str, FolderListing], folders: Mapping[str, tuple[str, str]]) -> None:
    """
    Raises:
        ValueError: the folder of one split is inside that of another, where it would be a class.
    """
    real = {split: Path(os.path.realpath(listing.root)) for split, listing in listings.items()}
    for inner, outer in ((a, b) for a in real for b in real if a != b):
        if real[inner] == real[outer] and inner < outer:
            logger.warning("%s and %s are the same folder.", listings[inner].source, listings[outer].source)
        elif real[inner] != real[outer] and real[inner].is_relative_to(real[outer]):
            raise ValueError(
                f"{listings[inner].source} is inside {listings[outer].source}, so its images would be used in both. "
                f"Pass two folders that are next to each other as {folders[outer][0]} and {folders[inner][0]}."
            )


def _refuse_untrained(train: FolderListing, other: FolderListing) -> None:
    """
    Raises:
        ValueError: a class folder of `other` is none of `train`.
    """
    unknown = sorted(set(other.classes) - set(train.classes))
    if not unknown:
        return
    known = {_plain(name): name for name in train.classes}
    alike = [f"{name!r} and {known[_plain(name)]!r}" for name in unknown if _plain(name) in known]
    also = f" Written differently: {', '.join(alike[:SHOWN])}." if alike else ""
    raise ValueError(
        f"{other.source} has classes that {train.source} has no images of: {_first(unknown)}.{also} Bring both to the "
        "same subfolders."
    )


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _from_class_folders(listing: FolderListing, label: ClassLabel | Value, cache_dir: str | None) -> Dataset:
    """The dataset of a folder, and a warning for each thing that may be meant differently."""
    if listing.loose:
        listing.ignored["images next to the class folders"] += [path for path, _ in listing.loose]
    listing.ignored["files next to the class folders"] += listing.files
    alike = [names for names in _by_plain_name(listing.classes).values() if len(names) > 1]
    if alike:
        shown = "; ".join(" and ".join(map(repr, names)) for names in alike[:SHOWN])
        logger.warning("%s: class names that differ in case or spaces alone are different classes: %s.",
                       listing.source, shown)  # fmt: skip
    if deeper := listing.deeper_folders():
        logger.warning(
            "%s: %d images are in %d folders inside class folders (%s). Each belongs to the class of the first-level "
            "folder.",
            listing.source,
            deeper.total(),
            len(deeper),
            _first(sorted(deeper)),
        )
    images = [(name, image) for name in sorted(listing.classes) for image in listing.classes[name]]
    _refuse_empty_files((image for _, image in images), listing)
    digest = hashlib.blake2b(digest_size=8)
    for name, (path, size) in images:
        digest.update(f"{name}\0{path}\0{size}\n".encode())
    features = Features({"image": ImageFeature(), "label": label})
    number = label.str2int if isinstance(label, ClassLabel) else str
    numbers = {name: number(name) for name in listing.classes}

    def tables() -> Iterator[pa.Table]:
        for start in range(0, len(images), ROWS_AT_ONCE):
            rows = images[start : start + ROWS_AT_ONCE]
            labels = pa.array([numbers[name] for name, _ in rows], features.arrow_schema.field("label").type)
            yield _table([f"{listing.root}/{path}" for _, (path, _) in rows], {"label": labels}, features)

    digest.update(repr(getattr(label, "names", None)).encode())
    return _stored(tables(), features, digest.hexdigest(), listing, cache_dir)


def _by_plain_name(names: Iterable[str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for name in sorted(names):
        groups[_plain(name)].append(name)
    return groups


def _find_metadata(listing: FolderListing, label_column: str | None) -> tuple[str, pa.Table] | None:
    """The metadata file that has the labels: the one with `label_column`, or one where there are no class folders."""
    present = [name for name in METADATA_FILES if name in listing.files]
    for name in present:
        wanted = {label_column} if label_column else set(LABEL_COLUMNS)
        if label_column is None and len(listing.classes) > 1:
            return None
        table = _read_table(os.path.join(listing.root, name), listing)
        columns = set(table.column_names)
        if not wanted & columns and listing.classes:
            continue
        if FILE_COLUMN not in columns:
            raise ValueError(
                f"{name} of {listing.source} must have a column '{FILE_COLUMN}' with the image of each row; its "
                f"columns are {table.column_names}."
            )
        return name, table
    return None


def _read_table(path: str, listing: FolderListing) -> pa.Table:
    try:
        if path.endswith(".csv"):
            # An empty field is a missing value; "NA" or "null" may be the name of a class.
            options = pa.csv.ConvertOptions(strings_can_be_null=True, null_values=[""])
            return pa.csv.read_csv(path, convert_options=options)
        return pa.json.read_json(path) if path.endswith(".jsonl") else pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{os.path.basename(path)} of {listing.source} cannot be read: {error}") from error


def _from_metadata(listing: FolderListing, name: str, metadata: pa.Table, cache_dir: str | None) -> Dataset:
    """The images that a metadata file lists, with its other columns."""
    known = {path: size for images in (listing.loose, *listing.classes.values()) for path, size in images}
    images, missing = [], []
    for row, value in enumerate(metadata.column(FILE_COLUMN).to_pylist()):
        found = None if value is None else _locate(str(value), listing.root, known)
        missing += [f"{value} (row {row})"] if found is None else []
        images += [found] if found is not None else []
    if missing:
        raise ValueError(
            f"{name} of {listing.source} lists {len(missing)} images that are not there: {', '.join(missing[:SHOWN])}"
            f"{', ...' if len(missing) > SHOWN else ''}. Its column '{FILE_COLUMN}' has paths relative to the folder."
        )
    if not images:
        raise ValueError(f"{name} of {listing.source} has no row: there are no images in it.")
    _refuse_empty_files(images, listing)
    if unlisted := sorted(set(known) - {path for path, _ in images}):
        listing.ignored[f"images that {name} does not list"] += unlisted
    listing.ignored["files next to the images"] += [file for file in listing.files if file != name]
    others = {
        column: metadata.column(column) for column in metadata.column_names if column not in (FILE_COLUMN, "image")
    }
    schema = pa.schema({column: values.type for column, values in others.items()})
    features = Features({"image": ImageFeature(), **Features.from_arrow_schema(schema)})
    digest = hashlib.blake2b(Path(listing.root, name).read_bytes(), digest_size=8)
    digest.update(repr(images).encode())
    table = _table([os.path.join(listing.root, path) for path, _ in images], others, features)
    return _stored([table], features, digest.hexdigest(), listing, cache_dir)


def _locate(value: str, root: str, known: Mapping[str, int]) -> ImageFile | None:
    for path in (value, value.replace("\\", "/")):
        path = os.path.normpath(path).replace(os.sep, "/")
        if path in known:
            return path, known[path]
        if os.path.isfile(outside := os.path.join(root, path)):
            return path, os.path.getsize(outside)
    return None


def _refuse_empty_files(images: Iterable[ImageFile], listing: FolderListing) -> None:
    empty = [path for path, size in images if size == 0]
    if empty:
        raise ValueError(
            f"{listing.source} has {len(empty)} image files of 0 bytes: {_first(empty)}. Copy them again or delete "
            "them."
        )


def _table(paths: Sequence[str], others: Mapping[str, pa.Array], features: Features) -> pa.Table:
    image = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())], names=["bytes", "path"]
    )
    return pa.table({"image": image, **others}).cast(features.arrow_schema)


def _stored(
    tables: Iterable[pa.Table], features: Features, fingerprint: str, listing: FolderListing, cache_dir: str | None
) -> Dataset:
    """Write the table to the cache, if it is not there, and open it from there (memory-mapped)."""
    # The file has absolute paths, the fingerprint is that of the content.
    key = hashlib.blake2b(f"{fingerprint}\0{listing.root}\0{features}".encode(), digest_size=8).hexdigest()
    path = Path(cache_dir or config.HF_DATASETS_CACHE, "image_folders", f"{key}.arrow")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may write the same file.
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, features.arrow_schema) as writer:
                for table in tables:
                    writer.write_table(table)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    dataset = Dataset.from_file(str(path))
    dataset._fingerprint = fingerprint
    return dataset


def _describe(ignored: Mapping[str, Sequence[str]], files: Sequence[str] = ()) -> list[str]:
    groups = {**ignored, "other files": files}
    return [f"{reason} ({len(names)}: {_first(names)})" for reason, names in groups.items() if names]


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
