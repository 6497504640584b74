"""A verification as one HTML page. Needs jinja2 and matplotlib (the `plot` extra).

The page holds no script and nothing from elsewhere; its own content security policy forbids both.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from psoft_export.manifest import basis_origin
from psoft_export.plots import plot_extra
from psoft_export.reports import wording
from psoft_export.reports.files import check_file, write_text
from psoft_export.reports.wording import FiguresT, number, ulp
from psoft_export.verification.figures import (
    GeometryFigures,
    VerificationReport,
    WeightFigures,
)

_TEMPLATE = Path(__file__).with_name("page.html")
_SHOWN_PROBLEMS = 10
_SHOWN_FILES = 3


@dataclass(frozen=True)
class Column(Generic[FiguresT]):
    """A column of a table by module: its head, its text, and the figure that is bad when large."""

    name: str
    text: Callable[[FiguresT], str]
    figure: Callable[[FiguresT], float | None] | None = None


@dataclass(frozen=True)
class Cell:
    """A figure, and whether it is the worst of its column."""

    text: str
    worst: bool


@dataclass(frozen=True)
class Row:
    """A module's figures, and whether the merge of it is wrong."""

    module: str
    cells: tuple[Cell, ...]
    faulty: bool


def check_page(path: Path) -> None:
    """Raise what `write_page` would for want of a package or a folder, before the work is done."""
    with plot_extra("--report"):
        import jinja2  # noqa: F401

        import psoft_export.reports.charts  # noqa: F401
    check_file(path)


def write_page(report: VerificationReport, path: Path) -> None:
    """Write the report as one self-contained page. The same report gives the same bytes.

    Args:
        report: what a verification found.
        path: file to write, replaced in one step.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        OutputError: the file cannot be written.
    """
    write_text(path, render_page(report))


def render_page(report: VerificationReport) -> str:
    """The page's HTML.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    with plot_extra("--report"):
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup

        from psoft_export.reports.charts import (
            LABELLED,
            angle_panels,
            delta_panels,
            error_chart,
        )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = Markup
    # A line may break after each part of a path.
    environment.filters["breakable"] = lambda path: Markup(".<wbr>").join(path.split("."))
    weights = report.weights.modules if report.weights else ()
    geometry = report.geometry.modules if report.geometry else ()
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        verdict=wording.verdict(report),
        sides=[("base", report.base), ("adapter", report.adapter), ("merged", report.merged)],
        source_name=wording.source_name,
        weight_files=wording.weight_files,
        shown_files=_SHOWN_FILES,
        basis=basis_origin(report.basis),
        levels=wording.levels(report),
        weight_facts=wording.weight_facts(report.weights) if report.weights else (),
        geometry_facts=wording.geometry_facts(report.geometry) if report.geometry else (),
        output_facts=wording.output_facts(report.outputs) if report.outputs else (),
        outputs_ratio=wording.outputs_ratio(report.outputs) if report.outputs else None,
        shown_problems=_SHOWN_PROBLEMS,
        error_chart=error_chart(weights) if weights else None,
        faults=[weights[i] for i in wording.faults(weights)[:LABELLED]],
        deltas=delta_panels(weights),
        angles=angle_panels(geometry),
        weight_columns=_WEIGHT_COLUMNS,
        weight_rows=_rows(weights, _WEIGHT_COLUMNS, wording.faults(weights)),
        geometry_columns=_GEOMETRY_COLUMNS,
        geometry_rows=_rows(geometry, _GEOMETRY_COLUMNS),
        in_ulp=wording.in_ulp,
        version=importlib.metadata.version("psoft-export"),
    )


_WEIGHT_COLUMNS: tuple[Column[WeightFigures], ...] = (
    Column("shape", lambda m: " × ".join(map(str, m.shape))),
    Column("dtype", lambda m: m.dtype),
    Column("error (ulp)", lambda m: ulp(m.largest_error_ulp), lambda m: m.largest_error_ulp),
    Column("not nearest", lambda m: f"{m.not_nearest:,}", lambda m: m.not_nearest),
    Column("relative error", lambda m: number(m.relative_error), lambda m: m.relative_error),
    Column("‖ΔW‖ / ‖W‖", lambda m: number(m.relative_delta), lambda m: m.relative_delta),
    Column(
        "times applied",
        lambda m: "–" if m.applied is None else f"{m.applied:.4f}",
        wording.times_applied_error,
    ),
)
_GEOMETRY_COLUMNS: tuple[Column[GeometryFigures], ...] = (
    Column("strict", lambda m: "yes" if m.strict else "no"),
    Column("largest angle", lambda m: f"{m.largest_angle:.1f}°", lambda m: m.largest_angle),
    Column("median angle", lambda m: f"{m.median_angle:.1f}°", lambda m: m.median_angle),
    Column(
        "‖RᵀR − I‖", lambda m: number(m.orthogonality_error, 2), lambda m: m.orthogonality_error
    ),
    Column("norms", lambda m: number(m.norm_change, 2), lambda m: m.norm_change),
    Column("angles", lambda m: number(m.angle_change, 2) + "°", lambda m: m.angle_change),
    Column("energy", lambda m: number(m.energy_change, 2), lambda m: m.energy_change),
    Column("basis residual", lambda m: number(m.basis_residual, 2), lambda m: m.basis_residual),
)


def _rows(
    modules: Sequence[FiguresT], columns: Sequence[Column[FiguresT]], faulty: Sequence[int] = ()
) -> list[Row]:
    """The faulty modules first, as `faulty` has them; then the others in their order."""
    worst = [_outlier(modules, column) for column in columns]
    order = [*faulty, *(i for i in range(len(modules)) if i not in set(faulty))]
    return [
        Row(
            module=modules[i].module,
            cells=tuple(
                Cell(column.text(modules[i]), modules[i] is of_column)
                for column, of_column in zip(columns, worst, strict=True)
            ),
            faulty=i in faulty,
        )
        for i in order
    ]


def _outlier(modules: Sequence[FiguresT], column: Column[FiguresT]) -> FiguresT | None:
    """The module with the largest figure of a column; None where all read the same."""
    if column.figure is None or len({column.text(module) for module in modules}) == 1:
        return None
    return wording.worst(modules, column.figure)
