"""What is known of each module before its signs are searched: its basis, and what SVDs say."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.adapters.adapter import SubspaceAdapter
from psoft_export.adapters.basis_record import BaseTensor
from psoft_export.algebra.rotation import rotation
from psoft_export.bases import BasisFinder
from psoft_export.basis.signs import inseparable
from psoft_export.basis.solver import leading_triplets
from psoft_export.basis.svd import Basis, BasisOptions, basis_values, make_basis
from psoft_export.cache import BasisCache
from psoft_export.plan import MergePlan
from psoft_export.recovery.readings import Decompose, own_reading, read_signs
from psoft_export.verification.tiles import unit_in_last_place
from psoft_export.weights import BaseReader, TargetWeight


@dataclass(frozen=True)
class KnownModule:
    """One module before the search.

    Attributes:
        basis: A and B of its weight with some signs, float32, CPU.
        next_value: σ_{r+1}.
        origin: the weight.
        matters: which signs can be pinned down, and change ΔW by more than rounding W to its
            dtype does (bool, r).
        cluster: indices of the vectors that no sign can pin down.
        signs: name of each reading → its signs against `basis` (±1, r).
    """

    basis: Basis
    next_value: float
    origin: BaseTensor
    matters: Tensor
    cluster: Tensor
    signs: Mapping[str, Tensor]


def find_modules(
    plan: MergePlan,
    device: torch.device,
    cache: BasisCache | None,
    decompositions: dict[str, Decompose],
    tell: Callable[[str], None],
) -> tuple[dict[str, KnownModule], dict[str, str]]:
    """Each module's basis, and what every decomposition says of its signs.

    Args:
        plan: of an adapter that is taken to have no record.
        device: where to compute.
        cache: of bases.
        decompositions: by name; one that fails for a weight is taken out.
        tell: told in a few words of each weight.

    Returns:
        Module → what is known of it, and the SHA-256 of each weight file of the base, by name.
    """
    adapter = plan.adapter
    assert isinstance(adapter, SubspaceAdapter)
    options = adapter.basis_options
    finder = BasisFinder(adapter, device=device, cache=cache)
    found = {}
    with BaseReader(plan) as reader:
        for number, tensor in enumerate(plan.targets, 1):
            assert tensor.module is not None
            weight = reader.target(tensor)
            single = weight.as_trained.to(device, torch.float32)
            basis, next_value = _basis(tensor.module, weight, single, options, finder)
            read = {
                name: torch.ones(options.rank)  # the basis is of that very decomposition
                if name == own_reading(device)
                else read_signs(single, basis, options, decompose)
                for name, decompose in decompositions.items()
            }
            for name in [name for name, signs in read.items() if signs is None]:
                tell(f"the SVD '{name}' failed for '{tensor.module}', and is left away")
                del decompositions[name]
            changes = _changes_by_flip(basis, adapter, tensor.module)
            matters = changes >= _rounding(weight.as_trained)
            cluster = inseparable(basis_values(basis, options), next_value)
            matters[cluster.long()] = False
            found[tensor.module] = KnownModule(
                basis,
                next_value,
                weight.trained,
                matters,
                cluster,
                {name: signs for name, signs in read.items() if signs is not None},
            )
            tell(f"reading signs: {number} of {len(plan.targets)} weights")
        return found, reader.sha256()


def _basis(
    module: str,
    weight: TargetWeight,
    single: Tensor,
    options: BasisOptions,
    finder: BasisFinder,
) -> tuple[Basis, float]:
    """A and B on the CPU, and σ_{r+1}, such as any exact solver gives them but for signs.

    What torch's SVD gives on a GPU is none (`docs/basis.md`): a record of its signs is refused.

    Args:
        module: its path.
        weight: W.
        single: the same numbers in float32, on the device of the run.
        options: how A and B are scaled.
        finder: gives the SVD of a CPU, or what the cache has of it.
    """
    if single.device.type != "cpu":
        solution = leading_triplets(single, options.rank)
        triplets = solution.triplets.to(torch.device("cpu"))
        return make_basis(triplets, options), solution.certificate.next_value
    here = finder.find(module, weight.as_trained, weight.trained.sha256)
    assert here.basis is not None and here.next_value is not None
    return here.basis, here.next_value


def _rounding(weight: Tensor) -> float:
    """Norm of what rounding a weight to its dtype changes: errors even over half a unit."""
    units = unit_in_last_place(weight.double(), weight.dtype)
    return math.sqrt(float(units.square().sum()) / 12)


def _changes_by_flip(basis: Basis, adapter: SubspaceAdapter, module: str) -> Tensor:
    """‖ΔW with one sign flipped − ΔW‖, Frobenius, of each sign (r, float64).

    A flip negates row and column i of R but for the diagonal; rows of A, and columns of B, are
    orthogonal.
    """
    turn = rotation(adapter.rotations[module]).fill_diagonal_(0)
    left = adapter.basis_options.scaling * torch.linalg.vector_norm(basis.b.double(), dim=0)
    right = torch.linalg.vector_norm(basis.a.double(), dim=1)
    squares = (left[:, None] * turn * right[None, :]).square()
    changes: Tensor = 2 * (squares.sum(0) + squares.sum(1)).sqrt()
    return changes
