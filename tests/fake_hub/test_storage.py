"""Tests of repositories: a commit applies completely or raises the error of the real Hub."""

import base64
import hashlib

import pytest
from fake_hub.storage import HubError, Repository

DATA = bytes(range(256))
TEXT = {"content": base64.b64encode(b"text").decode(), "encoding": "base64"}
POINTER = {"path": "w.bin", "algo": "sha256", "oid": hashlib.sha256(DATA).hexdigest(), "size": len(DATA)}


@pytest.fixture
def repo():
    repo = Repository("alice/model", "model", private=False)
    repo.write("main", {"a.txt": "one", "x/b.txt": "two", "w.bin": DATA}, (), "Files")
    return repo


def commit_lines(*operations, **header):
    """Return the lines of a commit request: the header, and operations as pairs of key and value."""
    return [
        {"key": "header", "value": {"summary": "A commit"} | header},
        *({"key": key, "value": value} for key, value in operations),
    ]


@pytest.mark.parametrize(
    "operation, status, message",
    [
        (("lfsFile", POINTER | {"oid": "0" * 64}), 400, "an LFS pointer pointed to a file that does not exist"),
        (("lfsFile", POINTER | {"size": 1}), 400, "an LFS pointer pointed to a file that does not exist"),
        (("lfsFile", POINTER | {"algo": "md5"}), 400, "an LFS pointer pointed to a file that does not exist"),
        (("file", TEXT | {"path": "../up.txt"}), 400, "Invalid path"),
        (("file", TEXT | {"path": "x/../../up.txt"}), 400, "Invalid path"),
        (("file", TEXT | {"path": "/etc/passwd"}), 400, "Invalid path"),
        (("file", TEXT | {"path": "x/.git/config"}), 400, "Invalid path"),
        (("file", TEXT | {"path": "x//y"}), 400, "Invalid path"),
        (("file", TEXT | {"path": "a.txt/b.txt"}), 400, "Both a file and a folder: a.txt"),
        (("file", TEXT | {"path": "b.txt", "content": "no base64!"}), 400, "is not base64"),
        (("file", TEXT | {"path": "b.txt", "encoding": "utf-8"}), 400, "Unknown encoding"),
        (("file", TEXT | {"path": "b.txt", "content": "AAAA" * (4 * 2**20)}), 400, "files larger than 10 MiB"),
        (("deletedFile", {"path": "x"}), 404, "A file with this name doesn't exist: x"),
        (("deletedFolder", {"path": "a.txt/"}), 404, "A folder with this name doesn't exist: a.txt"),
        (("deletedFolder", {"path": ""}), 400, "Invalid path"),
        (("renamedFile", {"path": "a.txt"}), 400, "Unknown operation: renamedFile"),
    ],
)
def test_commit_invalid_operation_raises(repo, operation, status, message):
    before = repo.resolve("main")
    with pytest.raises(HubError, match=message) as error:
        repo.commit("main", commit_lines(("file", TEXT | {"path": "good.txt"}), operation), "alice")
    assert error.value.status == status
    assert repo.resolve("main") is before and list(before.files) == [".gitattributes", "a.txt", "w.bin", "x/b.txt"]


@pytest.mark.parametrize(
    "branch, operations, status",
    [
        ("main", [], 400),
        ("main", commit_lines()[1:] + [{"key": "file", "value": TEXT | {"path": "b.txt"}}], 400),
        ("main", commit_lines(summary=""), 400),
        ("none", commit_lines(), 404),
        ("main", commit_lines(parentCommit="0" * 40), 412),
    ],
)
def test_commit_invalid_header_branch_or_parent_raises(repo, branch, operations, status):
    with pytest.raises(HubError) as error:
        repo.commit(branch, operations, "alice")
    assert error.value.status == status


def test_commit_applies_operations_in_order(repo):
    before = repo.resolve("main")
    operations = [
        ("deletedFolder", {"path": "x/"}),
        ("file", TEXT | {"path": "x"}),
        ("deletedFile", {"path": "a.txt"}),
        ("lfsFile", POINTER | {"path": "v.bin"}),
    ]
    commit = repo.commit("main", commit_lines(*operations, parentCommit=before.oid, description="More"), "bob")
    assert {path: blob.data for path, blob in commit.files.items() if path[0] != "."} == {
        "v.bin": DATA,
        "w.bin": DATA,
        "x": b"text",
    }
    assert (commit.parent, commit.title, commit.message, commit.author) == (before, "A commit", "More", "bob")
    assert commit.oid != repo.commit("main", commit_lines(), "bob").oid and repo.resolve(commit.oid[:7]) is commit
    assert [commit.last_change(path).title for path in ("x", "w.bin", ".gitattributes")] == [
        "A commit",
        "Files",
        "initial commit",
    ]


def test_commit_validates_changed_card_only(repo):
    repo.write("main", {"README.md": "---\n- wrong\n---\n"}, (), "Seed")
    repo.commit("main", commit_lines(("deletedFile", {"path": "a.txt"})), "alice")
    card = {"path": "README.md", "encoding": "base64", "content": base64.b64encode(b"---\n- worse\n---\n").decode()}
    with pytest.raises(HubError, match="Invalid metadata in README.md"):
        repo.commit("main", commit_lines(("file", card)), "alice")
    repo.commit("main", commit_lines(("file", card | {"path": "docs/README.md"})), "alice")


def test_write_uses_lfs_by_pattern_and_size():
    files = {"a.txt": b"x", "model.bin": b"bin", "runs/events.out.tfevents.1": b"tf", "x/plot.png": b"png"}
    expected = {"model": ["model.bin", "runs/events.out.tfevents.1"]}
    expected["dataset"] = [*expected["model"], "x/plot.png"]
    for kind, paths in expected.items():
        commit = Repository("alice/name", kind, private=False).write("main", files, (), "Files")
        assert [path for path, blob in commit.files.items() if blob.lfs] == paths
    repo = Repository("alice/name", "model", private=False)
    head = repo.write("main", {".gitattributes": "*.txt filter=lfs diff=lfs\n*.bin text\n"}, (), "Rules")
    assert repo.uses_lfs("x/a.txt", 1, head) and not repo.uses_lfs("a.bin", 10 * 2**20, head)
    assert repo.uses_lfs("a.bin", 10 * 2**20 + 1, head)
