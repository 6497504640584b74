"""Linear layers with the rotation of a task, or of each row's own, beside them.

Each computes x Wᵀ + ((x rightᵀ) (R − I)ᵀ) leftᵀ: W, left and right are the base's, R is the task.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from psoft_export.changes.shared_subspace import Subspace
from psoft_export.changes.subspace import added_by_rotation
from psoft_export.onnx.folder import LEFT, RIGHT, ROTATION, ROTATIONS


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
        right, left = self.get_parameter(RIGHT), self.get_parameter(LEFT)
        return found + added_by_rotation(inputs, right, self.get_parameter(ROTATION), left)


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
        rotations = self.get_parameter(ROTATIONS)[self._task_ids()]
        right, left = self.get_parameter(RIGHT), self.get_parameter(LEFT)
        return found + added_by_rotation(inputs, right, rotations, left)


def replace_layers(model: nn.Module, made: Iterable[tuple[str, nn.Module]]) -> None:
    """Put modules in the places of others, by path."""
    for path, module in made:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def _parameter(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype).contiguous(), requires_grad=False)
