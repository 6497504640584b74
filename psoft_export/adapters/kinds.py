"""The kinds of adapters that are known, and reading one of whatever kind it is.

A new kind is a module here with a function `read`, entered in `KINDS` (docs/adapters.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from psoft_export.adapters import givens as givens_format
from psoft_export.adapters import peft_layers, psoft, psoft_paper
from psoft_export.adapters.adapter import Adapter, NeumannTerms, Reading
from psoft_export.adapters.files import CONFIG, AdapterFiles, adapter_files, read_files
from psoft_export.algebra.parameters import GivensForm
from psoft_export.checkpoint.source import Source, resolve
from psoft_export.errors import AdapterError, UnsupportedError, UsageError

_SHOWN = 3


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Attributes:
        name: what it is called.
        peft_type: what the config says of it.
        marks: what the names of its tensors hold, and of no other kind's.
        read: the `Adapter` in files of this kind.
        shared: what names of its tensors hold that are those of another kind as well; then
            tensors of its own tell it from that one.
        told: which fields of `Reading` it asks for.
    """

    name: str
    peft_type: str
    marks: tuple[str, ...]
    read: Callable[[AdapterFiles, Reading], Adapter]
    shared: tuple[str, ...] = ()
    told: tuple[str, ...] = ()

    def matches(self, files: AdapterFiles) -> bool:
        """Whether files say that they are of this kind."""
        if files.config["peft_type"] != self.peft_type:
            return False
        return not self.shared or any(self.is_only(key) for key in files.tensors)

    def has(self, name: str) -> bool:
        """Whether a tensor of this name can be of this kind."""
        return self.is_only(name) or any(mark in name for mark in self.shared)

    def is_only(self, name: str) -> bool:
        """Whether a tensor of this name is of this kind, unless of one that shares it."""
        return any(mark in name for mark in self.marks)


# The first that matches is taken: the paper's checkpoints say that they are LoRA.
KINDS = (
    Kind("PSOFT", "PSOFT", (psoft.MARKER,), psoft.read),
    Kind(
        "PSOFT of the paper's code",
        "LORA",
        (".lora_orth.",),
        psoft_paper.read,
        shared=(".lora_A.", ".lora_B."),
        told=("neumann_terms",),
    ),
    Kind("qGOFT", "GIVENS", (".givens_",), givens_format.read, told=("givens",)),
    *(Kind(m.name, m.peft_type, m.marks, peft_layers.read) for m in peft_layers.METHODS),
)


def load_adapter(
    adapter: str | Path,
    *,
    neumann_terms: NeumannTerms | None = None,
    givens: GivensForm | None = None,
    token: str | None = None,
) -> Adapter:
    """Read an adapter of any kind that is known (docs/adapters.md).

    Args:
        adapter: a folder, or a Hub id with an optional `@revision`.
        neumann_terms: of a checkpoint of the PSOFT paper's code: the terms of its Cayley–Neumann
            series, or `exact`; by default 5, as that code.
        givens: of a qGOFT adapter: `reference` or `paper`; by default `reference`.
        token: a Hub token; by default the one that `hf auth login` stored.

    Raises:
        AdapterError: a file is missing or malformed, or its tensors fit no kind.
        UnsupportedError: it is of a kind, or has an option, that is not known here.
        UsageError: `neumann_terms` or `givens` cannot be used, or not with this kind.
        NonFiniteError: a tensor holds NaN or infinity.
        RecordError: its basis record is damaged, or belongs to another adapter.
        HubError: the repository cannot be had.

    Example:
        >>> adapter = psoft_export.load_adapter("examples/byte_llama/adapters/prose-relaxed-r64")
        >>> adapter.rank
        64
    """
    reading = Reading(neumann_terms, givens)
    return read_adapter(resolve(adapter, CONFIG, adapter_files, token=token), reading)


def read_adapter(source: Source, reading: Reading) -> Adapter:
    """The adapter in a folder; errors as of `load_adapter`."""
    files = read_files(source)
    kind = next((kind for kind in KINDS if kind.matches(files)), None)
    if kind is None:
        raise UnsupportedError(
            f"{files.config_path}: peft_type is '{files.config['peft_type']}'; this tool takes "
            f"{_known()} adapters"
        )
    _check_tensors(kind, files)
    _check_reading(kind, reading)
    return kind.read(files, reading)


def _known() -> str:
    return ", ".join(kind.name for kind in KINDS)


def _check_reading(kind: Kind, reading: Reading) -> None:
    for field, value in reading.given().items():
        if field not in kind.told:
            meant = next(other.name for other in KINDS if field in other.told)
            raise UsageError(
                f"{field.replace('_', '-')} {value}: is for {meant}; this adapter is of {kind.name}"
            )


def _check_tensors(kind: Kind, files: AdapterFiles) -> None:
    """Check that there are tensors of this kind, and of no other."""
    own = next((key for key in sorted(files.tensors) if kind.has(key)), None)
    for other in KINDS:
        for key in sorted(files.tensors):
            if not other.is_only(key) or kind.has(key):
                continue
            if own is None:
                raise AdapterError(
                    f"{files.weights}: tensor '{key}' is of {other.name}, but {CONFIG} says that "
                    f"the adapter is of {kind.name}"
                )
            raise AdapterError(
                f"{files.weights}: holds tensors of two kinds, of {kind.name} ('{own}') and of "
                f"{other.name} ('{key}'); merge adapters one by one, each from its own folder"
            )
    if own is None:
        keys = sorted(files.tensors)
        found = ", ".join(f"'{key}'" for key in keys[:_SHOWN]) or "nothing"
        more = f" and {len(keys) - _SHOWN} more" if keys[_SHOWN:] else ""
        raise AdapterError(
            f"{files.weights}: holds no {kind.name} tensor ('…{kind.marks[0]}…'); found {found}"
            f"{more}. Kinds known: {_known()}"
        )
