"""Whether a graph computes what the PyTorch model does: the outputs level, for graphs.

The vocabulary and the figures are those of `verification.outputs`. The truth is PyTorch in a
finer dtype, the yardstick PyTorch in the graph's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from psoft_export.errors import UnsupportedError
from psoft_export.onnx.runtime import OnnxModel, has_cuda, load, load_in_float32
from psoft_export.verification.figures import OutputsLevel
from psoft_export.verification.inputs import CannotRunError, make_inputs
from psoft_export.verification.models import LoadedModel, PlainLoader, UnmergedLoader
from psoft_export.verification.outputs import Load, OutputsCheck, Verdict, Wording

FACTOR = 4.0
QUANTIZED_SPREAD = 0.5


def check_graph(
    folder: Path,
    references: Mapping[str | None, Load],
    loader: PlainLoader | UnmergedLoader,
    *,
    beside: int,
    outside: Mapping[str, float],
    code: str,
    text: Path | None,
    device: torch.device,
    note: Callable[[str], None],
    quantized: bool = False,
    max_loss_increase: float | None = None,
) -> dict[str, OutputsLevel]:
    """Run a folder's graph beside the models that it should be, one task after another.

    Args:
        folder: the export, on disk.
        references: task (None: no task) → what the graph should compute then, in PyTorch.
        loader: of the model without tasks.
        beside: how many numbers stand beside its layers in a reference.
        outside: task → the share of ΔW that the graph is known to leave out.
        code: dtype code of the graph.
        text: as of `make_inputs`.
        device: where the models run; the graph on CUDA where ONNX Runtime has it there.
        note: told in a few words of each step.
        quantized: the graph's weights are of fewer bits: it must be the same model, not equal.
        max_loss_increase: then the task loss may grow by at most that, in nats per token.

    Returns:
        The level by task; `""` is the model without one.
    """
    where = str(device) if device.type == "cuda" and has_cuda() else "cpu"
    if device.type == "cuda" and where == "cpu":
        note(
            "ONNX Runtime has no CUDA here, so the graph is checked on the CPU; for the GPU run: "
            "pip install 'psoft-export[onnx-gpu]'"
        )
    # Its CPU provider has almost no operator for bfloat16.
    in_float32 = code == "BF16" and where == "cpu"
    if in_float32:
        note("ONNX Runtime has no bfloat16 on the CPU: the graph is checked in float32")

    @cache
    def model() -> OnnxModel:
        try:
            return load_in_float32(folder) if in_float32 else load(folder, device=where)
        except UnsupportedError as cause:
            raise CannotRunError(str(cause)) from cause

    levels = {}
    without: Sequence[Tensor] = ()
    for task, reference in references.items():
        of_task = f" of '{task}'" if task is not None else ""
        wording = Wording(
            checked="the ONNX graph" + of_task,
            reference="PyTorch" + of_task,
            truth="PyTorch" + of_task,
        )
        rule = Verdict(FACTOR, left_out=outside.get(task or "", 0.0), tokens=True)
        if quantized:
            rule = Verdict(FACTOR, spread=QUANTIZED_SPREAD)
        check = OutputsCheck(code, device, wording, rule, note)

        def checked(_: torch.dtype, __: torch.device, task: str | None = task) -> LoadedModel:
            return LoadedModel(model().in_task(task), frozenset())

        try:
            inputs = make_inputs(loader.skeleton, folder, text, of_graph=True)
            check.check_memory(loader, inputs, beside)
        except CannotRunError as reason:
            levels[task or ""] = check.not_run(str(reason))
            continue
        level = check.level(inputs, reference, checked, without)
        if task is None:
            without = check.truth_outputs
        if in_float32 and level.skipped is None:
            words = f"{level.inputs}; the graph in float32, for want of bfloat16"
            level = replace(level, inputs=words)
        if max_loss_increase is not None:
            level = _bounded(level, max_loss_increase)
        levels[task or ""] = level
    return levels


def _bounded(level: OutputsLevel, allowed: float) -> OutputsLevel:
    """The level, unfit where the loss grew by more than is allowed."""
    if level.losses is None:
        problem = "outputs: this model gave no loss to compare"
        return replace(level, problems=(*level.problems, problem))
    grown = level.losses["merged"] - level.losses["truth"]
    if grown <= allowed:
        return level
    problem = f"outputs: the loss grows by {grown:.3g} nats per token; {allowed:g} are allowed"
    return replace(level, problems=(*level.problems, problem))
