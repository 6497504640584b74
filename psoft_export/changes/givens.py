"""qGOFT's change: W P, P a product of parallel Givens or quasi-Givens transforms."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from psoft_export.algebra.givens import given_angles, levels, row_mixing, transforms
from psoft_export.algebra.merged_weight import MergeRows
from psoft_export.algebra.parameters import GivensParameters
from psoft_export.changes.change import ChangeFacts, WeightChange
from psoft_export.reference.expected import Expected
from psoft_export.reference.givens import expected_rows

_ROWS = 256  # of the identity, at a time


@dataclass(frozen=True)
class GivensTransform(WeightChange):
    """W P, with the parameters that P is made of."""

    parameters: GivensParameters

    @property
    def facts(self) -> ChangeFacts:
        """In the strict form the largest angle of a single rotation."""
        angles = given_angles(self.parameters)
        return ChangeFacts(
            largest_angle=math.degrees(float(angles.abs().max())) if len(angles) else None
        )

    def merging(self, weight: Tensor) -> MergeRows:
        """W P by blocks."""
        mixing = row_mixing(self.parameters).to(weight.device)
        return lambda rows, _: mixing.apply(rows)

    def expected(self, weight: Tensor) -> Expected:
        """W P − W, level by level."""
        return expected_rows(self.parameters, weight)

    def stand_beside(self, model: nn.Module, path: str, dtype: torch.dtype) -> None:
        """Let the layer see x Pᵀ, level by level, in place of x."""
        layer = model.get_submodule(path)
        weight = next(layer.parameters())
        parameters, stored = self.parameters, transforms(self.parameters)
        steps = [
            (level, stored[level.transforms].to(dtype).to(weight))
            for level in levels(parameters.dimension)
        ]
        scaler = None
        if parameters.scaler is not None:
            scaler = parameters.scaler.to(dtype).to(weight)
        turn = _turn_neighbours if parameters.form == "reference" else _turn_pairs

        def transformed(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0]
            for level, own in reversed(steps):
                x = turn(x, level.step, level.count, own)
            return (x if scaler is None else x * scaler, *inputs[1:])

        layer.register_forward_pre_hook(transformed)


def distance_between_forms(parameters: GivensParameters) -> float:
    """‖P_reference − P_paper‖ / √d, Frobenius: 0 where both mean the same, 1.4 where unrelated."""
    mixings = [row_mixing(replace(parameters, form=form)) for form in ("reference", "paper")]
    dimension, squares = parameters.dimension, 0.0
    for start in range(0, dimension, _ROWS):
        count = min(_ROWS, dimension - start)
        rows = torch.zeros(count, dimension, dtype=torch.float64)
        rows[torch.arange(count), torch.arange(start, start + count)] = 1
        one, other = (mixing.apply(rows) for mixing in mixings)
        squares += float((one - other).square().sum())
    return math.sqrt(squares / dimension)


def _turn_pairs(x: Tensor, step: int, count: int, own: Tensor) -> Tensor:
    """x L of one level, of its true pairs."""
    end, stride = 2 * step * count, 2 * step
    first, second = x[..., :end:stride], x[..., step:end:stride]
    turned = x.clone()
    turned[..., :end:stride] = first * own[:, 0, 0] + second * own[:, 1, 0]
    turned[..., step:end:stride] = first * own[:, 0, 1] + second * own[:, 1, 1]
    return turned


def _turn_neighbours(x: Tensor, step: int, count: int, own: Tensor) -> Tensor:
    """x Lᵀ of one level, as the code's second version pairs: cosines and sines by neighbours."""
    end, stride = 2 * step * count, 2 * step
    cosine, sine = torch.ones_like(x[(0,) * (x.ndim - 1)]), torch.zeros_like(x[(0,) * (x.ndim - 1)])
    cosine[:end:stride], cosine[step:end:stride] = own[:, 0, 0], own[:, 1, 1]
    sine[:end:stride], sine[step:end:stride] = -own[:, 0, 1], own[:, 1, 0]
    beside = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cosine + beside * sine
