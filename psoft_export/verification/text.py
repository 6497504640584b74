"""The text that models are compared on, as its file holds it."""

import codecs
from pathlib import Path

from psoft_export.errors import UsageError, first_line

TEXT_BYTES = 2**20  # that are read of a file


def read_text(path: Path, *, whole_lines: bool = False) -> str:
    """The first MiB of a UTF-8 file, without a byte order mark.

    Args:
        path: the file.
        whole_lines: leave away the last line of the MiB where the file goes on.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(TEXT_BYTES + 1)
        is_whole = len(data) <= TEXT_BYTES
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data[:TEXT_BYTES], is_whole)
        return text if is_whole or not whole_lines else text.rpartition("\n")[0]
    except UnicodeDecodeError as cause:
        raise UsageError(f"{path}: not UTF-8 text ({first_line(cause)})") from cause
    except OSError as cause:
        raise UsageError(f"{path}: cannot be read ({cause.strerror})") from cause
