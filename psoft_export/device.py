"""Choosing the device that computes, and how exactly it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from psoft_export.errors import UsageError

_PROCESSOR = Path("/proc/cpuinfo")  # Linux
_MOST_WORKERS = 4  # each holds a weight in float64; with more cores, each has several threads


def choose_device(name: str) -> torch.device:
    """The device behind `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: an unknown name, or CUDA where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise UsageError(f"device '{name}' is not one of auto, cpu, cuda, cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device '{name}': torch {torch.__version__} sees no such GPU; use cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The device as reports name it: `cpu`, or `cuda` with the card's name."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type


def workers_on(device: torch.device) -> int:
    """How many weights are merged at a time on `device`, each with its share of torch's threads.

    On a CPU small weights keep few threads busy; a GPU is busy with one.
    """
    return min(torch.get_num_threads(), _MOST_WORKERS) if device.type == "cpu" else 1


@cache
def multiplies_by_avx2() -> bool:
    """Whether products on this CPU are those of MKL's kernels for AVX2.

    On processors of other makers than Intel MKL takes these also where there is AVX-512.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":
        return capability == "AVX2"
    try:
        lines = _PROCESSOR.read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return bool(makers) and "GenuineIntel" not in makers


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32, whatever the process has chosen for speed."""
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
