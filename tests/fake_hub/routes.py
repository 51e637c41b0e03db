"""The endpoints of the tests' Hub: what each request does to the repositories, and who may send it."""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote

from fake_hub.cards import check_card
from fake_hub.storage import Commit, HubError, Repository, check_path, check_ref_name, git_oid, sha256, timestamp

REPO_NAME = re.compile(r"(?![.-])(?!.*(?:--|\.\.))[\w.-]{1,96}(?<![.-])(?<!\.git)", re.ASCII)

API = r"/api/(?P<kind>model|dataset)s/(?P<id>[^/]+(?:/[^/]+)?)"
SITE = r"/(?:(?P<kind>dataset)s/)?(?P<id>[^/]+(?:/[^/]+)?)"
REVISION = r"(?P<revision>[^/]+)"
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
class Call:
    """A request as it came in, and on whose behalf."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    user: str | None = None
    role: str = "read"

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")

    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: object, status: int = 200) -> "Reply":
        return cls(status, json.dumps(value, default=str).encode(), {"Content-Type": "application/json"})


def refusal(error: HubError) -> Reply:
    """The answer to a refused request; the client reads the headers, and some callers the body."""
    reply = Reply.of({"error": error.message, **error.body}, error.status)
    # A header is one line of ASCII.
    message = " ".join(error.message.encode("ascii", "replace").decode().split())
    code = {"X-Error-Code": error.code} if error.code else {}
    reply.headers |= {"X-Error-Message": message, **code, **error.headers}
    return reply


class Routes:
    """The repositories and the endpoints; its caller sees to it that one request runs at a time."""

    def __init__(self, url: str, tokens: Mapping[str, str | tuple[str, str]]):
        self.url = url
        self.accounts = {token: (who, "write") if isinstance(who, str) else who for token, who in tokens.items()}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tickets: dict[str, tuple[Repository, str, int]] = {}
        self.routes = [(method, re.compile(pattern), name, access) for method, pattern, name, access in ROUTES]

    def handle(self, call: Call) -> Reply | None:
        """The reply to a request; None where nothing is served at its address."""
        for method, pattern, name, access in self.routes:
            if call.method in method.split("|") and (match := pattern.fullmatch(call.path)):
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                try:
                    if access != "ticket":
                        self._authenticate(call)
                    if access in ("read", "write"):
                        found["repo"] = self._open(call, found.pop("kind", "model"), found.pop("id"), access)
                    reply = getattr(self, name)(call, **found)
                except HubError as error:
                    return refusal(error)
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    return refusal(HubError(400, f"Malformed request: {error!r}"))
                return reply if isinstance(reply, Reply) else Reply.of(reply)
        return None

    def _authenticate(self, call: Call) -> None:
        if header := call.headers.get("Authorization"):
            account = self.accounts.get(header.removeprefix("Bearer "))
            if account is None or not header.startswith("Bearer "):
                raise HubError(401, "Invalid credentials in Authorization header")
            call.user, call.role = account

    def _open(self, call: Call, kind: str, repo_id: str, access: str) -> Repository:
        """The repository, if the caller may use it so; a private one of others does not exist for the caller."""
        repo = self.repositories.get((kind, repo_id))
        hidden = repo is None or (repo.private and call.user != repo.owner)
        if call.user is None and (hidden or access == "write"):
            # The client takes a bare 401 for an unknown repository, but only at an https address.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if hidden:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if access == "write":
            if call.flag("create_pr"):
                raise HubError(403, "Discussions are disabled for this repository")
            if call.user != repo.owner:
                raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
            self._require_write(call)
        return repo

    def _require_write(self, call: Call) -> None:
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        if call.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")

    def whoami(self, call: Call) -> dict:
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": call.role}}
        names = {"type": "user", "id": git_oid("user", call.user.encode())[:24], "name": call.user}
        return names | {"fullname": call.user, "isPro": False, "canPay": False, "orgs": [], "auth": token}

    def validate_yaml(self, call: Call) -> Reply:
        errors, warnings = ([{"message": text} for text in texts] for texts in check_card(call.json()["content"]))
        return Reply.of({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def _named(self, call: Call) -> tuple[str, str, str]:
        """The kind, the name and the address of the repository that a create or delete request speaks of."""
        self._require_write(call)
        body = call.json()
        kind, owner = body.get("type") or "model", body.get("organization") or call.user
        if kind not in ("model", "dataset") or not REPO_NAME.fullmatch(body["name"]):
            raise HubError(400, f"Invalid repo name or type: {body['name']} ({kind})")
        if owner != call.user:
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        path = f"{owner}/{body['name']}"
        return kind, path, f"{self.url}/{path}" if kind == "model" else f"{self.url}/{kind}s/{path}"

    def create_repo(self, call: Call) -> dict:
        kind, name, url = self._named(call)
        if (kind, name) in self.repositories:
            raise HubError(409, f"You already created this {kind} repo", url=url)
        body = call.json()
        private = body.get("visibility", "private" if body.get("private") else "public") == "private"
        self.repositories[kind, name] = Repository(name, kind, private)
        return {"url": url, "name": name}

    def delete_repo(self, call: Call) -> dict:
        kind, name, _ = self._named(call)
        if self.repositories.pop((kind, name), None) is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return {}

    def info(self, call: Call, repo: Repository, revision: str = "main") -> dict:
        facts = repo.info(repo.resolve(revision), call.flag("blobs"))
        wanted = call.query.get("expand")
        return {key: facts[key] for key in ("id", *wanted) if key in facts} if wanted else facts

    def auth_check(self, call: Call, repo: Repository) -> dict:
        return {"ok": True}

    def refs(self, call: Call, repo: Repository) -> dict:
        def listed(prefix: str, commits: Mapping[str, Commit]) -> list[dict]:
            return [{"name": name, "ref": prefix + name, "targetCommit": c.oid} for name, c in commits.items()]

        branches, tags = listed("refs/heads/", repo.branches), listed("refs/tags/", repo.tags)
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def commits(self, call: Call, repo: Repository, revision: str) -> list[dict]:
        def listed(c: Commit) -> dict:
            text = {"title": c.title, "message": c.message}
            return {"id": c.oid, "authors": [{"user": c.author}], "date": timestamp(c.date), **text}

        return [listed(commit) for commit in repo.resolve(revision).history()]

    def tree(self, call: Call, repo: Repository, revision: str, path: str = "") -> list[dict]:
        commit = repo.resolve(revision)
        paths = commit.tree(path.strip("/"), call.flag("recursive"))
        return [commit.entry(each, call.flag("expand")) for each in paths]

    def paths_info(self, call: Call, repo: Repository, revision: str) -> list[dict]:
        commit, form = repo.resolve(revision), parse_qs(call.body.decode())
        expand = form.get("expand", [""])[0].lower() == "true"
        entries = [commit.entry(path.strip("/"), expand) for path in form["paths"]]
        return [entry for entry in entries if entry]

    def resolve(self, call: Call, repo: Repository, revision: str, path: str) -> Reply:
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if (blob := commit.files.get(path)) is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{blob.content_oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
        if not wanted or wanted[0] == "bytes=-":
            return Reply(200, blob.data, headers)
        size, first, last = len(blob.data), wanted[1], wanted[2]
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        return Reply(206, blob.data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    def preupload(self, call: Call, repo: Repository, revision: str) -> dict:
        commit, files = repo.resolve(revision), []
        for file in call.json()["files"]:
            path, blob = check_path(file["path"]), commit.files.get(file["path"])
            mode = "lfs" if repo.goes_to_lfs(path, file["size"], commit) else "regular"
            oid = {"oid": blob.content_oid} if blob else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": files, "commitOid": commit.oid}

    def lfs_batch(self, call: Call, repo: Repository) -> dict:
        body = call.json()
        if body["operation"] != "upload" or "basic" not in body.get("transfers", ["basic"]):
            raise HubError(422, "Only uploads with the basic transfer are served")
        objects = [self._lfs_object(repo, each["oid"], each["size"]) for each in body["objects"]]
        return {"transfer": "basic", "objects": objects}

    def _lfs_object(self, repo: Repository, oid: str, size: int) -> dict:
        known = {"oid": oid, "size": size}
        if not re.fullmatch(r"[0-9a-f]{64}", oid) or size < 0:
            return known | {"error": {"code": 422, "message": "Invalid oid or size"}}
        if oid in repo.lfs and len(repo.lfs[oid]) == size:
            return known
        ticket = secrets.token_hex(16)
        self.tickets[ticket] = (repo, oid, size)
        verify = {"href": f"{self.url}/{repo.url_path}.git/info/lfs/verify"}
        upload = {"href": f"{self.url}/lfs-storage/{ticket}", "header": {}}
        return known | {"authenticated": True, "actions": {"upload": upload, "verify": verify}}

    def upload(self, call: Call, ticket: str) -> Reply:
        """Like a storage host's signed address: it takes the one object it was made for, and no token."""
        if ticket not in self.tickets:
            raise HubError(403, "Request has expired")
        if "Authorization" in call.headers:
            raise HubError(400, "Only one auth mechanism allowed")
        repo, oid, size = self.tickets[ticket]
        if len(call.body) != size or sha256(call.body) != oid:
            raise HubError(400, "The content does not match its oid and size")
        repo.lfs[oid] = call.body
        return Reply(headers={"ETag": f'"{oid}"'})

    def lfs_verify(self, call: Call, repo: Repository) -> dict:
        body = call.json()
        if body["oid"] not in repo.lfs or len(repo.lfs[body["oid"]]) != body["size"]:
            raise HubError(404, "Object does not exist on the server, or has another size")
        return {}

    def commit(self, call: Call, repo: Repository, revision: str) -> dict:
        commit = repo.commit(revision, [json.loads(line) for line in call.body.splitlines()], call.user)
        url = f"{self.url}/{repo.url_path}/commit/{commit.oid}"
        return {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}

    def create_branch(self, call: Call, repo: Repository, name: str) -> dict:
        if check_ref_name(name) in repo.branches:
            raise HubError(409, "Reference already exists")
        repo.branches[name] = repo.resolve(call.json().get("startingPoint", "main"))
        return {}

    def delete_branch(self, call: Call, repo: Repository, name: str) -> dict:
        if name == "main":
            raise HubError(403, "Cannot delete the main branch")
        if repo.branches.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}

    def create_tag(self, call: Call, repo: Repository, revision: str) -> dict:
        name, commit = check_ref_name(call.json()["tag"]), repo.resolve(revision)
        if name in repo.tags:
            raise HubError(409, "Tag already exists")
        repo.tags[name] = commit
        return {}

    def delete_tag(self, call: Call, repo: Repository, name: str) -> dict:
        if repo.tags.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}
