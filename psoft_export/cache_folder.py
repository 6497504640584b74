"""Where the cache is. Loads nothing, so that it can be looked at before anything is loaded."""

import os
from contextlib import suppress
from pathlib import Path

from psoft_export.errors import UsageError

_VARIABLE = "PSOFT_EXPORT_CACHE"


def cache_folder(named: str | Path | None) -> Path:
    """The folder of that name, by default the user's; it need not be there.

    By default that is `$PSOFT_EXPORT_CACHE`, or `psoft-export` in the user's cache folder.

    Raises:
        UsageError: the name is that of a file, or there is no home folder to find one in.
    """
    path = _expanded(named) if named is not None else _default()
    with suppress(OSError):  # what cannot be looked at cannot be used; the cache will say so
        if path.exists() and not path.is_dir():
            raise UsageError(f"cache-dir '{path}' is a file, not a folder")
    return path


def layouts_folder(cache: Path) -> Path:
    """The folder in the cache for what `layouts` keeps."""
    return cache / "layouts"


def _default() -> Path:
    if named := os.environ.get(_VARIABLE):
        return _expanded(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "psoft-export"
    return _expanded("~/.cache") / "psoft-export"


def _expanded(folder: str | Path) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError as cause:
        raise UsageError(
            f"'{folder}' cannot be found, as there is no such home folder; name the cache with "
            f"--cache-dir or {_VARIABLE}, or pass --no-cache"
        ) from cause
