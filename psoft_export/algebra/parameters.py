"""What adapters store for one module, as data. Both evaluations start from it."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

GivensForm = Literal["reference", "paper"]


@dataclass(frozen=True)
class CayleyNeumann:
    """The truncated series that stands in for the Cayley transform.

    `terms` is counted as `convention` says: as PEFT's `num_cayley_neumann_terms` or as the
    paper's own code counts. `max_norm` is PEFT's `cayley_neumann_eps`, a bound on ‖Q‖_F above
    which Q is scaled down, or None.
    """

    terms: int
    max_norm: float | None = None
    convention: Literal["peft", "paper"] = "peft"


@dataclass(frozen=True)
class RotationParameters:
    """Of a rotation in a principal subspace (PSOFT).

    `weight` is either the r(r−1)/2 entries of Q above the diagonal, in
    `torch.triu_indices(r, r, 1)` order (`orthogonal` true), or the r × r matrix itself
    (`orthogonal` false). `vector_a` (input side) and `vector_b` (output side) are r entries
    each, or None. `series` is None for the exact Cayley transform. Stored dtypes are kept.
    """

    rank: int
    weight: Tensor
    vector_a: Tensor | None = None
    vector_b: Tensor | None = None
    orthogonal: bool = True
    series: CayleyNeumann | None = None

    @property
    def count(self) -> int:
        """How many numbers are stored."""
        parts = (self.weight, self.vector_a, self.vector_b)
        return sum(part.numel() for part in parts if part is not None)


@dataclass(frozen=True)
class GivensParameters:
    """Of a product of parallel 2 × 2 transforms (qGOFT).

    Attributes:
        angles: d − 1 numbers x, the angles being π · tanh(x); None in the relaxed form.
        blocks: (d − 1) × 2 × 2 transforms; None in the strict form.
        scaler: d numbers, or None.
        form: `paper`: true transforms of the pair (i, i + 2^level), W P = W S L₁ᵀ L₂ᵀ …, as the
            paper and the first version of its code have it. `reference`: what the forward pass
            of the code's second version computes, neighbours paired at every level, W S L₁ L₂ ….
            S is the diagonal of `scaler`.
    """

    angles: Tensor | None
    blocks: Tensor | None
    scaler: Tensor | None
    form: GivensForm

    @property
    def dimension(self) -> int:
        """d."""
        stored = self.angles if self.angles is not None else self.blocks
        assert stored is not None
        return len(stored) + 1
