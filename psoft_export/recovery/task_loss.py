"""The loss of a task as a function of the signs: the frozen base with rotations beside its layers.

What is kept for the gradient is x Aᵀ of each adapted layer, beside what the frozen model keeps;
no weight has a gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psoft_export.algebra.relaxed_signs import RelaxedSigns, couplings
from psoft_export.basis.svd import Basis
from psoft_export.changes.subspace import added_by_rotation
from psoft_export.errors import NonFiniteError
from psoft_export.recovery.examples import IGNORED, Example, Task, collate


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

    def loss(self, examples: Sequence[Example], generators: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each example and number of its targets, differentiable in the generators.

        Args:
            examples: run at once.
            generators: of the rotations (`RelaxedSigns.coupled`), modules × r × r; or for each
                example its own, examples × modules × r × r.
        """
        arguments, targets = collate(examples, self._pad)
        self._cores = self.rotations.cores(generators).transpose(-1, -2)
        try:
            return self._run(arguments, targets)
        finally:
            self._cores = None

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
        if signs is not None:
            coupled = couplings(signs.to(self.device, torch.float32))
            self._cores = self.rotations.cores(self.rotations.coupled(coupled)).transpose(-1, -2)
        try:
            for first in range(0, len(examples), self._rows):
                lost, count = self._run(*collate(examples[first : first + self._rows], self._pad))
                sums.append(lost.double().cpu())
                counts.append(count.double().cpu())
        finally:
            self._cores = None
        found = Losses(torch.cat(sums), torch.cat(counts))
        if not found.sums.isfinite().all():
            raise not_finite("the loss of an example")
        return found

    def _run(self, arguments: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self._model.dtype
        moved = {
            name: tensor.to(self.device, dtype if tensor.is_floating_point() else None)
            for name, tensor in arguments.items()
        }
        self._given = len(targets)
        logits = self._model(**moved).logits.float()
        targets = targets.to(self.device)
        if targets.is_floating_point():
            errors = (logits[:, 0] - targets).square()
            return errors / (2 * self._variance), torch.ones_like(targets)
        if self._task == "causal":
            logits, targets = logits[:, :-1], targets[:, 1:]
        lost = nn.functional.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        rows = len(targets)
        counted = (targets != IGNORED).view(rows, -1).sum(1)
        return lost.view(rows, -1).sum(1), counted

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
