"""Tests of the fake Hub with the real client: it accepts and rejects the same requests as the real Hub."""

import base64
import hashlib
import json
import socket
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub.server import Hub, RequestRecord
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

TOKENS = {"hf_alice": "alice", "hf_reader": ("alice", "read"), "hf_bob": "bob"}
WEIGHTS = bytes(range(256)) * 16


@pytest.fixture
def hub(monkeypatch):
    # Another test may have imported the client already, so environment variables have no effect.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with Hub(TOKENS) as hub:
        yield hub
    assert hub.unknown_requests == []


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="hf_alice")


def send_request(hub, method, path, body=b"", token="hf_alice", **headers):
    """Send a request that the client does not send. Return the status, the headers and the body of the reply."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(hub.url + path, data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as reply:
        return reply.code, reply.headers, reply.read()


def get_status(error):
    return error.value.response.status_code


def test_upload_and_download_preserve_files(hub, api, tmp_path):
    files = {"config.json": b'{"model_type": "vit"}', "sub/notes.txt": "für später".encode(), "empty.bin": b""}
    files |= {"model.safetensors": WEIGHTS, "large.txt": b"x" * (10 * 2**20 + 1)}
    for path, data in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(data)
    url = api.create_repo("alice/model", private=True)
    assert (url.repo_id, url.endpoint) == ("alice/model", hub.url)
    commit_id = api.upload_folder(repo_id="alice/model", folder_path=tmp_path / "folder").oid

    stored = hub.files("alice/model")
    assert stored.pop(".gitattributes").startswith(b"*.7z filter=lfs")
    assert stored == files
    blobs = hub.repo("alice/model").resolve("main").files
    assert [path for path, blob in blobs.items() if blob.lfs] == ["large.txt", "model.safetensors"]
    snapshot = Path(api.snapshot_download("alice/model", cache_dir=tmp_path / "cache"))
    assert {path: (snapshot / path).read_bytes() for path in files} == files

    for path, data in files.items():
        entry = api.get_hf_file_metadata(url=f"{hub.url}/alice/model/resolve/main/{path}")
        lfs, regular = hashlib.sha256(data), hashlib.sha1(b"blob %d\0" % len(data) + data)
        assert entry.etag == (lfs if blobs[path].lfs else regular).hexdigest()
        assert (entry.size, entry.commit_hash) == (len(data), commit_id)
    info = api.model_info("alice/model", files_metadata=True)
    assert (info.sha, info.private, info.author, info.library_name) == (commit_id, True, "alice", "transformers")
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs and sibling.lfs.sha256) for sibling in info.siblings}
    assert sizes["config.json"] == (21, None)
    assert sizes["model.safetensors"] == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())


def test_commit_unchanged_files_sends_nothing(hub, api):
    hub.add_repo("alice/model", {"a.txt": "one", "b.bin": WEIGHTS})
    operations = [CommitOperationAdd("a.txt", b"one"), CommitOperationAdd("b.bin", WEIGHTS)]
    commit = api.create_commit("alice/model", operations, commit_message="Nothing new")
    assert commit.oid == hub.repo("alice/model").resolve("main").oid
    assert not [request for request in hub.requests if request.method == "PUT" or "/commit/" in request.path]


def test_range_request_returns_part_of_file(hub, api):
    hub.add_repo("alice/data", {"x/a.csv": "one", "x/y/b.parquet": WEIGHTS}, repo_type="dataset")
    path = "/datasets/alice/data/resolve/main/x/y/b.parquet"
    for byte_range, data in (("bytes=2-5", WEIGHTS[2:6]), ("bytes=4000-", WEIGHTS[4000:]), ("bytes=-7", WEIGHTS[-7:])):
        status, headers, body = send_request(hub, "GET", path, token=None, Range=byte_range)
        assert (status, body, headers["Content-Length"]) == (206, data, str(len(data)))
    assert headers["Content-Range"] == "bytes 4089-4095/4096"
    assert send_request(hub, "GET", path, Range="bytes=4096-")[0] == 416


def test_listings_describe_files_and_folders(hub, api):
    hub.add_repo("alice/data", {"x/a.csv": "one", "x/y/b.parquet": WEIGHTS}, repo_type="dataset")
    tree = api.list_repo_tree("alice/data", repo_type="dataset", recursive=True, expand=True)
    entries = {entry.path: entry for entry in tree}
    assert list(entries) == [".gitattributes", "x", "x/a.csv", "x/y", "x/y/b.parquet"]
    assert entries["x/y/b.parquet"].lfs.size == len(WEIGHTS) and entries["x/a.csv"].lfs is None
    assert entries["x/a.csv"].last_commit.title == "Add files"
    assert [e.path for e in api.list_repo_tree("alice/data", "x", repo_type="dataset")] == ["x/a.csv", "x/y"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("alice/data", "z", repo_type="dataset"))
    entries = api.get_paths_info("alice/data", ["x", "x/a.csv", "none"], repo_type="dataset")
    assert [entry.path for entry in entries] == ["x", "x/a.csv"]


def test_revisions_resolve_to_commits(hub, api, tmp_path):
    first = hub.add_repo("alice/model", {"a.txt": "one"})
    api.create_tag("alice/model", tag="v1")
    api.create_branch("alice/model", branch="try/new", revision=first)
    second = api.upload_file(repo_id="alice/model", path_in_repo="a.txt", path_or_fileobj=b"two").oid
    third = api.upload_file(repo_id="alice/model", path_in_repo="a.txt", path_or_fileobj=b"3", revision="try/new").oid

    def read(revision):
        return Path(api.hf_hub_download("alice/model", "a.txt", revision=revision, cache_dir=tmp_path)).read_text()

    revisions = ["main", second, "v1", first, first[:8], "try/new", third]
    assert [read(revision) for revision in revisions] == ["two", "two", "one", "one", "one", "3", "3"]
    assert [api.repo_info("alice/model", revision=r).sha for r in ("main", "v1", "try/new")] == [second, first, third]
    titles = [entry.title for entry in api.list_repo_commits("alice/model")]
    assert titles == ["Upload a.txt with huggingface_hub", "Add files", "initial commit"]
    refs = api.list_repo_refs("alice/model")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "try/new": third}
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1", first)]


def test_create_and_delete_branch_and_tag(hub, api, tmp_path):
    hub.add_repo("alice/model", {"a.txt": "one"})
    api.create_tag("alice/model", tag="v1")
    api.create_branch("alice/model", branch="try/new")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag("alice/model", tag="v1")
    assert get_status(error) == 409
    api.create_branch("alice/model", branch="try/new", exist_ok=True)
    api.delete_tag("alice/model", tag="v1")
    api.delete_branch("alice/model", branch="try/new")
    for revision in ("v1", "try/new", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.repo_info("alice/model", revision=revision)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("alice/model", "a.txt", revision="v1", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(repo_id="alice/model", path_in_repo="a", path_or_fileobj=b"a", revision="none")
    with pytest.raises(HfHubHTTPError) as error:
        api.delete_branch("alice/model", branch="main")
    assert get_status(error) == 403


def test_commit_deletes_files_and_folders(hub, api):
    before = hub.add_repo("alice/model", {"a.txt": "one", "x/b.txt": "two", "x/c.bin": WEIGHTS})
    operations = [CommitOperationDelete("a.txt"), CommitOperationDelete("x/"), CommitOperationAdd("d.txt", b"new")]
    api.create_commit("alice/model", operations, commit_message="Tidy")
    assert set(hub.files("alice/model")) == {".gitattributes", "d.txt"}
    assert set(hub.files("alice/model", before)) == {".gitattributes", "a.txt", "x/b.txt", "x/c.bin"}
    for path in ("a.txt", "x/"):
        operations = [CommitOperationAdd("e.txt", b"e"), CommitOperationDelete(path)]
        with pytest.raises(EntryNotFoundError, match="with this name doesn't exist"):
            api.create_commit("alice/model", operations, commit_message="Again")
    assert "e.txt" not in hub.files("alice/model")


def test_commit_outdated_parent_raises(hub, api):
    parent = hub.add_repo("alice/model", {"a.txt": "one"})
    moved = hub.add_commit("alice/model", {"b.txt": "two"}, delete=["a.txt"])
    operations = [CommitOperationAdd("c.txt", b"three")]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.create_commit("alice/model", operations, commit_message="Late", parent_commit=parent)
    assert get_status(error) == 412
    api.create_commit("alice/model", operations, commit_message="In time", parent_commit=moved)
    assert set(hub.files("alice/model")) == {".gitattributes", "b.txt", "c.txt"}


def test_lfs_upload_other_content_is_rejected(hub):
    hub.add_repo("alice/model")
    oid = hashlib.sha256(WEIGHTS).hexdigest()

    def announce(size, oid=oid):
        body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": size}]}
        status, _, reply = send_request(hub, "POST", "/alice/model.git/info/lfs/objects/batch", body)
        assert status == 200
        return json.loads(reply)["objects"][0]

    def get_upload_path(size):
        return announce(size)["actions"]["upload"]["href"].removeprefix(hub.url)

    path = get_upload_path(len(WEIGHTS))
    for content in (WEIGHTS[:-1], WEIGHTS[:-1] + b"?", WEIGHTS + b"?"):
        assert send_request(hub, "PUT", path, content, token=None)[0] == 400
    assert send_request(hub, "PUT", get_upload_path(9), WEIGHTS, token=None)[0] == 400
    # An upload URL takes no token.
    assert send_request(hub, "PUT", path, WEIGHTS)[0] == 400
    assert send_request(hub, "PUT", "/lfs-storage/0123", WEIGHTS, token=None)[0] == 403
    verify = "/alice/model.git/info/lfs/verify"
    assert send_request(hub, "POST", verify, {"oid": oid, "size": len(WEIGHTS)})[0] == 404
    assert hub.repo("alice/model").lfs == {}

    assert send_request(hub, "PUT", path, WEIGHTS, token=None)[0] == 200
    assert send_request(hub, "POST", verify, {"oid": oid, "size": len(WEIGHTS)})[0] == 200
    assert send_request(hub, "POST", verify, {"oid": oid, "size": 1})[0] == 404
    assert "actions" not in announce(len(WEIGHTS))
    assert announce(4, oid="../etc/passwd")["error"]["code"] == 422


@pytest.fixture
def four_repos(hub):
    """Add a public and a private repository of each of two users."""
    for repo_id, private in (("alice/open", False), ("alice/closed", True), ("bob/open", False), ("bob/closed", True)):
        hub.add_repo(repo_id, {"a.txt": "one"}, private=private)


@pytest.fixture
def reader(hub):
    """Return a client whose token has no write access."""
    return HfApi(endpoint=hub.url, token="hf_reader")


@pytest.fixture
def anonymous(hub):
    return HfApi(endpoint=hub.url, token=False)


def upload(client, repo_id):
    return client.upload_file(repo_id=repo_id, path_in_repo="b.txt", path_or_fileobj=b"two")


def test_token_permits_access(four_repos, api, reader, anonymous):
    assert (api.whoami()["name"], reader.whoami()["auth"]["accessToken"]["role"]) == ("alice", "read")
    assert api.repo_exists("alice/closed")
    assert reader.repo_exists("alice/closed")
    assert anonymous.repo_exists("alice/open")


@pytest.mark.parametrize(
    "client_name, repo_id",
    [("api", "alice/none"), ("api", "bob/closed"), ("anonymous", "alice/closed"), ("anonymous", "alice/none")],
)
def test_missing_or_private_repository_is_not_found(four_repos, client_name, repo_id, request, tmp_path):
    client = request.getfixturevalue(client_name)
    for call in (client.model_info, client.list_repo_refs, lambda repo_id: upload(client, repo_id)):
        with pytest.raises(RepositoryNotFoundError) as error:
            call(repo_id)
        assert get_status(error) == (401 if client_name == "anonymous" else 404)
    with pytest.raises(RepositoryNotFoundError):
        client.hf_hub_download(repo_id, "a.txt", cache_dir=tmp_path)


def test_repository_of_other_type_is_not_found(four_repos, api):
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("alice/open")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("gpt2")


def test_upload_without_write_access_is_rejected(four_repos, hub, api, reader):
    for client, repo_id, message in (
        (api, "bob/open", "pass `create_pr=1` as a query parameter"),
        (reader, "alice/open", "you must use a write token"),
    ):
        with pytest.raises(HfHubHTTPError, match=message) as error:
            upload(client, repo_id)
        assert get_status(error) == 403
    with pytest.raises(HfHubHTTPError, match="Discussions are disabled") as error:
        api.upload_file(repo_id="bob/open", path_in_repo="b.txt", path_or_fileobj=b"two", create_pr=True)
    assert get_status(error) == 403
    assert send_request(hub, "POST", "/bob/open.git/info/lfs/objects/batch", {})[0] == 403
    assert all("b.txt" not in hub.files(name) for name in ("alice/open", "bob/open"))


def test_invalid_token_is_rejected(four_repos, hub):
    client = HfApi(endpoint=hub.url, token="hf_nonsense")
    for call in (client.whoami, lambda: client.model_info("alice/open"), lambda: upload(client, "alice/open")):
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert get_status(error) == 401
        assert error.value.response.headers["X-Error-Message"] == "Invalid credentials in Authorization header"
    assert "b.txt" not in hub.files("alice/open")


def test_missing_file_raises(hub, api, tmp_path):
    commit_id = hub.add_repo("alice/model")
    with pytest.raises(EntryNotFoundError) as error:
        api.hf_hub_download("alice/model", "none.txt", cache_dir=tmp_path)
    assert error.value.response.headers["X-Repo-Commit"] == commit_id
    assert not api.file_exists("alice/model", "none.txt")


def test_create_and_delete_repository(hub, api):
    url = api.create_repo("alice/data", repo_type="dataset")
    assert str(url) == f"{hub.url}/datasets/alice/data"
    assert api.create_repo("alice/data", repo_type="dataset", exist_ok=True) == url
    assert api.create_repo("named").repo_id == "alice/named"
    body = {"name": "a..b", "organization": "alice", "type": "model"}
    assert send_request(hub, "POST", "/api/repos/create", body)[0] == 400
    for repo_id, token, expected in (
        ("alice/named", "hf_alice", 409),
        ("bob/other", "hf_alice", 403),
        ("alice/other", "hf_reader", 403),
        ("alice/other", False, 401),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            api.create_repo(repo_id, token=token)
        assert get_status(error) == expected
    api.delete_repo("alice/named")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("alice/named")


def test_failed_upload_can_be_repeated(hub, api):
    hub.add_repo("alice/model")
    hub.drop_next_upload(after_bytes=100)
    api.upload_file(repo_id="alice/model", path_in_repo="w.bin", path_or_fileobj=WEIGHTS)
    upload_statuses = [request.status for request in hub.requests if request.method == "PUT"]
    assert upload_statuses == [None, 200]
    assert hub.files("alice/model")["w.bin"] == WEIGHTS

    hub.reject_next_upload(403)
    with pytest.raises((RuntimeError, HfHubHTTPError)):
        api.upload_file(repo_id="alice/model", path_in_repo="v.bin", path_or_fileobj=WEIGHTS[::-1])
    assert "v.bin" not in hub.files("alice/model") and len(hub.repo("alice/model").lfs) == 1
    api.upload_file(repo_id="alice/model", path_in_repo="v.bin", path_or_fileobj=WEIGHTS[::-1])
    assert hub.files("alice/model")["v.bin"] == WEIGHTS[::-1]


@pytest.mark.parametrize("stored", [False, True])
def test_lost_commit_can_be_repeated(hub, api, stored):
    hub.add_repo("alice/model")
    hub.drop_next_commit(stored)
    with pytest.raises(Exception, match="reset|disconnected"):
        api.upload_file(repo_id="alice/model", path_in_repo="w.bin", path_or_fileobj=WEIGHTS)
    assert ("w.bin" in hub.files("alice/model")) == stored
    api.upload_file(repo_id="alice/model", path_in_repo="w.bin", path_or_fileobj=WEIGHTS)
    assert hub.files("alice/model")["w.bin"] == WEIGHTS
    assert [request.status for request in hub.requests if request.method == "PUT"] == [200]
    assert len(api.list_repo_commits("alice/model")) == 2


def test_truncated_commit_request_is_ignored(hub):
    hub.add_repo("alice/model")
    file = {"path": "a.txt", "encoding": "base64", "content": base64.b64encode(b"one").decode()}
    lines = [{"key": "header", "value": {"summary": "Truncated"}}, {"key": "file", "value": file}]
    body = "\n".join(map(json.dumps, lines)).encode()
    head = "POST /api/models/alice/model/commit/main HTTP/1.1\r\nAuthorization: Bearer hf_alice\r\n"
    with socket.create_connection(("127.0.0.1", int(hub.url.split(":")[-1]))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body) + 1}\r\n\r\n".encode() + body)
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert hub.requests == [RequestRecord("POST", "/api/models/alice/model/commit/main", None, True)]
    assert "a.txt" not in hub.files("alice/model")


def test_invalid_card_is_rejected(hub, api):
    hub.add_repo("alice/model")
    invalid_card = b"---\nlicense: none\n---\n"
    with pytest.raises(ValueError, match='"license" must be one of'):
        api.upload_file(repo_id="alice/model", path_in_repo="README.md", path_or_fileobj=invalid_card)
    file = {"path": "README.md", "encoding": "base64", "content": base64.b64encode(invalid_card).decode()}
    lines = [{"key": "header", "value": {"summary": "Invalid card"}}, {"key": "file", "value": file}]
    body = "\n".join(map(json.dumps, lines)).encode()
    status, headers, reply = send_request(hub, "POST", "/api/models/alice/model/commit/main", body)
    assert status == 400 and json.loads(reply)["error"].startswith("Invalid metadata in README.md")
    assert headers["X-Error-Message"].startswith("Invalid metadata in README.md. - ")
    assert "README.md" not in hub.files("alice/model")


def test_card_fills_model_info(hub, api):
    hub.add_repo("alice/model")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata in repo card"):
        api.upload_file(repo_id="alice/model", path_in_repo="README.md", path_or_fileobj=b"# A model")
    result = {"task": {"type": "a"}, "dataset": {"type": "b", "name": "c"}, "metrics": [{"type": "d", "value": 0.5}]}
    data = {"license": "mit", "tags": ["vision"], "base_model": "google/vit", "pipeline_tag": "image-classification"}
    data |= {"model-index": [{"name": "model", "results": [result]}]}
    text = f"---\n{json.dumps(data)}\n---\n"
    api.upload_file(repo_id="alice/model", path_in_repo="README.md", path_or_fileobj=text.encode())
    info = api.model_info("alice/model")
    assert (info.pipeline_tag, info.card_data.license) == ("image-classification", "mit")
    assert {"vision", "license:mit", "base_model:google/vit", "image-classification"} == set(info.tags)
    assert info.card_data.eval_results[0].metric_value == 0.5
    partial_info = api.model_info("alice/model", expand=["sha", "tags"])
    assert (partial_info.sha, partial_info.tags, partial_info.card_data) == (info.sha, info.tags, None)


def test_requests_are_recorded(hub, api):
    api.create_repo("alice/model")
    api.create_commit(
        "alice/model",
        [CommitOperationAdd("a.txt", b"see /home/me/data"), CommitOperationAdd("w.bin", b"from /home/me/data")],
        commit_message="hf_alice did it",
    )
    assert hub.requests[0] == RequestRecord("POST", "/api/repos/create", 200, True)
    assert {request.token for request in hub.requests if request.method == "PUT"} == {False}
    endpoints = [request.path.split("/")[-2] for request in hub.requests_containing("/home/me/data")]
    assert endpoints == ["preupload", "lfs-storage", "commit"]
    assert [request.path for request in hub.requests_containing("hf_alice")] == ["/api/models/alice/model/commit/main"]
    assert hub.requests_containing("hf_bob") == []
    send_request(hub, "GET", "/api/models/alice/hf_alice", token=None)
    assert "hf_alice" not in repr(hub.requests) and hub.requests[-1].path == "/api/models/alice/***"
    assert (hub.requests[-1].status, hub.requests[-1].token) == (401, False)


def test_unknown_requests_are_recorded():
    with Hub(TOKENS) as hub:
        assert send_request(hub, "GET", "/api/trending?x=1")[0] == 404
        assert send_request(hub, "DELETE", "/api/models/alice/model")[0] == 404
        paths = [(request.method, request.path) for request in hub.unknown_requests]
    assert paths == [("GET", "/api/trending?x=1"), ("DELETE", "/api/models/alice/model")]
    with pytest.raises(urllib.error.URLError):
        send_request(hub, "GET", "/api/whoami-v2")


def test_environment_excludes_other_hub_settings(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_real")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    environment = hub.environment(cache=tmp_path)
    assert not {"HF_TOKEN", "HF_HUB_OFFLINE", "https_proxy"} & set(environment)
    assert (environment["HF_ENDPOINT"], environment["HF_HOME"]) == (hub.url, str(tmp_path))
    assert hub.environment("hf_alice", cache=tmp_path)["HF_TOKEN"] == "hf_alice"
