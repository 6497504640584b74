"""Exporting to ONNX, from references to a complete folder that is proven equal."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir
import torch
import transformers
from transformers.exporters import ExportedComponent, ExportedModel

from psoft_export.adapters.adapter import NeumannTerms
from psoft_export.algebra.parameters import GivensForm
from psoft_export.bases import BasisFinder
from psoft_export.cache import BasisCache, open_cache
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.dtypes import TORCH_DTYPES, parse_dtype
from psoft_export.checkpoint.output import OutputFolder, check_free_space, check_target
from psoft_export.checkpoint.reader import file_sha256, open_checkpoint
from psoft_export.checkpoint.source import Source, resolve
from psoft_export.combining import Combination, plan_merge
from psoft_export.device import choose_device
from psoft_export.errors import (
    CheckpointError,
    NotEquivalentError,
    OutputError,
    UnsupportedError,
    UsageError,
)
from psoft_export.manifest import FILENAME, basis_origin, source_record
from psoft_export.merging import execute_merge
from psoft_export.model.skeleton import Skeleton, library_class, read_config
from psoft_export.onnx.equivalence import check_graph
from psoft_export.onnx.folder import (
    COMPONENTS,
    FORMAT,
    FORMAT_VERSION,
    check_task_name,
)
from psoft_export.onnx.quantization import Quantization, quantize_program
from psoft_export.onnx.runtime import load
from psoft_export.onnx.subjects import ManyTasksSubject, PlainSubject, Subject
from psoft_export.onnx.tasks import Task, find_task
from psoft_export.onnx.tracing import Fusion, check_opset, trace
from psoft_export.opening import base_files, check_apart
from psoft_export.pipeline import ProgressCallback
from psoft_export.plan import MergePlan
from psoft_export.verification.figures import OutputsLevel
from psoft_export.verification.inputs import make_inputs
from psoft_export.verification.models import find_changes
from psoft_export.verification.text import read_text

_MERGED = ".merged"  # the merged checkpoint, in the scratch folder of the output
Note = Callable[[str], None]
_ITEMSIZE = {code: TORCH_DTYPES[code].itemsize for code in ("F32", "F16", "BF16")}


@dataclass(frozen=True)
class OnnxReport:
    """The outcome of an export.

    Attributes:
        output: the folder written.
        task: what the graph is for.
        files: name → bytes of what was written, small files apart.
        verification: by task (`""`: the merged model, or the base) how the graph's outputs were
            found; of a quantized graph those before quantization.
        quantized: the same of the quantized graph; empty without quantization.
        manifest: all that `psoft_export.json` says.
    """

    output: Path
    task: str
    files: Mapping[str, int]
    verification: Mapping[str, OutputsLevel]
    quantized: Mapping[str, OutputsLevel]
    manifest: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON-ready object."""
        return {"output": str(self.output), **self.manifest}


@dataclass(frozen=True)
class _Form:
    """How a graph is written."""

    code: str
    opset: int | None
    fuse: Fusion | None
    quantization: Quantization | None


@dataclass(frozen=True)
class _Checking:
    """How a graph is checked."""

    device: torch.device
    text: Path | None
    max_loss_increase: float | None
    unchecked: bool
    note: Note


@dataclass(frozen=True)
class _Prepared:
    """What is exported.

    Attributes:
        subject: the model.
        task: what for.
        origin: what the manifest says of where it comes from.
        tasks: the same of each task of the graph.
    """

    subject: Subject
    task: Task
    origin: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def export(
    output: str | Path,
    *,
    model: str | Path | None = None,
    base: str | Path | None = None,
    adapter: str | Path | Combination | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    mixed_batch: bool = False,
    task: str | None = None,
    dtype: str = "fp32",
    opset: int | None = None,
    fuse: Fusion | None = None,
    quantize: Literal["int8"] | None = None,
    calibration: str | Path | None = None,
    text: str | Path | None = None,
    max_loss_increase: float | None = None,
    keep_merged: str | Path | None = None,
    unchecked: bool = False,
    device: str = "auto",
    svd_device: str | None = None,
    require_record: bool = False,
    neumann_terms: NeumannTerms | None = None,
    givens: GivensForm | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    token: str | None = None,
    progress: ProgressCallback | None = None,
    note: Note | None = None,
) -> OnnxReport:
    """Write a folder that ONNX Runtime serves, proven equal to the PyTorch model.

    From `model`, a checkpoint as it stands; from `base` and `adapter`, their merge, which is
    made beside the output and removed again; or from `base` and several named `adapters`, one
    graph for all these tasks.

    The graph is run beside the PyTorch model on several batch sizes and lengths, with padding,
    with and without the cache, and may be no farther from the truth (PyTorch in a finer dtype)
    than a small multiple of PyTorch itself in the graph's dtype; greedy generation must give the
    same tokens, near ties apart. The folder appears only when that holds.

    Args:
        output: folder to write.
        model: folder or Hub id of a checkpoint.
        base: folder or Hub id of a base.
        adapter: folder or Hub id of its adapter, of any kind that `merge` takes; or a combination
            of several, merged.
        adapters: task name → folder or Hub id of a PSOFT adapter of the base.
        mixed_batch: with `adapters`: an input `task_ids` gives each row of a batch its own task.
        task: as `transformers.pipeline` names them; by default that of the model class.
        dtype: `fp32`, `fp16` or `bf16`: of weights, computation and cache.
        opset: version of ONNX's operator set; by default the exporter's own.
        fuse: ONNX Runtime's fused operators for `cpu` or `cuda`; by default standard ones.
        quantize: `int8`: weights of matrix products in 8 bits, each activation as it comes.
        calibration: text file; then activations are quantized by what it shows of them.
        text: a UTF-8 file to compare outputs, and the task loss, on.
        max_loss_increase: with `quantize` and `text`: refuse a larger increase of the loss, in
            nats per token.
        keep_merged: folder to keep the merged checkpoint in.
        unchecked: write the folder also where the models cannot be compared, for want of memory
            say; it then says so.
        device: where the merge and the PyTorch models run; ONNX Runtime also runs there.
        svd_device: as for `merge`.
        require_record: as for `merge`.
        neumann_terms: as for `merge`.
        givens: as for `merge`.
        cache: as for `merge`.
        cache_dir: as for `merge`.
        overwrite: replace a non-empty output folder.
        token: a Hub token.
        progress: told how far the merge is.
        note: told in a few words of each step.

    Returns:
        What was written, and how equal it was found to be.

    Raises:
        NotEquivalentError: the graph does not compute what the model does.
        UnsupportedError: no exporter for the architecture or task; the message says which are.
        MismatchError: the adapters do not share the base's subspaces.
        PsoftExportError: a subclass that says what is wrong; see `docs/exit-codes.md`.

    Example:
        >>> psoft_export.onnx.export("onnx", base="base", adapter="adapter")
        >>> psoft_export.onnx.export("many", base="base", adapters={"math": "a1", "code": "a2"})
    """
    _check_what(model, base, adapter, adapters, mixed_batch=mixed_batch)
    if quantize is None and (calibration is not None or max_loss_increase is not None):
        raise UsageError("calibration, max_loss_increase: are for quantization; pass --quantize")
    if max_loss_increase is not None and text is None:
        raise UsageError("max_loss_increase: needs a text to tell the loss on; pass --text")
    if fuse is not None and fuse not in get_args(Fusion):
        raise UsageError(f"fuse '{fuse}': is not cpu or cuda")
    if fuse is not None and calibration is not None:
        raise UsageError(
            "fuse, calibration: ONNX Runtime's static quantizer does not take fused operators; "
            "leave out one of them"
        )
    check_opset(opset)
    quantization = Quantization.asked(quantize, calibration)
    form = _Form(parse_dtype(dtype), opset, fuse, quantization)
    if quantization is not None and form.code != "F32":
        raise UsageError(f"quantize, dtype: int8 stands beside fp32, not {dtype}")
    if text is not None:
        read_text(Path(text))  # refused now rather than at the end
    tell = note or (lambda _: None)
    on = choose_device(device)
    trained_on = choose_device(svd_device) if svd_device is not None else None
    on_text = Path(text) if text is not None else None
    checking = _Checking(on, on_text, max_loss_increase, unchecked, tell)
    store = open_cache(cache_dir) if cache else None
    target = Path(output)
    check_target(target.absolute(), overwrite=overwrite)
    if keep_merged is not None:
        if adapter is None:
            raise UsageError("keep_merged: there is a merged checkpoint only with --adapter")
        check_target(Path(keep_merged).absolute(), overwrite=overwrite)
        _check_apart(target, Path(keep_merged), "the folder of the merged checkpoint")

    def plan(of: str | Path | Combination, as_dtype: str | None) -> MergePlan:
        assert base is not None
        return plan_merge(
            base,
            of,
            device=device,
            svd_device=svd_device,
            cache=cache,
            cache_dir=cache_dir,
            require_record=require_record,
            dtype=as_dtype,
            neumann_terms=neumann_terms,
            givens=givens,
            token=token,
        )

    if model is not None:
        source = resolve(model, companions.CONFIG, base_files, token=token)
        _check_apart(target, source.folder, "the model's own folder")

        def prepare(scratch: Path) -> _Prepared:
            origin = {"model": _source_of(source), **_merge_of(source.folder)}
            return _Prepared(*_plain(source, task, None), origin)

    elif adapters is not None:
        plans = {name: plan(of, None) for name, of in adapters.items()}
        for one in plans.values():
            check_apart(target, one)

        def prepare(scratch: Path) -> _Prepared:
            return _many(plans, task, checking, trained_on, store, mixed_batch=mixed_batch)

    else:
        assert adapter is not None
        merging = plan(adapter, dtype)
        check_apart(target, merging)

        def prepare(scratch: Path) -> _Prepared:
            tell("merging")
            folder = Path(keep_merged) if keep_merged is not None else scratch / _MERGED
            report = execute_merge(
                merging,
                folder,
                device=on,
                svd_device=trained_on,
                cache=store,
                overwrite=overwrite,
                progress=progress,
            )
            names = ("base", "adapter", "basis", "warnings")
            origin = {name: report.manifest[name] for name in names}
            merged = Source(folder, folder.name)
            return _Prepared(*_plain(merged, task, merging.layout.class_name), origin)

    return _write(target, prepare, form, checking, overwrite=overwrite)


def _check_what(
    model: str | Path | None,
    base: str | Path | None,
    adapter: str | Path | Combination | None,
    adapters: Mapping[str, str | Path] | None,
    *,
    mixed_batch: bool,
) -> None:
    """Check that what is to be exported is named once, and whole."""
    if model is not None:
        if base is not None or adapter is not None or adapters is not None:
            raise UsageError("model: is a checkpoint as it stands; pass it, or base and adapter")
    elif base is None or (adapter is None) == (adapters is None):
        raise UsageError(
            "nothing to export: pass --model, or --base and --adapter, or --base and several "
            "--adapter NAME=FOLDER"
        )
    if adapters is not None and not adapters:
        raise UsageError("adapters: name at least one task")
    for name in adapters or ():
        check_task_name(name)
    if mixed_batch and adapters is None:
        raise UsageError("mixed_batch: needs named tasks; pass --adapter NAME=FOLDER")


def _check_apart(target: Path, other: Path, what: str) -> None:
    """Check that what is written does not replace, or lie in, a folder that is needed.

    Raises:
        OutputError: it does.
    """
    output, folder = target.resolve(), other.resolve()
    if output == folder or output in folder.parents or folder in output.parents:
        raise OutputError(f"{target}: is, holds or lies in {what} ({other}); choose another output")


def _plain(source: Source, wanted: str | None, class_name: str | None) -> tuple[PlainSubject, Task]:
    """A checkpoint, and the task to export it for."""
    config = read_config(source.folder)
    architectures = [class_name] if class_name else [*(config.architectures or []), None]
    task = find_task(config, architectures[0], wanted)
    known = library_class(architectures[0])
    is_own = wanted is None or (known is not None and _is_of(task, known, config))
    model_class = known if is_own and known is not None else task.model_class(config)
    checkpoint = open_checkpoint(source.folder)
    return PlainSubject(checkpoint, Skeleton(model_class, config)), task


def _is_of(task: Task, model_class: type, config: Any) -> bool:
    found = task.classes.get(type(config), ())
    return model_class in (found if isinstance(found, (tuple, list)) else (found,))


def _many(
    plans: Mapping[str, MergePlan],
    wanted: str | None,
    checking: _Checking,
    svd_device: torch.device | None,
    cache: BasisCache | None,
    *,
    mixed_batch: bool,
) -> _Prepared:
    """A base with several tasks."""
    changes, bases = {}, {}
    for name, plan in plans.items():
        checking.note(f"bases of '{name}'")
        finder = BasisFinder(
            plan.adapter, device=checking.device, svd_device=svd_device, cache=cache
        )
        changes[name] = find_changes(plan, finder, checking.device)
        bases[name] = finder
    subject = ManyTasksSubject(plans, changes, mixed_batch)
    first = next(iter(plans.values()))
    task = find_task(subject.skeleton.config, first.layout.class_name, wanted)
    if task.name == "text2text-generation":
        raise UnsupportedError(
            "several tasks in one graph are for models of one graph; an encoder-decoder has three: "
            "export each task with --adapter FOLDER"
        )
    if not _is_of(task, subject.skeleton.model_class, subject.skeleton.config):
        raise UsageError(
            f"task '{task.name}': the adapters are of {subject.skeleton.class_name}, which is of "
            "another task"
        )
    hashes = {f.name: file_sha256(f.path, CheckpointError) for f in first.checkpoint.files}
    origin = {
        "base": source_record(first.base, hashes),
        "warnings": [w for n, b in bases.items() for w in (*plans[n].warnings, *b.warnings)],
    }
    tasks = {
        name: {
            "adapter": source_record(plan.adapter.source, plan.adapter.sha256),
            "method": plan.adapter.method,
            "basis": basis_origin(bases[name].describe()),
            "outside": subject.outside[name],
        }
        for name, plan in plans.items()
    }
    return _Prepared(subject, task, origin, tasks)


def _source_of(source: Source) -> dict[str, Any]:
    checkpoint = open_checkpoint(source.folder)
    files = {file.name: file_sha256(file.path, CheckpointError) for file in checkpoint.files}
    return source_record(source, files)


def _merge_of(folder: Path) -> dict[str, Any]:
    """What a merged folder says of its base and adapter; nothing where it is of other origin."""
    try:
        content = json.loads((folder / FILENAME).read_text("utf-8"))
        return {name: content[name] for name in ("base", "adapter", "basis")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(
    target: Path,
    prepare: Callable[[Path], _Prepared],
    form: _Form,
    checking: _Checking,
    *,
    overwrite: bool,
) -> OnnxReport:
    """Trace, write, check: everything that is the same for all subjects."""
    with OutputFolder(target, overwrite=overwrite) as folder:
        prepared = prepare(folder.path)
        subject, task, origin = prepared.subject, prepared.task, prepared.origin
        if checking.max_loss_increase is not None and task.name != "text-generation":
            raise UsageError(f"max_loss_increase: '{task.name}' has no loss on a text")
        check_free_space(folder.path, _needed_bytes(subject, task, form))
        small = subject.companions()
        companions.write_companions(small, folder.path)
        _write_config(subject, folder.path)
        checking.note("tracing")
        components = _trace(subject, task, form)
        files = subject.write_tasks(folder.path, form.code)
        content: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "tool": _versions(),
            **origin,
            "model_class": subject.skeleton.class_name,
            "task": task.name,
            "dtype": form.code,
            "opset": next(iter(components.values())).program.opset_imports.get(""),
            "fused_for": form.fuse,
            "quantization": None,
            "tasks": {name: {**of, "file": files[name]} for name, of in prepared.tasks.items()},
            **subject.describe(),
        }
        companions.write_json(folder.path / FILENAME, content)
        _save(components, folder.path)
        checked = _check(folder.path, subject, form, checking)
        _refuse_unequal(target, checked, unchecked=checking.unchecked)
        quantized: dict[str, OutputsLevel] = {}
        if form.quantization is not None:
            checking.note(f"quantizing to {form.quantization.name}")
            samples = _calibration(folder.path, subject, form.quantization)
            for component in components.values():
                component.program = quantize_program(component.program, form.quantization, samples)
            content["quantization"] = form.quantization.name
            companions.write_json(folder.path / FILENAME, content)
            _save(components, folder.path)
            quantized = _check(folder.path, subject, form, checking, quantized=True)
            _refuse_unequal(target, quantized, unchecked=checking.unchecked)
        shutil.rmtree(folder.path / _MERGED, ignore_errors=True)
        others = {*small, companions.CONFIG, COMPONENTS, FILENAME}
        inside = (path for path in sorted(folder.path.iterdir()) if path.is_file())
        written = [path for path in inside if path.name not in others]
        content["files"] = {p.name: file_sha256(p, OutputError) for p in written}
        content["verification"] = {name: level.summary() for name, level in checked.items()}
        content["verification_quantized"] = {n: level.summary() for n, level in quantized.items()}
        unseen = {lv.skipped for lv in (*checked.values(), *quantized.values()) if lv.skipped}
        content["warnings"] = [
            *origin.get("warnings", ()),
            *(f"the graph was not compared with PyTorch: {reason}" for reason in sorted(unseen)),
        ]
        companions.write_json(folder.path / FILENAME, content)
        sizes = {p.name: p.stat().st_size for p in written}
        folder.commit()
    return OnnxReport(target, task.name, sizes, checked, quantized, content)


def _needed_bytes(subject: Subject, task: Task, form: _Form) -> int:
    """The room that the graphs take, each with weights of its own."""
    graphs = 3 if task.name == "text2text-generation" else 1
    kept = 2 if form.quantization is not None else 1  # the quantized one beside the float one
    return subject.numbers * _ITEMSIZE[form.code] * graphs * kept + companions.ROOM_BYTES


def _write_config(subject: Subject, folder: Path) -> None:
    """`config.json` with the class that the graph is of."""
    classes = [subject.skeleton.class_name]
    changes = {"architectures": classes}
    same = subject.skeleton.config.architectures == classes
    companions.write_config(subject.folder, {} if same else changes, folder)


def _trace(subject: Subject, task: Task, form: _Form) -> dict[str, ExportedComponent]:
    model = subject.traced(form.code)
    components = {}
    for name, sample in task.samples(model).items():
        traced = sample.part if sample.part is not None else model
        component = trace(traced, subject.sample(sample), opset=form.opset, fuse=form.fuse)
        subject.finish(component.program, form.code)
        components[name] = component
    return components


def _calibration(
    folder: Path, subject: Subject, quantization: Quantization
) -> list[dict[str, torch.Tensor]]:
    """What the graph is run on to see the ranges of its activations."""
    text = quantization.calibration
    if text is None:
        return []
    model = load(folder, device="cpu")
    inputs = make_inputs(subject.skeleton, folder, text)
    try:
        return [model.graph_inputs(**batch.arguments) for batch in inputs.batches]
    except KeyError as cause:
        raise UsageError(f"{text}: calibration is for models of one graph") from cause


def _save(components: Mapping[str, ExportedComponent], folder: Path) -> None:
    """Write every graph, its weights beside it, and what is recorded of it."""
    for name, component in components.items():
        for value in component.program.graph.initializers.values():
            value.meta.pop("path", None)
        component.program.meta.pop("path", None)
        component.metadata.export_config.setdefault("component", name)
    ExportedModel(dict(components), "onnx").save_pretrained(folder)


def _check(
    folder: Path, subject: Subject, form: _Form, checking: _Checking, *, quantized: bool = False
) -> dict[str, OutputsLevel]:
    return check_graph(
        folder,
        subject.references(),
        subject.loader,
        beside=subject.beside,
        outside=subject.outside,
        code=form.code,
        text=checking.text,
        device=checking.device,
        note=checking.note,
        quantized=quantized,
        max_loss_increase=checking.max_loss_increase if quantized else None,
    )


def _refuse_unequal(target: Path, levels: Mapping[str, OutputsLevel], *, unchecked: bool) -> None:
    for task, level in levels.items():
        if level.skipped is not None and not unchecked:
            raise NotEquivalentError(
                f"{target}: cannot be compared with PyTorch, so nothing was written: "
                f"{level.skipped}; pass --unchecked to write it all the same",
                levels,
            )
        if not level.equivalent:
            where = f"task '{task}': " if task else ""
            raise NotEquivalentError(
                f"{target}: not equivalent, so nothing was written: {where}{level.problems[0]}",
                levels,
            )


def _versions() -> dict[str, str]:
    packages: Iterable[str] = ("psoft-export", "onnx", "onnxscript")
    return {
        **{name.replace("-", "_"): importlib.metadata.version(name) for name in packages},
        "onnxruntime": _onnxruntime_version(),
        "onnx_ir": onnx_ir.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _onnxruntime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
