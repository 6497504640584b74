"""What of a basis an SVD elsewhere cannot find again, and how it is put back.

The SVD gives every singular pair up to its sign, and pairs with nearly equal values up to a
rotation among them. A sign record holds the signs, and those pairs themselves.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from psoft_export.algebra.low_rank import product_difference, product_norm
from psoft_export.basis.svd import Basis, BasisOptions, Triplets, basis_values, make_basis

# A float32 SVD turns vector i towards vector j by about _PRECISION · σ₁ / |σᵢ − σⱼ| radians
# (first-order perturbation theory with a backward error of a few units of float32 rounding;
# the factor is measured, `docs/basis.md`).
_PRECISION = 4 * 2.0**-24
_INSEPARABLE = 1 / 16  # radians: a pair that may turn more than this is recorded itself
ADVISED_LIMIT = 1e-2  # of `delta_uncertainty`: beyond it, a record should hold the whole basis
_SAME_VALUE = 1e-4  # relative to σ₁: how far recorded and found singular values may differ


@dataclass(frozen=True)
class SignRecord:
    """The signs of one module's basis, and its inseparable vectors.

    Attributes:
        values: the singular values that the training basis was scaled with (r, float32).
        anchor: for each i the row of the largest |entry| of uᵢ (r, int32).
        sign: the sign of that entry in the training basis, 1 or −1 (r, int8).
        cluster: indices of the vectors that no sign can pin down (c, int32), ascending.
        cluster_a: their rows of A (c × in, float32), as training held them.
        cluster_b: their columns of B (out × c, float32).
        distance: how far ΔW in the basis that the record gives back was found to be from ΔW in
            training's, relative to ‖ΔW‖; 0 where nobody measured it.
    """

    values: Tensor
    anchor: Tensor
    sign: Tensor
    cluster: Tensor
    cluster_a: Tensor
    cluster_b: Tensor
    distance: float = 0.0

    def left_open(self, next_value: float, rotation: Tensor) -> float:
        """What the record leaves open of ΔW, relative to ‖ΔW‖: estimated, and measured.

        Arguments as of `delta_uncertainty`.
        """
        estimate = delta_uncertainty(self.values, next_value, rotation, self.cluster)
        return max(estimate, self.distance)


class SignMismatchError(ValueError):
    """A record does not belong to these triplets; the message says in what."""


def turning(values: Tensor, next_value: float) -> Tensor:
    """How far a float32 SVD may turn each pair of vectors into each other, in radians.

    Args:
        values: σ₁ … σ_r, descending, any floating dtype.
        next_value: σ_{r+1}, so that the edge of the subspace counts.

    Returns:
        r × (r + 1), float64: entry (i, j) for vectors i and j, at most π/2; zero for i = j.
    """
    inner = values.detach().to("cpu", torch.float64)
    outer = torch.cat([inner, torch.tensor([next_value], dtype=torch.float64)])
    gaps = (inner[:, None] - outer[None, :]).abs()
    angles = (_PRECISION * inner[0] / gaps).nan_to_num(math.inf).clamp_(max=math.pi / 2)
    angles.fill_diagonal_(0)
    return angles


def inseparable(values: Tensor, next_value: float) -> Tensor:
    """Indices (int32) of the vectors that a float32 SVD does not separate from a neighbour."""
    reach = turning(values, next_value).amax(dim=1)
    return (reach > _INSEPARABLE).nonzero()[:, 0].to(torch.int32)


def delta_uncertainty(
    values: Tensor, next_value: float, rotation: Tensor, held: Tensor | None = None
) -> float:
    """The size of what is not known of ΔW, relative to ‖ΔW‖: two correct float32 SVDs apart.

    First order: vector i is uncertain by the root mean square of `turning`, and carries row and
    column i of Σ (R − I), the core of ΔW in the basis of singular vectors.

    Args:
        values: σ₁ … σ_r.
        next_value: σ_{r+1}.
        rotation: R, r × r, float64, CPU.
        held: indices of vectors that a record holds themselves; they count as known.
    """
    angles = turning(values, next_value).square().sum(dim=1)
    if held is not None:
        angles[held.long()] = 0
    identity = torch.eye(len(values), dtype=torch.float64)
    core = values.detach().to("cpu", torch.float64)[:, None] * (rotation - identity)
    norm = float(torch.linalg.vector_norm(core))
    if not norm:
        return 0.0
    carried = core.square().sum(dim=1) + core.square().sum(dim=0)
    return math.sqrt(float((angles * carried).sum())) / norm


def record_signs(basis: Basis, options: BasisOptions, next_value: float) -> SignRecord:
    """The record of a basis as training held it.

    Args:
        basis: A and B.
        options: how they were scaled.
        next_value: σ_{r+1} of W.
    """
    values = basis_values(basis, options)
    cluster = inseparable(values, next_value)
    left = basis.b.to("cpu")
    anchor = left.abs().argmax(dim=0)
    sign = torch.where(left.gather(0, anchor[None])[0] < 0, -1, 1)
    held = cluster.long()
    return SignRecord(
        values.to("cpu", torch.float32),
        anchor.to(torch.int32),
        sign.to(torch.int8),
        cluster,
        basis.a.to("cpu", torch.float32)[held].clone(),
        basis.b.to("cpu", torch.float32)[:, held].clone(),
    )


def proven_signs(
    basis: Basis, options: BasisOptions, triplets: Triplets, next_value: float, rotation: Tensor
) -> SignRecord:
    """The record of a basis, and how far what it gives back is from that basis.

    An SVD on a GPU can miss the singular vectors by far more than float32's rounding
    (`docs/basis.md`), and what it returned in their place no solver finds again.

    Args:
        basis: A and B as training held them.
        options: how they were scaled.
        triplets: the leading triplets of W, by a solver that is exact.
        next_value: σ_{r+1} of W.
        rotation: R, r × r, float64.

    Returns:
        The record; its `distance` is infinite where the singular values themselves are others.
    """
    record = record_signs(basis, options, next_value)
    try:
        restored = restore(triplets, record, options)
    except SignMismatchError:
        return replace(record, distance=math.inf)
    return replace(record, distance=delta_distance(restored, basis, rotation))


def delta_distance(basis: Basis, reference: Basis, rotation: Tensor) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW'‖ (Frobenius) of one rotation in two bases of the same options.

    Args:
        basis: A and B. reference: A' and B', on any device.
        rotation: R, r × r, float64.
    """
    core = rotation.cpu() - torch.eye(len(rotation), dtype=torch.float64)
    left, right = basis.b.cpu().double() @ core, basis.a.cpu().double()
    other_left, other_right = reference.b.cpu().double() @ core, reference.a.cpu().double()
    norm = product_norm(other_left, other_right)
    return product_difference(left, right, other_left, other_right) / norm if norm else 0.0


def signs_at(left: Tensor, anchor: Tensor) -> Tensor:
    """The signs (±1, int8, CPU) of U's columns at the anchor rows."""
    entries = left.gather(0, anchor.to(left.device, torch.int64)[None])[0]
    return torch.where(entries < 0, -1, 1).to("cpu", torch.int8)


def relative_signs(basis: Basis, reference: Basis) -> tuple[Tensor, Tensor]:
    """Which vectors of `basis` point against those of `reference`, and how well they align.

    Args:
        basis: A and B. reference: A and B of the same weight and options.

    Returns:
        Signs (r, ±1, float64) and |cosine| between corresponding vectors (r, float64), both on
        the CPU; the longer of the rows of A and the columns of B decides.
    """
    ours, theirs = basis.b.T.to("cpu", torch.float64), reference.b.T.to("cpu", torch.float64)
    null = theirs.norm(dim=1) == 0  # where σᵢ = 0, only A tells
    if null.any():
        ours, theirs = basis.a.to("cpu", torch.float64), reference.a.to("cpu", torch.float64)
    products = (ours * theirs).sum(dim=1)
    cosines = (products / (ours.norm(dim=1) * theirs.norm(dim=1))).abs().nan_to_num(0.0)
    return torch.where(products < 0, -1.0, 1.0).double(), cosines


def restore(triplets: Triplets, record: SignRecord, options: BasisOptions) -> Basis:
    """The training basis, from any correct solver's triplets of the same W and the record.

    Args:
        triplets: at least r leading triplets of W, float32.
        record: the record of the training basis.
        options: rank, scaling and initialisation.

    Raises:
        SignMismatchError: the singular values are not those recorded.
    """
    device = triplets.values.device
    found, recorded = triplets.values[: options.rank].cpu(), record.values
    difference = float((found.double() - recorded.double()).abs().max())
    if difference > _SAME_VALUE * float(recorded[0]):
        raise SignMismatchError(f"singular values differ by {difference:.3g} from those recorded")
    flip = record.sign != signs_at(triplets.left[:, : options.rank], record.anchor)
    flips = torch.where(flip, -1.0, 1.0).to(device)
    pinned = Triplets(
        triplets.left[:, : options.rank] * flips,
        recorded.to(device),
        triplets.right[: options.rank] * flips[:, None],
    )
    basis = make_basis(pinned, options)
    held = record.cluster.long().to(device)
    basis.a[held] = record.cluster_a.to(device)
    basis.b[:, held] = record.cluster_b.to(device)
    return basis
