"""What the tests' Hub keeps: blobs, commits, branches and tags, and the rules for what may enter them."""

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

from fake_hub.cards import as_list, check_card, read_card

MAX_REGULAR_SIZE = 10 * 2**20

LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx "
    "*.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz "
    "*.wasm *.xz *.zip *.zst *tfevents*"
).split()
DATASET_LFS_PATTERNS = (
    "*.lz4 *.mds *.pcm *.sam *.raw *.aac *.flac *.mp3 *.ogg *.wav *.bmp *.gif *.png *.tiff *.jpg *.jpeg *.webp *.mp4 "
    "*.webm"
).split()


class HubError(Exception):
    """A refusal: the status, the message, the X-Error-Code where there is one, and more for the body or headers."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None, **body: str
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.headers, self.body = status, message, code, headers or {}, body


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def timestamp(date: datetime) -> str:
    return date.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def check_path(path: str) -> str:
    """`path` if it names a place inside a repository; a 400 otherwise."""
    if not isinstance(path, str) or any(part.lower() in ("", ".", "..", ".git") for part in path.split("/")):
        raise HubError(400, f"Invalid path in repository: {path!r}")
    return path


def check_ref_name(name: str) -> str:
    """`name` if it may name a branch or a tag; a 400 otherwise."""
    if not re.fullmatch(r"(?!.*(?:\.\.|//))\w[\w./-]*(?<![./])", name) or re.fullmatch(r"[0-9a-f]{40}", name):
        raise HubError(400, f"Invalid reference name: {name}")
    return name


@dataclass(frozen=True)
class Blob:
    """The content of a file; with LFS, git holds a pointer to it and the client sees both."""

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
        """What the client compares a local file with: the ETag, and the `oid` that preupload gives."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """An immutable snapshot of a whole repository."""

    oid: str
    parent: "Commit | None"
    title: str
    message: str
    author: str
    date: datetime
    files: Mapping[str, Blob]

    def history(self) -> "Iterator[Commit]":
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def last_change(self, path: str) -> "Commit":
        """The latest commit that changed the file `path`, or a file under the folder `path`."""

        def state(commit: Commit | None) -> dict[str, str]:
            files = commit.files if commit else {}
            return {name: blob.oid for name, blob in files.items() if name == path or name.startswith(path + "/")}

        return next(commit for commit in self.history() if state(commit) != state(commit.parent))

    def entry(self, path: str, expand: bool = False) -> dict | None:
        """The file or folder `path` as the tree and paths-info endpoints describe it; None where there is none."""
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
            entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": timestamp(last.date)}
        return entry

    def tree(self, folder: str, recursive: bool) -> list[str]:
        """The paths of the files and folders in `folder`; a 404 where that is no folder."""
        prefix = f"{folder}/" if folder else ""
        below = [path.removeprefix(prefix).split("/") for path in self.files if path.startswith(prefix)]
        if folder and not below:
            raise HubError(404, f"{folder} does not exist on the given revision", "EntryNotFound")
        depths = {"/".join(parts[:depth]) for parts in below for depth in range(1, len(parts) + 1)}
        return sorted(prefix + path for path in depths if recursive or "/" not in path)


def read_config(commit: Commit) -> dict:
    """The settings in config.json; empty where there are none or they cannot be read."""
    try:
        config = json.loads(commit.files["config.json"].data)
    except (KeyError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


@dataclass
class Repository:
    """A model or a dataset repository: a history per branch, tags, and the LFS objects uploaded to it."""

    id: str
    type: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self):
        """Like the real Hub's, the first commit holds the rules for what goes to LFS."""
        patterns = LFS_PATTERNS + (DATASET_LFS_PATTERNS if self.type == "dataset" else [])
        rules = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns)
        self._append("main", {".gitattributes": Blob(rules.encode(), lfs=False)}, "initial commit", "", "system")

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def url_path(self) -> str:
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag or (the first seven digits of) a commit id names."""
        if commit := self.branches.get(revision) or self.tags.get(revision):
            return commit
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = [commit for oid, commit in self.commits.items() if oid.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def goes_to_lfs(self, path: str, size: int, commit: Commit) -> bool:
        """Whether `path` is stored with LFS: too large for git, or named by the commit's .gitattributes."""
        rules = commit.files.get(".gitattributes")
        lines = [line.split() for line in rules.data.decode().splitlines()] if rules else []
        patterns = [line[0] for line in lines if "filter=lfs" in line[1:]]
        names = [(path, pattern) if "/" in pattern else (path.split("/")[-1], pattern) for pattern in patterns]
        return size > MAX_REGULAR_SIZE or any(fnmatch.fnmatchcase(*name) for name in names)

    def _append(self, branch: str, files: Mapping[str, Blob], title: str, message: str, author: str) -> Commit:
        parent, date = self.branches.get(branch), datetime.now(timezone.utc)
        listing = [f"{path} {blob.oid}" for path, blob in sorted(files.items())]
        facts = [self.id, parent and parent.oid, title, message, author, timestamp(date), *listing]
        oid = git_oid("commit", "\n".join(map(str, facts)).encode())
        commit = Commit(oid, parent, title, message, author, date, dict(sorted(files.items())))
        self.commits[oid] = self.branches[branch] = commit
        return commit

    def write(self, branch: str, files: Mapping[str, bytes | str], delete: Iterable[str], title: str) -> Commit:
        """A commit made from Python, as by the owner; paths are checked, cards are not."""
        head = self.branches[branch]
        if missing := set(delete) - head.files.keys():
            raise KeyError(f"Not in {self.id}: {sorted(missing)}")
        contents = {check_path(path): data.encode() if isinstance(data, str) else data for path, data in files.items()}
        new = {path: Blob(data, self.goes_to_lfs(path, len(data), head)) for path, data in contents.items()}
        self.lfs.update({blob.sha256: blob.data for blob in new.values() if blob.lfs})
        kept = {path: head.files[path] for path in head.files.keys() - set(delete)}
        return self._append(branch, kept | new, title, "", self.owner)

    def commit(self, branch: str, operations: list[dict], author: str) -> Commit:
        """Apply the lines of a commit request, all of them or none."""
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
        clash = sorted(path for path in files if any(other.startswith(path + "/") for other in files))
        if clash:
            raise HubError(400, f"Both a file and a folder: {clash[0]}")
        card = files.get("README.md")
        if card is not None and card is not head.files.get("README.md"):
            errors, _ = check_card(card.data.decode(errors="replace"))
            if errors:
                raise HubError(400, "Invalid metadata in README.md.\n" + "\n".join(f"- {error}" for error in errors))
        return self._append(branch, files, header["summary"], header.get("description") or "", author)

    def _apply(self, key: str, value: dict, files: dict[str, Blob]) -> None:
        path = check_path(value["path"].removesuffix("/") if key == "deletedFolder" else value["path"])
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
        """What `model_info` and `dataset_info` read; the counts are zero, as nobody uses this Hub."""
        readme = commit.files.get("README.md")
        card = read_card(readme.data.decode(errors="replace")) if readme else {}
        siblings: list[dict] = [{"rfilename": path} for path in commit.files]
        if blobs:
            for sibling, (path, blob) in zip(siblings, commit.files.items(), strict=True):
                sibling |= {"size": len(blob.data), "blobId": blob.oid}
                if lfs := commit.entry(path).get("lfs"):
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        first = list(commit.history())[-1]
        facts = {"id": self.id, "author": self.owner, "sha": commit.oid, "private": self.private, "gated": False}
        facts |= {"disabled": False, "downloads": 0, "likes": 0, "siblings": siblings, "cardData": card}
        facts |= {"createdAt": timestamp(first.date), "lastModified": timestamp(commit.date)}
        tags = list(as_list(card.get("tags")))
        for key, prefix in (("license", "license"), ("datasets", "dataset"), ("base_model", "base_model")):
            tags += [f"{prefix}:{value}" for value in as_list(card.get(key))]
        if self.type == "model":
            config = read_config(commit)
            library = card.get("library_name") or ("transformers" if "model_type" in config else None)
            tags += [tag for tag in (library, card.get("pipeline_tag")) if tag]
            keys = ("architectures", "auto_map", "model_type")
            facts |= {"modelId": self.id, "config": {key: config[key] for key in keys if key in config}}
            facts |= {"library_name": library, "pipeline_tag": card.get("pipeline_tag"), "spaces": []}
            facts |= {"model-index": card.get("model-index")}
        return facts | {"tags": list(dict.fromkeys(tags))}
