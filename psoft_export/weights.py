"""Reading a plan's base: weights to be merged, checked against the basis record, and the rest."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from psoft_export.adapters.basis_record import BaseTensor
from psoft_export.cache import BasisCache
from psoft_export.checkpoint.dtypes import TORCH_DTYPES
from psoft_export.checkpoint.reader import FileReader, tensor_sha256
from psoft_export.checkpoint.safetensors_file import TensorEntry
from psoft_export.errors import MismatchError
from psoft_export.plan import MergePlan, PlannedTensor


@dataclass(frozen=True)
class TargetWeight:
    """A weight to be merged.

    Attributes:
        values: W, out × in: as the base stores it, or its transpose where that stores in × out.
        trained: W as training had it: its dtype code, shape and SHA-256. The dtype is the stored
            one unless the record says that training loaded the base in another.
    """

    values: Tensor
    trained: BaseTensor

    @property
    def as_trained(self) -> Tensor:
        """W in the dtype that training had it in."""
        return self.values.to(TORCH_DTYPES[self.trained.dtype])


class BaseReader:
    """Reads the base of a plan, and hashes what of it is not hashed yet, on the way.

    Use as a context manager.
    """

    def __init__(self, plan: MergePlan, cache: BasisCache | None = None) -> None:
        """Opens nothing yet.

        Args:
            plan: the plan.
            cache: where hashes of tensors are kept; None to keep none, and take none from there.
        """
        self._plan = plan
        self._kept_hashes = cache.tensor_hashes if cache is not None else None
        self._files = ExitStack()
        self._readers: dict[Path, FileReader] = {}
        # SHA-256 of tensors, by file and name: those that were kept, once the file is known to be
        # the same, and those found here.
        self._known: dict[Path, dict[str, str]] = {}
        self._found: dict[Path, dict[str, str]] = {}

    def __enter__(self) -> "BaseReader":
        for file in self._plan.checkpoint.files:
            self._readers[file.path] = self._files.enter_context(FileReader(file))
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def chunks(self, entry: TensorEntry) -> Iterator[Tensor]:
        """A tensor's bytes in order; see `FileReader.chunks`."""
        return self._readers[entry.file].chunks(entry)

    def target(self, tensor: PlannedTensor) -> TargetWeight:
        """One weight to be merged.

        Raises:
            MismatchError: the adapter's record was made from another weight; names all such.
            CheckpointError: the file cannot be read.
        """
        weight = self._read(tensor)
        if not self._is_recorded(tensor, weight):
            strangers = [tensor.spec.name]
            targets = self._plan.targets
            for other in targets[targets.index(tensor) + 1 :]:
                if not self._is_recorded(other, self._read(other)):
                    strangers.append(other.spec.name)
            listed = ", ".join(strangers[:3])
            listed += f" and {len(strangers) - 3} more" if strangers[3:] else ""
            raise MismatchError(
                f"{self._plan.base.name}: not the base that the adapter's basis was recorded "
                f"with; its values differ in {listed}. Use that base, or record with this one"
            )
        return weight

    def sha256(self) -> dict[str, str]:
        """SHA-256 of each weight file, by name; reads what is left of them.

        Raises:
            CheckpointError: a file cannot be read, or was changed meanwhile.
        """
        hashes = {path: reader.sha256() for path, reader in self._readers.items()}
        for path, found in self._found.items():
            if self._kept_hashes is not None and self._readers[path].is_as_opened:
                kept = self._kept_hashes.get(hashes[path]) or {}
                self._kept_hashes.put(hashes[path], kept | found)
        return {path.name: sha256 for path, sha256 in hashes.items()}

    def _read(self, tensor: PlannedTensor) -> TargetWeight:
        entry, record = tensor.entry, self._plan.adapter.record
        assert entry is not None and tensor.module is not None
        stored, sha256 = self._hashed(entry)
        dtype = record.base[tensor.module].dtype if record else entry.dtype
        if dtype != entry.dtype:
            sha256 = tensor_sha256(stored.to(TORCH_DTYPES[dtype]))
        values = stored.T if tensor.transposed else stored
        rows, columns = values.shape
        return TargetWeight(values, BaseTensor(dtype, (rows, columns), sha256))

    def _hashed(self, entry: TensorEntry) -> tuple[Tensor, str]:
        """A tensor in its stored dtype, and the SHA-256 of its bytes."""
        reader = self._readers[entry.file]
        if entry.file not in self._known and self._kept_hashes is not None:
            digest = reader.digest_ahead()
            if digest is not None:
                self._known[entry.file] = self._kept_hashes.get(digest) or {}
        sha256 = self._known.get(entry.file, {}).get(entry.name)
        if sha256 is not None:
            values = reader.values(entry)
            return values, sha256 if reader.is_as_opened else tensor_sha256(values)
        values, sha256 = reader.tensor(entry)
        self._found.setdefault(entry.file, {})[entry.name] = sha256
        return values, sha256

    def _is_recorded(self, tensor: PlannedTensor, weight: TargetWeight) -> bool:
        record = self._plan.adapter.record
        assert tensor.module is not None
        return record is None or record.base[tensor.module] == weight.trained
