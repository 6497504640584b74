"""`psoft-export verify`: whether a merged checkpoint is what base and adapter mean."""

from typing import Annotated, Literal

import typer

from psoft_export.checkpoint.hashed_ahead import start_hashing
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
    BaseOption,
    CacheDirOption,
    DeviceOption,
    GivensOption,
    JsonOption,
    NeumannTermsOption,
    NoCacheOption,
    QuietOption,
    ReportOption,
    RequireRecordOption,
    SummaryOption,
    SvdDeviceOption,
    TextOption,
    TokenOption,
)
from psoft_export.cli.output import Output, print_verdict
from psoft_export.cli.reports import Reports
from psoft_export.errors import NotEquivalentError
from psoft_export.planner import start_planner

EXAMPLES = """
[bold]Examples[/]

  psoft-export verify --base ./base --adapter ./adapter --merged ./merged

  psoft-export verify --base ./base --adapter ./adapter --merged ./merged --level weights --json

  psoft-export verify --base ./base --adapter ./adapter --merged ./merged --text task.txt

  psoft-export verify --base ./base --adapter ./adapter --merged ./merged --report report.html
"""


def verify_command(
    base: BaseOption,
    adapter: AdaptersOption,
    merged: Annotated[
        str, typer.Option("--merged", help="Checkpoint to verify: a folder or a Hub id.")
    ],
    level: Annotated[
        Literal["weights", "outputs", "all"],
        typer.Option("--level", help="What to compare: every tensor, what the models say, both."),
    ] = "all",
    text: TextOption = None,
    report_file: ReportOption = None,
    summary_file: SummaryOption = None,
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
    """Verify that a merged checkpoint is what its base and adapter mean.

    Exit code 0 when it is, 14 when it is not.
    """
    out = Output(quiet=quiet, as_json=as_json)  # before the Hub library reads its settings
    adapters = Adapters.asked(adapter, method, factor, density, seed)
    reports = Reports(report_file, summary_file)
    reports.check()
    # The other levels run models here, and combining plans here.
    apart = level == "weights" and not adapters.is_combination
    planner = start_planner(cache_dir, cache=not no_cache) if apart else None
    start_hashing(*adapters.references.values(), base)
    from psoft_export import verify

    with out.merge_progress("verifying") as progress:
        report = verify(
            base,
            adapters.reference(),
            merged,
            level=level,
            text=text,
            device=device,
            svd_device=svd_device,
            require_record=require_record,
            neumann_terms=options.neumann_terms(neumann_terms),
            givens=givens,
            cache=not no_cache,
            cache_dir=cache_dir,
            token=token,
            progress=progress,
            note=out.note,
            planner=planner,
        )
    for warning in report.warnings:
        out.warn(warning)
    reports.write(out, report)
    out.result(report.to_dict(), lambda console: print_verdict(console, report))
    if not report.equivalent:
        raise NotEquivalentError(f"{merged}: not equivalent: {report.first_problem}")
