"""A small, strict Hugging Face Hub over HTTP on the loopback address, for tests with the real client.

    with Hub(tokens={"hf_alice": "alice", "hf_reader": ("alice", "read")}) as hub:
        HfApi(endpoint=hub.url, token="hf_alice").create_repo("alice/model")
        subprocess.run([...], env=hub.environment("hf_alice", cache=tmp_path))
        assert "config.json" in hub.files("alice/model")
        assert not hub.unknown_requests

A client in the process of the tests also needs xet turned off (HF_HUB_DISABLE_XET). The endpoints are in `routes`, the
repositories in `storage`, the rules for cards in `cards`. Unlike the real Hub, this one

- has no organizations, gated repositories, Spaces, search or pagination, and rejects pull requests with a 403;
- ignores .gitignore, accepts binary files of up to 10 MiB without LFS, and never adds to .gitattributes;
- derives the library of a model from its card or `model_type`, and its task from its card only;
- sends LFS files itself, where the real Hub redirects to a storage server.
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

from fake_hub.routes import Reply, Request, Routes, error_reply
from fake_hub.storage import HubError, Repository


@dataclass(frozen=True)
class RequestRecord:
    """A request and its result.

    Args:
        method: HTTP method.
        path: Path and query, with "***" instead of tokens.
        status: Status of the reply, or None if the connection was lost.
        token: Whether the request had a token.
    """

    method: str
    path: str
    status: int | None
    token: bool


@dataclass(frozen=True)
class Failure:
    """An error reply or a lost connection for one request.

    Args:
        status: Status of the error reply, or None to reset the connection.
        after_bytes: Bytes of the body to receive before the reset. None for all.
        stored: Whether to handle the request before the reset.
    """

    status: int | None = None
    after_bytes: int | None = None
    stored: bool = False


class Hub:
    """The server. It runs from its creation to `close` or the end of a `with` block.

    Args:
        tokens: The user of each valid token, or the user and "read" for a token without write access. The user `alice`
            owns the repositories `alice/...`.
    """

    def __init__(self, tokens: Mapping[str, str | tuple[str, str]] | None = None):
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._lock = threading.RLock()
        self._routes = Routes(self.url, tokens or {})
        self._records: list[tuple[RequestRecord, bytes]] = []
        self._unknown_records: list[RequestRecord] = []
        self._failures: dict[str, list[Failure]] = {"upload": [], "commit": []}
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and close all connections."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._server.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def environment(self, token: str | None = None, *, cache: Path) -> dict[str, str]:
        """Return the environment variables of a process that uses this Hub.

        They are those of this process, without settings for another Hub or a proxy. Requests of the libraries to other
        servers are off. Only `load_dataset` looks up the name of the dataset viewer. It derives that name from the
        address of this Hub, and the name does not exist.

        Args:
            token: Token of the process. None for a process without one.
            cache: Folder for `HF_HOME`.
        """
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(foreign)}
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            # The default of 10 seconds is too short for a busy machine.
            "HF_HUB_ETAG_TIMEOUT": "600",
            "HF_HUB_DOWNLOAD_TIMEOUT": "600",
        }
        if token:
            environment["HF_TOKEN"] = token
        return environment

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str] | None = None,
        *,
        repo_type: str = "model",
        private: bool = False,
    ) -> str:
        """Create a repository with a .gitattributes and these files. The owner needs no token.

        Returns:
            The id of the last commit.
        """
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
        """Commit to a branch as the owner, without a request.

        Returns:
            The id of the commit.
        """
        with self._lock:
            return self.repo(repo_id, repo_type).write(revision, files, delete, "Change files").oid

    def repo(self, repo_id: str, repo_type: str = "model") -> Repository:
        """Return a repository, with its branches, tags, commits and LFS objects.

        Raises:
            KeyError: There is no such repository.
        """
        return self._routes.repositories[repo_type, repo_id]

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Return the content of each file of a revision."""
        with self._lock:
            commit = self.repo(repo_id, repo_type).resolve(revision)
        return {path: blob.data for path, blob in commit.files.items()}

    @property
    def requests(self) -> list[RequestRecord]:
        """All requests so far, in the order in which they ended."""
        with self._lock:
            return [record for record, _ in self._records]

    @property
    def unknown_requests(self) -> list[RequestRecord]:
        """Requests without an endpoint. Each is an error of the client, or an endpoint that this Hub lacks."""
        with self._lock:
            return list(self._unknown_records)

    def requests_containing(self, text: str | bytes) -> list[RequestRecord]:
        """Return the requests with `text` in the URL, a header other than Authorization, or the decoded body."""
        needle = text.encode() if isinstance(text, str) else text
        with self._lock:
            return [record for record, content in self._records if needle in content]

    def drop_next_upload(self, after_bytes: int = 0, times: int = 1) -> None:
        """Reset the connection of the next `times` LFS uploads after `after_bytes` of the body.

        The client retries up to five times, after 1, 2, 4, 8 and 8 seconds. But huggingface_hub 1.x does not retry if
        it was still sending, as with files of many MB.
        """
        self._add_failures("upload", [Failure(after_bytes=after_bytes)] * times)

    def reject_next_upload(self, status: int = 403) -> None:
        """Reply to the next LFS upload with an error. The client does not retry after a status of 4xx."""
        self._add_failures("upload", [Failure(status)])

    def drop_next_commit(self, stored: bool = False) -> None:
        """Reset the connection of the next commit.

        `create_commit` and, with xet off, `upload_folder` do not retry a commit.

        Args:
            stored: Whether to store the commit first, so that only the reply is lost.
        """
        self._add_failures("commit", [Failure(stored=stored)])

    def _add_failures(self, kind: str, failures: list[Failure]) -> None:
        with self._lock:
            self._failures[kind] += failures

    def _next_failure(self, method: str, path: str) -> Failure | None:
        if method == "PUT" and path.startswith("/lfs-storage/"):
            kind = "upload"
        elif method == "POST" and "/commit/" in path:
            kind = "commit"
        else:
            return None
        with self._lock:
            return self._failures[kind].pop(0) if self._failures[kind] else None

    def _serve(self, request: Request, target: str, failure: Failure | None) -> Reply | None:
        """Handle and record a request. Return the reply, or None to reset the connection."""
        with self._lock:
            unknown, reply = False, None
            if failure and failure.status:
                reply = error_reply(HubError(failure.status, "Request has expired"))
            elif failure is None or failure.stored:
                reply = self._routes.handle(request)
                unknown = reply is None
                reply = reply or error_reply(HubError(404, "Sorry, we can't find the page you are looking for."))
            if failure and failure.stored:
                reply = None
            record = self._record(request, target, reply.status if reply else None)
            if unknown:
                self._unknown_records.append(record)
            return reply

    def _record(self, request: Request, target: str, status: int | None) -> RequestRecord:
        headers = "\n".join(
            f"{name}: {value}" for name, value in request.headers.items() if name.lower() != "authorization"
        )
        content = b"\n".join([target.encode(), headers.encode(), request.body, *_decoded_strings(request.body)])
        for token in self._routes.accounts:
            target = target.replace(token, "***")
        record = RequestRecord(request.method, target, status, "authorization" in request.headers)
        self._records.append((record, content))
        return record


def _decoded_strings(body: bytes) -> Iterator[bytes]:
    """Yield the decoded strings of a JSON or NDJSON body, without escapes and base64."""

    def decode(value: object) -> Iterator[bytes]:
        if isinstance(value, dict):
            for key, item in value.items():
                is_base64 = key == "sample" or (key == "content" and value.get("encoding") == "base64")
                yield from [base64.b64decode(item)] if is_base64 else decode(item)
        elif isinstance(value, list):
            for item in value:
                yield from decode(item)
        elif isinstance(value, str):
            yield value.encode()

    if body.startswith(b"{"):
        with suppress(ValueError, TypeError):
            for line in body.splitlines():
                yield from decode(json.loads(line))


class _Server(ThreadingHTTPServer):
    # The client opens many connections at once. With a full queue, each further one waits for a second.
    request_queue_size = 64
    hub: Hub

    def __init__(self, *arguments):
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)


class _Handler(BaseHTTPRequestHandler):
    """Handler for HTTP/1.1 with persistent connections and complete bodies."""

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
            # The client or `Hub.close` closed the connection.
            self.close_connection = True

    def _handle(self) -> None:
        url, hub = urlsplit(self.path), self.server.hub
        request = Request(self.command, url.path, parse_qs(url.query), self.headers, b"")
        failure = hub._next_failure(request.method, request.path)
        request.body, complete = self._read_body(failure.after_bytes if failure else None)
        reply = hub._serve(request, self.path, failure if complete else Failure())
        if reply is None:
            self._reset()
            return
        self.send_response_only(reply.status)
        for name, value in (reply.headers | {"Content-Length": str(len(reply.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if request.method != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read_body(self, limit: int | None) -> tuple[bytes, bool]:
        """Return the body, or its first `limit` bytes, and whether all of these bytes arrived."""
        length = int(self.headers.get("Content-Length", 0))
        num_bytes = length if limit is None else min(limit, length)
        body = self.rfile.read(num_bytes)
        return body, len(body) == num_bytes

    def _reset(self) -> None:
        """Reset the connection, so that the client gets an error at once even while it is sending."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
