"""Store the repositories of the fake Hub: blobs, commits, branches and tags, and the rules of a valid commit."""

import base64
import binascii
import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property

from fake_hub.cards import as_list, read_card, validate_card

MAX_REGULAR_SIZE = 10 * 2**20

LFS_PATTERNS = (
    "*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.ftz", "*.gz", "*.h5", "*.joblib", "*.lfs.*", "*.mlmodel",
    "*.model", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb", "*.pickle", "*.pkl", "*.pt",
    "*.pth", "*.rar", "*.safetensors", "saved_model/**/*", "*.tar.*", "*.tar", "*.tflite", "*.tgz", "*.wasm", "*.xz",
    "*.zip", "*.zst", "*tfevents*",
)  # fmt: skip
DATASET_LFS_PATTERNS = (
    "*.lz4", "*.mds", "*.pcm", "*.sam", "*.raw", "*.aac", "*.flac", "*.mp3", "*.ogg", "*.wav", "*.bmp", "*.gif",
    "*.png", "*.tiff", "*.jpg", "*.jpeg", "*.webp", "*.mp4", "*.webm",
)  # fmt: skip


class HubError(Exception):
    """An error reply.

    Args:
        status: HTTP status.
        message: Text for the header `X-Error-Message` and the body.
        code: Value of the header `X-Error-Code`.
        headers: Additional headers.
        body: Additional keys of the JSON body.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None, **body: str
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}
        self.body = body


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def format_timestamp(date: datetime) -> str:
    return date.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def validate_path(path: str) -> str:
    """Return the path of a file if it is valid.

    Raises:
        HubError: The path does not stay inside the repository (400).
    """
    if not isinstance(path, str) or any(part.lower() in ("", ".", "..", ".git") for part in path.split("/")):
        raise HubError(400, f"Invalid path in repository: {path!r}")
    return path


def validate_ref_name(name: str) -> str:
    """Return the name of a branch or a tag if it is valid.

    Raises:
        HubError: The name is not valid (400).
    """
    if not re.fullmatch(r"(?!.*(?:\.\.|//))\w[\w./-]*(?<![./])", name) or re.fullmatch(r"[0-9a-f]{40}", name):
        raise HubError(400, f"Invalid reference name: {name}")
    return name


@dataclass(frozen=True)
class Blob:
    """Content of a file. With LFS, git stores a pointer, and the client gets both."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return sha256(self.data)

    @property
    def pointer(self) -> bytes:
        lines = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return lines.encode()

    @cached_property
    def oid(self) -> str:
        return git_oid("blob", self.pointer if self.lfs else self.data)

    @property
    def content_oid(self) -> str:
        """Hash that the client compares with a local file: the ETag, and the `oid` in the reply of preupload."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """Immutable snapshot of all files of a repository."""

    oid: str
    parent: "Commit | None"
    title: str
    message: str
    author: str
    date: datetime
    files: Mapping[str, Blob]

    def history(self) -> "Iterator[Commit]":
        """Yield this commit and its ancestors, newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def last_change(self, path: str) -> "Commit":
        """Return the latest commit that changed the file `path`, or a file in the folder `path`."""

        def list_oids(commit: Commit | None) -> dict[str, str]:
            files = commit.files if commit else {}
            return {name: blob.oid for name, blob in files.items() if name == path or name.startswith(path + "/")}

        return next(commit for commit in self.history() if list_oids(commit) != list_oids(commit.parent))

    def entry(self, path: str, expand: bool = False) -> dict | None:
        """Describe a file or folder for the endpoints tree and paths-info. None if it does not exist."""
        if blob := self.files.get(path):
            entry = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
        else:
            inside = [f"{name} {blob.oid}" for name, blob in self.files.items() if name.startswith(path + "/")]
            if not inside:
                return None
            entry = {"type": "directory", "oid": git_oid("tree", "\n".join(inside).encode()), "size": 0, "path": path}
        if expand:
            last = self.last_change(path)
            entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": format_timestamp(last.date)}
        return entry

    def tree(self, folder: str, recursive: bool) -> list[str]:
        """List the paths of the files and folders in a folder.

        Raises:
            HubError: The folder does not exist (404).
        """
        prefix = f"{folder}/" if folder else ""
        relative_paths = [path.removeprefix(prefix).split("/") for path in self.files if path.startswith(prefix)]
        if folder and not relative_paths:
            raise HubError(404, f"{folder} does not exist on the given revision", "EntryNotFound")
        entries = {"/".join(parts[:depth]) for parts in relative_paths for depth in range(1, len(parts) + 1)}
        return sorted(prefix + path for path in entries if recursive or "/" not in path)


def read_config(commit: Commit) -> dict:
    """Return the content of config.json. The result is empty if the file is missing or not a JSON object."""
    try:
        config = json.loads(commit.files["config.json"].data)
    except (KeyError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


@dataclass
class Repository:
    """Model or dataset repository: the commits of each branch, the tags, and the uploaded LFS objects."""

    id: str
    type: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self):
        # As on the real Hub, the first commit contains the rules for LFS.
        patterns = LFS_PATTERNS + (DATASET_LFS_PATTERNS if self.type == "dataset" else ())
        rules = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns)
        self._append("main", {".gitattributes": Blob(rules.encode(), lfs=False)}, "initial commit", "", "system")

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def url_path(self) -> str:
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"

    def resolve(self, revision: str) -> Commit:
        """Return the commit of a branch, a tag, or a commit id of at least seven digits.

        Raises:
            HubError: The revision does not exist (404).
        """
        if commit := self.branches.get(revision) or self.tags.get(revision):
            return commit
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = [commit for oid, commit in self.commits.items() if oid.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def uses_lfs(self, path: str, size: int, commit: Commit) -> bool:
        """Return whether a file uses LFS: it is too large for git, or the .gitattributes of the commit match it."""
        rules = commit.files.get(".gitattributes")
        lines = [line.split() for line in rules.data.decode().splitlines()] if rules else []
        patterns = [line[0] for line in lines if "filter=lfs" in line[1:]]
        names = [(path, pattern) if "/" in pattern else (path.split("/")[-1], pattern) for pattern in patterns]
        return size > MAX_REGULAR_SIZE or any(fnmatch.fnmatchcase(*name) for name in names)

    def _append(self, branch: str, files: Mapping[str, Blob], title: str, message: str, author: str) -> Commit:
        parent, date = self.branches.get(branch), datetime.now(timezone.utc)
        listing = [f"{path} {blob.oid}" for path, blob in sorted(files.items())]
        content = [self.id, parent and parent.oid, title, message, author, format_timestamp(date), *listing]
        oid = git_oid("commit", "\n".join(map(str, content)).encode())
        commit = Commit(oid, parent, title, message, author, date, dict(sorted(files.items())))
        self.commits[oid] = self.branches[branch] = commit
        return commit

    def write(self, branch: str, files: Mapping[str, bytes | str], delete: Iterable[str], title: str) -> Commit:
        """Commit files as the owner, without a request. Validate the paths, but not the card."""
        head = self.branches[branch]
        if missing := set(delete) - head.files.keys():
            raise KeyError(f"Not in {self.id}: {sorted(missing)}")
        new = {}
        for path, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            new[validate_path(path)] = Blob(data, self.uses_lfs(path, len(data), head))
        self.lfs.update({blob.sha256: blob.data for blob in new.values() if blob.lfs})
        unchanged = {path: head.files[path] for path in head.files.keys() - set(delete)}
        return self._append(branch, unchanged | new, title, "", self.owner)

    def commit(self, branch: str, operations: list[dict], author: str) -> Commit:
        """Apply all lines of a commit request, or none.

        Args:
            branch: Branch to commit to.
            operations: The header and the operations, one per line of the request.
            author: User who sent the request.

        Raises:
            HubError: The header, the branch, the parent or an operation is not valid.
        """
        if not operations or operations[0].get("key") != "header" or not operations[0]["value"].get("summary"):
            raise HubError(400, "The first line of a commit must be a header with a summary")
        header = operations[0]["value"]
        if branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = self.branches[branch]
        if not head.oid.startswith(header.get("parentCommit") or head.oid):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations[1:]:
            self._apply(operation["key"], operation["value"], files)
        conflicts = sorted(path for path in files if any(other.startswith(path + "/") for other in files))
        if conflicts:
            raise HubError(400, f"Both a file and a folder: {conflicts[0]}")
        card = files.get("README.md")
        if card is not None and card is not head.files.get("README.md"):
            errors, _ = validate_card(card.data.decode(errors="replace"))
            if errors:
                raise HubError(400, "Invalid metadata in README.md.\n" + "\n".join(f"- {error}" for error in errors))
        return self._append(branch, files, header["summary"], header.get("description") or "", author)

    def _apply(self, key: str, value: dict, files: dict[str, Blob]) -> None:
        path = validate_path(value["path"].removesuffix("/") if key == "deletedFolder" else value["path"])
        if key == "file":
            if value.get("encoding") != "base64":
                raise HubError(400, f"Unknown encoding of {path}: {value.get('encoding')}")
            try:
                data = base64.b64decode(value["content"], validate=True)
            except binascii.Error as error:
                raise HubError(400, f"The content of {path} is not base64: {error}") from error
            if len(data) > MAX_REGULAR_SIZE:
                raise HubError(400, "Your push was rejected because it contains files larger than 10 MiB.")
            files[path] = Blob(data, lfs=False)
        elif key == "lfsFile":
            data = self.lfs.get(value["oid"]) if value.get("algo") == "sha256" else None
            if data is None or value.get("size", len(data)) != len(data):
                message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                raise HubError(400, f"{message} Offending file: {path}")
            files[path] = Blob(data, lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif key == "deletedFolder":
            inside = [name for name in files if name.startswith(path + "/")]
            if not inside:
                raise HubError(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
            for name in inside:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation: {key}")

    def info(self, commit: Commit, blobs: bool) -> dict:
        """Describe a revision for `model_info` and `dataset_info`. The numbers of downloads and likes are 0."""
        readme = commit.files.get("README.md")
        card = read_card(readme.data.decode(errors="replace")) if readme else {}
        siblings: list[dict] = [{"rfilename": path} for path in commit.files]
        if blobs:
            for sibling, (path, blob) in zip(siblings, commit.files.items(), strict=True):
                sibling |= {"size": len(blob.data), "blobId": blob.oid}
                if lfs := commit.entry(path).get("lfs"):
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        tags = list(as_list(card.get("tags")))
        for key, prefix in (("license", "license"), ("datasets", "dataset"), ("base_model", "base_model")):
            tags += [f"{prefix}:{value}" for value in as_list(card.get(key))]
        info = {
            "id": self.id,
            "author": self.owner,
            "sha": commit.oid,
            "private": self.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
            "cardData": card,
            "createdAt": format_timestamp(list(commit.history())[-1].date),
            "lastModified": format_timestamp(commit.date),
        }
        if self.type == "model":
            config = read_config(commit)
            library = card.get("library_name") or ("transformers" if "model_type" in config else None)
            task = card.get("pipeline_tag")
            tags += [tag for tag in (library, task) if tag]
            config_keys = ("architectures", "auto_map", "model_type")
            info |= {
                "modelId": self.id,
                "config": {key: config[key] for key in config_keys if key in config},
                "library_name": library,
                "pipeline_tag": task,
                "spaces": [],
                "model-index": card.get("model-index"),
            }
        return info | {"tags": list(dict.fromkeys(tags))}
