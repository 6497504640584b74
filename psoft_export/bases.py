"""Where a module's basis comes from: its record, the cache, the solver, or the training's SVD."""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psoft_export.adapters.psoft import Adapter
from psoft_export.algebra.rotation import rotation
from psoft_export.basis.signs import delta_uncertainty
from psoft_export.basis.solver import SOLVER, Workspace, leading_triplets
from psoft_export.basis.svd import Basis, Triplets, make_basis, training_svd
from psoft_export.cache import BasisCache, CachedTriplets
from psoft_export.device import device_name
from psoft_export.memory import release_freed_memory

NO_RECORD = (
    "the adapter has no basis record, so nobody knows the signs of its singular vectors: taken "
    "are those of the SVD on {device} here. Where training's were others the result is wrong, and "
    "nothing else will tell. Check the task loss, or run 'psoft-export record' on the machine "
    "that trained; --svd-device says which kind of device computed the SVD there"
)


@dataclass(frozen=True)
class FoundBasis:
    """A module's basis.

    Attributes:
        basis: A and B, float32, on the device that merges.
        uncertainty: what is not known of ΔW relative to ‖ΔW‖, unknown signs apart
            (`basis.signs.delta_uncertainty`); None where σ_{r+1} is not known.
        next_value: σ_{r+1}, or None where it was not found.
    """

    basis: Basis
    uncertainty: float | None
    next_value: float | None


class BasisFinder:
    """Finds the basis of each module of one adapter.

    From a `full` record it is read. From a `signs` record the singular vectors are found by
    `basis.solver` (or in the cache) and the record's signs applied. Without a record it is the
    SVD that PEFT would compute on `svd_device`.
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
        self._device = device
        self._svd_device = svd_device or device
        self._cache = cache
        self._of_thread = threading.local()
        self._solver = SOLVER if adapter.record else _svd_name(self._svd_device)

    @property
    def warnings(self) -> list[str]:
        """What the user should know, one plain sentence each."""
        found = []
        if self._adapter.record is None:
            found.append(NO_RECORD.format(device=device_name(self._svd_device)))
        if self._cache is not None and self._cache.problem:
            found.append(self._cache.problem)
        return found

    def describe(self) -> dict[str, Any]:
        """How bases are found, for the manifest."""
        record, options = self._adapter.record, self._adapter.basis_options
        if record is None:
            origin: dict[str, Any] = {"record": None}
        else:
            origin = {
                "record": {
                    "kind": record.kind,
                    "sha256": self._adapter.sha256[record.path.name],
                    "svd": record.svd.origin,
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
        single = weight.to(self._svd_device).to(torch.float32)
        triplets, next_value = training_svd(single, self._adapter.basis_options)
        self._keep(sha256, CachedTriplets(triplets, next_value))
        return self._made(module, triplets.to(self._device), next_value)

    def find_beside_others(self, module: str, weight: Tensor, sha256: str) -> FoundBasis | None:
        """As `find`, from a thread among several; None where it takes training's own SVD."""
        record, options = self._adapter.record, self._adapter.basis_options
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
        record, options = self._adapter.record, self._adapter.basis_options
        held = None
        if record is None:
            basis = make_basis(triplets, options)
        else:
            basis, held = record.restored(module, triplets, options)
        uncertainty = None
        if next_value is not None:
            turn = rotation(self._adapter.rotations[module])
            uncertainty = delta_uncertainty(triplets.values, next_value, turn, held)
        return FoundBasis(basis, uncertainty, next_value)

    @property
    def _usable_cache(self) -> BasisCache | None:
        """The cache, for bases that depend on the weight and the solver alone."""
        return self._cache if self._adapter.basis_options.solver == "full" else None

    def _cached(self, sha256: str) -> CachedTriplets | None:
        if (cache := self._usable_cache) is None:
            return None
        return cache.get(sha256, self._solver, self._adapter.basis_options.rank)

    def _keep(self, sha256: str, found: CachedTriplets) -> None:
        if (cache := self._usable_cache) is not None:
            cache.put(sha256, self._solver, found)

    def _workspace(self) -> Workspace:
        if not hasattr(self._of_thread, "workspace"):
            self._of_thread.workspace = Workspace()
        workspace: Workspace = self._of_thread.workspace
        return workspace


def _svd_name(device: torch.device) -> str:
    """Everything that the signs of `torch.linalg.svd` are known to depend on."""
    if device.type == "cuda":
        where = f"{device_name(device)}, cuda {torch.version.cuda}"
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        where = f"cpu {capability}, {torch.get_num_threads()} threads"
    return f"torch.linalg.svd float32, torch {torch.__version__}, {where}"
