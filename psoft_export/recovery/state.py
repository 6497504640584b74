"""A search on disk between two cycles, so that an interrupted one goes on where it was."""

import json
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from psoft_export.checkpoint.output import replacing_file
from psoft_export.checkpoint.safetensors_file import save_tensors
from psoft_export.errors import OutputError
from psoft_export.recovery.retraining import Mean, Retrained
from psoft_export.recovery.search import SearchState

SUFFIX = ".search.safetensors"
_FORMAT = "psoft-search/6"
_GENERATOR = "generator"
_FOUND, _WHOLE, _TAUGHT = "found.", "whole.", "taught."  # before the name of a search


class StateFile:
    """Where the state of one search is kept."""

    def __init__(self, folder: Path, key: str) -> None:
        """`key` says in hexadecimal all that the search depends on."""
        self.path = folder / f"{key}{SUFFIX}"
        self._key = key

    def read(self) -> SearchState | None:
        """The state kept, or None; a damaged file counts as none."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != _FORMAT or metadata.get("key") != self._key:
                return None
            counts = json.loads(metadata["counts"])
            means = {name: Mean(tensors[name], count) for name, count in counts.items()}
            found = {
                name.removeprefix(_FOUND): signs
                for name, signs in tensors.items()
                if name.startswith(_FOUND)
            }
            trained = {
                name: Retrained(means[_WHOLE + name], means.get(_TAUGHT + name)) for name in found
            }
            done, steps = int(metadata["done"]), int(metadata["steps"])
            return SearchState(tensors[_GENERATOR], done, steps, found, trained)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None

    def write(self, state: SearchState) -> None:
        """Replace what is kept.

        Raises:
            OutputError: the folder cannot be written.
        """
        means = {}
        for name, trained in state.trained.items():
            means[_WHOLE + name] = trained.whole
            if trained.taught is not None:
                means[_TAUGHT + name] = trained.taught
        tensors = {name: mean.value for name, mean in means.items()}
        tensors |= {_FOUND + name: signs for name, signs in state.found.items()}
        tensors[_GENERATOR] = state.generator
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {
            "format": _FORMAT,
            "key": self._key,
            "done": str(state.done),
            "steps": str(state.steps),
            "counts": json.dumps({name: mean.count for name, mean in means.items()}),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise OutputError(f"{self.path.parent}: cannot be made ({cause.strerror})") from cause
        with replacing_file(self.path, durable=False) as scratch:
            save_tensors(scratch, tensors, metadata)

    def remove(self) -> None:
        """Forget the search."""
        with suppress(OSError):
            self.path.unlink()
