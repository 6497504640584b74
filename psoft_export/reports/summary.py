"""A verification in a few lines of Markdown, for the page of the CI job that ran it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psoft_export.manifest import basis_origin
from psoft_export.reports import wording
from psoft_export.reports.files import write_text
from psoft_export.verification.figures import VerificationReport

_MOST_LISTED = 10
_MOST_FILES = 3
_LONGEST_TEXT = 600
_SIGNS = {"good": "✅", "bad": "❌", "open": "⚪"}


def write_summary(report: VerificationReport, path: Path) -> None:
    """Write `summary` into a file, replaced in one step.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(path, summary(report))


def summary(report: VerificationReport) -> str:
    """The report in GitHub's Markdown: verdict, a few figures, what is wrong, what is not known."""
    verdict = wording.verdict(report)
    lines = [f"## {_SIGNS[verdict.kind]} {verdict.title}", "", verdict.sentence, ""]
    lines += _listed("Problems", report.problems)
    lines += _table(["level", "result", "figures"], _level_rows(report))
    lines += _table(
        ["compared", "name", "SHA-256"],
        [
            [side, _code(wording.source_name(source)), _hashes(source)]
            for side, source in (
                ("base", report.base),
                ("adapter", report.adapter),
                ("merged", report.merged),
            )
        ],
    )
    lines += [f"Basis: {_text(basis_origin(report.basis))}. {_text(report.method)}.", ""]
    lines += _listed("Warnings", report.warnings)
    return "\n".join(lines).rstrip("\n") + "\n"


def _level_rows(report: VerificationReport) -> list[list[str]]:
    return [
        [
            level.name,
            f"{_SIGNS[level.kind]} {level.status}",
            "; ".join(figures) or _text(level.reason),
        ]
        for level, figures in wording.in_brief(report)
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def _listed(title: str, sentences: Sequence[str]) -> list[str]:
    if not sentences:
        return []
    lines = [f"### {title}", "", *(f"- {_text(s)}" for s in sentences[:_MOST_LISTED])]
    if len(sentences) > _MOST_LISTED:
        lines.append(f"- and {len(sentences) - _MOST_LISTED} more")
    return [*lines, ""]


def _hashes(source: Mapping[str, Any]) -> str:
    files = [f"{_code(name)} {digits}" for name, digits in wording.weight_files(source).items()]
    more = [f"and {len(files) - _MOST_FILES} more"] if len(files) > _MOST_FILES else []
    return ", ".join(files[:_MOST_FILES] + more)


def _text(text: str) -> str:
    """Text of unknown origin that reads as it is: no markup, no HTML, no links, one line."""
    line = _one_line(text)
    escaped = re.sub(r"([\\`*_{}\[\]<>|~$@#&])", r"\\\1", line)
    return escaped.replace("://", r"\://")


def _code(text: str) -> str:
    """A name as code, also in a cell of a table."""
    line = _one_line(text)
    if re.fullmatch(r"[\w ./:@+-]+", line):
        return f"`{line}`"
    coded = re.sub(r"[^a-zA-Z0-9 .-]", lambda sign: f"&#{ord(sign[0])};", line)
    return f"<code>{coded}</code>"


def _one_line(text: str) -> str:
    """At most one line of characters that a file can hold."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= _LONGEST_TEXT else line[: _LONGEST_TEXT - 1] + "…"
