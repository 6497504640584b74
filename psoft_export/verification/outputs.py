"""Verification by outputs: the merged model beside its base with the adapter not merged.

Both are held against the truth, base and adapter in a finer dtype; models are in memory one at a
time. Which inputs, `inputs` says; how models are made, `models`.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from psoft_export.bases import BasisFinder
from psoft_export.changes.change import WeightChange
from psoft_export.checkpoint.dtypes import TORCH_DTYPES
from psoft_export.checkpoint.reader import Checkpoint, open_checkpoint
from psoft_export.device import full_precision
from psoft_export.errors import CheckpointError, first_line
from psoft_export.memory import available_bytes, release_freed_memory
from psoft_export.plan import MergePlan
from psoft_export.verification.distance import DistanceSum, cross_entropy, share_followed
from psoft_export.verification.figures import Generation, OutputDistance, OutputsLevel
from psoft_export.verification.inputs import (
    Batch,
    CannotRunError,
    Inputs,
    decoder_start_token,
    make_inputs,
    pad_token,
    tokenizer_folder,
)
from psoft_export.verification.models import (
    LoadedModel,
    MergedLoader,
    UnmergedLoader,
    find_changes,
)

# Right merges measured 0.56 to 1.28: three trained adapters and small models of seven families, in
# three dtypes, from bases in three. The extremes are classifiers, which give few outputs.
FACTOR = 2.0
_KEPT_NUMBERS = 2**25  # of the truth's outputs: 128 MiB in float32
_GIB = 2**30
_COARSENESS = {code: torch.finfo(TORCH_DTYPES[code]).eps for code in ("F32", "F16", "BF16")}

Note = Callable[[str], None]


def check_outputs(
    plan: MergePlan,
    merged: Path,
    bases: BasisFinder,
    *,
    device: torch.device,
    text: Path | None = None,
    note: Note | None = None,
) -> OutputsLevel:
    """Run the merged model beside base and unmerged adapter, and compare both with the truth.

    The truth is base and adapter, unmerged, in float32; in float64 where the merged weights are
    float32 themselves. The merged model, in the dtype of its weights, may be no farther from it
    than `FACTOR` times base and adapter unmerged in that dtype, by the root mean square over all
    outputs. Both err by rounding alone, the unmerged one that of the side
    path's factors and activations, the merged one that of the sum W + ΔW, and by about as much.
    A fault smaller than that rounding cannot be seen in outputs; the weights level sees it.

    Greedy generation is reported and is no part of the verdict: in half precision base and
    adapter themselves leave the truth's path at near ties.

    Positions are compared evenly spaced where all would be more than 2²⁵ numbers. Where base and
    adapter do not hold every parameter of the class (a head that was not saved), the hidden
    states before it are compared.

    Args:
        plan: base and adapter.
        merged: folder of the merged checkpoint.
        bases: finds the adapter's bases.
        device: where the models run.
        text: a UTF-8 file whose tokens are run, and give the task loss; without one, random
            tokens or pixels.
        note: told in a few words of each step.

    Returns:
        The level; with `skipped` set where the model does not fit into memory, or is of a kind
        that takes neither tokens nor images. Where the merged model cannot be loaded that is a
        problem of the verdict, and `merged` is None.

    Raises:
        UsageError: the text cannot be used.
        CheckpointError: a folder cannot be read, or transformers cannot load the base.
        PsoftExportError: as of `bases.find`.
    """
    checkpoint = open_checkpoint(merged)
    return _Check(plan, checkpoint, device, note or (lambda _: None)).level(bases, text)


@dataclass
class _Observed:
    """What one model did, apart from its outputs, which are consumed as they come."""

    tokens: Tensor | None = None
    loss: float | None = None


@dataclass
class _Truth:
    """The truth's outputs, kept to compare others with.

    Attributes:
        output: what they are: `logits`, or another name.
        are_logits: whether each position's outputs are the logits of one distribution.
        outputs: kept positions × outputs of each batch, on the CPU.
    """

    output: str = ""
    are_logits: bool = False
    outputs: list[Tensor] = field(default_factory=list)


class _Check:
    """One run of the level."""

    def __init__(
        self, plan: MergePlan, checkpoint: Checkpoint, device: torch.device, note: Note
    ) -> None:
        self._plan = plan
        self._checkpoint = checkpoint
        self._device = device
        self._note = note
        self._code = _dtype_of(plan, checkpoint)
        self._truth_code = "F64" if self._code == "F32" else "F32"
        self._inputs: Inputs
        self._truth = _Truth()
        self._thinned = False

    def level(self, bases: BasisFinder, text: Path | None) -> OutputsLevel:
        """Everything that the level says."""
        unmerged_loader = UnmergedLoader(self._plan)
        merged_loader = MergedLoader(self._checkpoint, unmerged_loader.skeleton)
        try:
            self._inputs = make_inputs(unmerged_loader.skeleton, tokenizer_folder(self._plan), text)
            self._check_memory(unmerged_loader)
            self._note("running the models: bases")
            changes = find_changes(self._plan, bases, self._device)
            with full_precision():
                return self._compared(unmerged_loader, merged_loader, changes)
        except CannotRunError as reason:
            return self._not_run(str(reason))
        except torch.OutOfMemoryError:
            return self._not_run(f"too little memory on {self._device}")

    def _compared(
        self,
        unmerged_loader: UnmergedLoader,
        merged_loader: MergedLoader,
        changes: Mapping[str, WeightChange],
    ) -> OutputsLevel:
        truth_dtype, dtype = TORCH_DTYPES[self._truth_code], TORCH_DTYPES[self._code]
        self._note(f"running the models: base and adapter in {self._truth_code}, the truth")
        model = unmerged_loader.load(changes, truth_dtype, self._device)
        unknown = model.missing
        if unknown:  # then there are no logits, and nothing that follows from them
            self._inputs = replace(self._inputs, prompts=None, windows=None)
        truth = self._observe(model, unknown, self._keep)
        del model
        release_freed_memory()

        self._note(f"running the models: base and adapter in {self._code}")
        unmerged_sum = DistanceSum(self._truth.are_logits)
        model = unmerged_loader.load(changes, dtype, self._device)
        unmerged = self._observe(model, unknown, self._adding_to(unmerged_sum))
        del model
        release_freed_memory()

        self._note(f"running the models: the merged one in {self._code}")
        merged_sum = DistanceSum(self._truth.are_logits)
        problems = []
        merged = _Observed()
        try:
            model = merged_loader.load(dtype, self._device)
            if lacking := sorted(model.missing - unknown):
                problems.append(_lacks(lacking))
            merged = self._observe(model, unknown, self._adding_to(merged_sum))
            del model
        except (CheckpointError, CannotRunError, torch.OutOfMemoryError) as cause:
            # The others ran, so this is the merged model's own.
            merged_sum = DistanceSum(self._truth.are_logits)
            problems.append(f"outputs: the merged model cannot be run: {first_line(cause)}")
        else:
            problems += self._verdict(merged_sum, unmerged_sum)
        return OutputsLevel(
            inputs=self._words(unknown),
            output=self._truth.output,
            dtype=self._code,
            truth=self._truth_code,
            positions=sum(len(outputs) for outputs in self._truth.outputs),
            merged=merged_sum.result(),
            unmerged=unmerged_sum.result(),
            factor=FACTOR,
            generation=_generation(truth, unmerged, merged),
            losses=_losses(truth, unmerged, merged),
            skipped=None,
            problems=tuple(problems),
        )

    def _verdict(self, merged_sum: DistanceSum, unmerged_sum: DistanceSum) -> list[str]:
        if merged_sum.not_finite:
            total = merged_sum.not_finite + merged_sum.positions
            others = unmerged_sum.not_finite
            return [
                f"outputs: the merged model gives NaN or infinity in {self._code} at "
                f"{merged_sum.not_finite} of {total} positions, base and adapter unmerged at "
                f"{others}" + ("; write a wider dtype" if others else "")
            ]
        merged, unmerged = merged_sum.result(), unmerged_sum.result()
        assert merged is not None
        if unmerged is None:
            return [
                f"outputs: base and adapter unmerged give NaN or infinity in {self._code} at "
                "every position, so nothing says how far the merged model may be; write a wider "
                "dtype"
            ]
        return [self._too_far(merged, unmerged)] if merged.rms > FACTOR * unmerged.rms else []

    def _too_far(self, merged: OutputDistance, unmerged: OutputDistance) -> str:
        allowed = unmerged.rms
        times = f"{merged.rms / allowed:.3g} times" if allowed else "beyond any multiple of"
        name = "logit" if self._truth.are_logits else "output"
        return (
            f"outputs: the merged model is {merged.rms:.3g} from the {self._truth_code} truth "
            f"(root mean square of Δ{name}), {times} the {allowed:.3g} of base and adapter "
            f"unmerged in {self._code}; at most {FACTOR:g} times is rounding"
        )

    def _observe(
        self,
        loaded: LoadedModel,
        unknown: frozenset[str],
        consume: Callable[[int, Tensor], None],
    ) -> _Observed:
        """Run a model on everything.

        Raises:
            CannotRunError: it does not run.
        """
        observed = _Observed()
        model, inputs = loaded.model, self._inputs
        try:
            with torch.no_grad(), _all_in(model.dtype):
                for index, batch in enumerate(inputs.batches):
                    name, outputs = _outputs(model, self._arguments(batch, model), bool(unknown))
                    if not self._truth.output:
                        self._truth.output = name
                        # One output is no distribution, and an image of outputs not one each.
                        self._truth.are_logits = (
                            name == "logits" and outputs.ndim < 4 and outputs.shape[-1] > 1
                        )
                    consume(index, self._kept(outputs, batch))
                if inputs.prompts is not None:
                    observed.tokens = self._generated(model, inputs.prompts)
                if inputs.windows is not None:
                    observed.loss = self._loss(model, inputs.windows)
        except (CannotRunError, CheckpointError, torch.OutOfMemoryError):
            raise
        except Exception as cause:  # model classes raise errors of many kinds
            raise CannotRunError(
                f"{type(model).__name__} does not run in {model.dtype} on {self._device} "
                f"({first_line(cause)})"
            ) from cause
        return observed

    def _arguments(self, batch: Batch, model: Any) -> dict[str, Tensor]:
        return {
            name: value.to(self._device, model.dtype if value.is_floating_point() else None)
            for name, value in batch.arguments.items()
        }

    def _kept(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Positions × outputs: those that are not padding, evenly spaced where all are too many.

        Args:
            outputs: rows × … × outputs.
            batch: what they are of.
        """
        if outputs.ndim > 3:
            outputs = outputs.flatten(1)
        if batch.valid is not None and outputs.ndim == 3:
            outputs = outputs[batch.valid.to(outputs.device)]
        flat = outputs.reshape(-1, outputs.shape[-1])
        total = sum(other.positions for other in self._inputs.batches)
        step = math.ceil(total * flat.shape[1] / _KEPT_NUMBERS)
        self._thinned |= step > 1
        return flat[(len(flat) - 1) % step :: step]

    def _keep(self, _: int, outputs: Tensor) -> None:
        if not outputs.isfinite().all():
            raise CannotRunError(
                f"base and adapter give NaN or infinity in {self._truth_code} themselves"
            )
        self._truth.outputs.append(outputs.cpu())

    def _adding_to(self, distance: DistanceSum) -> Callable[[int, Tensor], None]:
        def add(index: int, outputs: Tensor) -> None:
            truth = self._truth.outputs[index]
            if outputs.shape != truth.shape:
                raise CheckpointError(
                    f"it has {outputs.shape[-1]} outputs, base and adapter {truth.shape[-1]}"
                )
            distance.add(truth, outputs.cpu())

        return add

    def _generated(self, model: Any, prompts: Tensor) -> Tensor:
        """The tokens that greedy generation adds to each prompt; none of them ends it."""
        count = self._inputs.new_tokens
        config = model.config.get_text_config(decoder=True)
        # In place of the checkpoint's own: penalties and sampling are no part of the weights.
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            num_beams=1,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=pad_token(model.config),
            bos_token_id=getattr(config, "bos_token_id", None),
            eos_token_id=getattr(config, "eos_token_id", None),
            decoder_start_token_id=decoder_start_token(model.config),
        )
        ids = prompts.to(self._device)
        tokens: Tensor = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
        return tokens[:, -count:].cpu()

    def _loss(self, model: Any, windows: Tensor) -> float:
        """Mean loss of a token given those before it in its window, in nats."""
        total = 0.0
        for window in windows[:, None]:
            ids = window.to(self._device)
            total += cross_entropy(model(input_ids=ids).logits, ids)
        return total / windows[:, 1:].numel()

    def _check_memory(self, loader: UnmergedLoader) -> None:
        """Check that the largest model, the truth's, fits.

        Raises:
            CannotRunError: it does not; says what it needs.
        """
        itemsize = TORCH_DTYPES[self._truth_code].itemsize
        plan = self._plan
        beside = sum(
            plan.adapter.numbers_beside(t.module, t.weight_shape)
            for t in plan.targets
            if t.module is not None
        )
        config, batches = loader.skeleton.config.get_text_config(), self._inputs.batches
        outputs = [batch.positions * int(getattr(config, "vocab_size", 1)) for batch in batches]
        weights = itemsize * loader.numbers
        running = itemsize * (beside + 2 * max(outputs))
        # What stands beside waits for the next model, as the truth's outputs do.
        waiting = 8 * beside + itemsize * min(sum(outputs), _KEPT_NUMBERS)
        cpu = torch.device("cpu")
        needs = {self._device: weights + running, cpu: weights + waiting}
        if self._device.type == "cpu":
            needs = {cpu: weights + running + waiting}
        for device, needed in needs.items():
            if needed > (available := available_bytes(device)):
                raise CannotRunError(
                    f"base and adapter in {self._truth_code} need about {needed / _GIB:.2g} GiB "
                    f"on {device}, where {available / _GIB:.2g} GiB are free"
                )

    def _words(self, unknown: frozenset[str]) -> str:
        words = self._inputs.words
        if self._thinned:
            words += "; evenly spaced positions of these compared"
        if unknown:
            first = min(unknown)
            words += (
                f"; the states before the head, of which base and adapter do not hold '{first}'"
            )
        return words

    def _not_run(self, reason: str) -> OutputsLevel:
        return OutputsLevel(
            inputs="",
            output="",
            dtype=self._code,
            truth=self._truth_code,
            positions=0,
            merged=None,
            unmerged=None,
            factor=FACTOR,
            generation=None,
            losses=None,
            skipped=reason,
            problems=(),
        )


def _dtype_of(plan: MergePlan, checkpoint: Checkpoint) -> str:
    """The dtype code of the merged weights; of several, the coarsest, which bounds the rest."""
    entries = checkpoint.entries
    names = [target.spec.name for target in plan.targets]
    found = {entries[name].dtype for name in names if name in entries} & _COARSENESS.keys()
    if not found:
        raise CheckpointError(
            f"{checkpoint.folder}: holds no weight '{names[0]}' in F32, F16 or BF16; is it a merge "
            "of this base?"
        )
    return max(found, key=lambda code: _COARSENESS[code])


def _outputs(model: Any, arguments: dict[str, Tensor], before_head: bool) -> tuple[str, Tensor]:
    """What a model gives that is compared: its name, and rows × … × outputs."""
    if before_head:
        result = model.base_model(**arguments)
        if "last_hidden_state" not in result:
            raise CannotRunError(
                f"{type(model).__name__} has parameters that neither base nor adapter holds, and "
                "no states before them to compare"
            )
        return "last_hidden_state", result["last_hidden_state"]
    result = model(**arguments)
    if "logits" in result:
        return "logits", result["logits"]
    if "start_logits" in result and "end_logits" in result:
        both = torch.stack([result["start_logits"], result["end_logits"]], dim=-1)
        return "start_logits and end_logits", both
    if "last_hidden_state" in result:
        return "last_hidden_state", result["last_hidden_state"]
    raise CannotRunError(f"{type(model).__name__} gives neither logits nor a last hidden state")


def _lacks(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return (
        f"outputs: the merged checkpoint lacks '{names[0]}'{more}, which base and adapter hold; "
        "zeros were run in place of it"
    )


def _generation(truth: _Observed, unmerged: _Observed, merged: _Observed) -> Generation | None:
    if truth.tokens is None or unmerged.tokens is None or merged.tokens is None:
        return None
    return Generation(
        tokens=truth.tokens.numel(),
        merged=share_followed(truth.tokens, merged.tokens),
        unmerged=share_followed(truth.tokens, unmerged.tokens),
    )


def _losses(truth: _Observed, unmerged: _Observed, merged: _Observed) -> dict[str, float] | None:
    if truth.loss is None or unmerged.loss is None or merged.loss is None:
        return None
    return {"truth": truth.loss, "unmerged": unmerged.loss, "merged": merged.loss}


class _StaysDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps float64 where a model class converts to float32, as many do in norms and softmax.

    Besides, the masks of padded positions are the least float64, which is −∞ in float32, and a
    softmax over nothing else is NaN.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        if (
            func is torch.ops.aten._to_copy.default
            and named.get("dtype") is torch.float32
            and args[0].dtype is torch.float64
        ):
            named["dtype"] = torch.float64
        return func(*args, **named)


def _all_in(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Where everything is computed in `dtype`, if that is float64."""
    if dtype is torch.float64:
        return _StaysDouble()  # type: ignore[no-untyped-call]
    return nullcontext()
