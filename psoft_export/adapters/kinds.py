"""The kinds of adapters that are known, and reading one of whatever kind it is.

A new kind is a module here with two functions, `matches` and `read`, entered in `_KINDS`
(docs/adapters.md).
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from psoft_export.adapters import givens, peft_layers, psoft, psoft_paper
from psoft_export.adapters.adapter import Adapter, GivensForm, NeumannTerms, Reading
from psoft_export.adapters.files import CONFIG, AdapterFiles, adapter_files, read_files
from psoft_export.checkpoint.source import Source, resolve
from psoft_export.errors import AdapterError, UnsupportedError


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Attributes:
        name: what it is called.
        marks: what the names of its tensors hold, and of no other kind's.
        shared: what names of its tensors hold that are those of another kind as well.
        module: has `matches(files)`, whether files say that they are of this kind, and
            `read(files, reading)`, the `Adapter` in them.
    """

    name: str
    marks: tuple[str, ...]
    module: ModuleType
    shared: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether a tensor of this name can be of this kind."""
        return any(mark in name for mark in (*self.marks, *self.shared))

    def is_only(self, name: str) -> bool:
        """Whether a tensor of this name is of this kind, unless of one that shares it."""
        return any(mark in name for mark in self.marks)


# The first that matches is taken: the paper's checkpoints say that they are LoRA.
KINDS = (
    Kind("PSOFT", (psoft.MARKER,), psoft),
    Kind("PSOFT of the paper's code", (".lora_orth.",), psoft_paper, (".lora_A.", ".lora_B.")),
    Kind("qGOFT", (".givens_hard", ".givens_soft", ".givens_scaler"), givens),
    *(Kind(kind, marks, peft_layers) for kind, marks in peft_layers.MARKS.items()),
)
_SHOWN = 3


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
    for kind in KINDS:
        if kind.module.matches(files) and _is_named(kind, files):
            _check_tensors(kind, files)
            adapter: Adapter = kind.module.read(files, reading)
            return adapter
    raise UnsupportedError(
        f"{files.config_path}: peft_type is '{files.config['peft_type']}'; this tool takes "
        f"{_known()} adapters"
    )


def _is_named(kind: Kind, files: AdapterFiles) -> bool:
    """Whether `peft_layers`, which reads several kinds, is asked about the right one."""
    return kind.module is not peft_layers or files.config["peft_type"] == kind.name.upper()


def _known() -> str:
    return ", ".join(kind.name for kind in KINDS)


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
