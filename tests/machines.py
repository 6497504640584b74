"""Stand-ins for other machines: SVDs that differ from the one here as theirs would."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from psoft_export import bases
from psoft_export.basis.solver import Certificate, Solution
from psoft_export.basis.svd import BasisOptions, Triplets

Svd = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def numpy_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = np.linalg.svd(weight.float().numpy(), full_matrices=False)
    return torch.from_numpy(left), torch.from_numpy(values), torch.from_numpy(right)


def float64_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return left.float(), values.float(), right.float()


def random_signs(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    generator = torch.Generator().manual_seed(int(1e6 * values[0]))
    signs = torch.randint(0, 2, (len(values),), generator=generator) * 2.0 - 1
    return left * signs, values, signs[:, None] * right


def one_thread(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    finally:
        torch.set_num_threads(before)
    return left, values, right


def coarse_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As a GPU's Jacobi SVD leaves it: orthonormal vectors, some 1e-2 radians astray."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    generator = torch.Generator().manual_seed(9)
    near = []
    for exact in (left, right.T):
        noise = torch.randn(exact.shape, dtype=torch.float64, generator=generator)
        factor, triangle = torch.linalg.qr(exact + 1e-2 / len(exact) ** 0.5 * noise)
        near.append((factor * triangle.diagonal().sign()).float())
    return near[0], values.float(), near[1].T.contiguous()


MACHINES: dict[str, Svd] = {
    "numpy": numpy_svd,
    "float64": float64_svd,
    "random signs": random_signs,
    "one thread": one_thread,
}


def pretend(svd: Svd, patch: pytest.MonkeyPatch) -> None:
    """Find every basis by `svd`, as another machine would, with a record or without."""

    def triplets(weight: Tensor, rank: int) -> tuple[Triplets, float]:
        left, values, right = svd(weight)
        return Triplets(left, values, right).truncated(rank), float(values[rank])

    def solver(weight: Tensor, rank: int, workspace: object) -> Solution:
        found, following = triplets(weight, rank)
        return Solution(found, Certificate("svd", 0.0, 0.0, 0.0, 0.0, following, 0))

    def training(weight: Tensor, options: BasisOptions) -> tuple[Triplets, float]:
        return triplets(weight, options.rank)

    patch.setattr(bases, "leading_triplets", solver)
    patch.setattr(bases, "training_svd", training)


def pretend_training(svd: Svd, patch: pytest.MonkeyPatch) -> None:
    """Find bases by `svd` where training's own is asked for, and there alone."""

    def training(weight: Tensor, options: BasisOptions) -> tuple[Triplets, float]:
        left, values, right = svd(weight)
        return Triplets(left, values, right).truncated(options.rank), float(values[options.rank])

    patch.setattr(bases, "training_svd", training)
