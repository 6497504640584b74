"""One safetensors file: 8 bytes of header length, a JSON header, the bytes; read by byte range.

Plain reads instead of a memory map, so that what a merge holds in memory is what it asked for.
"""

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from psoft_export.checkpoint.dtypes import TORCH_DTYPES
from psoft_export.errors import CheckpointError, PsoftExportError, first_line

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in the text of the library's error


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: its name, dtype code, shape, and where its bytes are.

    `offset` counts from the start of `file`; it is −1 for tensors of a PyTorch pickle file,
    which have no plain place in it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(
    path: Path, error: type[PsoftExportError] = CheckpointError
) -> tuple[list[TensorEntry], dict[str, str]]:
    """The tensors of a safetensors file in the order of their bytes.

    Returns:
        The entries, and the file's metadata.

    Raises:
        PsoftExportError: of the class `error`: the file cannot be read or is damaged.
    """
    try:
        # The library checks what a header can get wrong: sizes, overlaps, holes, truncation.
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError as cause:
        raise error(f"{path}: no such file") from cause
    # RuntimeError: the file went away, or was replaced, between the library's two looks at it.
    except (SafetensorError, OSError, ValueError, RuntimeError) as cause:
        raise error(
            f"{path}: not a readable safetensors file ({first_line(cause)}); "
            "copy or download it again"
        ) from cause
    metadata = header.pop("__metadata__", {})
    start = 8 + length
    entries = []
    for name, info in header.items():
        if info["dtype"] not in TORCH_DTYPES:
            raise error(f"{path}: tensor '{name}' has dtype {info['dtype']}, which torch lacks")
        begin, end = info["data_offsets"]
        shape = tuple(info["shape"])
        entries.append(TensorEntry(name, info["dtype"], shape, path, start + begin, end - begin))
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    return entries, metadata


def read_tensor(entry: TensorEntry, error: type[PsoftExportError] = CheckpointError) -> Tensor:
    """One tensor of a safetensors file, by plain reads.

    Raises:
        PsoftExportError: of the class `error`: the file cannot be read or has become shorter.
    """
    data = torch.empty(entry.nbytes, dtype=torch.uint8)
    try:
        with entry.file.open("rb", buffering=0) as file:
            read_fully(file.fileno(), data.numpy().data, entry.offset)
    except EOFError as cause:
        raise error(f"{entry.file}: ends early; copy or download it again") from cause
    except OSError as cause:
        raise error(f"{entry.file}: cannot be read ({cause.strerror})") from cause
    return data.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of tensors that are in memory; streams are for `ShardWriter`.

    Raises:
        OSError: it cannot be written; the library has an error of its own in its place.
    """
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as cause:
        found = _OS_ERROR.search(str(cause))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from cause


def read_fully(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from a file's bytes at `offset`.

    Raises:
        EOFError: the file ends before.
        OSError: it cannot be read.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            raise EOFError
        done += count
