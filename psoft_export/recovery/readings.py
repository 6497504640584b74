"""What the singular value decompositions that this machine can do say of the signs of one weight.

Training's own SVD was one of few routines. Another one on the same device, or the same on another
kind of weight, gives the signs of that routine exactly, so each is tried before anything is
searched.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from psoft_export.basis.signs import relative_signs
from psoft_export.basis.svd import Basis, BasisOptions, Triplets, make_basis
from psoft_export.errors import UsageError

Decompose = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def _torch_cpu(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _svd(weight.cpu())


def _float64(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _svd(weight.cpu().double())


def _transposed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    right, values, left = _svd(weight.cpu().T.contiguous())
    return left.T, values, right.T


def _numpy(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = np.linalg.svd(weight.cpu().numpy(), full_matrices=False)
    return torch.from_numpy(left), torch.from_numpy(values), torch.from_numpy(right)


def _on_cuda(driver: str | None) -> Decompose:
    return lambda weight: _svd(weight, driver)


def _svd(weight: Tensor, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight, full_matrices=False, driver=driver)
    return left, values, right


_ON_CPU: dict[str, Decompose] = {
    "cpu": _torch_cpu,
    "cpu-float64": _float64,
    "cpu-transposed": _transposed,
    "numpy": _numpy,
}
_ON_CUDA: dict[str, Decompose] = {
    "cuda": _on_cuda(None),
    "cuda-gesvd": _on_cuda("gesvd"),
    "cuda-gesvdj": _on_cuda("gesvdj"),
    "cuda-gesvda": _on_cuda("gesvda"),
}


def known_readings(device: torch.device) -> dict[str, Decompose]:
    """The decompositions that a run on a device can do, by name."""
    return _ON_CPU | (_ON_CUDA if device.type == "cuda" else {})


def own_reading(device: torch.device) -> str | None:
    """The name of the decomposition that the basis of a run on a device comes from, if of one."""
    return "cpu" if device.type == "cpu" else None


def chosen_readings(names: Sequence[str] | None, device: torch.device) -> dict[str, Decompose]:
    """Those of these names, or all.

    Raises:
        UsageError: a run on this device has none of such a name.
    """
    known = known_readings(device)
    for name in names or ():
        if name not in known:
            raise UsageError(f"reading '{name}' is not one of {', '.join(known)}")
    return {name: known[name] for name in names} if names is not None else known


def read_signs(
    weight: Tensor, basis: Basis, options: BasisOptions, decompose: Decompose
) -> Tensor | None:
    """The signs of a decomposition's vectors against those of a basis of the same weight.

    Args:
        weight: W, out × in, float32, on the device of the run.
        basis: A and B.
        options: how they are scaled.
        decompose: gives U, the singular values and Vᵀ of W.

    Returns:
        ±1 (r, float32, CPU); None where the decomposition failed.
    """
    try:
        left, values, right = decompose(weight)
    except (RuntimeError, np.linalg.LinAlgError):  # torch's errors of solvers and of memory
        return None
    triplets = Triplets(left, values, right).truncated(options.rank)
    found = make_basis(triplets.to(torch.device("cpu")).to(torch.float32), options)
    signs, _ = relative_signs(found, basis.to(torch.device("cpu")))
    return signs.float()
