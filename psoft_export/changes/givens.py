"""qGOFT's change: W P, P a product of parallel Givens or quasi-Givens transforms."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from psoft_export.algebra.givens import givens_angles, levels, row_mixing, transforms
from psoft_export.algebra.merged_weight import MergeRows
from psoft_export.algebra.parameters import GivensParameters
from psoft_export.changes.change import ChangeFacts, WeightChange
from psoft_export.reference.expected import Expected
from psoft_export.reference.givens import expected_rows


@dataclass(frozen=True)
class GivensTransform(WeightChange):
    """W P, with the parameters that P is made of."""

    parameters: GivensParameters

    @property
    def facts(self) -> ChangeFacts:
        """In the strict form the largest angle of a single rotation."""
        angles = givens_angles(self.parameters)
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
