"""What every kind of adapter is to the rest of the package."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from psoft_export.adapters.basis_record import BasisRecord
from psoft_export.algebra.merged_weight import product_dtype
from psoft_export.algebra.parameters import GivensForm, RotationParameters
from psoft_export.algebra.rotation import (
    core_rotation,
    orthogonality_error,
    rotation_angles,
    vector_deviation,
)
from psoft_export.basis.svd import Basis, BasisOptions
from psoft_export.changes.change import WeightChange
from psoft_export.changes.subspace import SubspaceRotation
from psoft_export.checkpoint.source import Source
from psoft_export.errors import MismatchError, UsageError

NeumannTerms = int | Literal["exact"]


@dataclass(frozen=True)
class Reading:
    """What the user says of an adapter that its files do not.

    Attributes:
        neumann_terms: of a checkpoint of the PSOFT paper's code: how many terms its
            Cayley–Neumann series had, or `exact` for the Cayley transform. None: 5, that code's
            default.
        givens: of a qGOFT adapter: which code trained it (`algebra.parameters`). None: `reference`.
    """

    neumann_terms: NeumannTerms | None = None
    givens: GivensForm | None = None

    def __post_init__(self) -> None:
        terms: object = self.neumann_terms
        is_number = isinstance(terms, int) and not isinstance(terms, bool) and terms >= 0
        if not (terms is None or terms == "exact" or is_number):
            raise UsageError(
                f"neumann-terms {terms!r}: a number of at least 0, or exact, is needed"
            )
        if self.givens not in (None, *get_args(GivensForm)):
            raise UsageError(
                f"givens '{self.givens}' is not one of {', '.join(get_args(GivensForm))}"
            )

    def given(self) -> dict[str, Any]:
        """What was said, by field."""
        fields = {"neumann_terms": self.neumann_terms, "givens": self.givens}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class ModuleFacts:
    """What an adapter says of one module.

    Attributes:
        rank: r, or None where the method has none.
        angles: its rotation angles in degrees, descending: of PSOFT all r, each plane counted
            twice; of strict qGOFT those of its single rotations; else empty.
        orthogonality_error: ‖CᵀC − I‖_F of PSOFT's rotation before its scaling vectors, else None.
        vector_a: max |vector_a − 1|, 0 where the adapter has none.
        vector_b: max |vector_b − 1|, 0 where the adapter has none.
        form_distance: of qGOFT: how far the product of its transforms is from the other reading
            of it (`algebra.givens.distance_between_forms`), else None.
    """

    rank: int | None
    angles: tuple[float, ...] = ()
    orthogonality_error: float | None = None
    vector_a: float = 0.0
    vector_b: float = 0.0
    form_distance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter(ABC):
    """An adapter as its files state it.

    Attributes:
        source: where it was read from.
        weights_file: name of the file that holds the tensors.
        config: `adapter_config.json`, whole.
        saved: tensors that replace or join the base's (`modules_to_save`), by model name.
        sha256: SHA-256 of each file read, by name.
        record: its basis record, or None.
        warnings: what the user should know of the files, one plain sentence each.
    """

    source: Source
    weights_file: str
    config: Mapping[str, Any]
    saved: Mapping[str, Tensor]
    sha256: Mapping[str, str]
    record: BasisRecord | None = None
    warnings: tuple[str, ...] = ()

    @property
    @abstractmethod
    def method_name(self) -> str:
        """The method's name."""

    @property
    @abstractmethod
    def paper(self) -> str:
        """The address of the method's paper on arXiv."""

    @property
    @abstractmethod
    def method(self) -> str:
        """The method in one line."""

    @property
    @abstractmethod
    def modules(self) -> tuple[str, ...]:
        """The modules that it changes, as it names them, in the order of the file."""

    @property
    @abstractmethod
    def parameter_count(self) -> int:
        """Number of trained numbers (saved modules not counted)."""

    @property
    @abstractmethod
    def options(self) -> Mapping[str, Any]:
        """The options that change the result, by the names of its config."""

    @property
    def takes_conv1d(self) -> bool:
        """Whether its targets may be transformers' `Conv1D` (GPT-2), which stores in × out."""
        return False

    @property
    def needs_record(self) -> bool:
        """Whether nothing but a basis record could say what the adapter means."""
        return False

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA pair as it stands."""
        return False

    def scratch_bytes(self, shape: tuple[int, int]) -> int:
        """Estimate of what the merge of one weight (out × in) holds beside the weight."""
        return 0

    @property
    def rank(self) -> int | None:
        """r, or None where the method has none."""
        return None

    def product_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype in which ΔW is formed on a device."""
        return torch.float64

    @abstractmethod
    def check_target(self, module: str, shape: tuple[int, int]) -> None:
        """Check that a module's tensors fit its weight.

        Args:
            module: as the adapter names it.
            shape: out × in.

        Raises:
            MismatchError: they do not; the adapter was trained on another base.
        """

    def describe(self, module: str) -> ModuleFacts:
        """What the files say of one module."""
        return ModuleFacts(self.rank)

    @abstractmethod
    def numbers_beside(self, module: str, shape: tuple[int, int]) -> int:
        """How many numbers a change adds to a model in which it stands beside its layer.

        Args:
            module: as the adapter names it.
            shape: out × in.
        """

    @abstractmethod
    def change(self, module: str, basis: Basis | None) -> WeightChange:
        """What it does to the weight of one module.

        Args:
            module: as the adapter names it.
            basis: A and B of that weight, for a kind that is defined by them.
        """


@dataclass(frozen=True, kw_only=True)
class SubspaceAdapter(Adapter):
    """An adapter that rotates principal subspaces (PSOFT), in any of its formats.

    Attributes:
        basis_options: what the basis depends on.
        rotations: module path → stored parameters of its rotation.
        alpha: scaling · r, a number of the type that the config has.
        bases: module path → A and B, where the adapter's own file holds them.
        basis_dtype: dtype in which that file holds them.
        method_options: see `options`.
        format_name: where the format is from, in a word or two; empty for PEFT's own.
    """

    basis_options: BasisOptions
    rotations: Mapping[str, RotationParameters]
    alpha: float
    method_options: Mapping[str, Any]
    bases: Mapping[str, Basis] = field(default_factory=dict)
    basis_dtype: torch.dtype = torch.float32
    format_name: str = ""

    @property
    def method_name(self) -> str:
        """See `Adapter`."""
        return "PSOFT"

    @property
    def paper(self) -> str:
        """See `Adapter`."""
        return "https://arxiv.org/abs/2505.11235"

    @property
    def method(self) -> str:
        """The method in one line: strict or relaxed, Cayley transform or series, or free."""
        parameters = next(iter(self.rotations.values()))
        vectors = [n for n in ("vector_a", "vector_b") if getattr(parameters, n) is not None]
        relaxed = " and ".join(vectors)
        suffix = f" ({self.format_name})" if self.format_name else ""
        if not parameters.orthogonal:
            return "PSOFT with a free R" + (f", {relaxed}" if vectors else "") + suffix
        series = parameters.series
        transform = f"Cayley–Neumann series, {series.terms} terms" if series else "Cayley transform"
        form = f"PSOFT-RO (relaxed: {relaxed})" if vectors else "PSOFT-SO (strict)"
        return f"{form}, {transform}{suffix}"

    @property
    def modules(self) -> tuple[str, ...]:
        """See `Adapter`."""
        return tuple(self.rotations)

    @property
    def parameter_count(self) -> int:
        """See `Adapter`."""
        return sum(parameters.count for parameters in self.rotations.values())

    @property
    def options(self) -> Mapping[str, Any]:
        """See `Adapter`."""
        return self.method_options

    @property
    def held_dtype(self) -> torch.dtype:
        """The dtype in which training held A and B."""
        if self.record is not None:
            held: torch.dtype = getattr(torch, self.record.svd.dtype)
            return held
        return self.basis_dtype

    @property
    def takes_conv1d(self) -> bool:
        """Only where its own file holds A and B; PEFT's PSOFT adapts `torch.nn.Linear` alone."""
        return bool(self.bases)

    @property
    def needs_record(self) -> bool:
        """See `Adapter`."""
        return not self.bases

    @property
    def rank(self) -> int:
        """See `Adapter`."""
        return self.basis_options.rank

    def product_dtype(self, device: torch.device) -> torch.dtype:
        """See `Adapter`."""
        return product_dtype(device)

    def check_target(self, module: str, shape: tuple[int, int]) -> None:
        """See `Adapter`."""
        if self.rank > min(shape):
            raise MismatchError(
                f"target module '{module}': rank {self.rank} is larger than its weight "
                f"{list(shape)}; the adapter was trained on another base"
            )
        if (basis := self.bases.get(module)) is None:
            return
        stored = (basis.b.shape[0], basis.a.shape[1])
        if stored != shape:
            raise MismatchError(
                f"target module '{module}': its lora_A and lora_B are for a weight {list(stored)}, "
                f"the base has {list(shape)}; the adapter was trained on another base"
            )

    def describe(self, module: str) -> ModuleFacts:
        """See `Adapter`."""
        parameters = self.rotations[module]
        return ModuleFacts(
            parameters.rank,
            tuple(math.degrees(angle) for angle in rotation_angles(parameters).tolist()),
            orthogonality_error(core_rotation(parameters)),
            vector_deviation(parameters.vector_a),
            vector_deviation(parameters.vector_b),
        )

    def numbers_beside(self, module: str, shape: tuple[int, int]) -> int:
        """Of A, B and R − I."""
        return self.rank * (sum(shape) + self.rank)

    def change(self, module: str, basis: Basis | None) -> SubspaceRotation:
        """See `Adapter`."""
        assert basis is not None
        return SubspaceRotation(self.rotations[module], basis, self.basis_options)
