"""The basis as PEFT finds it at load time: the same SVD call, and A and B from its result."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Solver = Literal["full", "lowrank"]
Initialisation = Literal["psoft_init", "pissa_init"]


@dataclass(frozen=True)
class BasisOptions:
    """The adapter's options that the basis depends on (PEFT's field names in brackets).

    solver (`psoft_svd`), initialisation (`ab_svd_init`), scaling (`psoft_alpha / r`), and for
    the low-rank solver its power iterations (`psoft_svd_lowrank_niter`) and `random_seed`.
    """

    rank: int
    scaling: float
    solver: Solver = "full"
    initialisation: Initialisation = "psoft_init"
    power_iterations: int = 10
    random_seed: int = 0


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of W: `left` (out × r), `values` (r, descending), `right` (r × in).

    `left[:, i]`, `values[i]` and `right[i]` belong together; all of one floating dtype.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def truncated(self, rank: int) -> "Triplets":
        """The first `rank` triplets, as copies (the factors they are cut from can be freed)."""
        layout = torch.contiguous_format
        return Triplets(
            self.left[:, :rank].clone(memory_format=layout),
            self.values[:rank].clone(),
            self.right[:rank].clone(memory_format=layout),
        )

    def to(self, target: torch.dtype | torch.device) -> "Triplets":
        """The triplets rounded to a dtype, or on a device."""
        return Triplets(self.left.to(target), self.values.to(target), self.right.to(target))


@dataclass(frozen=True)
class Basis:
    """A (r × in, down-projection) and B (out × r, up-projection), float32."""

    a: Tensor
    b: Tensor

    def to(self, device: torch.device) -> "Basis":
        """The basis on a device."""
        return Basis(self.a.to(device), self.b.to(device))


def training_svd(weight: Tensor, options: BasisOptions) -> tuple[Triplets, float | None]:
    """The triplets of W from the very call that PEFT makes when it loads an adapter.

    PEFT 0.21, `peft/tuners/psoft/layer.py`, `PsoftLayer._compute_svd_factors`. The result is
    bit for bit PEFT's on the same machine, device and thread count; see `docs/basis.md` for what
    that means elsewhere.

    Args:
        weight: W, out × in, float32, on the device to compute on.
        options: rank and solver.

    Returns:
        The triplets, and σ_{r+1} where the solver finds it.
    """
    rank = options.rank
    if options.solver == "full":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        following = float(values[rank]) if rank < len(values) else 0.0
        return Triplets(left, values, right).truncated(rank), following
    on_cpu = weight.device.type == "cpu"
    fork = {"devices": []} if on_cpu else {"devices": [weight.device], "device_type": "cuda"}
    with torch.random.fork_rng(**fork):
        torch.manual_seed(options.random_seed)
        left, values, right = torch.svd_lowrank(weight, q=rank, niter=options.power_iterations)
    return Triplets(left, values, right.T).truncated(rank), None


def make_basis(triplets: Triplets, options: BasisOptions) -> Basis:
    """A and B as PEFT scales them from the first r triplets.

    Args:
        triplets: at least r of them, float32.
        options: rank, scaling and initialisation.
    """
    rank = options.rank
    left, right = triplets.left[:, :rank], triplets.right[:rank]
    scaled = triplets.values[:rank] / options.scaling
    # PEFT multiplies by diagonal matrices; scaling rows and columns gives the same bits.
    if options.initialisation == "pissa_init":
        root = scaled.sqrt()
        return Basis(root[:, None] * right, left * root)
    return Basis(right, left * scaled)


def basis_values(basis: Basis, options: BasisOptions) -> Tensor:
    """The singular values that A and B were scaled with (r, float64).

    σᵢ = scaling · ‖Aᵢ‖ ‖Bᵢ‖ in either initialisation.
    """
    norms = torch.linalg.vector_norm(basis.a.double(), dim=1)
    values: Tensor = options.scaling * norms * torch.linalg.vector_norm(basis.b.double(), dim=0)
    return values
