"""`psoft-export record` and `convert`: the basis record of an adapter, made, checked, converted."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from psoft_export.cli import options
from psoft_export.cli.lora import show_lora
from psoft_export.cli.options import (
    AdapterOption,
    BaseOption,
    CacheDirOption,
    CommitMessageOption,
    CreatePrOption,
    DeviceOption,
    JsonOption,
    NeumannTermsOption,
    NoCacheOption,
    OutputOption,
    OverwriteCardOption,
    OverwriteOption,
    PrivateOption,
    PushToOption,
    QuietOption,
    RevisionOption,
    TokenOption,
)
from psoft_export.cli.output import Output
from psoft_export.cli.push import Upload, print_push, with_push
from psoft_export.errors import UsageError

if TYPE_CHECKING:
    from psoft_export import RecordReport

RECORD_EXAMPLES = """
[bold]Examples[/] (on the machine that trained)

  psoft-export record --base ./base --adapter ./adapter

  psoft-export record --base ./base --adapter ./adapter --kind full --overwrite

  psoft-export record --base ./base --adapter ./adapter --check
"""
CONVERT_EXAMPLES = """
[bold]Examples[/]

  psoft-export convert --base ./base --adapter ./adapter --to full --output ./adapter-full

  psoft-export convert --base ./base --adapter ./adapter --to this-machine --output ./for-peft
"""


def record_command(
    base: BaseOption,
    adapter: AdapterOption,
    kind: Annotated[
        Literal["auto", "signs", "full"],
        typer.Option("--kind", help="signs, full, or auto: signs where they say enough."),
    ] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Compare the record with this machine's SVD instead.")
    ] = False,
    device: DeviceOption = "auto",
    cache_dir: CacheDirOption = None,
    no_cache: NoCacheOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a record.")] = False,
    token: TokenOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write psoft_basis.safetensors into an adapter's folder.

    It holds what another machine's SVD cannot know of the basis. Run it on the machine and device
    that trained.
    """
    out = Output(quiet=quiet, as_json=as_json)
    from psoft_export import check_record, record

    with out.merge_progress("comparing" if check else "recording") as progress:
        shared: dict[str, Any] = {
            "device": device,
            "cache": not no_cache,
            "cache_dir": cache_dir,
            "token": token,
            "progress": progress,
        }
        if not check:
            report = record(base, adapter, kind=kind, overwrite=overwrite, **shared)
        elif kind != "auto" or overwrite:
            raise UsageError("--check writes nothing; leave --kind and --overwrite away")
        else:
            report = check_record(base, adapter, **shared)
    _show(out, report)


def convert_command(
    base: BaseOption,
    adapter: AdapterOption,
    to: Annotated[
        Literal["signs", "full", "this-machine", "peft", "lora"],
        typer.Option(
            "--to",
            help="Kind of record; the basis that PEFT finds on this machine; of a checkpoint of "
            "the paper's code, PEFT's PSOFT format; or a LoRA, as 'psoft-export lora' writes it.",
        ),
    ],
    output: OutputOption,
    neumann_terms: NeumannTermsOption = None,
    device: DeviceOption = "auto",
    cache_dir: CacheDirOption = None,
    no_cache: NoCacheOption = False,
    overwrite: OverwriteOption = False,
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
    """Write a PSOFT adapter in another form that means the same weights."""
    out = Output(quiet=quiet, as_json=as_json)
    upload = Upload.asked(
        push_to, private, revision, create_pr, commit_message, overwrite_card, token
    )
    from psoft_export import convert, to_lora

    if upload is not None:
        upload.prepare()
    with out.merge_progress("converting") as progress:
        shared: dict[str, Any] = {
            "neumann_terms": options.neumann_terms(neumann_terms),
            "device": device,
            "cache": not no_cache,
            "cache_dir": cache_dir,
            "overwrite": overwrite,
            "token": token,
            "progress": progress,
        }
        if to == "lora":
            lora = to_lora(base, adapter, output, **shared)
        else:
            report = convert(base, adapter, output, to=to, **shared)
    if to == "lora":
        show_lora(out, lora, upload, output)
    else:
        _show(out, report, upload, output)


def _show(
    out: Output, report: "RecordReport", upload: Upload | None = None, output: Path | None = None
) -> None:
    for warning in report.warnings:
        out.warn(warning)
    pushed = None
    if upload is not None and output is not None:
        pushed = upload.finish(out, output)

    def show(console: Console) -> None:
        _print(console, report)
        print_push(console, pushed)

    out.result(with_push(report.to_dict(), pushed), show)


def _print(console: Console, report: "RecordReport") -> None:
    checked = any(module.differing is not None for module in report.modules)
    table = Table(box=None)
    table.add_column("module", overflow="fold")
    for column in ("rank", "held", "ΔW left open"):
        table.add_column(column, justify="right", no_wrap=True)
    if checked:
        for column in ("signs that differ here", "vectors turned here"):
            table.add_column(column, justify="right")
    for module in report.modules:
        left_open = "?" if module.uncertainty is None else f"{module.uncertainty:.1e}"
        row = [module.module, str(module.rank), str(module.held), left_open]
        if checked:
            row += [str(module.differing), str(module.turned)]
        table.add_row(*row)
    console.print(table)
    if checked:
        differing = sum(module.differing or 0 for module in report.modules)
        turned = sum(module.turned or 0 for module in report.modules)
        total = sum(module.rank for module in report.modules)
        console.print(
            f"{differing} of {total} signs differ between the record and this machine's SVD"
            + (f"; {turned} vectors are turned among near-equal ones" if turned else "")
        )
    console.print(f"{report.kind} record {report.path}", markup=False, highlight=False)
