"""`psoft-export inspect`: an adapter at a glance."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from psoft_export.cli.options import JsonOption, TokenOption
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
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a PSOFT adapter is: method, options, size, and how far each layer turns."""
    out = Output(as_json=as_json)  # before the Hub library reads its settings
    from psoft_export import inspect

    summary = inspect(adapter, base=base, token=token)
    if plot is not None:
        from psoft_export.plots import plot_rotation_angles

        plot_rotation_angles(summary, plot)
        out.note(f"drawn to {plot}")
    out.result(summary.to_dict(), lambda console: _print_summary(console, summary))


def _print_summary(console: Console, summary: "AdapterSummary") -> None:
    head = Table.grid(padding=(0, 2))
    head.add_row("adapter", summary.name)
    head.add_row("method", summary.method)
    head.add_row("options", ", ".join(f"{name} {value}" for name, value in summary.options.items()))
    head.add_row("rank", str(summary.rank))
    head.add_row("parameters", f"{summary.parameters:,} in {len(summary.layers)} modules")
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
    right = ("count", "largest angle", "median angle", "orthogonality error", "|a − 1|", "|b − 1|")
    for column in (*right, *(("shape",) if summary.base else ())):
        table.add_column(column, justify="right")
    groups: dict[tuple[str, tuple[int, ...] | None], list[LayerSummary]] = {}
    for layer in summary.layers:
        groups.setdefault((layer.kind, layer.shape), []).append(layer)
    for (kind, shape), layers in groups.items():
        angles = sorted(angle for layer in layers for angle in layer.angles)
        row = [
            kind,
            str(len(layers)),
            f"{angles[-1]:.1f}°",
            f"{angles[len(angles) // 2]:.1f}°",
            f"{max(layer.orthogonality_error for layer in layers):.1e}",
            f"{max(layer.vector_a for layer in layers):.3f}",
            f"{max(layer.vector_b for layer in layers):.3f}",
        ]
        if shape is not None:
            row.append(" × ".join(map(str, shape)))
        table.add_row(*row)
    console.print(table)
