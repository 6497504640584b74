"""The basis as PEFT finds it at load time: the same SVD call, on the device asked for."""

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
class Basis:
    """A (r × in, down-projection) and B (out × r, up-projection), float32."""

    a: Tensor
    b: Tensor


def principal_subspace(weight: Tensor, options: BasisOptions) -> tuple[Tensor, Tensor, Tensor]:
    """U (out × r), S (r) and Vᵀ (r × in) of W, from the very call that PEFT makes.

    PEFT 0.21, `peft/tuners/psoft/layer.py`, `PsoftLayer._compute_svd_factors`. The result is
    bit for bit PEFT's on the same machine, device and thread count; see `docs/basis.md` for what
    that means elsewhere.

    Args:
        weight: W, out × in, float32.
        options: rank and solver.
    """
    rank = options.rank
    if options.solver == "full":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    on_cpu = weight.device.type == "cpu"
    fork = {"devices": []} if on_cpu else {"devices": [weight.device], "device_type": "cuda"}
    with torch.random.fork_rng(**fork):
        torch.manual_seed(options.random_seed)
        left, values, right = torch.svd_lowrank(weight, q=rank, niter=options.power_iterations)
    return left[:, :rank], values[:rank], right[:, :rank].T


def find_basis(weight: Tensor, options: BasisOptions) -> Basis:
    """The basis that PEFT would build for W on W's device.

    Args:
        weight: W, out × in, float32, float16 or bfloat16; the SVD runs in float32.
        options: rank, scaling, solver and initialisation.
    """
    left, values, right = principal_subspace(weight.to(torch.float32), options)
    scaled = values / options.scaling
    # PEFT multiplies by diagonal matrices; scaling rows and columns gives the same bits.
    if options.initialisation == "pissa_init":
        root = scaled.sqrt()
        a, b = root[:, None] * right, left * root
    else:
        a, b = right, left * scaled
    # Copies, so that the full factors of the SVD are freed.
    layout = torch.contiguous_format
    return Basis(a.clone(memory_format=layout), b.clone(memory_format=layout))
