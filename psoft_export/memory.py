"""Giving freed memory back to the operating system."""

import ctypes

_MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_freed_memory() -> None:
    """Return what glibc keeps of freed blocks; does nothing with other allocators.

    glibc learns to keep large blocks that were freed once. In a merge they all differ in size,
    so what it keeps is seldom used again and adds up to far more than the work needs.
    """
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)
