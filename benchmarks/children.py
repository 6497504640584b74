"""Parts of a benchmark in processes of their own, and what it all ran on. No torch."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.process import ProgramError


def child(
    module: str, part: str, environment: Mapping[str, str], *arguments: object
) -> dict[str, Any]:
    """What `python -m MODULE --part PART ARGUMENTS` prints last, as JSON.

    Raises:
        ProgramError: it failed.
    """
    command = [sys.executable, "-m", module, "--part", part, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ProgramError(f"{part} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def machine_line(threads: int, packages: Sequence[str]) -> str:
    """One line on what it all ran on."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{os.cpu_count()}-core {platform.machine()} ({names[0] if names else 'unknown'})"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    python = platform.python_version()
    return (
        f"{machine}, {memory:.0f} GiB; {date.today()}; Python {python}, {versions}; "
        f"{threads} threads"
    )


def child_environment(threads: int, cache: Path) -> dict[str, str]:
    """The environment of every child: so many threads, no Hub, and a cache of bases of its own."""
    count = str(threads)
    return os.environ | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "PSOFT_EXPORT_CACHE": str(cache),
    }


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def say(text: str) -> None:
    """Tell whoever waits what is being measured."""
    print(text, file=sys.stderr, flush=True)
