"""A Hub on loopback: the endpoints that reading a repository needs, over real HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

from tests import files

COMMIT = "c0ffee" + "0" * 34


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    commit: str
    files: Mapping[str, bytes]
    private: bool = False


class HubServer:
    """Serves folders as model repositories, each at one commit and under branch names.

    `requests` lists what was asked, `tokens` the bearer tokens that came with it.
    """

    def __init__(self, repositories: dict[str, Path], revisions: tuple[str, ...]) -> None:
        self.repositories = repositories
        self.revisions = (*revisions, COMMIT)
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._answer(self, body=True)

            def do_HEAD(self) -> None:
                server._answer(self, body=False)

            def do_POST(self) -> None:
                server._write(self)

            def do_PUT(self) -> None:
                server._write(self)

            def log_message(self, *_: object) -> None:
                """Keep the terminal quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        """Serve in the background."""
        thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlparse(request.path).path)
        self.requests.append(f"{request.command} {path}")
        if token := request.headers.get("Authorization"):
            self.tokens.add(token)
        if path.startswith("/api/models/"):
            self._model_info(request, path.removeprefix("/api/models/"))
            return
        repo_id, marker, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        found = self._snapshot(repo_id, revision) if marker else "RepoNotFound"
        if isinstance(found, str):
            self._refuse(request, found)
        elif name not in found.files:
            self._refuse(request, "EntryNotFound")
        else:
            content = found.files[name]
            request.send_response(200)
            request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            request.send_header("X-Repo-Commit", found.commit)
            request.send_header("Content-Length", str(len(content)))
            request.end_headers()
            if body:
                request.wfile.write(content)

    def _model_info(self, request: BaseHTTPRequestHandler, rest: str) -> None:
        marker = "/tree/" if "/tree/" in rest else "/revision/"
        repo_id, marker, revision = rest.partition(marker)
        found = self._snapshot(repo_id, revision or "main")
        if isinstance(found, str):
            self._refuse(request, found)
            return
        answer: object = {
            "id": repo_id,
            "sha": found.commit,
            "private": found.private,
            "siblings": [{"rfilename": name} for name in found.files],
        }
        if marker == "/tree/":
            answer = [
                {"type": "file", "path": name, "size": len(content), "oid": found.commit}
                for name, content in found.files.items()
            ]
        self._send(request, 200, json.dumps(answer).encode())

    def _snapshot(self, repo_id: str, revision: str) -> "Snapshot | str":
        """A repository at a revision, or the Hub's code for what is missing."""
        folder = self.repositories.get(repo_id)
        if folder is None:
            return "RepoNotFound"
        if revision not in self.revisions:
            return "RevisionNotFound"
        return Snapshot(COMMIT, files.tree(folder))

    def _write(self, request: BaseHTTPRequestHandler) -> None:
        """This server is for reading; `WritableHub` takes uploads."""
        self._send(request, 405, b"{}")

    def _refuse(self, request: BaseHTTPRequestHandler, code: str) -> None:
        self._send(request, 404, b"{}", code)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler, status: int, body: bytes, error: str | None = None
    ) -> None:
        request.send_response(status)
        if error is not None:
            request.send_header("X-Error-Code", error)
            request.send_header("X-Error-Message", error)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
