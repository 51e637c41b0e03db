"""Endpoints of the fake Hub: the effect of each request on the repositories, and the permissions."""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote

from fake_hub.cards import validate_card
from fake_hub.storage import (
    Commit,
    HubError,
    Repository,
    format_timestamp,
    git_oid,
    sha256,
    validate_path,
    validate_ref_name,
)

REPO_NAME = re.compile(r"(?![.-])(?!.*(?:--|\.\.))[\w.-]{1,96}(?<![.-])(?<!\.git)", re.ASCII)

API = r"/api/(?P<kind>model|dataset)s/(?P<id>[^/]+(?:/[^/]+)?)"
SITE = r"/(?:(?P<kind>dataset)s/)?(?P<id>[^/]+(?:/[^/]+)?)"
REVISION = r"(?P<revision>[^/]+)"
# Method, path, name of the method of `Routes`, and the access that it needs. An upload needs a ticket instead: the
# random part of its URL.
ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami", None),
    ("POST", r"/api/validate-yaml", "validate_yaml", None),
    ("POST", r"/api/repos/create", "create_repo", None),
    ("DELETE", r"/api/repos/delete", "delete_repo", None),
    ("PUT", r"/lfs-storage/(?P<ticket>[0-9a-f]+)", "upload", "ticket"),
    ("GET", rf"{API}(?:/revision/{REVISION})?", "info", "read"),
    ("GET", rf"{API}/auth-check", "auth_check", "read"),
    ("GET", rf"{API}/auth-check/write", "auth_check", "write"),
    ("GET", rf"{API}/refs", "refs", "read"),
    ("GET", rf"{API}/commits/{REVISION}", "commits", "read"),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.+))?", "tree", "read"),
    ("POST", rf"{API}/paths-info/{REVISION}", "paths_info", "read"),
    ("GET|HEAD", rf"{SITE}/resolve/{REVISION}/(?P<path>.+)", "resolve", "read"),
    ("POST", rf"{API}/preupload/{REVISION}", "preupload", "write"),
    ("POST", rf"{API}/commit/{REVISION}", "commit", "write"),
    ("POST", rf"{API}/branch/(?P<name>[^/]+)", "create_branch", "write"),
    ("DELETE", rf"{API}/branch/(?P<name>[^/]+)", "delete_branch", "write"),
    ("POST", rf"{API}/tag/{REVISION}", "create_tag", "write"),
    ("DELETE", rf"{API}/tag/(?P<name>[^/]+)", "delete_tag", "write"),
    ("POST", rf"{SITE}\.git/info/lfs/objects/batch", "lfs_batch", "write"),
    ("POST", rf"{SITE}\.git/info/lfs/verify", "lfs_verify", "write"),
)


@dataclass
class Request:
    """Incoming request, with the user and the role of its token."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    user: str | None = None
    role: str = "read"

    def get_flag(self, name: str) -> bool:
        """Return a boolean parameter of the query."""
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")

    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Reply:
    """Status, body and headers of a reply."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: object, status: int = 200) -> "Reply":
        """Create a reply whose body is the JSON of `value`."""
        return cls(status, json.dumps(value, default=str).encode(), {"Content-Type": "application/json"})


def error_reply(error: HubError) -> Reply:
    """Create the reply for an error. The client reads the headers, and some callers of it read the body."""
    reply = Reply.from_json({"error": error.message, **error.body}, error.status)
    # A header is one line of ASCII.
    message = " ".join(error.message.encode("ascii", "replace").decode().split())
    code = {"X-Error-Code": error.code} if error.code else {}
    reply.headers |= {"X-Error-Message": message, **code, **error.headers}
    return reply


class Routes:
    """The repositories and the endpoints. Not thread-safe: the server handles one request at a time.

    Args:
        url: Address of the server.
        tokens: The user of each valid token, or the user and the role ("read" or "write"). The default is "write".
    """

    def __init__(self, url: str, tokens: Mapping[str, str | tuple[str, str]]):
        self.url = url
        self.accounts = {token: (user, "write") if isinstance(user, str) else user for token, user in tokens.items()}
        self.repositories: dict[tuple[str, str], Repository] = {}
        # Repository, oid and size of the object that a ticket permits to upload.
        self.tickets: dict[str, tuple[Repository, str, int]] = {}
        self.routes = [(method, re.compile(pattern), name, access) for method, pattern, name, access in ROUTES]

    def handle(self, request: Request) -> Reply | None:
        """Return the reply to a request, or None if there is no endpoint for it."""
        for method, pattern, name, access in self.routes:
            if request.method in method.split("|") and (match := pattern.fullmatch(request.path)):
                arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                try:
                    if access != "ticket":
                        self._authenticate(request)
                    if access in ("read", "write"):
                        kind, repo_id = arguments.pop("kind", "model"), arguments.pop("id")
                        arguments["repo"] = self._get_repo(request, kind, repo_id, access)
                    reply = getattr(self, name)(request, **arguments)
                except HubError as error:
                    return error_reply(error)
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    return error_reply(HubError(400, f"Malformed request: {error!r}"))
                return reply if isinstance(reply, Reply) else Reply.from_json(reply)
        return None

    def _authenticate(self, request: Request) -> None:
        if header := request.headers.get("Authorization"):
            account = self.accounts.get(header.removeprefix("Bearer "))
            if account is None or not header.startswith("Bearer "):
                raise HubError(401, "Invalid credentials in Authorization header")
            request.user, request.role = account

    def _get_repo(self, request: Request, kind: str, repo_id: str, access: str) -> Repository:
        """Return a repository if the user has access to it. A private repository of another user is not found."""
        repo = self.repositories.get((kind, repo_id))
        hidden = repo is None or (repo.private and request.user != repo.owner)
        if request.user is None and (hidden or access == "write"):
            # The client reports a 401 without a code as an unknown repository, but only for https addresses.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if hidden:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if access == "write":
            if request.get_flag("create_pr"):
                raise HubError(403, "Discussions are disabled for this repository")
            if request.user != repo.owner:
                raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
            self._validate_write_access(request)
        return repo

    def _validate_write_access(self, request: Request) -> None:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        if request.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")

    def whoami(self, request: Request) -> dict:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": request.role}}
        names = {"type": "user", "id": git_oid("user", request.user.encode())[:24], "name": request.user}
        return names | {"fullname": request.user, "isPro": False, "canPay": False, "orgs": [], "auth": token}

    def validate_yaml(self, request: Request) -> Reply:
        errors, warnings = (
            [{"message": text} for text in texts] for texts in validate_card(request.json()["content"])
        )
        return Reply.from_json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def _get_repo_address(self, request: Request) -> tuple[str, str, str]:
        """Return the kind, the id and the URL of the repository that a request creates or deletes."""
        self._validate_write_access(request)
        body = request.json()
        kind, owner = body.get("type") or "model", body.get("organization") or request.user
        if kind not in ("model", "dataset") or not REPO_NAME.fullmatch(body["name"]):
            raise HubError(400, f"Invalid repo name or type: {body['name']} ({kind})")
        if owner != request.user:
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        path = f"{owner}/{body['name']}"
        return kind, path, f"{self.url}/{path}" if kind == "model" else f"{self.url}/{kind}s/{path}"

    def create_repo(self, request: Request) -> dict:
        kind, name, url = self._get_repo_address(request)
        if (kind, name) in self.repositories:
            raise HubError(409, f"You already created this {kind} repo", url=url)
        body = request.json()
        private = body.get("visibility", "private" if body.get("private") else "public") == "private"
        self.repositories[kind, name] = Repository(name, kind, private)
        return {"url": url, "name": name}

    def delete_repo(self, request: Request) -> dict:
        kind, name, _ = self._get_repo_address(request)
        if self.repositories.pop((kind, name), None) is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return {}

    def info(self, request: Request, repo: Repository, revision: str = "main") -> dict:
        info = repo.info(repo.resolve(revision), request.get_flag("blobs"))
        keys = request.query.get("expand")
        return {key: info[key] for key in ("id", *keys) if key in info} if keys else info

    def auth_check(self, request: Request, repo: Repository) -> dict:
        return {"ok": True}

    def refs(self, request: Request, repo: Repository) -> dict:
        def list_refs(prefix: str, commits: Mapping[str, Commit]) -> list[dict]:
            return [
                {"name": name, "ref": prefix + name, "targetCommit": commit.oid} for name, commit in commits.items()
            ]

        branches, tags = list_refs("refs/heads/", repo.branches), list_refs("refs/tags/", repo.tags)
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def commits(self, request: Request, repo: Repository, revision: str) -> list[dict]:
        return [
            {
                "id": commit.oid,
                "authors": [{"user": commit.author}],
                "date": format_timestamp(commit.date),
                "title": commit.title,
                "message": commit.message,
            }
            for commit in repo.resolve(revision).history()
        ]

    def tree(self, request: Request, repo: Repository, revision: str, path: str = "") -> list[dict]:
        commit = repo.resolve(revision)
        paths = commit.tree(path.strip("/"), request.get_flag("recursive"))
        return [commit.entry(entry, request.get_flag("expand")) for entry in paths]

    def paths_info(self, request: Request, repo: Repository, revision: str) -> list[dict]:
        commit, form = repo.resolve(revision), parse_qs(request.body.decode())
        expand = form.get("expand", [""])[0].lower() == "true"
        entries = [commit.entry(path.strip("/"), expand) for path in form["paths"]]
        return [entry for entry in entries if entry]

    def resolve(self, request: Request, repo: Repository, revision: str, path: str) -> Reply:
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if (blob := commit.files.get(path)) is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{blob.content_oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        byte_range = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if not byte_range or byte_range[0] == "bytes=-":
            return Reply(200, blob.data, headers)
        size, first, last = len(blob.data), byte_range[1], byte_range[2]
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        return Reply(206, blob.data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    def preupload(self, request: Request, repo: Repository, revision: str) -> dict:
        commit, files = repo.resolve(revision), []
        for file in request.json()["files"]:
            path, blob = validate_path(file["path"]), commit.files.get(file["path"])
            mode = "lfs" if repo.uses_lfs(path, file["size"], commit) else "regular"
            oid = {"oid": blob.content_oid} if blob else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": files, "commitOid": commit.oid}

    def lfs_batch(self, request: Request, repo: Repository) -> dict:
        body = request.json()
        if body["operation"] != "upload" or "basic" not in body.get("transfers", ["basic"]):
            raise HubError(422, "Only uploads with the basic transfer are served")
        objects = [self._describe_lfs_object(repo, item["oid"], item["size"]) for item in body["objects"]]
        return {"transfer": "basic", "objects": objects}

    def _describe_lfs_object(self, repo: Repository, oid: str, size: int) -> dict:
        """Return the upload URL of an LFS object. There is none if the object is stored already."""
        lfs_object = {"oid": oid, "size": size}
        if not re.fullmatch(r"[0-9a-f]{64}", oid) or size < 0:
            return lfs_object | {"error": {"code": 422, "message": "Invalid oid or size"}}
        if oid in repo.lfs and len(repo.lfs[oid]) == size:
            return lfs_object
        ticket = secrets.token_hex(16)
        self.tickets[ticket] = (repo, oid, size)
        verify = {"href": f"{self.url}/{repo.url_path}.git/info/lfs/verify"}
        upload = {"href": f"{self.url}/lfs-storage/{ticket}", "header": {}}
        return lfs_object | {"authenticated": True, "actions": {"upload": upload, "verify": verify}}

    def upload(self, request: Request, ticket: str) -> Reply:
        """Store an LFS object. Like a signed URL of a storage server, the URL is for one object, without a token."""
        if ticket not in self.tickets:
            raise HubError(403, "Request has expired")
        if "Authorization" in request.headers:
            raise HubError(400, "Only one auth mechanism allowed")
        repo, oid, size = self.tickets[ticket]
        if len(request.body) != size or sha256(request.body) != oid:
            raise HubError(400, "The content does not match its oid and size")
        repo.lfs[oid] = request.body
        return Reply(headers={"ETag": f'"{oid}"'})

    def lfs_verify(self, request: Request, repo: Repository) -> dict:
        body = request.json()
        if body["oid"] not in repo.lfs or len(repo.lfs[body["oid"]]) != body["size"]:
            raise HubError(404, "Object does not exist on the server, or has another size")
        return {}

    def commit(self, request: Request, repo: Repository, revision: str) -> dict:
        commit = repo.commit(revision, [json.loads(line) for line in request.body.splitlines()], request.user)
        url = f"{self.url}/{repo.url_path}/commit/{commit.oid}"
        return {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}

    def create_branch(self, request: Request, repo: Repository, name: str) -> dict:
        if validate_ref_name(name) in repo.branches:
            raise HubError(409, "Reference already exists")
        repo.branches[name] = repo.resolve(request.json().get("startingPoint", "main"))
        return {}

    def delete_branch(self, request: Request, repo: Repository, name: str) -> dict:
        if name == "main":
            raise HubError(403, "Cannot delete the main branch")
        if repo.branches.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}

    def create_tag(self, request: Request, repo: Repository, revision: str) -> dict:
        name, commit = validate_ref_name(request.json()["tag"]), repo.resolve(revision)
        if name in repo.tags:
            raise HubError(409, "Tag already exists")
        repo.tags[name] = commit
        return {}

    def delete_tag(self, request: Request, repo: Repository, name: str) -> dict:
        if repo.tags.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}
