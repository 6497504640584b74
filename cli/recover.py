"""`psoft-export recover`: find the signs of an adapter's basis by the loss of its task."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from psoft_export.cli.options import (
    AdapterOption,
    BaseOption,
    CacheDirOption,
    DeviceOption,
    JsonOption,
    QuietOption,
    TokenOption,
)
from psoft_export.cli.output import Output, size

if TYPE_CHECKING:
    from psoft_export import RecoveryReport

EXAMPLES = """
[bold]Examples[/]

  psoft-export recover --base ./base --adapter ./adapter --text task.txt

  psoft-export recover --base ./base --adapter ./adapter --text chats.jsonl --time 600

  psoft-export recover --base ./base --adapter ./adapter --text reviews.csv --labels bad,good

  psoft-export recover --base ./vit --adapter me/adapter --text ./images --output ./adapter
"""


def recover_command(
    base: BaseOption,
    adapter: AdapterOption,
    text: Annotated[
        Path,
        typer.Option(
            "--text",
            help="Data of the task: UTF-8 text, .jsonl, .csv, or a folder of images by label.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for a copy of the adapter; default: its own folder."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", help="Class names in the head's order, comma-separated."),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens of an example; default: 256.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Gradient steps at most; default: 1720."),
    ] = None,
    time: Annotated[
        float | None,
        typer.Option("--time", metavar="SECONDS", help="Time for the search, instead of steps."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Examples in a step.")] = 8,
    readings: Annotated[
        str | None,
        typer.Option("--readings", help="SVDs to try first, comma-separated; default: all."),
    ] = None,
    random_start: Annotated[
        bool, typer.Option("--random-start", help="Try no SVDs; search from nothing.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of everything random.")] = 0,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="fp32, fp16 or bf16; default: fp32, on CUDA bf16 if the base is."
        ),
    ] = None,
    cache_dir: CacheDirOption = None,
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", help="No cache of bases, and no search that can be resumed."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Search although there is a record; replace it.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a non-empty output folder.")
    ] = False,
    token: TokenOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the signs of an adapter that nobody recorded, from a little data of its task.

    A record is written only if the signs are recovered; it says that they come from data. Exit
    code 15: some were recovered; 16: none. After Ctrl-C the same command goes on from the last
    cycle that was done.
    """
    out = Output(quiet=quiet, as_json=as_json)
    from psoft_export import recover

    report = recover(
        base,
        adapter,
        text,
        output=output,
        labels=_names(labels),
        window=window,
        steps=steps,
        time_limit=time,
        batch=batch,
        readings=_names(readings),
        random_start=random_start,
        seed=seed,
        device=device,
        dtype=dtype,
        cache=not no_cache,
        cache_dir=cache_dir,
        force=force,
        overwrite=overwrite,
        token=token,
        note=out.note,
    )
    out.result(report.to_dict(), lambda console: _print(console, report))
    report.require_recovered()


def _names(listed: str | None) -> list[str] | None:
    return [name.strip() for name in listed.split(",")] if listed is not None else None


def _print(console: Console, report: "RecoveryReport") -> None:
    table = Table(box=None)
    table.add_column("module", overflow="fold")
    for column in ("rank", "settled", "do not matter", "in doubt", "out of reach", "at stake"):
        table.add_column(column, justify="right", no_wrap=True)
    for module in report.modules:
        counts = (module.rank, module.settled, module.immaterial, module.in_doubt)
        table.add_row(
            module.module,
            *map(str, counts),
            str(module.out_of_reach),
            f"{module.at_stake:.1e}" if module.in_doubt else "",
        )
    console.print(table)
    start = ""
    if report.start_loss is not None:
        start = f", start ({report.start}) {report.start_loss:.4g}"
    searches = "a search beside the start" if report.holds else "two searches"
    facts = Table.grid(padding=(0, 2))
    rows = {
        "data": report.data,
        "held-out loss": f"base {report.base_loss:.4g}{start}, found {report.loss:.4g}",
        "settled": f"{report.settled:.1%} of the signs that matter",
        "found again": f"{report.returned:.1%} of the signs that matter, by {searches}",
        "took": f"{report.steps} steps, {report.seconds:.0f} s, memory {size(report.peak_bytes)}",
    }
    for name, value in rows.items():
        facts.add_row(name, value)
    console.print(facts, highlight=False, markup=False)
    console.print(f"{report.verdict}: {report.reason}", markup=False, highlight=False)
    if report.path is not None:
        console.print(f"signs record {report.path}", markup=False, highlight=False)
