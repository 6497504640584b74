"""`psoft-export lora`: the adapter as a LoRA adapter, for PEFT and for servers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

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
    RequireRecordOption,
    RevisionOption,
    SvdDeviceOption,
    TokenOption,
)
from psoft_export.cli.output import Output, basis_facts, print_facts
from psoft_export.cli.push import Upload, print_push, with_push
from psoft_export.planner import start_planner

if TYPE_CHECKING:
    from psoft_export import LoraReport

EXAMPLES = """
[bold]Examples[/]

  psoft-export lora --base ./base --adapter ./adapter --output ./lora

  psoft-export lora --base ./base --adapter ./adapter --output ./lora --dtype bf16

  psoft-export lora --base ./base --adapter ./adapter --output ./lora --reduce-rank 0.01
"""


def lora_command(
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
    neumann_terms: NeumannTermsOption = None,
    givens: GivensOption = None,
    cache_dir: CacheDirOption = None,
    no_cache: NoCacheOption = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="fp32, fp16 or bf16 for lora_A and lora_B.")
    ] = "fp32",
    reduce_rank: Annotated[
        float | None,
        typer.Option(
            "--reduce-rank", metavar="TOL", help="Smaller rank at ‖error‖ / ‖ΔW‖ of at most TOL."
        ),
    ] = None,
    approximate: Annotated[
        int | None,
        typer.Option(
            "--approximate",
            metavar="RANK",
            help="Of a method whose ΔW has full rank (qGOFT, OFT, …): the nearest LoRA.",
        ),
    ] = None,
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
    """Write an adapter as a LoRA adapter that PEFT and LoRA servers load.

    Of PSOFT it is the same change of the weights: a PSOFT adapter is a LoRA pair already.
    """
    out = Output(quiet=quiet, as_json=as_json)  # before the Hub library reads its settings
    upload = Upload.asked(
        push_to, private, revision, create_pr, commit_message, overwrite_card, token
    )
    adapters = Adapters.asked(adapter, method, factor, density, seed)
    # Loads transformers while torch is loaded here; combining needs it here as well.
    planner = None if adapters.is_combination else start_planner(cache_dir, cache=not no_cache)
    start_hashing(*adapters.references.values(), base)
    from psoft_export import to_lora

    if upload is not None:
        upload.prepare()
    with out.merge_progress("converting") as progress:
        report = to_lora(
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
            reduce_rank=reduce_rank,
            approximate=approximate,
            overwrite=overwrite,
            token=token,
            progress=progress,
            planner=planner,
        )
    show_lora(out, report, upload, output)


def show_lora(out: Output, report: "LoraReport", upload: Upload | None, output: Path) -> None:
    """Warn, publish if that was asked for, and print what was converted."""
    for warning in report.manifest["warnings"]:
        out.warn(warning)
    pushed = upload.finish(out, output) if upload is not None else None

    def show(console: Console) -> None:
        _print(console, report)
        print_push(console, pushed)

    out.result(with_push(report.to_dict(), pushed), show)


def _print(console: Console, report: "LoraReport") -> None:
    modules = report.modules
    needed = sorted(module.needed_rank for module in modules)
    rows = {
        "converted": f"{len(modules)} modules, rank {modules[0].rank}",
        "LoRA rank": f"{report.rank}"
        + (f" (modules need {needed[0]} to {needed[-1]})" if needed[0] != needed[-1] else ""),
        "error / ‖ΔW‖": f"{max(module.relative_error for module in modules):.1e} at most",
        **basis_facts(report.manifest["basis"], modules),
    }
    print_facts(console, rows, report.output)
