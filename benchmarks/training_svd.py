"""How exact training's own SVD is, and what a record of signs would miss of it.

`python -m benchmarks.training_svd`: a minute on two CPU cores. `--device cuda`: with each driver.
"""

import argparse
import itertools
import math

import torch
from torch import Tensor

from benchmarks.children import machine_line
from benchmarks.solver import residuals
from benchmarks.spectra import SPECTRA
from psoft_export.algebra.parameters import RotationParameters
from psoft_export.algebra.rotation import rotation
from psoft_export.basis.signs import proven_signs
from psoft_export.basis.solver import leading_triplets
from psoft_export.basis.svd import BasisOptions, Triplets, make_basis

_RANK = 64
_GENERATOR_ENTRY = 0.01  # of Q; rotates planes by up to some 18 degrees at rank 64
_SHAPES = ((1024, 1024), (2048, 5632), (4096, 4096))
_DRIVERS = {"cpu": (None,), "cuda": (None, "gesvd", "gesvda")}


def _turn() -> Tensor:
    count = _RANK * (_RANK - 1) // 2
    entries = torch.randn(count, generator=torch.Generator().manual_seed(1))
    return rotation(RotationParameters(_RANK, _GENERATOR_ENTRY * entries))


def row(weight: Tensor, driver: str | None) -> str:
    """The figures of one SVD of W, as cells of a table.

    They are the largest ‖Wvᵢ − σᵢuᵢ‖ and the largest error of a σᵢ, both relative to σ₁, and
    `SignRecord.distance`.
    """
    options = BasisOptions(_RANK, scaling=1.0)
    exact = leading_triplets(weight, _RANK)
    factors = torch.linalg.svd(weight, full_matrices=False, driver=driver)
    found = Triplets(*factors).truncated(_RANK)
    _, astray = residuals(weight.double(), found.to(torch.float64))
    off = float((found.values - exact.triplets.values).abs().max() / found.values[0])
    basis, following = make_basis(found, options), exact.certificate.next_value
    missed = proven_signs(basis, options, exact.triplets, following, _turn()).distance
    missed_text = f"{missed:.1e}" if math.isfinite(missed) else "other σ"
    return f"{astray:.1e} | {off:.1e} | {missed_text}"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="benchmarks.training_svd", description=__doc__)
    parser.add_argument("--device", choices=sorted(_DRIVERS), default="cpu")
    device = parser.parse_args().device
    print(machine_line(torch.get_num_threads(), ("torch",)))
    if device == "cuda":
        print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    print("\n| weight, spectrum | driver | ‖Wv − σu‖ / σ₁ | σ off, / σ₁ | ΔW that signs miss |")
    print("| --- | --- | --: | --: | --: |")
    for shape, (name, make) in itertools.product(_SHAPES, SPECTRA.items()):
        weight = make(*shape, torch.Generator().manual_seed(5)).to(device)
        for driver in _DRIVERS[device]:
            cells = row(weight, driver)
            print(f"| {shape[0]} × {shape[1]}, {name} | {driver or 'default'} | {cells} |")


if __name__ == "__main__":
    main()
