"""Metadata files of image folders: `metadata.csv`, `metadata.jsonl` or `metadata.parquet` with the labels."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from ..utils.text import format_list
from .columns import LABEL_COLUMNS
from .folder_listing import FILE_COLUMN, METADATA_FILES, FolderListing, ImageFile


@dataclass(frozen=True)
class FolderMetadata:
    """Images and labels that a metadata file lists.

    Attributes:
        file_name: name of the metadata file.
        content: its bytes, for the fingerprint.
        images: the image of each row.
        columns: its other columns.
    """

    file_name: str
    content: bytes
    images: list[ImageFile]
    columns: dict[str, pa.ChunkedArray]


def find_metadata(listing: FolderListing, label_column: str | None) -> tuple[str, pa.Table] | None:
    """Find the metadata file with the labels of a folder.

    Args:
        listing: content of the folder.
        label_column: column with the labels. A metadata file with this column takes precedence over class folders.

    Returns:
        Name and content of the file. None if the class folders are the labels.

    Raises:
        ValueError: if the file cannot be read, or has no column `file_name`.
    """
    for name in METADATA_FILES:
        if name not in listing.files:
            continue
        if label_column is None and len(listing.classes) > 1:
            return None
        table = _read_table(os.path.join(listing.root, name), listing)
        columns = set(table.column_names)
        wanted = {label_column} if label_column else set(LABEL_COLUMNS)
        if not wanted & columns and listing.classes:
            continue
        if FILE_COLUMN not in columns:
            raise ValueError(
                f"{name} of {listing.source} must have a column '{FILE_COLUMN}' with the image of each row. Its "
                f"columns are {table.column_names}."
            )
        return name, table
    return None


def read_metadata(listing: FolderListing, name: str, table: pa.Table) -> FolderMetadata:
    """Find the images that a metadata file lists.

    Args:
        listing: content of the folder.
        name: name of the metadata file.
        table: its content.

    Raises:
        ValueError: if there are no rows, or an image does not exist.
    """
    sizes = {path: size for images in (listing.loose, *listing.classes.values()) for path, size in images}
    images, missing = [], []
    for row, value in enumerate(table.column(FILE_COLUMN).to_pylist()):
        image = None if value is None else _locate_image(str(value), listing.root, sizes)
        if image is None:
            missing.append(f"{value} (row {row})")
        else:
            images.append(image)
    if missing:
        raise ValueError(
            f"{name} of {listing.source} lists {len(missing)} images that do not exist: "
            f"{format_list(missing, formatter=str)}. The column '{FILE_COLUMN}' must contain "
            "paths relative to the folder."
        )
    if not images:
        raise ValueError(f"{name} of {listing.source} has no rows, so there are no images.")
    columns = {column: table.column(column) for column in table.column_names if column not in (FILE_COLUMN, "image")}
    return FolderMetadata(name, Path(listing.root, name).read_bytes(), images, columns)


def _read_table(path: str, listing: FolderListing) -> pa.Table:
    try:
        if path.endswith(".csv"):
            # Only an empty field is a missing value, since "NA" or "null" may be the name of a class.
            options = pa.csv.ConvertOptions(strings_can_be_null=True, null_values=[""])
            return pa.csv.read_csv(path, convert_options=options)
        return pa.json.read_json(path) if path.endswith(".jsonl") else pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{os.path.basename(path)} of {listing.source} cannot be read: {error}") from error


def _locate_image(value: str, root: str, sizes: Mapping[str, int]) -> ImageFile | None:
    """Return path and size of an image, whose path may have backslashes or lead to another folder."""
    for path in (value, value.replace("\\", "/")):
        path = os.path.normpath(path).replace(os.sep, "/")
        if path in sizes:
            return path, sizes[path]
        if os.path.isfile(outside := os.path.join(root, path)):
            return path, os.path.getsize(outside)
    return None
