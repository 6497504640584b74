"""What commands print with: one object that knows about quiet, JSON and terminals."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from psoft_export import LoraModule, ModuleReport, VerificationReport
    from psoft_export import Progress as MergeProgress

_PIPE_WIDTH = 200  # columns of a table that goes to a file or another program
_PROBLEMS = 10  # shown on the terminal
_PLAIN_LINES = 10  # progress lines of a whole run where there is no terminal


class Output:
    """Results go to stdout; warnings, progress and errors to stderr."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        """`quiet` drops results and progress; `as_json` prints results as one object."""
        if quiet or not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self._quiet = quiet
        self._as_json = as_json
        self._results = Console(emoji=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
        self._messages = Console(emoji=False, stderr=True, soft_wrap=True)

    def result(self, data: Mapping[str, Any], render: Callable[[Console], None]) -> None:
        """Print the result: `data` as JSON, or what `render` draws."""
        if self._as_json:
            sys.stdout.write(json.dumps(data, allow_nan=False) + "\n")
        elif not self._quiet:
            render(self._results)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._messages.print(f"[yellow]warning:[/] {_escaped(text)}", highlight=False)

    def note(self, text: str) -> None:
        """Print a line about what is happening."""
        if not self._quiet:
            self._messages.print(_escaped(text), highlight=False)

    @contextmanager
    def merge_progress(
        self, verb: str = "merging"
    ) -> Iterator[Callable[["MergeProgress"], None] | None]:
        """A callback that shows how far a run is: a bar on a terminal, lines elsewhere."""
        if self._quiet:
            yield None
        elif self._messages.is_terminal:
            columns = (
                TextColumn(verb),
                BarColumn(),
                DownloadColumn(),
                TextColumn("{task.fields[targets]}"),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self._messages, transient=True) as bar:
                task = bar.add_task("merge", total=None, targets="")

                def show(step: "MergeProgress") -> None:
                    targets = f"{step.done_targets}/{step.total_targets} targets"
                    bar.update(
                        task, completed=step.done_bytes, total=step.total_bytes, targets=targets
                    )

                yield show
        else:
            yield self._line_printer(verb)

    def _line_printer(self, verb: str) -> Callable[["MergeProgress"], None]:
        printed = 0

        def show(step: "MergeProgress") -> None:
            nonlocal printed
            share = _PLAIN_LINES * step.done_bytes // max(step.total_bytes, 1)
            if share > printed:
                printed = share
                self.note(
                    f"{verb}: {100 * step.done_bytes // step.total_bytes} %, "
                    f"{step.done_targets} of {step.total_targets} targets"
                )

        return show


def print_facts(console: Console, rows: Mapping[str, str], output: Path) -> None:
    """Print names and values in two columns, and where the output is."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, _escaped(value))
    console.print(table)
    console.print(f"written to {output}", markup=False, highlight=False)


def basis_facts(
    basis: Mapping[str, Any], modules: "Sequence[ModuleReport | LoraModule]"
) -> dict[str, str]:
    """Where the bases of a run came from, and what that leaves open."""
    from psoft_export.manifest import basis_origin, basis_source

    if basis_source(basis) == "none":
        return {}
    known = [m.basis_uncertainty for m in modules if m.basis_uncertainty is not None]
    left_open = f"{max(known):.1e} at most" if len(known) == len(modules) else "not known"
    return {"basis": basis_origin(basis), "left open by the basis / ‖ΔW‖": left_open}


def print_verdict(console: Console, report: "VerificationReport") -> None:
    """Print what a verification found, level by level, what is wrong, and its verdict."""
    from psoft_export.manifest import basis_origin
    from psoft_export.reports import wording

    rows = levels_run(report)
    if report.outputs is not None:
        rows["inputs"] = report.outputs.inputs
    table = Table.grid(padding=(0, 2))
    for name, value in (rows | {"basis": basis_origin(report.basis)}).items():
        table.add_row(name, _escaped(value))
    console.print(table)
    for problem in report.problems[:_PROBLEMS]:
        console.print(f"- {_printable(problem)}", markup=False, highlight=False)
    if len(report.problems) > _PROBLEMS:
        console.print(f"- and {len(report.problems) - _PROBLEMS} more (--json has them all)")
    verdict = wording.verdict(report)
    colour = {"good": "green", "bad": "red", "open": "yellow"}[verdict.kind]
    console.print(f"[bold {colour}]{verdict.title.lower()}[/]")


def levels_run(report: "VerificationReport") -> dict[str, str]:
    """The levels that were asked for, each in its most telling figures."""
    from psoft_export.reports import wording

    asked = {"weights": report.weights, "geometry": report.geometry, "outputs": report.outputs}
    return {
        level.name: "; ".join(figures) or f"{level.status}: {level.reason}"
        for level, figures in wording.in_brief(report)
        if asked[level.name] is not None
    }


def print_error(text: str) -> None:
    """Print an error as one line on stderr."""
    console = Console(emoji=False, stderr=True, soft_wrap=True)
    line = " ".join(text.split())
    console.print(f"[bold red]error:[/] {_escaped(line)}", highlight=False)


def size(nbytes: float) -> str:
    """A number of bytes for people: 7.1 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError


def _escaped(text: str) -> str:
    return _printable(text).replace("[", r"\[")


def _printable(text: str) -> str:
    """One line without control characters: names come from files that anyone may have made."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
