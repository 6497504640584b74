"""Planning in a process of its own, so that the one that merges never holds transformers.

Only what is planned comes back. This module itself loads nothing, so that the other process can
be started first and loads transformers while the caller loads torch.
"""

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from psoft_export.cache_folder import cache_folder, layouts_folder
from psoft_export.errors import PsoftExportError, UsageError

if TYPE_CHECKING:
    from psoft_export.adapters.adapter import Reading
    from psoft_export.checkpoint.source import Source
    from psoft_export.plan import Layout, OutputOptions


class Planner:
    """A process that plans one merge, and ends.

    Python starts it by importing the caller's main module again: a script that uses this needs
    the usual `if __name__ == "__main__":`.
    """

    def __init__(self, *, at_once: bool = True) -> None:
        """Start the process, or wait with it until it is asked; returns at once."""
        context = multiprocessing.get_context("spawn")
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(self._theirs,), name="psoft-plan", daemon=True
        )
        if at_once:
            self._start()

    def _start(self) -> None:
        self._process.start()
        self._theirs.close()

    def layout(
        self, base: "Source", adapter: "Source", reading: "Reading", options: "OutputOptions"
    ) -> "Layout":
        """What `planning.make_layout` says of these folders, with the same errors.

        Raises:
            UsageError: it was asked before.
            PsoftExportError: the process ended without an answer.
        """
        if self._connection.closed:
            raise UsageError("planner: plans one merge only; start another for the next")
        if self._process.pid is None:
            self._start()
        try:
            self._connection.send((base, adapter, reading, options))
            answer: Layout | Exception = self._connection.recv()
        except (EOFError, OSError) as cause:
            self._process.join()
            raise PsoftExportError(
                f"the planning process ended with code {self._process.exitcode} and no answer; "
                "too little memory?"
            ) from cause
        finally:
            self._connection.close()
        self._process.join()  # its memory is free from here on
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        """End the process; nothing is asked of it."""
        self._connection.close()
        if self._process.pid is None:
            self._theirs.close()
            return
        self._process.terminate()
        self._process.join()


def start_planner(cache_dir: str | Path | None = None, *, cache: bool = True) -> Planner | None:
    """A `Planner`, or None where it would save nothing: transformers is loaded here already.

    Its process starts at once, unless the cache holds layouts: the one that is needed may be
    among them, so then it starts when it is asked.

    Args:
        cache_dir: the folder of the cache; default: the user's.
        cache: whether layouts are taken from the cache at all. Both as they are given to what
            uses the planner.
    """
    if "transformers" in sys.modules:
        return None
    kept = False
    with suppress(OSError, UsageError):  # what is wrong with the cache is said where it is used
        kept = cache and any(layouts_folder(cache_folder(cache_dir)).glob("*.json"))
    return Planner(at_once=not kept)


def _serve(connection: Connection) -> None:
    """Answer one request; runs in the planning process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides what stops
    gc.disable()  # what is loaded is no garbage, and this process ends before any adds up
    from psoft_export.adapters.kinds import read_adapter
    from psoft_export.checkpoint.reader import open_checkpoint
    from psoft_export.planning import make_layout

    answer: Layout | Exception
    try:
        base, adapter, reading, options = connection.recv()
        answer = make_layout(open_checkpoint(base.folder), read_adapter(adapter, reading), options)
    except EOFError:
        return
    except PsoftExportError as error:
        answer = error
    except Exception as error:
        if os.environ.get("PSOFT_EXPORT_DEBUG"):
            traceback.print_exc()
        answer = RuntimeError(f"{type(error).__name__}: {error}")
    with suppress(OSError):  # nobody waits for it any more
        connection.send(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once: taking all modules apart would hold their memory for another second
