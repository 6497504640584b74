"""A Hub on loopback that takes uploads: repositories, branches, LFS objects, commits."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import yaml  # type: ignore[import-untyped]

from tests.hub_server import HubServer, Snapshot

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_BAD_TOKEN = "Invalid credentials in Authorization header"
_RELATIONS = {None, "finetune", "adapter", "merge", "quantized"}


@dataclass
class Repository:
    """One repository; `commits` holds every state by its hash, `branches` names some."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Add a state and let a branch name it."""
        digest = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[digest] = files
        self.branches[branch] = digest
        self.messages.append(message)
        return digest


class WritableHub(HubServer):
    """Stores what is pushed, besides serving folders to read.

    `token` may read and write; every other one is refused. `received` counts the bytes of each LFS
    object that came in; uploads of `cut_objects` break off after `cut_after` bytes. With
    `refuse_commits`, a status, all is taken but the commit.
    """

    def __init__(self, token: str, folders: dict[str, Path] | None = None) -> None:
        super().__init__(folders or {}, ("main",))
        self.token = token
        self.stored: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.received: dict[str, int] = {}
        self.created: list[dict[str, Any]] = []
        self.cut_after: int | None = None
        self.cut_objects: set[str] = set()
        self.refuse_commits: int | None = None

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """A repository's files at a branch."""
        repository = self.stored[repo_id]
        return repository.commits[repository.branches[revision]]

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        if request.headers.get("Authorization") not in (None, f"Bearer {self.token}"):
            self._send(request, 401, b"{}", _BAD_TOKEN)
        else:
            super()._answer(request, body)

    def _snapshot(self, repo_id: str, revision: str) -> Snapshot | str:
        repository = self.stored.get(repo_id)
        if repository is None:
            return super()._snapshot(repo_id, revision)
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return "RevisionNotFound"
        return Snapshot(commit, repository.commits[commit], repository.private)

    def _write(self, request: BaseHTTPRequestHandler) -> None:
        parsed = urlparse(request.path)
        path, query = unquote(parsed.path), parse_qs(parsed.query)
        self.requests.append(f"{request.command} {request.path}")
        if path.startswith("/lfs/"):
            self._object(request, path.removeprefix("/lfs/"))
            return
        body = _body(request)
        given = request.headers.get("Authorization")
        self.tokens.add(given or "")
        if given != f"Bearer {self.token}":
            self._send(request, 401, b"{}", _BAD_TOKEN)
        elif path == "/api/repos/create":
            self._create(request, json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate(request, json.loads(body)["content"])
        elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self._batch(request, found[1], json.loads(body))
        elif found := re.fullmatch(r"/api/models/(.+?)/(branch|preupload|commit)/(.+)", path):
            repository = self.stored[found[1]]
            action, revision = found[2], found[3]
            if action == "branch":
                repository.branches[revision] = repository.branches["main"]
                self._answer_json(request, {})
            elif revision not in repository.branches:
                self._send(request, 404, b"{}", "RevisionNotFound")
            elif action == "commit" and self.refuse_commits is not None:
                self._send(request, self.refuse_commits, b"{}")
            elif action == "preupload":
                self._preupload(request, repository, revision, json.loads(body))
            else:
                self._commit(request, found[1], revision, body, "create_pr" in query)
        else:
            self._send(request, 404, b"{}", "EntryNotFound")

    def _create(self, request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        self.created.append(asked)
        repo_id = f"{asked['organization'] or 'me'}/{asked['name']}"
        if repo_id.startswith("closed/"):
            message = "You don't have the rights to create a model under the namespace 'closed'"
            self._send(request, 403, json.dumps({"error": message}).encode())
            return
        exists = repo_id in self.stored
        if not exists:
            repository = Repository(asked.get("visibility") == "private")
            repository.commit("main", {".gitattributes": b""}, "initial commit")
            self.stored[repo_id] = repository
        self._answer_json(request, {"url": f"{self.url}/{repo_id}"}, 409 if exists else 200)

    def _validate(self, request: BaseHTTPRequestHandler, content: str) -> None:
        """By the rules of the Hub's documentation on model cards."""
        found = re.match(r"---\n(.*?)\n---\n", content, re.S)
        data = yaml.safe_load(found[1]) if found else {}
        named = data.get("base_model") or []
        errors = [
            f'"base_model" with value "{name}" is not valid'
            for name in (named if isinstance(named, list) else [named])
            if not _ID.fullmatch(name)
        ]
        if data.get("base_model_relation") not in _RELATIONS:
            errors.append('"base_model_relation" is not one of them')
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._answer_json(request, answer, 400 if errors else 200)

    def _preupload(
        self,
        request: BaseHTTPRequestHandler,
        repository: Repository,
        revision: str,
        asked: dict[str, Any],
    ) -> None:
        there = repository.commits[repository.branches[revision]]
        answers = []
        for file in asked["files"]:
            path = file["path"]
            large = path.endswith((".safetensors", ".bin"))
            answer = {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
            }
            if path in there:
                answer["oid"] = _oid(there[path], large=large)
            answers.append(answer)
        self._answer_json(request, {"files": answers})

    def _batch(self, request: BaseHTTPRequestHandler, repo_id: str, asked: dict[str, Any]) -> None:
        objects = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                answer["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
            objects.append(answer)
        self._answer_json(request, {"transfer": "basic", "objects": objects})

    def _object(self, request: BaseHTTPRequestHandler, oid: str) -> None:
        """Take one LFS object, and check that it is what its name says."""
        limit = self.cut_after if oid in self.cut_objects else None
        content = _body(request, limit)
        self.received[oid] = self.received.get(oid, 0) + len(content)
        if limit is not None:
            request.close_connection = True
            request.connection.close()
        elif hashlib.sha256(content).hexdigest() != oid:
            self._send(request, 400, b"{}", "not the object of this name")
        else:
            self.objects[oid] = content
            self._answer_json(request, {})

    def _commit(
        self, request: BaseHTTPRequestHandler, repo_id: str, branch: str, body: bytes, as_pr: bool
    ) -> None:
        repository = self.stored[repo_id]
        files = dict(repository.commits[repository.branches[branch]])
        message = ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
        target = f"refs/pr/{number}" if as_pr else branch
        digest = repository.commit(target, files, message)
        answer = {
            "commitUrl": f"{self.url}/{repo_id}/commit/{digest}",
            "commitOid": digest,
            "pullRequestUrl": f"{self.url}/{repo_id}/discussions/{number}" if as_pr else None,
        }
        self._answer_json(request, answer)

    def _answer_json(
        self, request: BaseHTTPRequestHandler, answer: object, status: int = 200
    ) -> None:
        self._send(request, status, json.dumps(answer).encode())


def _oid(content: bytes, *, large: bool) -> str:
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _body(request: BaseHTTPRequestHandler, limit: int | None = None) -> bytes:
    """What a request carries, up to `limit` bytes."""
    if "chunked" not in request.headers.get("Transfer-Encoding", ""):
        length = int(request.headers.get("Content-Length", 0))
        return request.rfile.read(length if limit is None else min(limit, length))
    content = b""
    while limit is None or len(content) < limit:
        size = int(request.rfile.readline(), 16)
        content += request.rfile.read(size)
        request.rfile.readline()
        if size == 0:
            break
    return content
