"""Runs one program and measures it from outside: time, memory, bytes moved. Linux only."""

import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_POLL_MILLISECONDS = 50
_LOG_TAIL = 2000


class ProgramError(Exception):
    """A measured program ended with an error."""


@dataclass(frozen=True)
class Usage:
    """What one process and its descendants took.

    `peak_bytes` is the largest resident set of one process (as the kernel recorded it), or of all
    at a time (samples 50 ms apart; files that they map are counted once), whichever is larger.
    `anonymous_bytes` is the part that no file backs, of all at a time. Bytes read and written are
    those of read and write calls, of descendants only where they were waited for; pages of
    memory-mapped files are in neither.
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
        anonymous = resident = 0
        ended = select.poll()
        ended.register(handle := os.pidfd_open(child.pid), select.POLLIN)
        while not ended.poll(_POLL_MILLISECONDS):
            in_memory = [_fields(pid, "status") for pid in _tree(child.pid)]
            private = sum(fields.get("RssAnon", 0) for fields in in_memory) * 1024
            mapped = max((fields.get("RssFile", 0) for fields in in_memory), default=0) * 1024
            anonymous, resident = max(anonymous, private), max(resident, private + mapped)
        seconds = time.monotonic() - start
        os.close(handle)
        # Not reaped yet, so that its counters can still be read.
        moved = _fields(child.pid, "io")
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        name = Path(command[0]).name
        tail = log.read_text("utf-8", "replace")[-_LOG_TAIL:]
        raise ProgramError(f"{name} ended with {child.returncode}:\n{tail}")
    peak = max(used.ru_maxrss * 1024, resident)
    return Usage(seconds, peak, anonymous, moved["rchar"], moved["wchar"])


def _tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:  # grows while it is gone through
        with suppress(OSError):  # it has ended
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def _fields(pid: int, name: str) -> dict[str, int]:
    """The numeric fields of a file in /proc; none where the process has ended."""
    fields: dict[str, int] = {}
    try:
        lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
    except OSError:
        return fields
    for line in lines:
        key, _, value = line.partition(":")
        number, *_ = value.split() or [""]
        if number.isdecimal():
            fields[key] = int(number)
    return fields
