"""The change of a layer of PEFT's own: PEFT merges it, and PEFT's forward pass says if rightly.

No formula of PEFT's is written here. The layer is built alone, in float64, around one weight.
"""

import dataclasses
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psoft_export.algebra.merged_weight import MergeRows
from psoft_export.changes.change import ChangeFacts, WeightChange
from psoft_export.errors import MissingExtraError, UnsupportedError
from psoft_export.reference.expected import DeltaRows, Expected

_LONGEST = 300  # characters of an error of PEFT's
_BUILDING = threading.Lock()
_PATTERN_FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


@dataclass(frozen=True)
class PeftLayer(WeightChange):
    """A layer of one of PEFT's methods.

    Attributes:
        module: its module path, which the config's patterns speak of.
        config: `adapter_config.json`.
        tensors: its tensors, by their names in the adapter's file.
        rank: r, where the method adds a product of that rank.
    """

    module: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    rank: int | None = None

    @property
    def facts(self) -> ChangeFacts:
        """The rank alone."""
        return ChangeFacts(rank=self.rank)

    def merging(self, weight: Tensor) -> MergeRows:
        """Rows of what PEFT's `merge` makes of W in float64."""
        layer = self._around(_linear(weight), torch.float64)
        try:
            layer.merge()
        except Exception as cause:  # PEFT raises errors of many kinds
            raise self._refused("merge", cause) from cause
        merged: Tensor = layer.get_base_layer().weight.detach().contiguous()
        return lambda _, rows: merged[rows].clone()

    def expected(self, weight: Tensor) -> Expected:
        """What PEFT's forward pass, not merged, makes of the identity, minus W."""
        layer = self._around(_linear(weight), torch.float64)
        identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
        with torch.no_grad():
            try:
                merged = layer(identity).T.contiguous()
            except Exception as cause:  # PEFT raises errors of many kinds
                raise self._refused("run", cause) from cause
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
        return Expected(
            delta=DeltaRows(lambda rows, which: merged[which] - rows),
            reach_left=norms + torch.linalg.vector_norm(merged, dim=1),
            reach_right=torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device),
            terms=weight.shape[1],
        )

    def stand_beside(self, model: nn.Module, path: str, dtype: torch.dtype) -> None:
        """Put PEFT's layer around the model's."""
        layer = model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, self._around(layer, dtype))

    def _around(self, layer: nn.Module, dtype: torch.dtype) -> Any:
        """PEFT's layer around one, its tensors rounded to `dtype`, in evaluation mode."""
        peft = _peft()
        weight: Any = layer.weight
        model, (parent, name) = _nested(layer, self.module)
        try:
            known = self._config(peft)
            # PEFT draws starting values from the generator of all threads, and warns of what
            # would make training fast.
            with _BUILDING, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                wrapped = peft.PeftModel(model, known, autocast_adapter_dtype=False)
            tensors = {
                key: tensor.to(dtype).to(weight) if tensor.is_floating_point() else tensor
                for key, tensor in self.tensors.items()
            }
            loaded = peft.set_peft_model_state_dict(wrapped, tensors)
        except UnsupportedError:
            raise
        except Exception as cause:  # PEFT raises errors of many kinds
            raise self._refused("load", cause) from cause
        absent = [key for key in loaded.missing_keys if ".base_layer." not in key]
        for text, keys in (("has no place for", loaded.unexpected_keys), ("asks for", absent)):
            if keys:
                raise UnsupportedError(
                    f"module '{self.module}': PEFT {peft.__version__} {text} a tensor '{keys[0]}'"
                )
        return getattr(parent, name).eval().requires_grad_(False).to(weight.device)

    def _config(self, peft: Any) -> Any:
        """PEFT's config for this module alone.

        Raises:
            UnsupportedError: it has a field that this PEFT does not know.
        """
        made = peft.PEFT_TYPE_TO_CONFIG_MAPPING[self.config["peft_type"]]
        known = {field.name for field in dataclasses.fields(made)} - {*_PATTERN_FIELDS}
        for name, value in self.config.items():
            if name not in known and name not in _PATTERN_FIELDS and value:
                raise UnsupportedError(
                    f"field '{name}' of the adapter's config is not known to PEFT "
                    f"{peft.__version__}; use the PEFT that trained it"
                )
        given = {n: v for n, v in self.config.items() if n in known and v is not None}
        return made(
            **{**given, "target_modules": [self.module], "task_type": None, "inference_mode": True}
        )

    def _refused(self, what: str, cause: Exception) -> UnsupportedError:
        return UnsupportedError(
            f"module '{self.module}': PEFT cannot {what} it alone ({_in_one_line(cause)})"
        )


def _in_one_line(cause: Exception) -> str:
    """An error's message; PEFT's and torch's say what is wrong only in the second line."""
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _linear(weight: Tensor) -> nn.Linear:
    """A linear layer with a copy of W in float64."""
    rows, columns = weight.shape
    with torch.device("meta"):
        layer = nn.Linear(columns, rows, bias=False, dtype=torch.float64)
    values = weight.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    layer.weight = nn.Parameter(values, requires_grad=False)
    return layer


def _nested(layer: nn.Module, path: str) -> tuple[nn.Module, tuple[nn.Module, str]]:
    """A model in which a layer is at this path and nothing else, and its parent and name there."""
    model = parent = nn.Module()
    *above, name = path.split(".")
    for part in above:
        child = nn.Module()
        setattr(parent, part, child)
        parent = child
    setattr(parent, name, layer)
    return model, (parent, name)


def _peft() -> Any:
    try:
        import peft
    except ImportError as cause:
        raise MissingExtraError(
            "adapters of this kind are merged by PEFT itself: pip install 'psoft-export[peft]'"
        ) from cause
    return peft
