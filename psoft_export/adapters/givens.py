"""qGOFT adapters (arXiv 2404.04316; `ArthurLeoM/peft-givens`, `peft_type: "GIVENS"`)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from psoft_export.adapters.adapter import Adapter, ModuleFacts, Reading
from psoft_export.adapters.files import AdapterFiles, adapter_name, sort_tensors
from psoft_export.algebra.givens import distance_between_forms, givens_angles
from psoft_export.algebra.parameters import GivensForm, GivensParameters
from psoft_export.basis.svd import Basis
from psoft_export.changes.givens import GivensTransform
from psoft_export.errors import AdapterError, MismatchError, UsageError

_TENSORS = ("givens_hard", "givens_soft", "givens_scaler")
_NAMED = re.compile(r"\.givens_(?:hard|soft|scaler)\.([^.]+)$")
_FIRST_VERSION = (
    "'{module}' has {dimension} inputs, an odd number, which the forward pass of the reference "
    "code's second version cannot take: the adapter is taken for one of its first version, whose "
    "transforms are true ones (--givens paper)"
)


@dataclass(frozen=True, kw_only=True)
class GivensAdapter(Adapter):
    """A qGOFT adapter.

    Attributes:
        parameters: module path → what is stored for it.
        form: whose meaning the tensors are given.
    """

    parameters: Mapping[str, GivensParameters]
    form: GivensForm

    @property
    def method_name(self) -> str:
        """See `Adapter`."""
        return "qGOFT"

    @property
    def paper(self) -> str:
        """See `Adapter`."""
        return "https://arxiv.org/abs/2404.04316"

    @property
    def method(self) -> str:
        """Strict or relaxed, with a scaler or not, and in whose meaning."""
        strict = sum(p.angles is not None for p in self.parameters.values())
        if strict == len(self.parameters):
            name = "GOFT (strict)"
        else:
            name = "qGOFT (relaxed)" if not strict else "GOFT (strict) and qGOFT (relaxed)"
        scaled = any(p.scaler is not None for p in self.parameters.values())
        meaning = "reference code" if self.form == "reference" else "paper"
        return f"{name}{' with a scaler' if scaled else ''}, as the {meaning} computes it"

    @property
    def modules(self) -> tuple[str, ...]:
        """See `Adapter`."""
        return tuple(self.parameters)

    @property
    def parameter_count(self) -> int:
        """See `Adapter`."""
        return sum(
            part.numel()
            for p in self.parameters.values()
            for part in (p.angles, p.blocks, p.scaler)
            if part is not None
        )

    @property
    def options(self) -> Mapping[str, Any]:
        """See `Adapter`."""
        return {
            "strict_oft": self.config.get("strict_oft", True),
            "no_scaling": self.config.get("no_scaling", False),
            "givens": self.form,
        }

    @property
    def takes_conv1d(self) -> bool:
        """See `Adapter`."""
        return True

    def check_target(self, module: str, shape: tuple[int, int]) -> None:
        """See `Adapter`."""
        if (dimension := self.parameters[module].dimension) != shape[1]:
            raise MismatchError(
                f"target module '{module}': its {dimension - 1} transforms are for {dimension} "
                f"inputs, its weight has {shape[1]}; the adapter was trained on another base"
            )

    def describe(self, module: str) -> ModuleFacts:
        """See `Adapter`."""
        stored = self.parameters[module]
        angles = givens_angles(stored).abs().rad2deg().sort(descending=True).values
        both = stored.dimension % 2 == 0  # the reference code's second version takes no other
        return ModuleFacts(
            None,
            tuple(angles.tolist()),
            form_distance=distance_between_forms(stored) if both else None,
        )

    def numbers_beside(self, module: str, shape: tuple[int, int]) -> int:
        """Four for each transform, and the scaler."""
        return 5 * self.parameters[module].dimension

    def change(self, module: str, basis: Basis | None) -> GivensTransform:
        """See `Adapter`."""
        return GivensTransform(self.parameters[module])


def read(files: AdapterFiles, reading: Reading) -> Adapter:
    """The adapter in these files.

    Raises:
        AdapterError: a field or tensor cannot be used.
        UsageError: `reading.givens` cannot be what trained it.
    """
    named = adapter_name(files, _NAMED)

    def part_of(rest: str) -> str | None:
        tensor = f"givens_{rest.removesuffix(f'.{named}')}"
        return tensor if tensor in _TENSORS else None

    parts, saved = sort_tensors(files, ".givens_", part_of, "the qGOFT format", named)
    form: GivensForm = reading.givens or "reference"
    warnings: tuple[str, ...] = ()
    parameters = {module: _parameters(module, p, form, files) for module, p in parts.items()}
    odd = next((m for m, p in parameters.items() if p.dimension % 2), None)
    if odd is not None and form == "reference":
        warning = _FIRST_VERSION.format(module=odd, dimension=parameters[odd].dimension)
        if reading.givens is not None:
            raise UsageError(f"givens 'reference': {warning}")
        form, warnings = "paper", (warning,)
        parameters = {module: replace(p, form=form) for module, p in parameters.items()}
    return GivensAdapter(
        source=files.source,
        weights_file=files.weights.name,
        config=files.config,
        saved=saved,
        sha256=files.sha256,
        warnings=warnings,
        parameters=parameters,
        form=form,
    )


def _parameters(
    module: str, parts: Mapping[str, str], form: GivensForm, files: AdapterFiles
) -> GivensParameters:
    """The file says which form a module has; the config's patterns only repeat it."""
    if ("givens_hard" in parts) == ("givens_soft" in parts):
        both = "both givens_hard and givens_soft" if "givens_hard" in parts else "neither of them"
        raise AdapterError(
            f"{files.weights}: '{module}' has {both}; a module has givens_hard (strict) or "
            "givens_soft (relaxed)"
        )
    angles = blocks = scaler = None
    if "givens_hard" in parts:
        count = files.tensors[parts["givens_hard"]].numel()
        angles = files.check_tensor(parts["givens_hard"], (count,), "a strict module")
    else:
        if "givens_scaler" in parts:
            raise AdapterError(
                f"{files.weights}: '{module}' has givens_soft and givens_scaler; only strict "
                "modules have a scaler"
            )
        count = next(iter(files.tensors[parts["givens_soft"]].shape), 0)
        blocks = files.check_tensor(parts["givens_soft"], (count, 2, 2), "a relaxed module")
    if "givens_scaler" in parts:
        scaler = files.check_tensor(
            parts["givens_scaler"], (count + 1,), f"a module of {count} transforms"
        )
    return GivensParameters(angles, blocks, scaler, form)
