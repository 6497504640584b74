"""Runs one program and measures it from outside: time, memory, bytes moved. Linux only."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.05
_LOG_TAIL = 2000


class ProgramError(Exception):
    """A measured program ended with an error."""


@dataclass(frozen=True)
class Usage:
    """What one process took.

    `peak_bytes` is the largest resident set (as the kernel recorded it), `anonymous_bytes` its
    part that no file backs (largest of samples 50 ms apart). Bytes read and written are those of
    read and write calls; pages of memory-mapped files are in neither.
    """

    seconds: float
    peak_bytes: int
    anonymous_bytes: int
    read_bytes: int
    written_bytes: int


def run_measured(command: Sequence[str | Path], environment: Mapping[str, str], log: Path) -> Usage:
    """Run `command` to its end, with its output in `log`.

    The kernel counts the parent's resident set at the fork towards the child's peak, so the
    caller must be small: it imports no torch.

    Raises:
        ProgramError: it failed; the message holds the end of its output.
    """
    with log.open("w") as output:
        start = time.monotonic()
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        anonymous = 0
        # Not reaped yet, so that its counters can still be read when it has ended.
        while not os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            anonymous = max(anonymous, _fields(child.pid, "status").get("RssAnon", 0) * 1024)
            time.sleep(_POLL_SECONDS)
        seconds = time.monotonic() - start
        moved = _fields(child.pid, "io")
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        name = Path(command[0]).name
        tail = log.read_text("utf-8", "replace")[-_LOG_TAIL:]
        raise ProgramError(f"{name} ended with {child.returncode}:\n{tail}")
    return Usage(seconds, used.ru_maxrss * 1024, anonymous, moved["rchar"], moved["wchar"])


def _fields(pid: int, name: str) -> dict[str, int]:
    """The numeric fields of a file in /proc."""
    fields = {}
    for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
        key, _, value = line.partition(":")
        number, *_ = value.split() or [""]
        if number.isdecimal():
            fields[key] = int(number)
    return fields
