"""The solver's triplets are those of a float64 SVD, whatever the shape and the spectrum."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from psoft_export.basis import chebyshev, lanczos, solver, tall_matrix
from psoft_export.basis.certificate import Found, measured, rayleigh_ritz
from psoft_export.basis.chebyshev import chebyshev_space
from psoft_export.basis.refinement import refined
from psoft_export.basis.solver import Solution, leading_triplets
from psoft_export.basis.space import TOLERANCE, RitzPairs, Space
from psoft_export.basis.svd import Triplets
from psoft_export.basis.tall_matrix import TallMatrix, Workspace
from tests import models

UNIT = 2.0**-24  # float32's rounding


def decaying(count: int) -> Tensor:
    return 1 + 10 * torch.arange(1, count + 1, dtype=torch.float64) ** -0.7


def flat(count: int) -> Tensor:
    return torch.exp(-torch.arange(count, dtype=torch.float64) / 1000)


def steep(count: int) -> Tensor:
    """Falling by a constant factor, as the flat one does, but soon: few vectors suffice."""
    return torch.exp(-torch.arange(count, dtype=torch.float64) / 50)


def clustered(count: int) -> Tensor:
    """Pairs of equal values, and one value forty times, among values with gaps."""
    values = decaying(count)
    values[1] = values[0]
    values[30:70] = values[30]
    return values


def low_rank(count: int) -> Tensor:
    values = decaying(count)
    values[12:] = 0
    return values


SPECTRA = {
    "decaying": decaying,
    "flat": flat,
    "steep": steep,
    "clustered": clustered,
    "low rank": low_rank,
}
SHAPES = [(384, 384), (640, 700), (700, 640), (1152, 96), (96, 1152), (1100, 1500)]


def matrix(rows: int, columns: int, values: Tensor) -> Tensor:
    """A float32 matrix with these singular values, to its rounding."""
    generator = torch.Generator().manual_seed(7)
    count = len(values)
    left, _ = torch.linalg.qr(torch.randn(rows, count, generator=generator).double())
    right, _ = torch.linalg.qr(torch.randn(columns, count, generator=generator).double())
    return ((left * values) @ right.T).float()


def check(weight: Tensor, rank: int, solution: Solution) -> None:
    """Against a float64 SVD of the very matrix: values, vectors where they are unique, subspace."""
    left, values, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    found = solution.triplets
    assert found.left.shape == (weight.shape[0], rank) and found.left.dtype == torch.float32
    assert found.right.shape == (rank, weight.shape[1]) and found.values.shape == (rank,)
    largest = float(values[0])
    assert float((found.values.double() - values[:rank]).abs().max()) <= UNIT * largest
    u, v = found.left.double(), found.right.double()
    for gram in (u.T @ u, v @ v.T):
        assert float((gram - torch.eye(rank)).abs().max()) <= 4 * UNIT
    product = weight.double() @ v.T - u * values[:rank]
    # Entries are rounded to float32, so a product of them errs by some UNIT of σ₁ in norm.
    assert float(product.norm(dim=0).max()) <= 4 * UNIT * largest
    certificate = solution.certificate
    assert certificate.accepted
    if rank < len(values):
        assert certificate.next_value == pytest.approx(float(values[rank]), abs=1e-9 * largest)
    neighbours = torch.cat([torch.tensor([math.inf]).double(), values])
    gaps = torch.minimum(neighbours[:rank] - values[:rank], values[:rank] - _after(values, rank))
    unique = gaps > 1e-4 * largest
    cosines = (u * left[:, :rank]).sum(0).abs()
    assert float((1 - cosines[unique]).max() if unique.any() else 0.0) <= UNIT


def _after(values: Tensor, rank: int) -> Tensor:
    return torch.cat([values, torch.zeros(1).double()])[1 : rank + 1]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_triplets_are_those_of_a_float64_svd(shape: tuple[int, int], spectrum: str) -> None:
    weight = matrix(*shape, SPECTRA[spectrum](min(shape)))
    for rank in (8, 40):
        check(weight, rank, leading_triplets(weight, rank))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_so_are_those_of_the_method_for_gpus(
    shape: tuple[int, int], spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "lanczos_spaces", lambda matrix, rank, *_: _on_gpus(matrix, rank))
    monkeypatch.setattr(solver, "_SMALL_SIDE", 100)
    weight = matrix(*shape, SPECTRA[spectrum](min(shape)))
    for rank in (8, 40):
        solution = leading_triplets(weight, rank)
        check(weight, rank, solution)
        falls_back = min(shape) < 100 or (spectrum == "low rank" and rank == 40)
        assert (solution.certificate.method == "chebyshev") != falls_back


def _on_gpus(matrix: TallMatrix, rank: int) -> list[Space]:
    return [space] if (space := chebyshev_space(matrix, rank)) is not None else []


def test_a_filter_that_leads_nowhere_gives_up() -> None:
    """Of an orthogonal matrix no direction is before another."""
    weight, _ = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64))
    assert chebyshev_space(TallMatrix(weight.float(), Workspace()), 16) is None
    assert chebyshev_space(TallMatrix(torch.zeros(300, 400), Workspace()), 16) is None


@pytest.mark.parametrize("dependence", [1e-2, 1e-7, 0.0])
def test_vectors_that_depend_on_one_another_become_orthonormal(dependence: float) -> None:
    rows = torch.randn(20, 300, dtype=torch.float64)
    rows[1:] = rows[0] + dependence * rows[1:]
    rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    found = chebyshev._orthonormal(rows)
    torch.testing.assert_close(found @ found.T, torch.eye(20, dtype=torch.float64))
    torch.testing.assert_close(rows @ found.T @ found, rows)


@pytest.mark.parametrize("rank", [1, 64, 200, 384])
def test_every_rank_up_to_all(rank: int) -> None:
    weight = matrix(384, 500, decaying(384))
    check(weight, rank, leading_triplets(weight, rank))


def test_real_weights() -> None:
    state = load_file(models.MINILM / "model.safetensors")
    for name in ("attention.self.query", "intermediate.dense", "output.dense"):
        weight = state[f"encoder.layer.3.{name}.weight"].float()
        check(weight, 32, leading_triplets(weight, 32))


def test_the_fast_method_is_used_where_it_pays_and_left_where_it_does_not() -> None:
    methods = {
        (1100, 1500, "decaying"): "block-lanczos",
        (1100, 1500, "flat"): "mixed-lanczos",
        (1100, 1500, "steep"): "block-lanczos",
        (384, 384, "decaying"): "gram",
    }
    for (rows, columns, spectrum), method in methods.items():
        weight = matrix(rows, columns, SPECTRA[spectrum](min(rows, columns)))
        assert leading_triplets(weight, 16).certificate.method == method


def test_more_equal_values_than_a_block_holds_are_not_missed() -> None:
    values = torch.cat([torch.full((40,), 5.0), torch.linspace(1, 0.1, 900)]).double()
    weight = matrix(940, 1000, values)
    solution = leading_triplets(weight, 48)
    assert solution.certificate.method != "block-lanczos"
    check(weight, 48, solution)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(dtype: torch.dtype) -> None:
    weight = matrix(640, 700, decaying(640)).to(dtype)
    check(weight, 24, leading_triplets(weight, 24))


def test_nothing_at_all() -> None:
    solution = leading_triplets(torch.zeros(700, 640), 16)
    assert torch.equal(solution.triplets.values, torch.zeros(16))
    left = solution.triplets.left
    assert torch.isfinite(left).all() and torch.isfinite(solution.triplets.right).all()


def test_what_cannot_be_certified_goes_to_the_full_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(700, 640, decaying(640))
    wanted = leading_triplets(weight, 16)
    certified = solver.rayleigh_ritz

    def doubt(*arguments: Any) -> Found:
        found = certified(*arguments)
        worse = replace(found.certificate, vector_error=1e-3, residual=1e-3)
        return replace(found, certificate=worse)

    monkeypatch.setattr(solver, "rayleigh_ritz", doubt)
    solution = leading_triplets(weight, 16)
    assert solution.certificate.method == "svd" and wanted.certificate.method == "block-lanczos"
    check(weight, 16, solution)


def flat_but_close(count: int) -> Tensor:
    """A hundred values so close that float32 cannot tell where the leading ones end."""
    values = torch.linspace(0.5, 0.1, count).double()
    values[:100] = torch.linspace(1, 1 - 1e-6, 100).double()
    return values


def flat_above_little(count: int) -> Tensor:
    """A flat top, and all others, of which some are wanted, within float32's rounding of it."""
    values = 1e-4 * flat(count)
    values[:14] = torch.linspace(1, 0.999, 14).double()
    return values


@pytest.mark.parametrize("values", [flat_but_close, flat_above_little])
def test_what_float32_cannot_find_is_found_in_float64(
    values: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanczos, "_FLAT", math.inf)  # every spectrum is tried in float32
    weight = matrix(1100, 1500, values(1100))
    solution = leading_triplets(weight, 40)
    assert solution.certificate.method != "mixed-lanczos"
    check(weight, 40, solution)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_flat_spectra_of_any_size(scale: float) -> None:
    weight = scale * matrix(1100, 1500, flat(1100))
    solution = leading_triplets(weight, 24)
    in_range = 1e-20 < scale < 1e20
    assert solution.certificate.method == ("mixed-lanczos" if in_range else "block-lanczos")
    check(weight, 24, solution)


def test_each_round_of_refinement_adds_digits_until_the_vectors_are_right() -> None:
    weight = matrix(700, 640, flat(640))
    held = TallMatrix(weight, Workspace())
    left, _, _ = torch.linalg.svd(weight.double().T)
    exact = left.T[:60]
    rough = torch.linalg.qr((exact + 1e-3 * torch.randn(exact.shape) / 640**0.5).T)[0].T
    before = rayleigh_ritz(held, Space(rough[:36].contiguous(), "mixed-lanczos"), 20)
    assert 1e-4 < before.certificate.vector_error < 1
    following = RitzPairs(torch.exp(-torch.arange(36, 60) / 500.0), rough[36:].float())
    found = refined(held, before, 20, following)
    assert found.certificate.vector_error <= TOLERANCE
    distance = found.near[:20] - (found.near[:20] * exact[:20]).sum(1, keepdim=True) * exact[:20]
    assert float(distance.norm(dim=1).max()) <= 4 * TOLERANCE


def test_refinement_that_leads_nowhere_stops() -> None:
    """Vectors that are no Ritz vectors of the leading end: λ − G is not definite."""
    weight = matrix(700, 640, flat(640))
    held = TallMatrix(weight, Workspace())
    rows = torch.linalg.qr(torch.randn(640, 60, dtype=torch.float64))[0].T
    before = rayleigh_ritz(held, Space(rows[:36].contiguous(), "mixed-lanczos"), 20)
    following = RitzPairs(torch.linspace(0.2, 0.1, 24), rows[36:].float())
    assert not refined(held, before, 20, following).certificate.accepted


@pytest.mark.parametrize("part", ["vectors", "values"])
def test_the_certificate_sees_a_wrong_vector(part: str) -> None:
    weight = matrix(640, 700, decaying(640)).double()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    near, far, sigma = left.T[:32].clone(), right[:32].clone(), values[:32].clone()
    held = TallMatrix(weight, Workspace())
    assert measured(held, near, sigma, far, 16, "svd").certificate.accepted
    if part == "vectors":  # 1e-6 radians out of the subspace, both sides to match
        near[5] += 1e-6 * left.T[100]
        far[5] += 1e-6 * right[100]
    else:
        sigma[5] *= 1 + 1e-6
    assert not measured(held, near, sigma, far, 16, "svd").certificate.accepted


@pytest.mark.parametrize("shape", [(300, 410), (410, 300)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_products_with_tiles_are_those_of_the_whole(
    shape: tuple[int, int], dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tall_matrix, "_WIDE_RESULTS", wide)
    monkeypatch.setattr(tall_matrix, "_TILE_ROWS", 37)
    monkeypatch.setattr(tall_matrix, "_ROUGH_TILE_ROWS", 53)
    monkeypatch.setattr(tall_matrix, "_DIAGONAL_BLOCK", 41)
    weight = torch.randn(shape).to(dtype)
    short = weight.double() if shape[0] < shape[1] else weight.double().T
    near, far = torch.randn(5, 300).double(), torch.randn(5, 410).double()
    held = TallMatrix(weight, Workspace())
    assert torch.equal(held.whole(), short)
    pairs = [
        (held.to_long_side(near), near @ short),
        (held.to_short_side(far), far @ short.T),
        (held.gram_product(near), near @ short @ short.T),
        (held.gram(), short @ short.T),
    ]
    pairs.append((held.gram_product(near), near @ short @ short.T))  # by the Gram matrix now
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    rough = held.gram(torch.float32)
    torch.testing.assert_close(rough.double(), short @ short.T, rtol=1e-5, atol=1e-4)
    assert held.gram_product(near.float()).dtype == torch.float32
    torch.testing.assert_close(held.gram_product(near.float()).T, rough @ near.float().T)


@pytest.mark.parametrize("shape", [(640, 600), (600, 640), (620, 620)])
def test_a_weight_is_read_wherever_it_lies_and_not_changed(shape: tuple[int, int]) -> None:
    weight = matrix(*shape, decaying(min(shape))).bfloat16()
    apart = torch.zeros(shape[0], 2 * shape[1], dtype=weight.dtype)[:, ::2].copy_(weight)
    before = weight.clone()
    first, second = leading_triplets(weight, 16), leading_triplets(apart, 16)
    assert first.certificate.method == "block-lanczos"
    assert torch.equal(weight, before)
    for name in ("left", "values", "right"):
        assert torch.equal(getattr(first.triplets, name), getattr(second.triplets, name))


def test_the_same_bits_in_another_process() -> None:
    script = (
        "import hashlib, torch\n"
        "from psoft_export.basis.solver import leading_triplets\n"
        "from tests.test_solver import decaying, matrix\n"
        "torch.set_num_threads(1)\n"
        "found = leading_triplets(matrix(700, 640, decaying(640)), 24).triplets\n"
        "data = b''.join(t.contiguous().numpy().tobytes() for t in\n"
        "                (found.left, found.values, found.right))\n"
        "print(hashlib.sha256(data).hexdigest())\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 65


def test_the_callers_random_numbers_stay_as_they_are() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    leading_triplets(matrix(640, 700, decaying(640)), 16)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_triplets_on_a_gpu(spectrum: str) -> None:
    weight = matrix(1100, 1500, SPECTRA[spectrum](1100))
    solution = leading_triplets(weight.cuda(), 40)
    assert solution.triplets.left.is_cuda
    found = solution.triplets
    moved = Triplets(found.left.cpu(), found.values.cpu(), found.right.cpu())
    check(weight, 40, Solution(moved, solution.certificate))
