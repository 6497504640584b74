"""The files that a verdict is written to beside the terminal: a page and a summary."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from psoft_export.cli.output import Output
from psoft_export.errors import OutputError

if TYPE_CHECKING:
    from psoft_export import VerificationReport


@dataclass(frozen=True)
class Reports:
    """The files that `--report` and `--summary` ask for."""

    page: Path | None
    summary: Path | None

    def check(self) -> None:
        """Raise what writing would for want of a package or a folder, before the work is done."""
        if self.page is not None:
            from psoft_export.reports.page import check_page

            check_page(self.page)
        if self.summary is not None:
            from psoft_export.reports.files import check_file

            check_file(self.summary)

    def write(self, out: Output, report: "VerificationReport") -> None:
        """Write them; what cannot be written is a warning, for the verdict stands without it."""
        try:
            if self.page is not None:
                from psoft_export.reports.page import write_page

                write_page(report, self.page)
                out.note(f"report written to {self.page}")
            if self.summary is not None:
                from psoft_export.reports.summary import write_summary

                write_summary(report, self.summary)
                out.note(f"summary written to {self.summary}")
        except OutputError as error:
            out.warn(str(error))
