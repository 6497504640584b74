"""Where a module's basis comes from: its record, the adapter, the cache, the solver, or an SVD."""

import math
import threading
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from psoft_export.adapters.adapter import Adapter, SubspaceAdapter
from psoft_export.algebra.rotation import rotation
from psoft_export.basis.signs import delta_uncertainty
from psoft_export.basis.solver import SOLVER, leading_triplets
from psoft_export.basis.svd import Basis, BasisOptions, Triplets, make_basis, training_svd
from psoft_export.basis.tall_matrix import Workspace
from psoft_export.cache import BasisCache, CachedTriplets
from psoft_export.device import device_name
from psoft_export.errors import MismatchError
from psoft_export.memory import release_freed_memory

NO_RECORD = (
    "the adapter has no basis record, so nobody knows the signs of its singular vectors: taken "
    "are those of the SVD on {device} here. Where training's were others the result is wrong, and "
    "nothing else will tell. Check the task loss, or run 'psoft-export record' on the machine "
    "that trained; --svd-device says which kind of device computed the SVD there"
)


_BELONGS = 0.05  # a truncated SVD of few iterations is nearer; another weight is not


@dataclass(frozen=True)
class FoundBasis:
    """A module's basis.

    Attributes:
        basis: A and B, float32, on the device that merges; None for an adapter that is not
            defined by a basis.
        uncertainty: what is not known of ΔW relative to ‖ΔW‖, unknown signs apart
            (`basis.signs.delta_uncertainty`); None where σ_{r+1} is not known.
        next_value: σ_{r+1}, or None where it was not found.
    """

    basis: Basis | None
    uncertainty: float | None
    next_value: float | None


class BasisFinder:
    """Finds the basis of each module of one adapter.

    From a `full` record it is read, and from an adapter whose own file holds it. From a `signs`
    record the singular vectors are found by `basis.solver` (or in the cache) and the record's
    signs applied. Without either it is the SVD that PEFT would compute on `svd_device`.
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        device: torch.device,
        svd_device: torch.device | None = None,
        cache: BasisCache | None = None,
    ) -> None:
        """Prepare for one adapter.

        Args:
            adapter: the adapter, with its record if it has one.
            device: where bases are needed.
            svd_device: where training computed its SVD, used without a record; default: `device`.
            cache: bases found before, or None.
        """
        self._adapter = adapter
        self._subspace = adapter if isinstance(adapter, SubspaceAdapter) else None
        self._device = device
        self._svd_device = svd_device or device
        self._cache = cache
        self._of_thread = threading.local()
        self._solver = SOLVER if adapter.record else _svd_name(self._svd_device)

    @property
    def cache(self) -> BasisCache | None:
        """The bases found before, with what else is kept beside them."""
        return self._cache

    @property
    def warnings(self) -> list[str]:
        """What the user should know, one plain sentence each."""
        found = []
        if self._depends_on_svd:
            found.append(NO_RECORD.format(device=device_name(self._svd_device)))
        if self._cache is not None and self._cache.problem:
            found.append(self._cache.problem)
        return found

    def describe(self) -> dict[str, Any]:
        """How bases are found, for the manifest."""
        if self._subspace is None:
            return {"record": None, "solver": None}
        record, options = self._adapter.record, self._subspace.basis_options
        if self._subspace.bases:
            return {"record": None, "solver": None, "stored": self._adapter.weights_file}
        if record is None:
            origin: dict[str, Any] = {"record": None}
        else:
            origin = {
                "record": {
                    "kind": record.kind,
                    "sha256": self._adapter.sha256[record.path.name],
                    "svd": record.origin,
                    "recovered": asdict(record.recovered) if record.recovered else None,
                }
            }
        if record is not None and record.kind == "full":
            return origin
        if record is not None:
            return origin | {"solver": SOLVER, "dtype": "float64", "device": self._device.type}
        return origin | {
            "solver": options.solver,
            "dtype": "float32",
            "device": device_name(self._svd_device),
            "threads": torch.get_num_threads(),
        }

    @property
    def finds_again(self) -> bool:
        """Whether A and B are found anew each time, as near as float32 numbers can be."""
        record = self._adapter.record
        return record is not None and record.kind == "signs"

    @property
    def _depends_on_svd(self) -> bool:
        """Whether nothing says which of the possible bases is meant."""
        return self._adapter.needs_record and self._adapter.record is None

    def find(self, module: str, weight: Tensor, sha256: str) -> FoundBasis:
        """The basis of one module.

        Args:
            module: module path, as the adapter names it.
            weight: W, out × in, as training had it, on any device.
            sha256: SHA-256 of its bytes.

        Raises:
            RecordError: the record cannot be read.
            MismatchError: the record's singular values are not those of W.
        """
        found = self.find_beside_others(module, weight, sha256)
        return found or self.find_by_training_svd(module, weight, sha256)

    def find_by_training_svd(self, module: str, weight: Tensor, sha256: str) -> FoundBasis:
        """As `find`, for an adapter without a record, whatever the cache holds.

        The SVD wants every thread of torch for itself, and its signs depend on their number.
        """
        release_freed_memory()
        assert self._subspace is not None
        single = weight.to(self._svd_device).to(torch.float32)
        triplets, next_value = training_svd(single, self._subspace.basis_options)
        self._keep(sha256, CachedTriplets(triplets, next_value))
        return self._made(module, triplets.to(self._device), next_value)

    def find_beside_others(self, module: str, weight: Tensor, sha256: str) -> FoundBasis | None:
        """As `find`, from a thread among several; None where it takes training's own SVD."""
        if self._subspace is None:
            return FoundBasis(None, 0.0, None)
        if (stored := self._subspace.bases.get(module)) is not None:
            stored = stored.to(self._device)
            _check_belongs(module, weight.to(self._device), stored, self._subspace.basis_options)
            return FoundBasis(stored, 0.0, None)
        record, options = self._adapter.record, self._subspace.basis_options
        if record is not None and record.kind == "full":
            return FoundBasis(record.basis(module).to(self._device), 0.0, None)
        cached = self._cached(sha256)
        if cached is None and record is not None:
            release_freed_memory()
            solution = leading_triplets(weight.to(self._device), options.rank, self._workspace())
            cached = CachedTriplets(solution.triplets, solution.certificate.next_value)
            self._keep(sha256, cached)
        if cached is None:
            return None
        return self._made(module, cached.triplets.to(self._device), cached.next_value)

    def _made(self, module: str, triplets: Triplets, next_value: float | None) -> FoundBasis:
        """The basis of these triplets, with the record's signs where there is one."""
        assert self._subspace is not None
        record, options = self._adapter.record, self._subspace.basis_options
        turn = rotation(self._subspace.rotations[module])
        if record is not None:
            basis, signs = record.restored(module, triplets, options)
            assert next_value is not None  # of the solver, always
            return FoundBasis(basis, signs.left_open(next_value, turn), next_value)
        uncertainty = None
        if next_value is not None:
            uncertainty = delta_uncertainty(triplets.values, next_value, turn)
        return FoundBasis(make_basis(triplets, options), uncertainty, next_value)

    @property
    def _usable_cache(self) -> BasisCache | None:
        """The cache, for bases that depend on the weight and the solver alone."""
        assert self._subspace is not None
        return self._cache if self._subspace.basis_options.solver == "full" else None

    def _cached(self, sha256: str) -> CachedTriplets | None:
        if (cache := self._usable_cache) is None:
            return None
        assert self._subspace is not None
        return cache.get(sha256, self._solver, self._subspace.basis_options.rank)

    def _keep(self, sha256: str, found: CachedTriplets) -> None:
        if (cache := self._usable_cache) is not None:
            cache.put(sha256, self._solver, found)

    def _workspace(self) -> Workspace:
        if not hasattr(self._of_thread, "workspace"):
            self._of_thread.workspace = Workspace()
        workspace: Workspace = self._of_thread.workspace
        return workspace


def _check_belongs(module: str, weight: Tensor, basis: Basis, options: BasisOptions) -> None:
    """Check that a stored basis is one of this weight, to a few percent.

    Raises:
        MismatchError: W Aᵀ is not scaling · B.
    """
    image = weight.to(basis.a.dtype) @ basis.a.T
    expected = options.scaling * basis.b
    off = float(torch.linalg.vector_norm(image - expected, dim=0).max())
    largest = float(torch.linalg.vector_norm(expected, dim=0).max())
    if off > _BELONGS * largest:
        raise MismatchError(
            f"module '{module}': the A and B that the adapter holds are no singular vectors of "
            f"this base's weight (off by {off / largest if largest else math.inf:.0%}); it was "
            "trained on another base"
        )


def _svd_name(device: torch.device) -> str:
    """Everything that the signs of `torch.linalg.svd` are known to depend on."""
    if device.type == "cuda":
        where = f"{device_name(device)}, cuda {torch.version.cuda}"
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        where = f"cpu {capability}, {torch.get_num_threads()} threads"
    return f"torch.linalg.svd float32, torch {torch.__version__}, {where}"
