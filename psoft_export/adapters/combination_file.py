"""`psoft_export.json` beside a combined adapter: what it was made from, and how."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psoft_export.errors import AdapterError

FILENAME = "psoft_export.json"
FORMAT = "psoft-export-combination"
FORMAT_VERSION = 1


def content(
    *,
    base: Mapping[str, Any],
    combination: Mapping[str, Any],
    method: str,
    modules: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The file's content. Holds no time and no path, so runs compare equal.

    Args:
        base: the base, by name and hashes.
        combination: method and options, and each adapter's name, weight, source and hashes.
        method: what the adapter written is, in a line.
        modules: what was done to each.
        warnings: what the user should know, one plain sentence each.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool": {"psoft_export": importlib.metadata.version("psoft-export")},
        "base": dict(base),
        "combination": dict(combination),
        "method": method,
        "modules": list(modules),
        "warnings": list(warnings),
    }


def read_combination(folder: Path) -> dict[str, Any] | None:
    """The content of the file in an adapter's folder, or None if it is no combination.

    Raises:
        AdapterError: the file is there and cannot be read.
    """
    path = folder / FILENAME
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text("utf-8"))
        if fields["format"] != FORMAT:
            return None
        sound = isinstance(fields["combination"], dict) and isinstance(fields["warnings"], list)
        if sound and fields["format_version"] == FORMAT_VERSION:
            return dict(fields)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise AdapterError(f"{path}: not a file that psoft-export wrote; remove it to do without")
