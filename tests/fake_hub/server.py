"""A small, strict Hugging Face Hub over HTTP on the loopback address, for tests with the real client.

    with Hub(tokens={"hf_alice": "alice", "hf_reader": ("alice", "read")}) as hub:
        HfApi(endpoint=hub.url, token="hf_alice").create_repo("alice/model")
        subprocess.run([...], env=hub.environment("hf_alice", cache=tmp_path))
        assert "config.json" in hub.files("alice/model")
        assert not hub.unknown_requests

A client in the tests' own process needs xet off (HF_HUB_DISABLE_XET) too. The endpoints are in `routes`, the
repositories in `storage`, the rules for cards in `cards`. Unlike the real Hub, this one

- has no organisations, gated repositories, Spaces, search or pages of results, and refuses pull requests with a 403;
- ignores .gitignore, takes binary files of up to 10 MiB without LFS, and never adds to .gitattributes by itself;
- tells a model's library from its card or `model_type` and its task from its card alone;
- sends LFS files itself, where the real one redirects to a storage host.
"""

import base64
import json
import os
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from fake_hub.routes import Call, Reply, Routes, refusal
from fake_hub.storage import HubError, Repository


@dataclass(frozen=True)
class Request:
    """What came in and how it ended: `status` is None where the connection was lost; `token`, whether one was sent."""

    method: str
    path: str
    status: int | None
    token: bool


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of its being answered: a refusal with `status`, or a lost connection.

    The connection is lost once `after_bytes` of the body (None: all) have arrived; if `stored`, once it was served.
    """

    status: int | None = None
    after_bytes: int | None = None
    stored: bool = False


class Hub:
    """The server, which runs from its creation to `close` or the end of a `with` block.

    `tokens` maps each valid token to its user, or to the user and "read" for a token that may not write. The user
    `alice` owns the repositories `alice/...`.
    """

    def __init__(self, tokens: Mapping[str, str | tuple[str, str]] | None = None):
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._lock = threading.RLock()
        self._routes = Routes(self.url, tokens or {})
        self._requests: list[tuple[Request, bytes]] = []
        self._unknown: list[Request] = []
        self._faults: dict[str, list[Fault]] = {"upload": [], "commit": []}
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop, and end the connections that clients keep open."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._server.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def environment(self, token: str | None = None, *, cache: Path) -> dict[str, str]:
        """The whole environment of a process that is to use this Hub: the present one, less its settings for another.

        `cache` becomes HF_HOME. The libraries' calls to other hosts are off, but for a look-up by `load_dataset` of
        the dataset viewer's name, which it makes from this Hub's and which does not exist.
        """
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(foreign)}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        on = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_SAFETENSORS_CONVERSION")
        ours |= dict.fromkeys(on, "1") | {"HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        # The client's 10 seconds are for a network, not for a busy machine.
        ours |= dict.fromkeys(("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"), "600")
        return kept | ours | ({"HF_TOKEN": token} if token else {})

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str] | None = None,
        *,
        repo_type: str = "model",
        private: bool = False,
    ) -> str:
        """A repository, also of somebody without a token; like each new one it holds .gitattributes. Its commit id."""
        with self._lock:
            if (repo_type, repo_id) in self._routes.repositories:
                raise ValueError(f"There is a {repo_type} {repo_id} already")
            repo = Repository(repo_id, repo_type, private)
            self._routes.repositories[repo_type, repo_id] = repo
            return repo.write("main", files, (), "Add files").oid if files else repo.branches["main"].oid

    def add_commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str],
        *,
        delete: Iterable[str] = (),
        revision: str = "main",
        repo_type: str = "model",
    ) -> str:
        """A commit on a branch as if its owner had made it elsewhere. Its id."""
        with self._lock:
            return self.repo(repo_id, repo_type).write(revision, files, delete, "Change files").oid

    def repo(self, repo_id: str, repo_type: str = "model") -> Repository:
        """The repository itself, with its branches, tags, commits and LFS objects; a KeyError where there is none."""
        return self._routes.repositories[repo_type, repo_id]

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The content of each file of a revision."""
        with self._lock:
            commit = self.repo(repo_id, repo_type).resolve(revision)
        return {path: blob.data for path, blob in commit.files.items()}

    @property
    def requests(self) -> list[Request]:
        """Every request so far, in the order of their ends."""
        with self._lock:
            return [request for request, _ in self._requests]

    @property
    def unknown_requests(self) -> list[Request]:
        """The requests for which there is no endpoint here: each is an error of the client or a gap of this Hub."""
        with self._lock:
            return list(self._unknown)

    def sent(self, text: str | bytes) -> list[Request]:
        """The requests that hold `text`: in their address, headers but for Authorization, or body, base64 decoded."""
        needle = text.encode() if isinstance(text, str) else text
        with self._lock:
            return [request for request, content in self._requests if needle in content]

    def drop_next_upload(self, after_bytes: int = 0, times: int = 1) -> None:
        """Reset the connection of the next `times` LFS uploads once `after_bytes` of each have arrived.

        The client tries again by itself up to five times, waiting 1, 2, 4, 8 and 8 seconds; but huggingface_hub 1.x
        gives up at once if it was still sending, as it is with files of many MB.
        """
        self._add_faults("upload", [Fault(after_bytes=after_bytes)] * times)

    def refuse_next_upload(self, status: int = 403) -> None:
        """Answer the next LFS upload with an error; the client does not try again after a 4xx."""
        self._add_faults("upload", [Fault(status)])

    def drop_next_commit(self, stored: bool = False) -> None:
        """Reset the connection of the next commit before it is made; if `stored`, after, so that the answer is lost.

        `create_commit` and, with xet off, `upload_folder` do not send a commit twice by themselves.
        """
        self._add_faults("commit", [Fault(stored=stored)])

    def _add_faults(self, kind: str, faults: list[Fault]) -> None:
        with self._lock:
            self._faults[kind] += faults

    def _fault(self, method: str, path: str) -> Fault | None:
        kind = {"PUT": "upload", "POST": "commit"}.get(method)
        if not (path.startswith("/lfs-storage/") if kind == "upload" else kind and "/commit/" in path):
            return None
        with self._lock:
            return self._faults[kind].pop(0) if self._faults[kind] else None

    def _serve(self, call: Call, target: str, fault: Fault | None) -> Reply | None:
        """The reply to a request, after it was recorded; None where the connection is to be dropped."""
        with self._lock:
            unknown, reply = False, None
            if fault and fault.status:
                reply = refusal(HubError(fault.status, "Request has expired"))
            elif fault is None or fault.stored:
                reply = self._routes.handle(call)
                unknown = reply is None
                reply = reply or refusal(HubError(404, "Sorry, we can't find the page you are looking for."))
            if fault and fault.stored:
                reply = None
            request = self._record(call, target, reply.status if reply else None)
            self._unknown += [request] if unknown else []
            return reply

    def _record(self, call: Call, target: str, status: int | None) -> Request:
        headers = "\n".join(
            f"{name}: {value}" for name, value in call.headers.items() if name.lower() != "authorization"
        )
        content = b"\n".join([target.encode(), headers.encode(), call.body, *_plain_parts(call.body)])
        for token in self._routes.accounts:
            target = target.replace(token, "***")
        request = Request(call.method, target, status, "authorization" in call.headers)
        self._requests.append((request, content))
        return request


def _plain_parts(body: bytes) -> Iterator[bytes]:
    """The strings of a JSON or NDJSON body as they read without its escapes and base64."""

    def parts(value: object) -> Iterator[bytes]:
        if isinstance(value, dict):
            for key, item in value.items():
                encoded = key == "sample" or (key == "content" and value.get("encoding") == "base64")
                yield from [base64.b64decode(item)] if encoded else parts(item)
        elif isinstance(value, list):
            for item in value:
                yield from parts(item)
        elif isinstance(value, str):
            yield value.encode()

    if body.startswith(b"{"):
        with suppress(ValueError, TypeError):
            for line in body.splitlines():
                yield from parts(json.loads(line))


class _Server(ThreadingHTTPServer):
    # The client opens many connections at once; a full queue would cost each of the others a second.
    request_queue_size = 64
    hub: Hub

    def __init__(self, *arguments):
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with connections that stay open, whole bodies in and whole bodies out."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            # The client, or the end of the Hub, cut the connection.
            self.close_connection = True

    def _answer(self) -> None:
        address, hub = urlsplit(self.path), self.server.hub
        call = Call(self.command, address.path, parse_qs(address.query), self.headers, b"")
        fault = hub._fault(call.method, call.path)
        call.body, complete = self._read_body(fault.after_bytes if fault else None)
        reply = hub._serve(call, self.path, fault if complete else Fault())
        if reply is None:
            self._reset()
            return
        self.send_response_only(reply.status)
        for name, value in (reply.headers | {"Content-Length": str(len(reply.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if call.method != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _read_body(self, limit: int | None) -> tuple[bytes, bool]:
        """The body, or no more than its first `limit` bytes, and whether it came whole."""
        length = int(self.headers.get("Content-Length", 0))
        wanted = length if limit is None else min(limit, length)
        body = self.rfile.read(wanted)
        return body, len(body) == wanted

    def _reset(self) -> None:
        """End the connection so that the client gets an error at once, whether it is still sending or waiting."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
