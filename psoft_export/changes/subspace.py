"""PSOFT's change: the principal subspace of W rotated, ΔW = scaling · B (R − I) A."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from psoft_export.algebra.merged_weight import MergeRows, added_product, low_rank_factors
from psoft_export.algebra.parameters import RotationParameters
from psoft_export.algebra.rotation import (
    core_rotation,
    orthogonality_error,
    rotation,
    rotation_angles,
)
from psoft_export.basis.svd import Basis, BasisOptions
from psoft_export.changes.change import ChangeFacts, WeightChange
from psoft_export.reference.expected import Expected
from psoft_export.reference.rotation import expected_product, reference_rotation


def added_by_rotation(inputs: Tensor, right: Tensor, rotation: Tensor, left: Tensor) -> Tensor:
    """What rotations add to a linear layer's output: ((x right) rotation) left.

    Args:
        inputs: x, batch × … × in.
        right: in × r.
        rotation: (R − I)ᵀ, r × r; or one for each row of the batch, batch × r × r.
        left: r × out.
    """
    projected = inputs @ right
    if rotation.ndim == 2:
        return (projected @ rotation) @ left
    if projected.ndim == 2:  # a classifier's, of one vector for each row
        return ((projected[:, None] @ rotation) @ left)[:, 0]
    while rotation.ndim < projected.ndim:
        rotation = rotation[:, None]
    return (projected @ rotation) @ left


@dataclass(frozen=True)
class SubspaceRotation(WeightChange):
    """The rotation R in the subspace of a basis.

    Attributes:
        parameters: of R.
        basis: A and B.
        options: how A and B are scaled.
    """

    parameters: RotationParameters
    basis: Basis
    options: BasisOptions

    @property
    def facts(self) -> ChangeFacts:
        """Rank, largest angle, and how far the core rotation is from orthogonal."""
        return ChangeFacts(
            rank=self.parameters.rank,
            largest_angle=math.degrees(float(rotation_angles(self.parameters)[0])),
            orthogonality_error=orthogonality_error(core_rotation(self.parameters)),
        )

    def merging(self, weight: Tensor) -> MergeRows:
        """W + left @ right."""
        left, right = self.low_rank_factors(self.options.scaling)
        return added_product(left.to(weight.device), right.to(weight.device))

    def expected(self, weight: Tensor) -> Expected:
        """scaling · (B (R A) − B A)."""
        basis = self.basis.to(weight.device)
        return expected_product(basis.a, basis.b, self.parameters, self.options.scaling)

    def stand_beside(self, model: nn.Module, path: str, dtype: torch.dtype) -> None:
        """Add scaling · ((x Aᵀ) (R − I)ᵀ) Bᵀ to the layer's output."""
        layer, scaling = model.get_submodule(path), self.options.scaling
        weight = next(layer.parameters())
        turn = reference_rotation(self.parameters)
        core = turn - torch.eye(len(turn), dtype=turn.dtype)
        a, core, b = (factor.to(dtype).to(weight) for factor in (self.basis.a, core, self.basis.b))

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + scaling * (((inputs[0] @ a.T) @ core.T) @ b.T)

        layer.register_forward_hook(add)

    def low_rank_factors(self, scaling: float) -> tuple[Tensor, Tensor]:
        """scaling · B (R − I) and A."""
        turn = rotation(self.parameters)
        return low_rank_factors(self.basis.a, self.basis.b, turn, scaling)
