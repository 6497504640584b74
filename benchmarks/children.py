"""Parts of a benchmark in processes of their own, and what it all ran on. No torch."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
