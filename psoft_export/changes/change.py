"""What an adapter does to one weight.

Merging, checking, exporting and reporting see a `WeightChange` and know nothing of the adapter
that it comes from. A kind of adapter (`adapters`) is what turns tensors into these.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from psoft_export.algebra.merged_weight import MergeRows
from psoft_export.reference.expected import Expected


@dataclass(frozen=True)
class ChangeFacts:
    """What is known of a change by itself; None is what its kind has not.

    Attributes:
        rank: r, the largest rank that ΔW can have where that is below the full one.
        largest_angle: largest rotation angle, in degrees.
        orthogonality_error: ‖CᵀC − I‖_F of its rotation C, scaling vectors left out.
    """

    rank: int | None = None
    largest_angle: float | None = None
    orthogonality_error: float | None = None


class WeightChange(ABC):
    """What an adapter does to one weight W (out × in): W becomes W + ΔW.

    It is evaluated twice: `merging` makes the merged weight, `expected` says what it should be,
    by formulas that are not those of `merging`. (Of a layer of PEFT's both are PEFT's: its merge,
    and its forward pass, which may share a rotation.)
    """

    @property
    @abstractmethod
    def facts(self) -> ChangeFacts:
        """What is known of the change by itself."""

    @abstractmethod
    def merging(self, weight: Tensor) -> MergeRows:
        """What makes rows of the merged weight.

        Args:
            weight: W (out × in), any floating dtype, on the device to compute on.
        """

    @abstractmethod
    def expected(self, weight: Tensor) -> Expected:
        """ΔW by the second evaluation; argument as of `merging`."""

    @abstractmethod
    def stand_beside(self, model: nn.Module, path: str, dtype: torch.dtype) -> None:
        """Let a model compute with W and this change, not merged, from now on.

        Args:
            model: holds the layer.
            path: module path of the layer in it.
            dtype: the change is rounded to it; the layer may compute in a wider one.
        """

    def low_rank_factors(self, scaling: float) -> tuple[Tensor, Tensor] | None:
        """Factors of ΔW = (scaling · left) right, or None where its rank may be full.

        Left is out × r and right r × in, float64, on the basis's device.
        """
        return None
