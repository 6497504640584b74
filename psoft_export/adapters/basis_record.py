"""The basis record: `psoft_basis.safetensors` beside an adapter, read and written.

Version 1 of the format. Metadata: `format`, `version`, `kind` (`signs` or `full`), `rank`, `svd`
(JSON: how the basis was found and scaled), `base` (JSON: module → dtype, shape and SHA-256 of
the weight it was found in), of signs `distance` (JSON: module → `SignRecord.distance`, where it
was measured), and `recovered` (JSON, `Recovery`) where nobody recorded the signs in training and
they were recovered from data. Tensors for every module: `singular_values`, `anchor`, `sign`,
`cluster`, `cluster_A` and `cluster_B` (see `basis.signs.SignRecord`), or `A` and `B`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from psoft_export.algebra.rounding import all_finite
from psoft_export.basis.signs import SignMismatchError, SignRecord, restore
from psoft_export.basis.svd import Basis, BasisOptions, Triplets
from psoft_export.checkpoint.dtypes import CODES
from psoft_export.checkpoint.output import replacing_file
from psoft_export.checkpoint.reader import raw
from psoft_export.checkpoint.safetensors_file import TensorEntry, read_header, read_tensor
from psoft_export.checkpoint.writer import ShardWriter, TensorSpec, aligned_order
from psoft_export.device import device_name
from psoft_export.errors import MismatchError, RecordError, UnsupportedError, UsageError

FILENAME = "psoft_basis.safetensors"
FORMAT = "psoft-basis"
VERSION = "1"
_UNKNOWN_SHA256 = "0" * 64

Kind = Literal["signs", "full"]
KindChoice = Literal["auto", "signs", "full"]
_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "signs": ("singular_values", "anchor", "sign", "cluster", "cluster_A", "cluster_B"),
    "full": ("A", "B"),
}


@dataclass(frozen=True)
class BaseTensor:
    """The weight that a basis was found in: dtype code, shape, and SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, int]
    sha256: str


@dataclass(frozen=True)
class SvdDescription:
    """How a recorded basis was found and scaled.

    Attributes:
        solver: `full` or `lowrank`, PEFT's names.
        device: as `device.device_name` says, on a CPU with torch's number of threads.
        library: such as `torch 2.13.0`.
        dtype: dtype in which training held A and B.
        scaling: alpha / r, which B carries.
        initialisation: `psoft_init` or `pissa_init`.
    """

    solver: str
    device: str
    library: str
    dtype: str
    scaling: float
    initialisation: str

    @classmethod
    def of(
        cls, options: BasisOptions, device: torch.device, dtype: torch.dtype
    ) -> "SvdDescription":
        """The description of an SVD on this machine, whose A and B are held in `dtype`."""
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        return cls(
            solver=options.solver,
            device=device_name(device) + threads,
            library=f"torch {torch.__version__}",
            dtype=str(dtype).removeprefix("torch."),
            scaling=options.scaling,
            initialisation=options.initialisation,
        )

    @property
    def origin(self) -> str:
        """Solver, device and library in one line."""
        return f"{self.solver} SVD, {self.device}, {self.library}"


@dataclass(frozen=True)
class Recovery:
    """That the signs of a record were not recorded in training but recovered from data.

    Attributes:
        data: what they were recovered from, in words; never a path.
        data_sha256: SHA-256 of that file, or of names and files of a folder in their order.
        base_loss: held-out loss of the base, in nats a target (`RecoveryReport` says more).
        start_loss: held-out loss with the best of the SVDs that were tried first, if any was.
        loss: held-out loss with the signs recorded.
        settled: share of the signs that matter which the data settle.
        seed: of the search.
        adapter: of a combination: the adapters whose signs were recovered, of which these are the
            figures of the one with the fewest settled; else empty.
    """

    data: str
    data_sha256: str
    base_loss: float
    start_loss: float | None
    loss: float
    settled: float
    seed: int
    adapter: str = ""

    @property
    def words(self) -> str:
        """All of it that a report should repeat."""
        whose = f" of '{self.adapter}'" if self.adapter else ""
        start = f", at the start {self.start_loss:.4g}" if self.start_loss is not None else ""
        return (
            f"signs{whose} recovered from data, not recorded in training ({self.settled:.1%} "
            f"settled; held-out loss {self.loss:.4g}, base {self.base_loss:.4g}{start})"
        )


@dataclass(frozen=True)
class BasisRecord:
    """A record on disk. Its header is read and checked; the tensors are read when asked for.

    Attributes:
        path: the file.
        kind: `signs` or `full`.
        rank: r.
        svd: how the basis was found.
        base: module path → the weight it was found in.
        entries: the file's tensors by name.
        distance: module path → `SignRecord.distance`, of those in which it was measured.
        recovered: how the signs were recovered from data, or None where training recorded them.
    """

    path: Path
    kind: Kind
    rank: int
    svd: SvdDescription
    base: Mapping[str, BaseTensor]
    entries: Mapping[str, TensorEntry]
    distance: Mapping[str, float]
    recovered: Recovery | None = None

    @property
    def origin(self) -> str:
        """Where the basis is from, in one line: an SVD, and data if they gave its signs."""
        return f"{self.recovered.words}; {self.svd.origin}" if self.recovered else self.svd.origin

    @property
    def summary(self) -> str:
        """Kind and origin in one line."""
        return f"{self.kind}; {self.origin}"

    def signs(self, module: str) -> SignRecord:
        """The signs of one module (kind `signs`).

        Raises:
            RecordError: the file cannot be read, or holds values that no record has.
        """
        values, anchor, sign, *held = (self._tensor(module, n) for n in _SUFFIXES["signs"])
        cluster, cluster_a, cluster_b = held
        distance = self.distance.get(module, 0.0)
        record = SignRecord(values, anchor, sign, cluster, cluster_a, cluster_b, distance)
        rows = self.base[module].shape[0]
        sound = (
            bool((record.sign.abs() == 1).all())
            and bool(((record.anchor >= 0) & (record.anchor < rows)).all())
            and bool(((record.cluster >= 0) & (record.cluster < self.rank)).all())
        )
        if not sound:
            raise RecordError(
                f"{self.path}: the signs of '{module}' are out of range; record it again"
            )
        return record

    def basis(self, module: str) -> Basis:
        """A and B of one module (kind `full`), float32.

        Raises:
            RecordError: the file cannot be read, or holds NaN or infinity.
        """
        return Basis(self._tensor(module, "A"), self._tensor(module, "B"))

    def restored(
        self, module: str, triplets: Triplets, options: BasisOptions
    ) -> tuple[Basis, SignRecord]:
        """A and B of one module (kind `signs`), given the leading triplets of its weight.

        Returns:
            The basis, float32 on the device of the triplets, and the signs.

        Raises:
            RecordError: as `signs`.
            MismatchError: the singular values are not those recorded.
        """
        signs = self.signs(module)
        try:
            return restore(triplets, signs, options), signs
        except SignMismatchError as cause:
            raise MismatchError(
                f"{self.path}: module '{module}': {cause}; record the adapter again"
            ) from cause

    def _tensor(self, module: str, suffix: str) -> Tensor:
        tensor = read_tensor(self.entries[f"{module}.{suffix}"], RecordError)
        if not all_finite(tensor):
            raise RecordError(f"{self.path}: '{module}.{suffix}' holds NaN or infinity")
        return tensor


def read_record(folder: Path) -> BasisRecord | None:
    """The basis record in an adapter's folder, or None where there is none.

    Raises:
        RecordError: the file is damaged, of another format or version, or incomplete.
    """
    path = folder / FILENAME
    if not path.exists():
        return None
    entries, metadata = read_header(path, RecordError)
    if metadata.get("format") != FORMAT:
        raise RecordError(f"{path}: not a basis record (its metadata lacks format '{FORMAT}')")
    if metadata.get("version") != VERSION:
        raise RecordError(
            f"{path}: version {metadata.get('version')!r} of the format; this release reads "
            f"version '{VERSION}'; use a release that knows it, or record again"
        )
    try:
        kind = metadata["kind"]
        rank = int(metadata["rank"])
        svd = SvdDescription(**json.loads(metadata["svd"]))
        base = {
            module: BaseTensor(
                str(origin["dtype"]).strip(),
                (int(origin["shape"][0]), int(origin["shape"][1])),
                str(origin["sha256"]),
            )
            for module, origin in json.loads(metadata["base"]).items()
        }
        measured = json.loads(metadata.get("distance", "{}"))
        distance = {str(module): float(value) for module, value in measured.items()}
        found = json.loads(metadata.get("recovered", "null"))
        recovered = _recovery(found) if found is not None else None
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as cause:
        raise RecordError(f"{path}: its metadata is not that of a basis record") from cause
    if kind not in _SUFFIXES:
        raise RecordError(f"{path}: kind {kind!r} is neither 'signs' nor 'full'")
    by_name = {entry.name: entry for entry in entries}
    record = BasisRecord(path, kind, rank, svd, base, by_name, distance, recovered)
    _check_tensors(record)
    return record


def _recovery(found: Mapping[str, Any]) -> Recovery:
    """The mark of a record; errors of `Recovery` and of conversions where it is none."""
    mark = Recovery(**found)
    start = mark.start_loss
    return replace(
        mark,
        data=str(mark.data),
        data_sha256=str(mark.data_sha256),
        base_loss=float(mark.base_loss),
        start_loss=float(start) if start is not None else None,
        loss=float(mark.loss),
        settled=float(mark.settled),
        seed=int(mark.seed),
        adapter=str(mark.adapter),
    )


def beside_record(folder: Path) -> list[Path]:
    """The files of an adapter's folder but its record, by name."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != FILENAME]


def check_kind(kind: str) -> None:
    """Check that a kind to record is one of `KindChoice`.

    Raises:
        UsageError: it is not.
    """
    if kind not in get_args(KindChoice):
        raise UsageError(f"kind '{kind}' is not one of {', '.join(get_args(KindChoice))}")


def check_fits(record: BasisRecord, modules: Iterable[str], options: BasisOptions) -> None:
    """Check that a record is one of this adapter.

    Raises:
        RecordError: another rank, scaling, initialisation or solver, or a module is missing.
    """
    path = record.path
    wanted = {
        "rank": (record.rank, options.rank),
        "scaling (psoft_alpha / r)": (record.svd.scaling, options.scaling),
        "ab_svd_init": (record.svd.initialisation, options.initialisation),
        "psoft_svd": (record.svd.solver, options.solver),
    }
    for field, (recorded, needed) in wanted.items():
        if recorded != needed:
            raise RecordError(
                f"{path}: was recorded with {field} {recorded}, the adapter has {needed}; "
                "it belongs to another adapter"
            )
    missing = [module for module in modules if module not in record.base]
    if missing:
        raise RecordError(
            f"{path}: lacks module '{missing[0]}' of the adapter ({len(missing)} such); "
            "it belongs to another adapter"
        )
    if options.solver == "lowrank" and record.kind == "signs":
        raise RecordError(
            f"{path}: holds signs only, but the basis of a 'lowrank' adapter cannot be found "
            "again; it needs a record of kind 'full'"
        )


def write_record(
    folder: Path,
    kind: Kind,
    rank: int,
    svd: SvdDescription,
    shapes: Mapping[str, tuple[int, int]],
    layers: Iterable[tuple[str, BaseTensor, SignRecord | Basis]],
    recovered: Recovery | None = None,
) -> Path:
    """Write `psoft_basis.safetensors` into `folder`, whole or not at all; replaces an earlier one.

    Records of kind `full` are written as they come, so that one module at a time is in memory.

    Args:
        folder: the adapter's folder.
        kind: what `layers` holds.
        rank: r.
        svd: how the basis was found.
        shapes: module path → out × in of its weight, in the order of `layers`.
        layers: module path, its weight, and its signs (kind `signs`) or basis (kind `full`).
        recovered: how the signs were recovered from data, or None.

    Raises:
        UnsupportedError: signs that do not give the basis back at all.
        OutputError: the folder cannot be written.
    """
    base = {m: BaseTensor("BF16", shape, _UNKNOWN_SHA256) for m, shape in shapes.items()}
    path = folder / FILENAME
    with replacing_file(path) as scratch:
        if kind == "signs":
            records: dict[str, Tensor] = {}
            distance = {}
            for module, origin, record in layers:
                assert isinstance(record, SignRecord)
                base[module] = origin
                if not math.isfinite(record.distance):
                    raise UnsupportedError(
                        f"module '{module}': the SVD of training is so far from the singular "
                        "vectors of the weight that signs cannot give it back; use kind 'full'"
                    )
                if record.distance:
                    distance[module] = record.distance
                records |= {f"{module}.{n}": t for n, t in _sign_tensors(record).items()}
            named = {n: TensorSpec(n, CODES[t.dtype], tuple(t.shape)) for n, t in records.items()}
            specs = aligned_order(named.values())
            metadata = _metadata(kind, rank, svd, base, recovered)
            if distance:
                metadata["distance"] = json.dumps(distance, sort_keys=True)
            writer = ShardWriter(scratch, specs, metadata)
            for spec in specs:
                writer.append(raw(records[spec.name]))
        else:
            specs = [
                TensorSpec(f"{module}.{name}", "F32", extents)
                for module, (rows, columns) in shapes.items()
                for name, extents in (("A", (rank, columns)), ("B", (rows, rank)))
            ]
            # The hashes are known at the end; the header has room for them from the start.
            writer = ShardWriter(scratch, specs, _metadata(kind, rank, svd, base, recovered))
            for module, origin, basis in layers:
                base[module] = origin
                assert isinstance(basis, Basis)
                writer.append(raw(basis.a.float()))
                writer.append(raw(basis.b.float()))
            writer.replace_metadata(_metadata(kind, rank, svd, base, recovered))
        writer.close()
    return path


def _sign_tensors(record: SignRecord) -> dict[str, Tensor]:
    values = (record.values, record.anchor, record.sign)
    held = (record.cluster, record.cluster_a, record.cluster_b)
    return dict(zip(_SUFFIXES["signs"], values + held, strict=True))


def _metadata(
    kind: Kind,
    rank: int,
    svd: SvdDescription,
    base: Mapping[str, BaseTensor],
    recovered: Recovery | None,
) -> dict[str, str]:
    origins = {
        # Padded, so that the header's length does not depend on what is filled in later.
        module: {"dtype": f"{origin.dtype:4}", "shape": origin.shape, "sha256": origin.sha256}
        for module, origin in base.items()
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "rank": str(rank),
        "svd": json.dumps(asdict(svd), sort_keys=True),
        "base": json.dumps(origins, sort_keys=True),
        **({"recovered": json.dumps(asdict(recovered), sort_keys=True)} if recovered else {}),
    }


def _check_tensors(record: BasisRecord) -> None:
    """Every tensor that the record must have, with its shape and dtype."""
    rank = record.rank
    for module, base in record.base.items():
        rows, columns = base.shape
        shapes: dict[str, tuple[str, tuple[int, ...]]]
        if record.kind == "full":
            shapes = {"A": ("F32", (rank, columns)), "B": ("F32", (rows, rank))}
        else:
            cluster = record.entries.get(f"{module}.cluster")
            count = cluster.shape[0] if cluster and len(cluster.shape) == 1 else 0
            shapes = {
                "singular_values": ("F32", (rank,)),
                "anchor": ("I32", (rank,)),
                "sign": ("I8", (rank,)),
                "cluster": ("I32", (count,)),
                "cluster_A": ("F32", (count, columns)),
                "cluster_B": ("F32", (rows, count)),
            }
        for suffix, (dtype, shape) in shapes.items():
            entry = record.entries.get(f"{module}.{suffix}")
            if entry is None:
                raise RecordError(f"{record.path}: lacks tensor '{module}.{suffix}'")
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise RecordError(
                    f"{record.path}: tensor '{module}.{suffix}' is {entry.dtype} "
                    f"{list(entry.shape)}; {dtype} {list(shape)} is needed"
                )
