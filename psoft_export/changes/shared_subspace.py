"""The principal subspace of a weight that several adapters share, and each one's rotation in it.

Adapters of one base rotate the same subspace, each in the basis that its own training found:
signs, scaling and rank may differ, and the vectors of near-equal singular values. Here they are
brought into one basis.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.algebra.factored_rotation import FactoredRotation, nearest_signs
from psoft_export.basis.svd import Basis, BasisOptions, Initialisation
from psoft_export.changes.change import WeightChange
from psoft_export.changes.subspace import SubspaceRotation
from psoft_export.errors import MismatchError, UnsupportedError

# Of ‖ΔW‖ in a module. Two float32 SVDs of one base are below 2e-3 apart; another base's subspace is
# all of it.
LARGEST_OUTSIDE = 0.01
_TURNED = 1e-3  # of ‖ΔW‖: a rotation that fits as well as this is preferred to a matrix that fits


@dataclass(frozen=True)
class Subspace:
    """Factors of every ΔW of a module: ΔW = left (R − I) right, float64, CPU.

    Attributes:
        left: out × r, scaling · B.
        right: r × in, A.
        initialisation: how the singular values are divided among them; None if not known.
    """

    left: Tensor
    right: Tensor
    initialisation: Initialisation | None = None

    @property
    def rank(self) -> int:
        """r."""
        return len(self.right)

    @classmethod
    def of(cls, basis: Basis, options: BasisOptions) -> "Subspace":
        """That of an adapter's basis."""
        left = options.scaling * basis.b.to("cpu", torch.float64)
        return cls(left, basis.a.to("cpu", torch.float64), options.initialisation)

    def rotation(
        self, own: "Subspace", turn: FactoredRotation, name: str
    ) -> tuple[FactoredRotation, float]:
        """R in these factors of a ΔW that is given by R in others.

        Where the others' vectors are these, turned among themselves (signs, near-equal singular
        values), R is turned with them and stays as orthogonal as it was. Else it is the free
        matrix of least squares.

        Args:
            own: the factors in which R is given.
            turn: R.
            name: adapter and module, for the message.

        Returns:
            The rotation, and the share of ‖ΔW‖ that it leaves out.

        Raises:
            MismatchError: ΔW lies outside the subspace.
        """
        if torch.equal(own.left, self.left) and torch.equal(own.right, self.right):
            return turn, 0.0
        moved = own.left @ (turn.matrix - torch.eye(own.rank, dtype=torch.float64))
        identity = torch.eye(self.rank, dtype=torch.float64)
        if own.initialisation == self.initialisation and own.rank <= self.rank:
            left, _, right = torch.linalg.svd(
                _unit_rows(own.right) @ _unit_rows(self.right).T, full_matrices=False
            )
            frame = left @ right
            # Scaling vectors stay what they are where only signs differ: tried first for them.
            frames = [nearest_signs(frame), frame] if turn.has_vectors else [frame]
            for turned in map(turn.in_basis, frames):
                here = self.left @ (turned.matrix - identity)
                outside = _share_left(moved, own.right, here, self.right)
                if outside <= _TURNED:
                    return turned, outside
        core, outside = self._fitted(moved, own.right, name)
        return FactoredRotation.free(identity + core), outside

    def core(self, change: SubspaceRotation, name: str) -> tuple[Tensor, float]:
        """R − I of an adapter's ΔW in these factors, r × r, float64, by least squares.

        That is left⁺ ΔW right⁺, whatever the factors are, and nothing of ΔW may be left over.

        Args:
            change: what the adapter does to the module's weight.
            name: adapter and module, for the message.

        Returns:
            The core, and the share of ‖ΔW‖ that it leaves out: what lies outside the subspace,
            because another SVD found the adapter's basis.

        Raises:
            MismatchError: ΔW lies outside the subspace.
        """
        left, right = change.low_rank_factors(change.options.scaling)
        return self._fitted(left.cpu(), right.cpu(), name)

    def _fitted(self, left: Tensor, right: Tensor, name: str) -> tuple[Tensor, float]:
        """The core of least squares of left right, and the share left out; see `core`."""
        core: Tensor = torch.linalg.pinv(self.left) @ left @ (right @ torch.linalg.pinv(self.right))
        outside = _share_left(left, right, self.left @ core, self.right)
        if outside > LARGEST_OUTSIDE:
            raise MismatchError(
                f"{name}: {outside:.1%} of its ΔW lies outside the subspace that the "
                "other adapters share; was it trained on another base, or is its basis not "
                "recorded?"
            )
        return core, outside


def rotations_of(task: str, changes: Mapping[str, WeightChange]) -> dict[str, SubspaceRotation]:
    """The changes of a task's adapter, which must be rotations.

    Raises:
        UnsupportedError: they are not.
    """
    found = {path: c for path, c in changes.items() if isinstance(c, SubspaceRotation)}
    if len(found) < len(changes):
        raise UnsupportedError(
            f"task '{task}': is not an adapter that rotates principal subspaces, so it shares none "
            "with others; merge it on its own"
        )
    return found


def shared_subspaces(tasks: Iterable[Mapping[str, SubspaceRotation]]) -> dict[str, Subspace]:
    """The subspace of each module: that of the task with the highest rank.

    Args:
        tasks: of each: module path → what it does.
    """
    found: dict[str, Subspace] = {}
    for changes in tasks:
        for path, change in changes.items():
            if path not in found or change.parameters.rank > found[path].rank:
                found[path] = Subspace.of(change.basis, change.options)
    return found


def cores(
    task: str, changes: Mapping[str, SubspaceRotation], subspaces: Mapping[str, Subspace]
) -> tuple[dict[str, Tensor], float]:
    """R − I of a task in each of its modules, and the largest share that one leaves out.

    Errors as of `Subspace.core`.
    """
    found = {
        path: subspaces[path].core(change, f"task '{task}', module '{path}'")
        for path, change in changes.items()
    }
    outside = max((share for _, share in found.values()), default=0.0)
    return {path: core for path, (core, _) in found.items()}, outside


def _unit_rows(matrix: Tensor) -> Tensor:
    """Each row divided by its length; a zero row stays zero."""
    lengths = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
    unit: Tensor = matrix / lengths.clamp_min(torch.finfo(matrix.dtype).tiny)
    return unit


def _share_left(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> float:
    """‖left right − other_left other_right‖ / ‖left right‖, Frobenius, without the products."""
    norm = _product_norm(left, right)
    rest = _product_norm(torch.cat([left, -other_left], dim=1), torch.cat([right, other_right]))
    return rest / norm if norm else rest


def _product_norm(left: Tensor, right: Tensor) -> float:
    """‖left right‖, Frobenius, without the product."""
    return float(torch.linalg.norm(torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T))
