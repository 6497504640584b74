"""A Hub on loopback: the endpoints that reading a repository needs, over real HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "c0ffee" + "0" * 34


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
        folder = self.repositories.get(repo_id)
        if not marker or folder is None:
            self._refuse(request, "RepoNotFound")
        elif revision not in self.revisions:
            self._refuse(request, "RevisionNotFound")
        elif not (folder / name).is_file():
            self._refuse(request, "EntryNotFound")
        else:
            content = (folder / name).read_bytes()
            request.send_response(200)
            request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            request.send_header("X-Repo-Commit", COMMIT)
            request.send_header("Content-Length", str(len(content)))
            request.end_headers()
            if body:
                request.wfile.write(content)

    def _model_info(self, request: BaseHTTPRequestHandler, rest: str) -> None:
        marker = "/tree/" if "/tree/" in rest else "/revision/"
        repo_id, marker, revision = rest.partition(marker)
        folder = self.repositories.get(repo_id)
        if folder is None:
            self._refuse(request, "RepoNotFound")
        elif marker and revision not in self.revisions:
            self._refuse(request, "RevisionNotFound")
        else:
            paths = [p for p in folder.rglob("*") if p.is_file()]
            names = [str(p.relative_to(folder)) for p in paths]
            answer: object = {
                "id": repo_id,
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in names],
            }
            if marker == "/tree/":
                answer = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": COMMIT}
                    for name, path in zip(names, paths, strict=True)
                ]
            self._send(request, 200, json.dumps(answer).encode())

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
