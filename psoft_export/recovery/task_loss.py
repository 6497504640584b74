"""The loss of a task as a function of the signs: the frozen base with rotations beside its layers.

What is kept for the gradient is x Aᵀ of each adapted layer, beside what the frozen model keeps;
no weight has a gradient.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psoft_export.algebra.relaxed_signs import RelaxedSigns, couplings
from psoft_export.basis.svd import Basis
from psoft_export.changes.subspace import added_by_rotation
from psoft_export.errors import NonFiniteError
from psoft_export.recovery.examples import IGNORED, Example, Task, collate

_BEGINNING = 16  # tokens that an example keeps where the model writes the others
_WRITING = 4  # times as many rows at once where the model writes, a token of each


def not_finite(what: str) -> NonFiniteError:
    """The error that something of the loss is NaN or infinite."""
    return NonFiniteError(
        f"{what} is NaN or infinite; is the dtype too narrow (--dtype fp32) or an example more "
        "than the model takes?"
    )


@dataclass(frozen=True)
class Losses:
    """What was lost on some examples.

    Attributes:
        sums: negative log-likelihood, added up over the targets of each example (float64, CPU), in
            nats; of a head of one number squared errors, as `TaskLoss.scale_to` scales them.
        counts: number of targets of each (float64, CPU).
    """

    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> float:
        """A target, in the mean."""
        return float(self.sums.sum() / self.counts.sum())


class TaskLoss:
    """A model and what its task loses at given signs.

    Attributes:
        rotations: the adapter's rotations as functions of the signs.
        device: where the model is.
        mixes_examples: whether a layer was seen whose first extent is not the batch, so that no
            example can have signs of its own in a batch.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        rotations: RelaxedSigns,
        bases: Mapping[str, Basis],
        scaling: float,
        *,
        pad: int,
        rows: int,
    ) -> None:
        """Stand the rotations beside the model's layers.

        Args:
            model: the base, frozen, on its device and in its dtype.
            task: what it answers.
            rotations: of the modules in the order of `bases`.
            bases: path of each layer in the model → A and B of its weight.
            scaling: alpha / r.
            pad: the token that pads.
            rows: how many examples are run at a time where nothing is learnt.
        """
        self.rotations = rotations
        self._model = model
        self._task = task
        self._pad = pad
        self._rows = rows
        self._variance = 0.5  # of the numbers of a head of one; it loses error² / (2 variance)
        self._given = 0  # examples of the call that is running
        self.mixes_examples = False
        self._cores: Tensor | None = None
        for number, (path, basis) in enumerate(bases.items()):
            self._stand_beside(model.get_submodule(path), number, basis, scaling)
        self.device = model.device

    def scale_to(self, examples: Sequence[Example]) -> None:
        """Let squared errors of a head of one number count by twice the base's mean on examples.

        They are then, but for a constant, the negative log-likelihood of a normal variable of that
        variance, in nats, whatever the unit of the numbers. Other losses are nats already.
        """
        if examples[0].targets.is_floating_point():
            mean_square = 2 * self._variance * self.losses(examples, None).mean
            self._variance = max(mean_square, torch.finfo(torch.float32).tiny)

    def loss(
        self, examples: Sequence[Example], generators: Tensor, teacher: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss of each example and number of its targets, differentiable in the generators.

        Args:
            examples: run at once.
            generators: of the rotations (`RelaxedSigns.coupled`), modules × r × r; or for each
                example its own, examples × modules × r × r.
            teacher: generators of the model whose answers, as chances or numbers, are asked for in
                the place of the examples' own (modules × r × r); None: theirs.
        """
        arguments, targets = collate(examples, self._pad)
        answers = None
        if teacher is not None:
            with torch.no_grad(), self._turned(teacher):
                answers = self._answers(arguments)
        with self._turned(generators):
            return self._lost(self._answers(arguments), targets, answers)

    @torch.no_grad()
    def written(
        self, examples: Sequence[Example], generators: Tensor, drawing: torch.Generator
    ) -> list[Example]:
        """Examples that begin as these do, and go on as the model writes.

        Of a task other than `causal`, and of a model that keeps nothing between two tokens, they
        are these as they are.

        Args:
            examples: any number.
            generators: of the model's rotations (modules × r × r).
            drawing: draws the tokens.
        """
        written: list[Example] = []
        with self._turned(generators):
            rows = _WRITING * self._rows
            for first in range(0, len(examples), rows):
                written += self._continued(examples[first : first + rows], drawing)
        return written

    @torch.no_grad()
    def losses(self, examples: Sequence[Example], signs: Tensor | None) -> Losses:
        """Of all examples.

        Args:
            examples: any number.
            signs: ±1, modules × r, on any device; None: the base.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """
        sums, counts = [], []
        with self._turned(self.generators(signs) if signs is not None else None):
            for first in range(0, len(examples), self._rows):
                arguments, targets = collate(examples[first : first + self._rows], self._pad)
                lost, count = self._lost(self._answers(arguments), targets)
                sums.append(lost.double().cpu())
                counts.append(count.double().cpu())
        found = Losses(torch.cat(sums), torch.cat(counts))
        if not found.sums.isfinite().all():
            raise not_finite("the loss of an example")
        return found

    def generators(self, signs: Tensor) -> Tensor:
        """Those of the rotations (modules × r × r) at signs (±1, modules × r, on any device)."""
        return self.rotations.coupled(couplings(signs.to(self.device, torch.float32)))

    @contextmanager
    def _turned(self, generators: Tensor | None) -> Iterator[None]:
        """The layers, with rotations beside them; None: as they are."""
        if generators is not None:
            self._cores = self.rotations.cores(generators).transpose(-1, -2)
        try:
            yield
        finally:
            self._cores = None

    def _answers(self, arguments: Mapping[str, Tensor]) -> Tensor:
        """The model's logits, float32; of `causal` without those after the last token."""
        dtype = self._model.dtype
        moved = {
            name: tensor.to(self.device, dtype if tensor.is_floating_point() else None)
            for name, tensor in arguments.items()
        }
        self._given = len(next(iter(moved.values())))
        logits: Tensor = self._model(**moved).logits.float()
        return logits[:, :-1] if self._task == "causal" else logits

    def _lost(
        self, logits: Tensor, targets: Tensor, answers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss of each row and number of its targets; `answers`: logits of which the loss is."""
        targets = targets.to(self.device)
        if targets.is_floating_point():
            errors = (logits[:, 0] - (targets if answers is None else answers[:, 0])).square()
            return errors / (2 * self._variance), torch.ones_like(targets)
        if self._task == "causal":
            targets = targets[:, 1:]
        rows, counted = len(targets), (targets != IGNORED).flatten()
        logits, targets = logits.flatten(0, -2), targets.flatten()
        if answers is None:
            lost = nn.functional.cross_entropy(
                logits, targets, ignore_index=IGNORED, reduction="none"
            )
        else:
            chances = answers.flatten(0, -2).softmax(-1)
            lost = counted * nn.functional.cross_entropy(logits, chances, reduction="none")
        return lost.view(rows, -1).sum(1), counted.view(rows, -1).sum(1)

    def _continued(self, rows: Sequence[Example], drawing: torch.Generator) -> list[Example]:
        """As `written`, of one batch, with the rotations beside the layers."""
        if self._task != "causal":
            return list(rows)
        tokens = collate(rows, self._pad)[0]["input_ids"].to(self.device)
        begins = torch.tensor([_beginning(row) for row in rows], device=self.device)
        first, length = int(begins.min()), tokens.shape[1]
        self._given = len(rows)
        came = self._model(input_ids=tokens[:, :first], use_cache=True)
        cache = _cache_name(self._model)
        if getattr(came, cache, None) is None:
            return list(rows)
        for place in range(first, length):
            chances = came.logits[:, -1].float().softmax(-1).cpu()
            drawn = torch.multinomial(chances, 1, generator=drawing)[:, 0].to(self.device)
            tokens[:, place] = torch.where(begins <= place, drawn, tokens[:, place])
            if place + 1 < length:
                came = self._model(
                    input_ids=tokens[:, place : place + 1],
                    use_cache=True,
                    **{cache: getattr(came, cache)},
                )
        return [_with_tokens(row, line) for row, line in zip(rows, tokens.cpu(), strict=True)]

    def _stand_beside(self, layer: nn.Module, number: int, basis: Basis, scaling: float) -> None:
        weight = next(layer.parameters())
        right = basis.a.T.to(weight).contiguous()
        left = (scaling * basis.b.T).to(weight).contiguous()

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.mixes_examples |= len(inputs[0]) != self._given
            if self._cores is None:
                return output
            core = self._cores[..., number, :, :].to(right.dtype)
            return output + added_by_rotation(inputs[0], right, core, left)

        layer.register_forward_hook(add)


def _cache_name(model: Any) -> str:
    """What a model calls the keys and values that it keeps; not all releases call it alike."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _beginning(example: Example) -> int:
    """How many of its tokens begin it: what is asked before the first target, and a few more."""
    asked = int((example.targets != IGNORED).long().argmax())
    return min(max(asked, _BEGINNING), len(example.targets))


def _with_tokens(example: Example, tokens: Tensor) -> Example:
    """An example with other tokens, and as targets those where it has some."""
    tokens = tokens[: len(example.targets)]
    targets = torch.where(example.targets == IGNORED, IGNORED, tokens)
    return Example({**example.inputs, "input_ids": tokens}, targets)
