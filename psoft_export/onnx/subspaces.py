"""The principal subspaces that the tasks of one graph share, and each task's rotation in them.

Each target layer computes x Wᵀ + ((x rightᵀ) (R − I)ᵀ) leftᵀ: W, left and right are the base's,
R is the task.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from psoft_export.basis.svd import Basis
from psoft_export.changes.change import WeightChange
from psoft_export.changes.subspace import SubspaceRotation
from psoft_export.errors import MismatchError, UnsupportedError
from psoft_export.onnx.folder import LARGEST_OUTSIDE, LEFT, RIGHT, ROTATION, ROTATIONS


@dataclass(frozen=True)
class Subspace:
    """Factors of every ΔW of a module: ΔW = left (R − I) right, float64.

    Attributes:
        left: out × r, scaling · B.
        right: r × in, A.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return len(self.right)

    @classmethod
    def of(cls, basis: Basis, scaling: float) -> "Subspace":
        """That of an adapter's basis."""
        return cls(scaling * basis.b.double(), basis.a.double())

    def core(self, change: SubspaceRotation, name: str) -> tuple[Tensor, float]:
        """R − I of another adapter's ΔW in these factors, r × r, float64.

        Signs, scaling and initialisation may be others, and the rank smaller: it is the core of
        least squares, left⁺ ΔW right⁺, and nothing of ΔW may be left over.

        Args:
            change: what the adapter does to the module's weight.
            name: adapter and module, for the message.

        Returns:
            The core, and the share of ‖ΔW‖ that it leaves out: what lies outside the subspace,
            because another SVD found the adapter's basis.

        Raises:
            MismatchError: ΔW lies outside the subspace.
        """
        factors = change.low_rank_factors(change.options.scaling)
        left, right = (factor.cpu() for factor in factors)
        core: Tensor = torch.linalg.pinv(self.left) @ left @ (right @ torch.linalg.pinv(self.right))
        norm = _product_norm(left, right)
        rest = _product_norm(
            torch.cat([left, -self.left @ core], dim=1), torch.cat([right, self.right])
        )
        if rest > LARGEST_OUTSIDE * norm:
            raise MismatchError(
                f"{name}: {rest / norm:.1%} of its ΔW lies outside the subspace that the graph's "
                "other tasks share; was it trained on another base, or is its basis not recorded?"
            )
        return core, rest / norm if norm else 0.0


def rotations_of(task: str, changes: Mapping[str, WeightChange]) -> dict[str, SubspaceRotation]:
    """The changes of a task's adapter, which must be rotations.

    Raises:
        UnsupportedError: they are not.
    """
    found = {path: c for path, c in changes.items() if isinstance(c, SubspaceRotation)}
    if len(found) < len(changes):
        raise UnsupportedError(
            f"task '{task}': is not an adapter that rotates principal subspaces; merge it, and "
            "export the merged folder with --model"
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
                found[path] = Subspace.of(change.basis, change.options.scaling)
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


class SwitchedLinear(nn.Module):
    """A linear layer with a rotation of its principal subspace beside it.

    Attributes:
        rotation: (R − I)ᵀ, r × r; in a graph an initializer that an input may override.
        subspace_right: rightᵀ, in × r.
        subspace_left: leftᵀ, r × out.
    """

    def __init__(self, layer: nn.Module, subspace: Subspace, dtype: torch.dtype) -> None:
        """Stand beside `layer`."""
        super().__init__()
        self.layer = layer
        setattr(self, RIGHT, _parameter(subspace.right.T, dtype))
        setattr(self, LEFT, _parameter(subspace.left.T, dtype))
        # What is traced must differ by layer: equal initializers would become one.
        setattr(self, ROTATION, _parameter(subspace.right[:, : subspace.rank], dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs × in → the layer's output, rotation included."""
        found: Tensor = self.layer(inputs)
        projected = inputs @ self.get_parameter(RIGHT)
        return found + (projected @ self.get_parameter(ROTATION)) @ self.get_parameter(LEFT)


class MixedLinear(nn.Module):
    """As `SwitchedLinear`, with a rotation of its own for each row of the batch.

    Attributes:
        rotations: (R − I)ᵀ of the base (zero) and of each task, (1 + tasks) × r × r.
    """

    def __init__(
        self,
        layer: nn.Module,
        subspace: Subspace,
        stacked: Sequence[Tensor],
        task_ids: Callable[[], Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Stand beside `layer`.

        Args:
            layer: the layer.
            subspace: of its weight.
            stacked: R − I of each task.
            task_ids: gives the rows' tasks (batch, int64) of the call under way.
            dtype: of the factors.
        """
        super().__init__()
        self.layer = layer
        self._task_ids = task_ids
        setattr(self, RIGHT, _parameter(subspace.right.T, dtype))
        setattr(self, LEFT, _parameter(subspace.left.T, dtype))
        rows = [torch.zeros(subspace.rank, subspace.rank), *(core.T for core in stacked)]
        setattr(self, ROTATIONS, _parameter(torch.stack([row.double() for row in rows]), dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """Batch × … × in → the layer's output, each row's rotation included."""
        found: Tensor = self.layer(inputs)
        ids = self._task_ids()
        rotation = self.get_parameter(ROTATIONS)[ids]
        projected = inputs @ self.get_parameter(RIGHT)
        if projected.ndim == 2:  # a classifier's, of one vector for each row
            projected = projected[:, None]
            return found + ((projected @ rotation) @ self.get_parameter(LEFT))[:, 0]
        while rotation.ndim < projected.ndim:
            rotation = rotation[:, None]
        return found + (projected @ rotation) @ self.get_parameter(LEFT)


def replace_layers(model: nn.Module, made: Iterable[tuple[str, nn.Module]]) -> None:
    """Put modules in the places of others, by path."""
    for path, module in made:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def _parameter(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype).contiguous(), requires_grad=False)


def _product_norm(left: Tensor, right: Tensor) -> float:
    """‖left right‖, Frobenius, without the product."""
    return float(torch.linalg.norm(torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T))
