"""`psoft-export combine`: several adapters of one base as one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

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
    OutputOption,
    OverwriteOption,
    QuietOption,
    RequireRecordOption,
    SvdDeviceOption,
    TokenOption,
)
from psoft_export.cli.output import Output, print_facts

if TYPE_CHECKING:
    from psoft_export import CombineReport

EXAMPLES = """
[bold]Examples[/]

  psoft-export combine --base ./base --adapter math=./a1:0.6 --adapter code=./a2:0.4 \\
      --method lie --output ./both
"""


def combine_command(
    base: BaseOption,
    adapter: AdaptersOption,
    output: OutputOption,
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
    from psoft_export import Combination, combine

    combination = adapters.reference()
    assert isinstance(combination, Combination)
    with out.merge_progress("combining") as progress:
        report = combine(
            base,
            combination,
            output,
            kind=kind,
            device=device,
            svd_device=svd_device,
            require_record=require_record,
            neumann_terms=options.neumann_terms(neumann_terms),
            cache=not no_cache,
            cache_dir=cache_dir,
            overwrite=overwrite,
            token=token,
            progress=progress,
        )
    for warning in report.manifest["warnings"]:
        out.warn(warning)
    out.result(report.to_dict(), lambda console: _print(console, report, combination.title, output))


def _print(console: Console, report: "CombineReport", title: str, output: Path) -> None:
    modules = report.modules
    rows = {
        "combination": title,
        "adapter": report.method,
        "combined": f"{len(modules)} modules",
        "largest rotation angle": f"{max(module.largest_angle for module in modules):.1f}°",
        "outside the common basis / ‖ΔW‖": f"{max(m.outside for m in modules):.1e} at most",
        "basis record": report.kind,
    }
    print_facts(console, rows, output)
