"""`psoft-export combine`: several adapters of one base as one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from psoft_export.cli import options
from psoft_export.cli.adapters import (
    Adapters,
    AdaptersOption,
    DensityOption,
    FactorOption,
    SeedOption,
)
from psoft_export.cli.options import (
    BaseOption,
    CacheDirOption,
    DeviceOption,
    JsonOption,
    NeumannTermsOption,
    NoCacheOption,
    OverwriteOption,
    QuietOption,
    RequireRecordOption,
    SvdDeviceOption,
    TokenOption,
)
from psoft_export.cli.output import Output, print_facts
from psoft_export.errors import UsageError

if TYPE_CHECKING:
    from psoft_export import CombineReport, LossTable, Sweep

EXAMPLES = """
[bold]Examples[/]

  psoft-export combine --base ./base --adapter math=./a1:0.6 --adapter code=./a2:0.4 \\
      --method lie --output ./both

  psoft-export combine --base ./base --adapter math=./a1 --adapter code=./a2 \\
      --evaluate math=math.txt --evaluate code=code.txt --sweep --plot losses.png
"""
_EVALUATION = "Trying it out"


def combine_command(
    base: BaseOption,
    adapter: AdaptersOption,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write; not needed with --evaluate."),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="linear, lie, ties, … (docs/combining.md).")
    ] = "lie",
    factor: FactorOption = None,
    density: DensityOption = None,
    seed: SeedOption = None,
    kind: Annotated[
        Literal["auto", "signs", "full"],
        typer.Option("--kind", help="Of the basis record; auto: signs where they say enough."),
    ] = "auto",
    evaluate_on: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluate",
            metavar="NAME=FILE",
            help="Print the loss on this UTF-8 text of the base, each adapter and the combination.",
            rich_help_panel=_EVALUATION,
        ),
    ] = None,
    sweep_all: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="With --evaluate: of every method, with the weights times 0.25 to 1.25.",
            rich_help_panel=_EVALUATION,
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            help="With --sweep: draw the losses into this file (png, svg, pdf).",
            rich_help_panel=_EVALUATION,
        ),
    ] = None,
    device: DeviceOption = "auto",
    svd_device: SvdDeviceOption = None,
    require_record: RequireRecordOption = False,
    neumann_terms: NeumannTermsOption = None,
    cache_dir: CacheDirOption = None,
    no_cache: NoCacheOption = False,
    overwrite: OverwriteOption = False,
    token: TokenOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Combine several adapters of one base into one PSOFT adapter with a basis record.

    Weights stand after a colon, 1 by default; the base has the rest. A negative weight takes a
    task away.
    """
    out = Output(quiet=quiet, as_json=as_json)
    adapters = Adapters.asked(adapter, method, factor, density, seed)
    texts = _texts(evaluate_on or [])
    _check_what(output, texts, plot, sweep_all=sweep_all)
    if plot is not None:
        from psoft_export.plots import check_picture

        check_picture(plot)
    from psoft_export import Combination, combine, evaluate, sweep

    combination = adapters.reference()
    assert isinstance(combination, Combination)
    shared: dict[str, Any] = {
        "device": device,
        "svd_device": svd_device,
        "require_record": require_record,
        "neumann_terms": options.neumann_terms(neumann_terms),
        "cache": not no_cache,
        "cache_dir": cache_dir,
        "token": token,
    }
    report, found = None, None
    if output is not None:
        with out.merge_progress("combining") as progress:
            report = combine(
                base,
                combination,
                output,
                kind=kind,
                overwrite=overwrite,
                progress=progress,
                **shared,
            )
        for warning in report.manifest["warnings"]:
            out.warn(warning)
    if texts:
        judge = sweep if sweep_all else evaluate
        found = judge(base, combination, texts, note=out.note, **shared)

    def show(console: Console) -> None:
        if report is not None:
            _print(console, report, combination.title)
        if found is not None:
            _print_losses(console, found)

    data = report.to_dict() if report is not None else {}
    out.result(data | ({"evaluation": found.to_dict()} if found is not None else {}), show)
    if plot is not None:
        from psoft_export import Sweep
        from psoft_export.plots import plot_sweep

        assert isinstance(found, Sweep)
        plot_sweep(found, plot)


def _texts(given: list[str]) -> dict[str, str]:
    """Text file by name."""
    texts: dict[str, str] = {}
    for text in given:
        name, separator, file = text.partition("=")
        if not separator or not name or not file:
            raise UsageError(f"--evaluate {text}: is not NAME=FILE")
        if name in texts:
            raise UsageError(f"--evaluate {text}: '{name}' is there twice")
        texts[name] = file
    return texts


def _check_what(
    output: Path | None, texts: dict[str, str], plot: Path | None, *, sweep_all: bool
) -> None:
    """Check that what is asked for goes together."""
    if output is None and not texts:
        raise UsageError("combine: pass --output to write an adapter, or --evaluate to try it")
    if sweep_all and not texts:
        raise UsageError("--sweep: pass the texts to evaluate on with --evaluate NAME=FILE")
    if plot is not None and not sweep_all:
        raise UsageError("--plot: draws what --sweep finds; pass --sweep")


def _print(console: Console, report: "CombineReport", title: str) -> None:
    modules = report.modules
    rows = {
        "combination": title,
        "adapter": report.method,
        "combined": f"{len(modules)} modules",
        "largest rotation angle": f"{max(module.largest_angle for module in modules):.1f}°",
        "outside the common basis / ‖ΔW‖": f"{max(m.outside for m in modules):.1e} at most",
        "basis record": report.kind,
    }
    print_facts(console, rows, report.output)


def _print_losses(console: Console, found: "LossTable | Sweep") -> None:
    from psoft_export import LossTable

    table = found if isinstance(found, LossTable) else found.table
    models = list(next(iter(table.losses.values())))
    grid = Table(box=None, title="loss, nats per token", title_justify="left")
    grid.add_column("text")
    for model in models:
        grid.add_column(model, justify="right")
    for text, losses in table.losses.items():
        grid.add_row(text, *(f"{losses[model]:.3f}" for model in models))
    console.print(grid)
    if isinstance(found, LossTable):
        return
    texts = list(table.losses)
    grid = Table(box=None)
    grid.add_column("method")
    for column in ("weights times", *texts, "mean"):
        grid.add_column(column, justify="right")
    for point in found.points:
        figures = [f"{point.losses[text]:.3f}" if point.losses else "–" for text in texts]
        mean = f"{point.mean:.3f}" if point.losses else (point.problem or "")
        grid.add_row(point.method, f"{point.scale:g}", *figures, mean)
    console.print(grid)
    best = found.best
    console.print(f"lowest mean: {best.method}, weights times {best.scale:g}: {best.mean:.3f}")
