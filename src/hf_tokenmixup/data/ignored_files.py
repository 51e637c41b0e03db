"""Which files and folders of an image folder are ignored, and how a warning names them."""

from collections.abc import Mapping, Sequence
from enum import Enum

from ..utils.text import format_list

# Files of operating systems. They are ignored without a warning.
SYSTEM_FILES = frozenset({".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
# Folders of operating systems. They are no classes.
SYSTEM_FOLDERS = frozenset({"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"})


class IgnoreReason(str, Enum):
    """Reason why a file or folder is ignored, as in the warning."""

    HIDDEN_FOLDER = "hidden and system folders"
    HIDDEN_FILE = "hidden files"
    BROKEN_LINK = "broken links"
    LINK_TO_PARENT = "links to a parent folder"
    LINK_TO_KNOWN_FOLDER = "links to a folder that is read elsewhere"
    NO_IMAGE_EXTENSION = "files without the extension of an image"
    NAME_NOT_UTF8 = "files with a name that is not UTF-8"
    EMPTY_FOLDER = "folders without images"
    LOOSE_IMAGE = "images next to the class folders"
    LOOSE_FILE = "files next to the class folders"
    UNLISTED_IMAGE = "images that the metadata file does not list"
    FILE_NEXT_TO_IMAGES = "files next to the images"


def is_hidden_folder(name: str) -> bool:
    """Whether a folder is hidden or belongs to an operating system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def describe_ignored(ignored: Mapping[IgnoreReason, Sequence[str]], other_files: Sequence[str] = ()) -> str:
    """Describe what is ignored.

    Args:
        ignored: relative paths by reason.
        other_files: names of further files.

    Returns:
        Reason, number and first paths: `hidden files (2: 'a/.x', 'b/.y'); broken links (1: 'a/z')`. Empty if nothing
        is ignored.
    """
    groups = {reason.value: paths for reason, paths in ignored.items()} | {"other files": other_files}
    return "; ".join(f"{name} ({len(paths)}: {format_list(paths)})" for name, paths in groups.items() if paths)
