"""LoRA, OFT, BOFT and HRA adapters of PEFT, merged by PEFT's own layers one module at a time."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from psoft_export.adapters.adapter import Adapter, ModuleFacts, Reading
from psoft_export.adapters.files import FLOATING, AdapterFiles, model_names, saved_name
from psoft_export.basis.svd import Basis
from psoft_export.changes.peft_layer import PeftLayer
from psoft_export.errors import AdapterError, MismatchError, UnsupportedError


@dataclass(frozen=True)
class Method:
    """One of PEFT's methods.

    Attributes:
        name: what it is called.
        paper: its number on arXiv.
        marks: what the names of its tensors hold.
        options: fields of its config that change the result.
        squares: how many in × in matrices PEFT may hold at a time for one weight.
    """

    name: str
    paper: str
    marks: tuple[str, ...]
    options: tuple[str, ...]
    squares: int

    @property
    def peft_type(self) -> str:
        """What the config says of it."""
        return self.name.upper()


METHODS = (
    Method(
        "LoRA",
        "2106.09685",
        (".lora_",),
        ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        squares=0,
    ),
    Method(
        "OFT",
        "2306.07280",
        (".oft_",),
        (
            "r",
            "oft_block_size",
            "block_share",
            "coft",
            "eps",
            "use_cayley_neumann",
            "num_cayley_neumann_terms",
        ),
        squares=2,
    ),
    Method(
        "BOFT",
        "2311.06243",
        (".boft_",),
        ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
        squares=5,
    ),
    Method("HRA", "2405.17484", (".hra_",), ("r", "apply_GS"), squares=3),
)
_BY_TYPE = {method.peft_type: method for method in METHODS}
# What a module's tensors are called; a tensor of another name is of a variant that is not known.
_PARTS = re.compile(
    r"\.(lora_A|lora_B|lora_magnitude_vector|oft_R|boft_R|boft_s|hra_u)(?:\.weight)?$"
)
_NEEDED = {
    "LORA": ("lora_A", "lora_B"),
    "OFT": ("oft_R",),
    "BOFT": ("boft_R", "boft_s"),
    "HRA": ("hra_u",),
}
_DIMENSIONS = {
    "lora_A": 2,
    "lora_B": 2,
    "lora_magnitude_vector": 1,
    "oft_R": 2,
    "boft_R": 4,
    "boft_s": 2,
    "hra_u": 2,
}
# With these, what PEFT loads is more than a change of single weights.
_REFUSED = {
    "lora_bias": "it changes biases too",
    "target_parameters": "it changes parameters that are no layer's weight",
    "layer_replication": "it makes a model of other layers",
    "trainable_token_indices": "it changes rows of the embedding",
    "alora_invocation_tokens": "it is off until a token turns it on, so nothing can be merged",
    "arrow_config": "it chooses among adapters for each token",
    "use_qalora": "it is for quantized bases",
    "use_bdlora": "its factors are blocks for several devices",
    "kasa_config": "KaSA's tensors are not read here",
    "monteclora_config": "MonteCLoRA's tensors are not read here",
    "megatron_config": "it is for Megatron's layers",
}
# Others replace the base's weights when PEFT loads the adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_SERIES_SINCE = (0, 18)  # PEFT's version that changed OFT's series, and the first that is recorded


@dataclass(frozen=True, kw_only=True)
class PeftLayersAdapter(Adapter):
    """An adapter of one of these methods.

    Attributes:
        of: the method.
        tensors: module path → its tensors, by their names in the file.
    """

    of: Method
    tensors: Mapping[str, Mapping[str, Tensor]]

    @property
    def method_name(self) -> str:
        """See `Adapter`."""
        return "DoRA" if self.config.get("use_dora") else self.of.name

    @property
    def paper(self) -> str:
        """See `Adapter`."""
        return f"https://arxiv.org/abs/{self.of.paper}"

    @property
    def method(self) -> str:
        """The method's name, and who merges it."""
        return f"{self.method_name}, by PEFT's own layers"

    @property
    def modules(self) -> tuple[str, ...]:
        """See `Adapter`."""
        return tuple(self.tensors)

    @property
    def parameter_count(self) -> int:
        """See `Adapter`."""
        return sum(t.numel() for tensors in self.tensors.values() for t in tensors.values())

    @property
    def options(self) -> Mapping[str, Any]:
        """See `Adapter`."""
        found = {name: self.config.get(name) for name in self.of.options}
        return {name: value for name, value in found.items() if value not in (None, {})}

    @property
    def takes_conv1d(self) -> bool:
        """See `Adapter`."""
        return True

    @property
    def is_lora(self) -> bool:
        """See `Adapter`."""
        return self.method_name == "LoRA"

    @property
    def rank(self) -> int | None:
        """See `Adapter`; the largest where modules differ."""
        return max((r for r in map(self._rank, self.tensors) if r is not None), default=None)

    def scratch_bytes(self, shape: tuple[int, int]) -> int:
        """W, the merged weight, that of the check, and what PEFT and the check have in × in."""
        rows, columns = shape
        return 8 * (4 * rows * columns + (2 + self.of.squares) * columns * columns)

    def check_target(self, module: str, shape: tuple[int, int]) -> None:
        """See `Adapter`."""
        for key, tensor in self.tensors[module].items():
            rows, columns = _extents(key, tuple(tensor.shape))
            if rows not in (None, shape[0]) or columns not in (None, shape[1]):
                raise MismatchError(
                    f"target module '{module}': its tensor '{key}' {list(tensor.shape)} does not "
                    f"fit a weight {list(shape)}; the adapter was trained on another base"
                )

    def describe(self, module: str) -> ModuleFacts:
        """See `Adapter`."""
        return ModuleFacts(self._rank(module))

    def numbers_beside(self, module: str, shape: tuple[int, int]) -> int:
        """Of its tensors; what a forward pass forms besides is freed after it."""
        return sum(tensor.numel() for tensor in self.tensors[module].values())

    def change(self, module: str, basis: Basis | None) -> PeftLayer:
        """See `Adapter`."""
        return PeftLayer(module, self.config, self.tensors[module], self._rank(module))

    def _rank(self, module: str) -> int | None:
        """Of lora_A; None where ΔW may have full rank."""
        if not self.is_lora:
            return None
        return next(len(t) for key, t in self.tensors[module].items() if ".lora_A" in key)


def read(files: AdapterFiles, _: Reading) -> Adapter:
    """The adapter in these files.

    Raises:
        AdapterError: a field cannot be used, or a tensor has no partner.
        UnsupportedError: an option that is more than a change of weights, or that another version
            of PEFT meant otherwise.
    """
    method = _BY_TYPE[files.config["peft_type"]]
    for field, why in _REFUSED.items():
        if files.config.get(field):
            raise UnsupportedError(f"{files.config_path}: field '{field}' is set; {why}")
    if method.name == "LoRA":
        _check_lora(files)
    elif method.name == "OFT":
        _check_oft(files)
    tensors, saved = _sort_tensors(files)
    for module, own in tensors.items():
        _check_parts(module, own, files)
    return PeftLayersAdapter(
        source=files.source,
        weights_file=files.weights.name,
        config=files.config,
        saved=saved,
        sha256=files.sha256,
        of=method,
        tensors=tensors,
    )


def _check_lora(files: AdapterFiles) -> None:
    files.rank(8)
    files.positive("lora_alpha", 8)
    start = files.config.get("init_lora_weights")
    if start not in _PLAIN_INITS:
        raise UnsupportedError(
            f"{files.config_path}: field 'init_lora_weights' is {start!r}: PEFT changes the base's "
            "weights when it loads such an adapter; save it as a plain LoRA from training "
            "(path_initial_model_for_weight_conversion)"
        )


def _check_oft(files: AdapterFiles) -> None:
    """What PEFT itself refuses or warns of when it loads an adapter of an older version."""
    if "oft_block_size" not in files.config:
        raise UnsupportedError(
            f"{files.config_path}: field 'oft_block_size' is missing: trained with PEFT before "
            "0.14, whose OFT was another"
        )
    if not files.config.get("use_cayley_neumann"):
        return
    version = str(files.config.get("peft_version", ""))
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < _SERIES_SINCE:
        raise UnsupportedError(
            f"{files.config_path}: 'use_cayley_neumann' is set and peft_version is "
            f"{version or 'missing'}: PEFT before 0.18 summed another series, which no PEFT at "
            "hand computes; merge it with the PEFT that trained it"
        )


def _sort_tensors(files: AdapterFiles) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Module → name in the file → tensor, and the tensors of `modules_to_save`."""
    marks = [mark for method in METHODS for mark in method.marks]
    tensors: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, name in model_names(files).items():
        if ".lora_embedding_" in name or ".oft_embedding_" in name:
            raise UnsupportedError(
                f"{files.weights}: tensor '{key}' is of an embedding; only linear layers are merged"
            )
        if (part := _PARTS.search(name)) is not None:
            tensor = files.tensors[key]
            if tensor.dtype not in FLOATING:
                raise AdapterError(
                    f"{files.weights}: tensor '{key}' has dtype {tensor.dtype}; a float is needed"
                )
            tensors.setdefault(name[: part.start()], {})[key] = tensor
        elif any(mark in name for mark in marks):
            raise UnsupportedError(
                f"{files.weights}: tensor '{key}' is of a variant of the method that is not known "
                "here"
            )
        elif (kept := saved_name(name)) is not None:
            saved[kept] = files.tensors[key]
    return tensors, saved


def _check_parts(module: str, own: Mapping[str, Tensor], files: AdapterFiles) -> None:
    """Check that a module's tensors are all there, and of one rank."""
    parts: dict[str, Tensor] = {}
    for key, tensor in own.items():
        found = _PARTS.search(key)
        assert found is not None
        if tensor.ndim != (dimensions := _DIMENSIONS[found[1]]):
            raise AdapterError(
                f"{files.weights}: tensor '{key}' has {tensor.ndim} dimensions; {dimensions} are "
                "needed"
            )
        parts[found[1]] = tensor
    needed = list(_NEEDED[files.config["peft_type"]])
    if files.config.get("use_dora"):
        needed.append("lora_magnitude_vector")
    for name in needed:
        if name not in parts:
            raise AdapterError(f"{files.weights}: '{module}' has no {name}")
    if "lora_magnitude_vector" in parts and not files.config.get("use_dora"):
        raise AdapterError(
            f"{files.weights}: '{module}' has a lora_magnitude_vector, but the config does not say "
            "use_dora"
        )
    if "lora_A" in parts and len(parts["lora_A"]) != parts["lora_B"].shape[1]:
        raise AdapterError(
            f"{files.weights}: '{module}' has a lora_A {list(parts['lora_A'].shape)} and a lora_B "
            f"{list(parts['lora_B'].shape)}, which are not of one rank"
        )


def _extents(key: str, shape: tuple[int, ...]) -> tuple[int | None, int | None]:
    """Rows and columns of the weight that a tensor is for, where its shape says them."""
    if ".lora_A" in key:
        return None, shape[1]
    if ".lora_B" in key or ".lora_magnitude_vector" in key or ".boft_s" in key:
        return shape[0], None
    if ".hra_u" in key:
        return None, shape[0]
    if ".boft_R" in key:
        return None, shape[1] * shape[2]
    if shape[0] > 1:  # OFT's; one block may be shared by all, of block · (block − 1) / 2 entries
        return None, shape[0] * round((1 + math.sqrt(1 + 8 * shape[1])) / 2)
    return None, None
