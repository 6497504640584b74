"""`psoft-export onnx` and `onnx-adapter`: graphs that ONNX Runtime serves, and their tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from psoft_export.cli import options
from psoft_export.cli.adapters import (
    Adapters,
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
    OutputOption,
    OverwriteOption,
    QuietOption,
    RequireRecordOption,
    SvdDeviceOption,
    TextOption,
    TokenOption,
)
from psoft_export.cli.output import Output, print_facts, size
from psoft_export.errors import UsageError

if TYPE_CHECKING:
    from psoft_export import Combination
    from psoft_export.onnx import AddedTask, OnnxReport
    from psoft_export.verification.figures import OutputsLevel

EXAMPLES = """
[bold]Examples[/]

  psoft-export onnx --base ./base --adapter ./adapter --output ./onnx

  psoft-export onnx --model ./merged --output ./onnx --dtype fp16 --fuse cuda

  psoft-export onnx --base ./base --adapter math=./a1 --adapter code=./a2 --output ./many

  psoft-export onnx --model ./merged --output ./onnx --quantize int8 --text task.txt
"""
ADAPTER_EXAMPLES = """
[bold]Example[/]

  psoft-export onnx-adapter --graph ./many --adapter ./a3 --name law
"""


def onnx_command(
    output: OutputOption,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A checkpoint as it stands: a folder or a Hub id."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base checkpoint: a folder or a Hub id.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            help="Its adapter; or NAME=ADAPTER, several times, for one graph of these tasks; or "
            "[NAME=]ADAPTER[:WEIGHT], several times with --method, for their combination.",
        ),
    ] = None,
    mixed_batch: Annotated[
        bool,
        typer.Option("--mixed-batch", help="Each row of a batch has its own task (task_ids)."),
    ] = False,
    task: Annotated[
        str | None,
        typer.Option("--task", help="As transformers names it; default: the model class's."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, fp16 or bf16.")] = "fp32",
    opset: Annotated[
        int | None, typer.Option("--opset", help="ONNX operator set; default: the exporter's.")
    ] = None,
    fuse: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option("--fuse", help="ONNX Runtime's fused operators for this device."),
    ] = None,
    quantize: Annotated[
        Literal["int8"] | None, typer.Option("--quantize", help="Weights in 8 bits.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="With --quantize: text that shows activations."),
    ] = None,
    max_loss_increase: Annotated[
        float | None,
        typer.Option(
            "--max-loss-increase",
            help="With --quantize and --text: refuse a larger one, in nats per token.",
        ),
    ] = None,
    text: TextOption = None,
    keep_merged: Annotated[
        Path | None,
        typer.Option("--keep-merged", help="Keep the merged checkpoint in this folder."),
    ] = None,
    unchecked: Annotated[
        bool,
        typer.Option("--unchecked", help="Write it also where memory is too small to compare."),
    ] = False,
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
    overwrite: OverwriteOption = False,
    token: TokenOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export to ONNX: a merged checkpoint, a base with its adapter, or one graph for many tasks.

    The graph is run beside the PyTorch model, and the folder appears only when both agree.
    """
    out = Output(quiet=quiet, as_json=as_json)
    one, several = _adapters(adapter or [], method, factor, density, seed)
    from psoft_export import onnx

    with out.merge_progress() as progress:
        report = onnx.export(
            output,
            model=model,
            base=base,
            adapter=one,
            adapters=several,
            mixed_batch=mixed_batch,
            task=task,
            dtype=dtype,
            opset=opset,
            fuse=fuse,
            quantize=quantize,
            calibration=calibration,
            text=text,
            max_loss_increase=max_loss_increase,
            keep_merged=keep_merged,
            unchecked=unchecked,
            device=device,
            svd_device=svd_device,
            require_record=require_record,
            neumann_terms=options.neumann_terms(neumann_terms),
            givens=givens,
            cache=not no_cache,
            cache_dir=cache_dir,
            overwrite=overwrite,
            token=token,
            progress=progress,
            note=out.note,
        )
    for warning in report.manifest.get("warnings", ()):
        out.warn(warning)
    out.result(report.to_dict(), lambda console: _print_report(console, report))


def onnx_adapter_command(
    graph: Annotated[Path, typer.Option("--graph", help="Folder of a graph for many tasks.")],
    adapter: Annotated[
        str, typer.Option("--adapter", help="Adapter with a basis record: a folder or a Hub id.")
    ],
    name: Annotated[str, typer.Option("--name", help="Of the task.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a task of this name.")
    ] = False,
    token: TokenOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add a task to a graph for many tasks, without exporting again."""
    out = Output(quiet=quiet, as_json=as_json)
    from psoft_export import onnx

    added = onnx.add_task(graph, adapter, name, overwrite=overwrite, token=token)
    out.result(
        {"task": added.name, "file": str(added.file), "bytes": added.nbytes},
        lambda console: _print_added(console, added),
    )


def _adapters(
    given: list[str],
    method: str | None,
    factor: float | None,
    density: float | None,
    seed: int | None,
) -> "tuple[str | Combination | None, dict[str, str] | None]":
    """The one adapter or combination, or several by task."""
    if method is not None or factor is not None or density is not None or seed is not None:
        return Adapters.asked(given, method, factor, density, seed).reference(), None
    if not any("=" in text for text in given):
        if len(given) > 1:
            raise UsageError(
                f"--adapter {given[1]}: several adapters are tasks of one graph and need names; "
                "pass --adapter NAME=ADAPTER, or combine them with --method"
            )
        return (given[0] if given else None), None
    tasks: dict[str, str] = {}
    for text in given:
        name, separator, adapter = text.partition("=")
        if not separator or not adapter:
            raise UsageError(f"--adapter {text}: is not NAME=ADAPTER, as the others are")
        if name in tasks:
            raise UsageError(f"--adapter {text}: task '{name}' is named twice")
        tasks[name] = adapter
    return None, tasks


def _print_report(console: Console, report: "OnnxReport") -> None:
    manifest = report.manifest
    form = f"{manifest['dtype']}, opset {manifest['opset']}"
    if manifest["fused_for"]:
        form += f", fused for {manifest['fused_for']}"
    if manifest["quantization"]:
        form += f", {manifest['quantization']}"
    rows = {
        "model": f"{manifest['model_class']}, {report.task}",
        "graph": form,
        "files": ", ".join(f"{name} {size(nbytes)}" for name, nbytes in report.files.items()),
    }
    if manifest["tasks"]:
        how = "one for each row of a batch" if manifest["mixed_batch"] else "switched by call"
        rows["tasks"] = f"{', '.join(manifest['tasks'])} ({how})"
    table = Table(box=None)
    columns = ("checked", "Δ of the graph", "Δ of PyTorch", "same top", "greedy tokens", "loss")
    for column in columns:
        table.add_column(column, justify="left" if column == "checked" else "right")
    for title, levels in (("", report.verification), (manifest["quantization"], report.quantized)):
        for name, level in levels.items():
            table.add_row(*_row(name, title, level, bool(manifest["tasks"])))
    console.print(table)
    print_facts(console, rows, report.output)


def _row(name: str, title: str, level: "OutputsLevel", has_tasks: bool) -> list[str]:
    """One line of the table of what was checked."""
    what = name or ("base" if has_tasks else "merged model")
    if title:
        what += f", {title}"
    if level.skipped is not None or level.merged is None or level.unmerged is None:
        return [what, f"not run: {level.skipped}", "", "", "", ""]
    top1, generation, losses = level.merged.top1, level.generation, level.losses
    return [
        what,
        f"{level.merged.rms:.2g}",
        f"{level.unmerged.rms:.2g}",
        f"{top1:.1%}" if top1 is not None else "–",
        f"{generation.merged:.1%}" if generation is not None else "–",
        f"{losses['truth']:.4f} → {losses['merged']:.4f}" if losses is not None else "–",
    ]


def _print_added(console: Console, added: "AddedTask") -> None:
    rows = {"task": added.name, "modules": str(added.modules), "size": size(added.nbytes)}
    print_facts(console, rows, added.file)
