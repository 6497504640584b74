"""How much memory there is, and giving freed memory back to the operating system."""

import ctypes
import os
from pathlib import Path

import torch

_MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_freed_memory() -> None:
    """Return what glibc keeps of freed blocks; does nothing with other allocators.

    glibc learns to keep large blocks that were freed once. In a merge they all differ in size,
    so what it keeps is seldom used again and adds up to far more than the work needs.
    """
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


def available_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now, without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # Linux before 3.14
