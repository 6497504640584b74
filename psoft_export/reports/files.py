"""Writing a report's one file."""

from pathlib import Path

from psoft_export.checkpoint.output import replacing_file
from psoft_export.errors import OutputError


def check_file(path: Path) -> None:
    """Raise `OutputError` where no file can be made under this name."""
    try:
        is_folder, has_parent = path.is_dir(), path.parent.is_dir()
    except OSError as cause:
        raise OutputError(f"{path}: cannot be written ({cause.strerror})") from cause
    if is_folder:
        raise OutputError(f"{path}: is a folder; name a file to write")
    if not has_parent:
        raise OutputError(f"{path.parent}: no such folder to put '{path.name}' in; create it")


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all; what is no character is written as its code.

    Raises:
        OutputError: it cannot be written.
    """
    check_file(path)
    with replacing_file(path) as scratch:
        scratch.write_bytes(text.encode("utf-8", "backslashreplace"))
