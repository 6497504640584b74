"""`psoft-export inspect`: an adapter at a glance."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from psoft_export.cli import options
from psoft_export.cli.options import GivensOption, JsonOption, NeumannTermsOption, TokenOption
from psoft_export.cli.output import Output

if TYPE_CHECKING:
    from psoft_export import AdapterSummary, LayerSummary

EXAMPLES = """
[bold]Examples[/]

  psoft-export inspect ./adapter --base ./base

  psoft-export inspect me/adapter@v2 --plot angles.png
"""


def inspect_command(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id, with @revision or not.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Also match the adapter to this base.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the rotation angles into this file (png, svg, pdf)."),
    ] = None,
    neumann_terms: NeumannTermsOption = None,
    givens: GivensOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what an adapter is: method, options, size, and how far each layer turns."""
    out = Output(as_json=as_json)  # before the Hub library reads its settings
    from psoft_export import inspect

    summary = inspect(
        adapter,
        base=base,
        neumann_terms=options.neumann_terms(neumann_terms),
        givens=givens,
        token=token,
    )
    for warning in summary.warnings:
        out.warn(warning)
    if plot is not None:
        from psoft_export.plots import plot_rotation_angles

        plot_rotation_angles(summary, plot)
        out.note(f"drawn to {plot}")
    out.result(summary.to_dict(), lambda console: _print_summary(console, summary))


@dataclass(frozen=True)
class _Column:
    """A figure of the modules that share a row.

    Attributes:
        name: its heading.
        of: the figures of one module; none where its method has none.
        text: what is shown of the figures of several modules.
    """

    name: str
    of: Callable[["LayerSummary"], Sequence[float | None]]
    text: Callable[[list[float]], str]

    def figures(self, layers: Iterable["LayerSummary"]) -> list[float]:
        """Of all modules, ascending."""
        return sorted(value for layer in layers for value in self.of(layer) if value is not None)

    def applies(self, layers: Iterable["LayerSummary"]) -> bool:
        """Whether there is anything to show."""
        return bool(self.figures(layers))

    def show(self, layers: Iterable["LayerSummary"]) -> str:
        """The text for several modules."""
        return self.text(self.figures(layers))


def _of_psoft(layer: "LayerSummary", value: float) -> list[float]:
    return [value] if layer.orthogonality_error is not None else []


_COLUMNS = (
    _Column("largest angle", lambda m: m.angles, lambda found: f"{found[-1]:.1f}°"),
    _Column("median angle", lambda m: m.angles, lambda found: f"{found[len(found) // 2]:.1f}°"),
    _Column(
        "orthogonality error", lambda m: [m.orthogonality_error], lambda found: f"{found[-1]:.1e}"
    ),
    _Column("|a − 1|", lambda m: _of_psoft(m, m.vector_a), lambda found: f"{found[-1]:.3f}"),
    _Column("|b − 1|", lambda m: _of_psoft(m, m.vector_b), lambda found: f"{found[-1]:.3f}"),
    _Column(
        "reference and paper apart", lambda m: [m.form_distance], lambda found: f"{found[-1]:.3f}"
    ),
)


def _print_summary(console: Console, summary: "AdapterSummary") -> None:
    head = Table.grid(padding=(0, 2))
    head.add_row("adapter", summary.name)
    head.add_row("method", summary.method)
    head.add_row("options", ", ".join(f"{name} {value}" for name, value in summary.options.items()))
    if summary.rank is not None:
        head.add_row("rank", str(summary.rank))
    head.add_row("parameters", f"{summary.parameters:,} in {len(summary.layers)} modules")
    if summary.needs_record:
        head.add_row("basis record", summary.record or "none (docs/basis.md)")
    if summary.saved:
        saved = ", ".join(f"{name} {list(shape)}" for name, shape in summary.saved.items())
        head.add_row("saved modules", saved)
    if summary.base is not None:
        head.add_row("base", f"{summary.base} ({summary.model_class}): every target fits")
    console.print(head, markup=False)
    console.print()
    table = Table(box=None)
    table.add_column("module")
    columns = [column for column in _COLUMNS if column.applies(summary.layers)]
    names = [column.name for column in columns]
    for name in ("count", *names, *(("shape",) if summary.base else ())):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, tuple[int, ...] | None], list[LayerSummary]] = {}
    for layer in summary.layers:
        groups.setdefault((layer.kind, layer.shape), []).append(layer)
    for (kind, shape), layers in groups.items():
        shown = [column.show(layers) if column.applies(layers) else "–" for column in columns]
        row = [kind, str(len(layers)), *shown]
        if shape is not None:
            row.append(" × ".join(map(str, shape)))
        table.add_row(*row)
    console.print(table)
