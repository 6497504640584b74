"""Small facts kept on disk under keys, a JSON file each; they can be found again at any time."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from psoft_export.checkpoint.output import replacing_file
from psoft_export.errors import OutputError

_SUFFIX = ".json"
_KEPT = 64


class KeptJson:
    """The facts in one folder; never stops a run, whatever is wrong with it.

    Each file carries the SHA-256 of its key and content, so that one that was damaged, or has the
    name of another, is not taken. Several processes can share the folder.
    """

    def __init__(self, folder: Path) -> None:
        """Use `folder`, made when the first is kept."""
        self._folder = folder

    def get(self, key: str) -> Any | None:
        """What is kept under a key (a file name without its end); None where nothing is."""
        path = self._path(key)
        try:
            kept = json.loads(path.read_bytes())
            if kept["sha256"] != _digest(key, kept["content"]):
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        with suppress(OSError):
            os.utime(path)
        return kept["content"]

    def put(self, key: str, content: Any) -> None:
        """Keep what JSON can hold; the least recently used are forgotten."""
        with suppress(OSError, OutputError, TypeError):
            text = json.dumps({"sha256": _digest(key, content), "content": content})
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing_file(self._path(key), durable=False) as scratch:
                scratch.write_text(text, "utf-8")
            paths = sorted(self._folder.glob(f"*{_SUFFIX}"), key=lambda path: -path.stat().st_mtime)
            for path in paths[_KEPT:]:
                path.unlink()

    def clear(self) -> int:
        """Forget all, with what killed runs left half-written; returns how many bytes that freed.

        Raises:
            OutputError: a file cannot be removed.
        """
        freed = 0
        for path in self._folder.glob(f"*{_SUFFIX}*"):
            freed += removed(path)
        with suppress(OSError):
            self._folder.rmdir()
        return freed

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


def removed(path: Path) -> int:
    """Remove a file, if it is there still; returns how many bytes that freed.

    Raises:
        OutputError: it cannot be removed.
    """
    try:
        nbytes = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    except OSError as cause:
        raise OutputError(f"{path}: cannot be removed ({cause.strerror})") from cause
    return nbytes


def _digest(key: str, content: Any) -> str:
    text = json.dumps({"key": key, "content": content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
