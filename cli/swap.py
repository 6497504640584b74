"""`psoft-export swap`: a merged checkpoint becomes another task's."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from psoft_export.cli import options
from psoft_export.cli.adapters import (
    Adapters,
    AdaptersOption,
    DensityOption,
    FactorOption,
    MethodOption,
    SeedOption,
)
from psoft_export.cli.options import (
    CacheDirOption,
    DeviceOption,
    GivensOption,
    JsonOption,
    NeumannTermsOption,
    NoCacheOption,
    QuietOption,
    RequireRecordOption,
    SvdDeviceOption,
    TokenOption,
)
from psoft_export.cli.output import Output, basis_facts, print_facts

if TYPE_CHECKING:
    from psoft_export import MergeReport

EXAMPLES = """
[bold]Examples[/]

  psoft-export swap ./merged --adapter ./a2 --base ./base

  psoft-export swap ./merged --adapter me/a2     # merged from a base on the Hub
"""


def swap_command(
    merged: Annotated[Path, typer.Argument(help="Folder that 'psoft-export merge' wrote.")],
    adapter: AdaptersOption,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Its base; default: the Hub repository it was merged from."),
    ] = None,
    device: DeviceOption = "auto",
    svd_device: SvdDeviceOption = None,
    method: MethodOption = None,
    factor: FactorOption = None,
    density: DensityOption = None,
    seed: SeedOption = None,
    require_record: RequireRecordOption = False,
    neumann_terms: NeumannTermsOption = None,
    givens: GivensOption = None,
    cache_dir: CacheDirOption = None,
    no_cache: NoCacheOption = False,
    token: TokenOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a merged checkpoint into another adapter's, in place.

    Only the tensors that change are written, and the folder changes in one step at the end.
    """
    out = Output(quiet=quiet, as_json=as_json)
    adapters = Adapters.asked(adapter, method, factor, density, seed)
    from psoft_export import swap

    with out.merge_progress("swapping") as progress:
        report = swap(
            merged,
            adapters.reference(),
            base=base,
            device=device,
            svd_device=svd_device,
            require_record=require_record,
            neumann_terms=options.neumann_terms(neumann_terms),
            givens=givens,
            cache=not no_cache,
            cache_dir=cache_dir,
            token=token,
            progress=progress,
        )
    for warning in report.manifest["warnings"]:
        out.warn(warning)
    out.result(report.to_dict(), lambda console: _print(console, report))


def _print(console: Console, report: "MergeReport") -> None:
    modules = report.modules
    rows = {
        "adapter": str(report.manifest["adapter"]["name"]),
        "method": str(report.manifest["adapter"]["method"]),
        "merged": f"{len(modules)} modules",
        **basis_facts(report.manifest["basis"], modules),
    }
    print_facts(console, rows, report.output)
