"""R as a smooth function of the signs of its basis, so that a gradient can look for them.

With D = diag(d), d in {−1, 1}ʳ, the rotation in a basis with other signs is D R D. Here the
couplings dᵢ dⱼ may lie anywhere in [−1, 1]. The generator is what is scaled, Q becomes Q ∘ C, so
that the core stays a rotation on the way: at C = 0 it is the identity, and the layer is the base's
but for the scaling vectors, which no sign changes. A free R has no generator; in its place stand
its entries off the diagonal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from psoft_export.algebra.parameters import RotationParameters
from psoft_export.algebra.rotation import skew_symmetric, turned_by


class RelaxedSigns:
    """The rotations of an adapter's modules as functions of the couplings.

    Attributes:
        shape: number of modules, and r.
        stored: the generators that are stored (modules × r × r, float32).
    """

    def __init__(self, parameters: Sequence[RotationParameters], device: torch.device) -> None:
        """Stack what is stored, in float32.

        Args:
            parameters: of every module; of one rank and one form.
            device: where to compute.
        """
        first = parameters[0]
        self.shape = (len(parameters), first.rank)
        self._orthogonal = first.orthogonal
        self._series = first.series
        stored = [
            skew_symmetric(p.weight, p.rank) if p.orthogonal else p.weight for p in parameters
        ]
        matrices = torch.stack([m.to(device, torch.float32) for m in stored])
        self._identity = torch.eye(first.rank, device=device)
        self._diagonal = matrices.diagonal(dim1=1, dim2=2).clone()  # of a free R; of Q zero
        self.stored = matrices.masked_fill(self._identity.bool(), 0)
        ones = torch.ones(first.rank)
        self._vector_a, self._vector_b = (
            torch.stack([(v if v is not None else ones).to(device, torch.float32) for v in vectors])
            for vectors in ([p.vector_a for p in parameters], [p.vector_b for p in parameters])
        )

    def coupled(self, couplings: Tensor) -> Tensor:
        """The generators in a basis of other signs, differentiable in the couplings.

        Args:
            couplings: … × modules × r × r, float32 (`couplings` and `vector_couplings` make
                them).

        Returns:
            … × modules × r × r, float32: Q, skew-symmetric; of a free R its entries off the
            diagonal.
        """
        return self.stored * couplings

    def moves(self, slopes: Tensor) -> Tensor:
        """The part of slopes along which generators can move: skew-symmetric as they are."""
        if self._orthogonal:
            return slopes - slopes.mT
        return slopes.masked_fill(self._identity.bool(), 0)

    def paired(self, products: Tensor) -> Tensor:
        """Of values of a generator's free numbers, in its places: those of each pair i, j added up.

        A skew-symmetric generator shows each of its numbers twice.
        """
        both = products + products.mT
        return both / 2 if self._orthogonal else both

    def cores(self, generators: Tensor) -> Tensor:
        """R − I of every module, differentiable in the generators.

        Args:
            generators: … × modules × r × r, float32, as `coupled` returns them.

        Returns:
            … × modules × r × r, float32.
        """
        if self._orthogonal:
            core = turned_by(generators, self._series)
        else:
            core = generators + torch.diag_embed(self._diagonal)
        turned = self._vector_b[:, :, None] * core * self._vector_a[:, None, :]
        return turned - self._identity


def couplings(d: Tensor) -> Tensor:
    """dᵢ dⱼ (… × r × r) of d (… × r): all that the rotations depend on."""
    return d[..., :, None] * d[..., None, :]


def vector_couplings(vectors: Tensor) -> Tensor:
    """vᵢ · vⱼ (… × r × r) of vectors (… × r × k): signs relaxed into k dimensions."""
    return vectors @ vectors.mT
