"""Verification by outputs: the merged model beside its base with the adapter not merged.

Both are held against the truth, base and adapter in a finer dtype; models are in memory one at a
time. Which inputs, `inputs` says; how models are made, `models`.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from psoft_export.bases import BasisFinder
from psoft_export.checkpoint.dtypes import TORCH_DTYPES
from psoft_export.checkpoint.reader import Checkpoint, open_checkpoint
from psoft_export.device import full_precision
from psoft_export.errors import CheckpointError, first_line
from psoft_export.memory import available_bytes, release_freed_memory
from psoft_export.model.key_value_cache import cache_argument, cache_of
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
    PlainLoader,
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
Load = Callable[[torch.dtype, torch.device], LoadedModel]


@dataclass(frozen=True)
class Wording:
    """What the models that are compared are called in problems and notes.

    Attributes:
        checked: the model whose outputs are checked.
        reference: what it is checked against, in its own dtype.
        truth: the same in a finer dtype.
    """

    checked: str = "the merged model"
    reference: str = "base and adapter unmerged"
    truth: str = "base and adapter"


@dataclass(frozen=True)
class Verdict:
    """What makes outputs unfit.

    Attributes:
        factor: the root mean square of the differences from the truth may be this many times
            that of the reference.
        left_out: the share of ΔW that the checked model is known to leave out; as large a share
            of what ΔW does to the outputs counts as the reference's own error.
        spread: or this share of the standard deviation of the truth's outputs, if that is more.
        tokens: whether greedy generation must follow the truth, near ties apart.
    """

    factor: float
    left_out: float = 0.0
    spread: float = 0.0
    tokens: bool = False


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
    tell = note or (lambda _: None)
    unmerged = UnmergedLoader(plan)
    merged_loader = MergedLoader(checkpoint, unmerged.skeleton)
    code = _dtype_of(plan, checkpoint)
    check = OutputsCheck(code, device, Wording(), Verdict(FACTOR), tell)
    try:
        inputs = make_inputs(unmerged.skeleton, tokenizer_folder(plan), text)
        check.check_memory(unmerged, inputs, numbers_beside(plan))
        tell("running the models: bases")
        changes = find_changes(plan, bases, device)
    except CannotRunError as reason:
        return check.not_run(str(reason))
    except torch.OutOfMemoryError:
        return check.not_run(f"too little memory on {device}")

    def reference(dtype: torch.dtype, on: torch.device) -> LoadedModel:
        return unmerged.load(changes, dtype, on)

    return check.level(inputs, reference, merged_loader.load)


def numbers_beside(plan: MergePlan) -> int:
    """How many numbers stand beside the layers of a plan's base, its adapter not merged."""
    return sum(
        plan.adapter.numbers_beside(target.module, target.weight_shape)
        for target in plan.targets
        if target.module is not None
    )


@dataclass
class _Observed:
    """What one model did, apart from its outputs, which are consumed as they come.

    Attributes:
        tokens: prompts × tokens that greedy generation added.
        margins: the same shape: by how much the best logit leads the second.
        loss: the task loss.
    """

    tokens: Tensor | None = None
    margins: Tensor | None = None
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

    def spread(self) -> float:
        """Standard deviation of all outputs."""
        return float(torch.cat([part.flatten() for part in self.outputs]).double().std())


class OutputsCheck:
    """One run of the level: a truth, a reference and the model that is checked."""

    def __init__(
        self, code: str, device: torch.device, wording: Wording, verdict: Verdict, note: Note
    ) -> None:
        """Prepare to compare.

        Args:
            code: dtype code of the model that is checked.
            device: where the models run.
            wording: what they are called.
            verdict: what makes outputs unfit.
            note: told in a few words of each step.
        """
        self._device = device
        self._note = note
        self._wording = wording
        self._rule = verdict
        self._code = code
        self._truth_code = "F64" if code == "F32" else "F32"
        self._inputs: Inputs
        self._truth = _Truth()
        self._without: Sequence[Tensor] = ()
        self._thinned = False

    @property
    def truth_outputs(self) -> list[Tensor]:
        """Of each batch, positions × outputs of the truth, once it was run."""
        return self._truth.outputs

    def level(
        self,
        inputs: Inputs,
        reference: Load,
        checked: Load,
        without: Sequence[Tensor] = (),
    ) -> OutputsLevel:
        """Run everything and compare.

        Args:
            inputs: what the models are run on.
            reference: loads the reference in a dtype; the truth too.
            checked: loads the model that is checked.
            without: `truth_outputs` of the same inputs without ΔW, where some of it is left out.

        Raises:
            CheckpointError: the reference cannot be loaded.
        """
        self._inputs = inputs
        self._without = without
        try:
            with full_precision():
                return self._compared(reference, checked)
        except CannotRunError as reason:
            return self.not_run(str(reason))
        except torch.OutOfMemoryError:
            return self.not_run(f"too little memory on {self._device}")

    def _compared(self, reference: Load, checked: Load) -> OutputsLevel:
        truth_dtype, dtype = TORCH_DTYPES[self._truth_code], TORCH_DTYPES[self._code]
        words = self._wording
        self._note(f"running the models: {words.truth} in {self._truth_code}, the truth")
        loaded = reference(truth_dtype, self._device)
        unknown = loaded.missing
        if unknown:  # then there are no logits, and nothing that follows from them
            self._inputs = replace(self._inputs, prompts=None, windows=None)
        truth = self._observe(loaded, unknown, self._keep)
        del loaded
        release_freed_memory()

        self._note(f"running the models: {words.truth} in {self._code}")
        unmerged_sum = DistanceSum(self._truth.are_logits)
        loaded = reference(dtype, self._device)
        unmerged = self._observe(loaded, unknown, self._adding_to(unmerged_sum))
        del loaded
        release_freed_memory()

        self._note(f"running the models: {words.checked} in {self._code}")
        merged_sum = DistanceSum(self._truth.are_logits)
        problems = []
        merged = _Observed()
        try:
            loaded = checked(dtype, self._device)
            if lacking := sorted(loaded.missing - unknown):
                problems.append(_lacks(lacking))
            merged = self._observe(loaded, unknown, self._adding_to(merged_sum))
            del loaded
        except (CheckpointError, CannotRunError, torch.OutOfMemoryError) as cause:
            # The others ran, so this is the checked model's own.
            merged_sum = DistanceSum(self._truth.are_logits)
            problems.append(f"outputs: {words.checked} cannot be run: {first_line(cause)}")
        else:
            problems += self._verdict(merged_sum, unmerged_sum)
            problems += self._tokens_astray(truth, merged, unmerged_sum)
        return OutputsLevel(
            inputs=self._words(unknown),
            output=self._truth.output,
            dtype=self._code,
            truth=self._truth_code,
            positions=sum(len(outputs) for outputs in self._truth.outputs),
            merged=merged_sum.result(),
            unmerged=unmerged_sum.result(),
            factor=self._rule.factor,
            generation=_generation(truth, unmerged, merged),
            losses=_losses(truth, unmerged, merged),
            skipped=None,
            problems=tuple(problems),
        )

    def _verdict(self, merged_sum: DistanceSum, unmerged_sum: DistanceSum) -> list[str]:
        words = self._wording
        if merged_sum.not_finite:
            total = merged_sum.not_finite + merged_sum.positions
            others = unmerged_sum.not_finite
            return [
                f"outputs: {words.checked} gives NaN or infinity in {self._code} at "
                f"{merged_sum.not_finite} of {total} positions, {words.reference} at "
                f"{others}" + ("; write a wider dtype" if others else "")
            ]
        merged, unmerged = merged_sum.result(), unmerged_sum.result()
        assert merged is not None
        if unmerged is None:
            return [
                f"outputs: {words.reference} give NaN or infinity in {self._code} at "
                f"every position, so nothing says how far {words.checked} may be; write a wider "
                "dtype"
            ]
        allowed = self._rule.factor * (unmerged.rms + self._left_out)
        if (spread := self._rule.spread * self._truth.spread()) > allowed:
            return [self._beyond_spread(merged.rms, spread)] if merged.rms > spread else []
        return [self._too_far(merged, unmerged)] if merged.rms > allowed else []

    def _too_far(self, merged: OutputDistance, unmerged: OutputDistance) -> str:
        allowed = unmerged.rms
        times = f"{merged.rms / allowed:.3g} times" if allowed else "beyond any multiple of"
        words = self._wording
        return (
            f"outputs: {words.checked} is {merged.rms:.3g} from the {self._truth_code} truth "
            f"(root mean square of Δ{self._unit}), {times} the {allowed:.3g} of "
            f"{words.reference} in {self._code}; at most {self._rule.factor:g} times is rounding"
            + (f" (and {self._left_out:.2g} is known to be left out)" if self._left_out else "")
        )

    def _beyond_spread(self, distance: float, allowed: float) -> str:
        return (
            f"outputs: {self._wording.checked} is {distance:.3g} from the {self._truth_code} truth "
            f"(root mean square of Δ{self._unit}); at most {allowed:.3g}, {self._rule.spread:g} "
            "of the spread of the truth's outputs, is called the same model"
        )

    @property
    def _left_out(self) -> float:
        """What outputs lack for what the checked model is known to leave out, first order."""
        if not self._rule.left_out or not self._without:
            return 0.0
        effect = DistanceSum(are_logits=False)
        for truth, without in zip(self._truth.outputs, self._without, strict=True):
            effect.add(truth, without)
        found = effect.result()
        return self._rule.left_out * found.rms if found is not None else 0.0

    @property
    def _unit(self) -> str:
        return "logit" if self._truth.are_logits else "output"

    def _tokens_astray(
        self, truth: _Observed, checked: _Observed, reference: DistanceSum
    ) -> list[str]:
        """Where greedy generation leaves the truth though its best token was no near tie.

        Two tokens are nearly tied where rounding could change their order: their logits are
        nearer than twice what the verdict allows, by the reference's largest difference.
        """
        found = reference.result()
        if not self._rule.tokens or found is None or self._rule.spread:
            return []
        if truth.tokens is None or checked.tokens is None or truth.margins is None:
            return []
        near = 2 * self._rule.factor * (found.largest + self._left_out)
        for row, same in enumerate(truth.tokens == checked.tokens):
            if same.all():
                continue
            step = int((~same).long().argmax())
            if (margin := float(truth.margins[row, step])) > near:
                return [
                    f"outputs: greedy generation of {self._wording.checked} leaves the truth's at "
                    f"token {step + 1} of prompt {row + 1}, where the best token leads by "
                    f"{margin:.3g} (less than {near:.3g} would be a near tie)"
                ]
        return []

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
                    arguments = self._arguments(batch, model)
                    name, outputs = _outputs(model, arguments, batch.split, bool(unknown))
                    if not self._truth.output:
                        self._truth.output = name
                        # One output is no distribution, and an image of outputs not one each.
                        self._truth.are_logits = (
                            name == "logits" and outputs.ndim < 4 and outputs.shape[-1] > 1
                        )
                    consume(index, self._kept(outputs, batch))
                if inputs.prompts is not None:
                    observed.tokens, observed.margins = self._generated(model, inputs.prompts)
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
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
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
                f"{self._wording.truth} give NaN or infinity in {self._truth_code} themselves"
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

    def _generated(self, model: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that greedy generation adds to each prompt, and their margins.

        None of them ends it.
        """
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
        ids = prompts.to(model.device)
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(found.logits, dim=1).topk(2).values
        return found.sequences[:, -count:].cpu(), (best[..., 0] - best[..., 1]).cpu()

    def _loss(self, model: Any, windows: Tensor) -> float:
        """Mean loss of a token given those before it in its window, in nats."""
        total = 0.0
        for window in windows[:, None]:
            ids = window.to(model.device)
            total += cross_entropy(model(input_ids=ids).logits, ids)
        return total / windows[:, 1:].numel()

    def check_memory(
        self, loader: UnmergedLoader | PlainLoader, inputs: Inputs, beside: int
    ) -> None:
        """Check that the largest model, the truth's, fits.

        Args:
            loader: of the reference.
            inputs: what the models are run on.
            beside: how many numbers stand beside its layers.

        Raises:
            CannotRunError: it does not; says what it needs.
        """
        itemsize = TORCH_DTYPES[self._truth_code].itemsize
        config, batches = loader.skeleton.config.get_text_config(), inputs.batches
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
                    f"{self._wording.truth} in {self._truth_code} need about "
                    f"{needed / _GIB:.2g} GiB on {device}, where "
                    f"{available / _GIB:.2g} GiB are free"
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

    def not_run(self, reason: str) -> OutputsLevel:
        """The level, not run."""
        return OutputsLevel(
            inputs="",
            output="",
            dtype=self._code,
            truth=self._truth_code,
            positions=0,
            merged=None,
            unmerged=None,
            factor=self._rule.factor,
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


def _outputs(
    model: Any, arguments: dict[str, Tensor], split: int | None, before_head: bool
) -> tuple[str, Tensor]:
    """What a model gives that is compared: its name, and rows × … × outputs."""
    if split is not None:
        return "logits", _outputs_in_two(model, arguments, split)
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


def _outputs_in_two(model: Any, arguments: dict[str, Tensor], split: int) -> Tensor:
    """The logits of a sequence given in two parts, the second with the first one's cache."""
    mask = arguments["attention_mask"]
    positions = {n: v for n, v in arguments.items() if n in ("input_ids", "position_ids")}
    head = {n: v[:, :split] for n, v in positions.items()}
    tail = {n: v[:, split:] for n, v in positions.items()}
    first = model(**head, attention_mask=mask[:, :split], use_cache=True)
    cached = {cache_argument(model): cache_of(first)}
    second = model(**tail, **cached, attention_mask=mask, use_cache=True)
    return torch.cat([first.logits, second.logits], dim=1)


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
