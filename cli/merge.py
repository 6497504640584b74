"""`psoft-export merge`: write the checkpoint in which an adapter is merged into its base."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

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
    CommitMessageOption,
    CreatePrOption,
    DeviceOption,
    GivensOption,
    JsonOption,
    NeumannTermsOption,
    NoCacheOption,
    OutputOption,
    OverwriteCardOption,
    OverwriteOption,
    PrivateOption,
    PushToOption,
    QuietOption,
    ReportOption,
    RequireRecordOption,
    RevisionOption,
    SummaryOption,
    SvdDeviceOption,
    TextOption,
    TokenOption,
)
from psoft_export.cli.output import Output, basis_facts, levels_run, print_facts, size
from psoft_export.cli.push import Upload, print_push, with_push
from psoft_export.cli.reports import Reports
from psoft_export.errors import NotEquivalentError, UsageError
from psoft_export.planner import start_planner

if TYPE_CHECKING:
    from psoft_export import MergePlan, MergeReport

EXAMPLES = """
[bold]Examples[/]

  psoft-export merge --base meta-llama/Llama-3.2-1B --adapter ./adapter --output ./merged

  psoft-export merge --base ./base --adapter ./adapter --output ./merged --dtype bf16 --overwrite

  psoft-export merge --base ./base --adapter ./unrecorded --output ./merged --recover-with task.txt

  psoft-export merge --base ./base --adapter me/adapter@v2 --output ./merged --dry-run

  psoft-export merge --base ./base --adapter ./adapter --output ./merged --push-to me/merged
"""


def merge_command(
    base: BaseOption,
    adapter: AdaptersOption,
    output: OutputOption,
    device: DeviceOption = "auto",
    svd_device: SvdDeviceOption = None,
    method: MethodOption = None,
    factor: FactorOption = None,
    density: DensityOption = None,
    seed: SeedOption = None,
    require_record: RequireRecordOption = False,
    recover_with: Annotated[
        Path | None,
        typer.Option(
            "--recover-with",
            metavar="DATA",
            help="Without a basis record: recover it first, as 'recover --text' does.",
        ),
    ] = None,
    neumann_terms: NeumannTermsOption = None,
    givens: GivensOption = None,
    cache_dir: CacheDirOption = None,
    no_cache: NoCacheOption = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="fp32, fp16 or bf16 for all floats; default: as stored."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", help="Largest weight file, as 5GB; default: the base's."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", help="Class names of a new classification head, comma-separated."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Also compare what the models say; a minute or more."),
    ] = False,
    text: TextOption = None,
    report_file: ReportOption = None,
    summary_file: SummaryOption = None,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; read no weights, write nothing.")
    ] = False,
    push_to: PushToOption = None,
    private: PrivateOption = False,
    revision: RevisionOption = None,
    create_pr: CreatePrOption = False,
    commit_message: CommitMessageOption = None,
    overwrite_card: OverwriteCardOption = False,
    token: TokenOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into its base checkpoint.

    The output folder is complete (weights, config, tokenizer, psoft_export.json) and appears
    only when every byte of it is on disk.
    """
    out = Output(quiet=quiet, as_json=as_json)  # before the Hub library reads its settings
    upload = Upload.asked(
        push_to, private, revision, create_pr, commit_message, overwrite_card, token
    )
    adapters = Adapters.asked(adapter, method, factor, density, seed)
    reports = Reports(report_file, summary_file)
    reports.check()
    # Loads transformers while torch is loaded here; models that are run, and combining, need it
    # here as well.
    held_here = dry_run or verify or adapters.is_combination or recover_with is not None
    planner = None if held_here else start_planner(cache_dir, cache=not no_cache)
    if not dry_run:
        start_hashing(*adapters.references.values(), base)
    from psoft_export import VerificationReport, merge, plan_merge

    names = [name.strip() for name in labels.split(",")] if labels is not None else None
    if dry_run and recover_with is not None:
        raise UsageError("--dry-run computes nothing; leave --recover-with away")
    if dry_run:
        plan = plan_merge(
            base,
            adapters.reference(),
            device=device,
            svd_device=svd_device,
            cache=not no_cache,
            cache_dir=cache_dir,
            require_record=require_record,
            neumann_terms=options.neumann_terms(neumann_terms),
            givens=givens,
            dtype=dtype,
            max_shard_size=max_shard_size,
            labels=names,
            token=token,
        )
        for warning in plan.warnings:
            out.warn(warning)
        out.result(plan.to_dict(), lambda console: _print_plan(console, plan))
        return
    if upload is not None:
        upload.prepare()
    try:
        with out.merge_progress() as progress:
            report = merge(
                base,
                adapters.reference(),
                output,
                device=device,
                svd_device=svd_device,
                require_record=require_record,
                neumann_terms=options.neumann_terms(neumann_terms),
                givens=givens,
                cache=not no_cache,
                cache_dir=cache_dir,
                dtype=dtype,
                max_shard_size=max_shard_size,
                labels=names,
                verify_outputs=verify,
                text=text,
                recover_with=recover_with,
                overwrite=overwrite,
                token=token,
                progress=progress,
                note=out.note,
                planner=planner,
            )
    except NotEquivalentError as error:
        if isinstance(error.report, VerificationReport):
            reports.write(out, error.report)
        raise
    for warning in report.manifest["warnings"]:
        out.warn(warning)
    reports.write(out, report.verification)
    pushed = upload.finish(out, output) if upload is not None else None

    def show(console: Console) -> None:
        _print_report(console, report)
        print_push(console, pushed)

    out.result(with_push(report.to_dict(), pushed), show)


def _print_plan(console: Console, plan: "MergePlan") -> None:
    table = Table(box=None)
    for column in ("target module", "checkpoint tensor"):
        table.add_column(column, overflow="fold")
    for column in ("shape", "rank", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    for target in plan.targets:
        shape = " × ".join(map(str, target.weight_shape))
        rank = str(plan.adapter.rank or "full")
        table.add_row(target.module, target.spec.name, shape, rank, size(target.spec.nbytes))
    console.print(table)
    tensors = sum(len(shard.tensors) for shard in plan.layout.shards)
    console.print(
        f"{len(plan.targets)} of {tensors} tensors merged into {plan.layout.class_name}, "
        f"{len(plan.layout.shards)} weight file(s)"
    )
    for field, value in plan.layout.config_changes.items():
        console.print(f"config.json: {field} becomes {value}", markup=False)
    if plan.adapter.needs_record:
        record = plan.adapter.record
        basis = f"recorded ({record.summary})" if record else "not recorded"
        console.print(f"basis {basis}", markup=False, highlight=False)
    console.print(
        f"disk {size(plan.output_bytes)}, memory for tensors about {size(plan.working_bytes)} "
        "(CPU; Python and its libraries not counted)"
    )


def _print_report(console: Console, report: "MergeReport") -> None:
    modules = report.modules
    deltas = sorted(module.relative_delta for module in modules)
    rank = modules[0].rank
    angles = [m.largest_angle for m in modules if m.largest_angle is not None]
    errors = [m.orthogonality_error for m in modules if m.orthogonality_error is not None]
    rows = {
        "method": str(report.manifest["adapter"]["method"]),
        "merged": f"{len(modules)} modules" + (f", rank {rank}" if rank is not None else ""),
        "‖ΔW‖/‖W‖": f"{deltas[0]:.3g} to {deltas[-1]:.3g}",
        **({"largest rotation angle": f"{max(angles):.1f}°"} if angles else {}),
        **({"orthogonality error": f"{max(errors):.1e}"} if errors else {}),
        "rounding error / ‖ΔW‖": f"{max(m.relative_rounding for m in modules):.2g} at most",
        **basis_facts(report.manifest["basis"], modules),
        **{f"checked: {name}": text for name, text in levels_run(report.verification).items()},
    }
    print_facts(console, rows, report.output)
