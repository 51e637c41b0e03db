"""Image folders as datasets: the first-level folders are the classes.

`load_dataset("imagefolder")` uses the innermost folder as the class, ignores links to folders and names with a leading
underscore, and drops all labels if two files are at different depths. Therefore this module lists the files itself. It
stores their paths and labels in an Arrow file in the cache, which the workers of a data loader open by name.
"""

import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, config
from datasets import Image as ImageFeature

from ..utils.class_names import normalize_class_name
from ..utils.text import format_list
from .folder_listing import (
    METADATA_FILES,
    TABLE_EXTENSIONS,
    FolderListing,
    ImageFile,
    image_extensions,
    iterate_files_by_folder,
    list_images,
    match_split_names,
    validate_classes,
    validate_eval_classes,
)
from .folder_metadata import find_metadata, read_metadata
from .ignored_files import IgnoreReason, describe_ignored, is_hidden_folder

logger = logging.getLogger(__name__)

ROWS_PER_TABLE = 100_000
MAX_PROBED_FILES = 200
# Extensions of files that contain many images, or the format of a dataset.
DATASET_EXTENSIONS = frozenset({".parquet", ".arrow", ".tar", ".zip", ".gz", ".h5", ".hdf5", ".lance"})


def find_image_folders(folder: str) -> dict[str, tuple[str, str]] | None:
    """Find the splits of a local image folder that is passed as `dataset_name`.

    Args:
        folder: path of the folder, or the name of a dataset.

    Returns:
        Parameter name and folder of each split, for `load_image_folders`: the subfolders `train`, `validation` and
        `test` (or similar names), or the folder itself as `train`. None if there is no such folder, or it contains
        data files that `load_dataset` opens (such as parquet).
    """
    if not os.path.isdir(folder):
        return None
    extensions: Counter[str] = Counter()
    for files in iterate_files_by_folder(folder):
        extensions.update(os.path.splitext(name)[1].lower() for name in files if name not in METADATA_FILES)
        if extensions.total() > MAX_PROBED_FILES:
            break
    images, tables = (sum(extensions[e] for e in known) for known in (image_extensions(), TABLE_EXTENSIONS))
    if any(extensions[extension] for extension in DATASET_EXTENSIONS) or images <= tables:
        return None
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden_folder(entry.name))
    splits = match_split_names(names)
    if splits and (len(splits) > 1 and "train" in splits or len(names) == sum(map(len, splits.values()))):
        return {split: ("dataset_name", os.path.join(folder, found[0])) for split, found in splits.items()}
    return {"train": ("dataset_name", folder)}


def find_tables(folder: str) -> dict[str, str]:
    """Find the tables (csv, json) that list the images of a local folder.

    Args:
        folder: path of the folder.

    Returns:
        Path of the table of each split. A single table is the split `train`. Empty if there is none.
    """
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden_folder(name))
        tables = sorted(name for name in names if os.path.splitext(name)[1].lower() in TABLE_EXTENSIONS)
        splits = match_split_names(os.path.splitext(name)[0] for name in tables)
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
    """Load splits from folders with one subfolder per class, or with a metadata file that contains the labels.

    Images in nested folders belong to the class of the first-level folder. Links to folders and files are followed.
    One warning per folder lists what is ignored.

    Args:
        folders: parameter name and folder of each split.
        label_column: label column of a metadata file. A metadata file with this column takes precedence over class
            folders.
        cache_dir: folder for the lists of files; None: the cache of `datasets`.
        training: whether the split `train` is used for training. It then needs at least two classes, and all classes
            of the other splits.
        required: whether all splits are required. Otherwise invalid splits after the first one are skipped with a
            warning (such as a test split without labels).

    Returns:
        Splits with the columns `image` and `label` (a ClassLabel of the folder names in sorted order), or with the
        columns of the metadata file. The fingerprint of a split depends on the relative paths, sizes and labels of its
        images, not on the location of the folder.

    Raises:
        ValueError: if a folder does not exist, has no images or labels, contains splits instead of classes, contains
            empty files, or contains the folder of another split.
    """
    listings: dict[str, FolderListing] = {}
    metadata: dict[str, tuple[str, pa.Table] | None] = {}
    for split, (parameter, folder) in folders.items():
        try:
            listing = list_images(folder, parameter)
            found = find_metadata(listing, label_column)
            if found is None:
                validate_classes(listing, parameter, min_classes=2 if training and split == "train" else 1)
                if training and "train" in listings and metadata["train"] is None:
                    validate_eval_classes(listings["train"], listing)
        except ValueError as error:
            if required or not listings:
                raise
            logger.warning("Split '%s' is not used: %s", split, error)
            continue
        listings[split], metadata[split] = listing, found
    _validate_not_nested(listings, folders)
    class_listings = [listing for split, listing in listings.items() if metadata[split] is None]
    names = sorted(set().union(*(listing.classes for listing in class_listings)))
    # If another split has its labels in a file, all labels are compared as strings.
    label = ClassLabel(names=names) if len(class_listings) == len(listings) else Value("string")
    dataset_dict = DatasetDict()
    for split, listing in listings.items():
        if metadata[split] is None:
            dataset_dict[split] = _load_class_folders(listing, label, cache_dir)
        else:
            dataset_dict[split] = _load_metadata(listing, *metadata[split], cache_dir)
        if ignored := describe_ignored(listing.ignored):
            logger.warning("Ignored in %s: %s.", listing.source, ignored)
    return dataset_dict


def _validate_not_nested(listings: Mapping[str, FolderListing], folders: Mapping[str, tuple[str, str]]) -> None:
    """Validate that no folder of a split is inside the folder of another split, where it would be a class.

    Raises:
        ValueError: if one is.
    """
    real = {split: Path(os.path.realpath(listing.root)) for split, listing in listings.items()}
    for inner, outer in ((a, b) for a in real for b in real if a != b):
        if real[inner] == real[outer] and inner < outer:
            logger.warning("%s and %s are the same folder.", listings[inner].source, listings[outer].source)
        elif real[inner] != real[outer] and real[inner].is_relative_to(real[outer]):
            raise ValueError(
                f"{listings[inner].source} is inside {listings[outer].source}, so its images would be in both splits. "
                f"Pass two folders that are next to each other as `{folders[outer][0]}` and `{folders[inner][0]}`."
            )


def _load_class_folders(listing: FolderListing, label: ClassLabel | Value, cache_dir: str | None) -> Dataset:
    """Load a folder with class folders. Warnings list class names that are similar, and nested folders."""
    if listing.loose:
        listing.ignored[IgnoreReason.LOOSE_IMAGE] += [path for path, _ in listing.loose]
    listing.ignored[IgnoreReason.LOOSE_FILE] += listing.files
    similar = [names for names in _group_by_normalized_name(listing.classes).values() if len(names) > 1]
    if similar:
        shown = "; ".join(" and ".join(map(repr, names)) for names in similar[:5])
        logger.warning(
            "%s: class names that differ only in case or spaces are different classes: %s.", listing.source, shown
        )
    if nested := listing.count_nested_images():
        logger.warning(
            "%s: %d images are in %d folders inside class folders (%s). Each belongs to the class of the first-level "
            "folder.",
            listing.source,
            nested.total(),
            len(nested),
            format_list(sorted(nested)),
        )
    images = [(name, image) for name in sorted(listing.classes) for image in listing.classes[name]]
    _validate_file_sizes((image for _, image in images), listing)
    digest = hashlib.blake2b(digest_size=8)
    for name, (path, size) in images:
        digest.update(f"{name}\0{path}\0{size}\n".encode())
    features = Features({"image": ImageFeature(), "label": label})
    encode = label.str2int if isinstance(label, ClassLabel) else str
    encoded = {name: encode(name) for name in listing.classes}

    def iterate_tables() -> Iterator[pa.Table]:
        for start in range(0, len(images), ROWS_PER_TABLE):
            rows = images[start : start + ROWS_PER_TABLE]
            labels = pa.array([encoded[name] for name, _ in rows], features.arrow_schema.field("label").type)
            yield _build_table([f"{listing.root}/{path}" for _, (path, _) in rows], {"label": labels}, features)

    digest.update(repr(getattr(label, "names", None)).encode())
    return _write_and_load(iterate_tables(), features, digest.hexdigest(), listing, cache_dir)


def _group_by_normalized_name(names: Iterable[str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for name in sorted(names):
        groups[normalize_class_name(name)].append(name)
    return groups


def _load_metadata(listing: FolderListing, name: str, table: pa.Table, cache_dir: str | None) -> Dataset:
    """Load the images that a metadata file lists, with its other columns."""
    metadata = read_metadata(listing, name, table)
    _validate_file_sizes(metadata.images, listing)
    listed = {path for path, _ in metadata.images}
    paths = {path for images in (listing.loose, *listing.classes.values()) for path, _ in images}
    listing.ignored[IgnoreReason.UNLISTED_IMAGE] += sorted(paths - listed)
    listing.ignored[IgnoreReason.FILE_NEXT_TO_IMAGES] += [file for file in listing.files if file != name]
    schema = pa.schema({column: values.type for column, values in metadata.columns.items()})
    features = Features({"image": ImageFeature(), **Features.from_arrow_schema(schema)})
    digest = hashlib.blake2b(metadata.content, digest_size=8)
    digest.update(repr(metadata.images).encode())
    absolute_paths = [os.path.join(listing.root, path) for path, _ in metadata.images]
    tables = [_build_table(absolute_paths, metadata.columns, features)]
    return _write_and_load(tables, features, digest.hexdigest(), listing, cache_dir)


def _validate_file_sizes(images: Iterable[ImageFile], listing: FolderListing) -> None:
    empty = [path for path, size in images if size == 0]
    if empty:
        raise ValueError(
            f"{listing.source} has {len(empty)} image files of 0 bytes: {format_list(empty)}. Copy them again or "
            "delete them."
        )


def _build_table(paths: Sequence[str], columns: Mapping[str, pa.Array], features: Features) -> pa.Table:
    image = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())], names=["bytes", "path"]
    )
    return pa.table({"image": image, **columns}).cast(features.arrow_schema)


def _write_and_load(
    tables: Iterable[pa.Table], features: Features, fingerprint: str, listing: FolderListing, cache_dir: str | None
) -> Dataset:
    """Write the tables to the cache unless the file exists, and load the file (memory-mapped)."""
    # The file contains absolute paths, so its name depends on the root. The fingerprint depends on the content only.
    key = hashlib.blake2b(f"{fingerprint}\0{listing.root}\0{features}".encode(), digest_size=8).hexdigest()
    path = Path(cache_dir or config.HF_DATASETS_CACHE, "image_folders", f"{key}.arrow")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may write the same file at the same time.
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
