"""LoRA, OFT, BOFT and HRA adapters of PEFT, merged by PEFT's own layers one module at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from psoft_export.adapters.adapter import Adapter, Reading
from psoft_export.adapters.files import AdapterFiles, model_names, saved_name
from psoft_export.basis.svd import Basis
from psoft_export.changes.peft_layer import PeftLayer
from psoft_export.errors import AdapterError, MismatchError, UnsupportedError

# What the names of each method's tensors hold.
MARKS = {
    "LoRA": (".lora_A.", ".lora_B.", ".lora_magnitude_vector", ".lora_embedding_"),
    "OFT": (".oft_R.",),
    "BOFT": (".boft_R", ".boft_s"),
    "HRA": (".hra_u",),
}
_PAPERS = {"LoRA": "2106.09685", "OFT": "2306.07280", "BOFT": "2311.06243", "HRA": "2405.17484"}
_NAMES = {name.upper(): name for name in MARKS}
_OPTIONS = {
    "LoRA": ("r", "lora_alpha", "use_rslora", "use_dora"),
    "OFT": ("r", "oft_block_size", "block_share", "coft"),
    "BOFT": ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
    "HRA": ("r", "apply_GS"),
}
# With these, what PEFT loads is more than a change of single weights.
_REFUSED = {
    "lora_bias": "it changes biases too",
    "target_parameters": "it changes parameters that are no layer's weight",
    "layer_replication": "it makes a model of other layers",
    "trainable_token_indices": "it changes rows of the embedding",
    "alora_invocation_tokens": "it is off until a token turns it on, so nothing can be merged",
    "use_qalora": "it is for quantized bases",
    "megatron_config": "it is for Megatron's layers",
}
# Others replace the base's weights when PEFT loads the adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, kw_only=True)
class PeftLayersAdapter(Adapter):
    """An adapter of one of these methods.

    Attributes:
        name: of the method.
        tensors: module path → its tensors, by their names in the file.
    """

    name: str
    tensors: Mapping[str, Mapping[str, Tensor]]

    @property
    def method_name(self) -> str:
        """See `Adapter`."""
        return self.name

    @property
    def paper(self) -> str:
        """See `Adapter`."""
        return f"https://arxiv.org/abs/{_PAPERS[self.name]}"

    @property
    def method(self) -> str:
        """The method's name, and a variant's."""
        return (
            f"{self.name}{' (DoRA)' if self.config.get('use_dora') else ''}, by PEFT's own layers"
        )

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
        return {name: self.config[name] for name in _OPTIONS[self.name] if name in self.config}

    @property
    def takes_conv1d(self) -> bool:
        """See `Adapter`."""
        return True

    @property
    def dense_copies(self) -> int:
        """W, the merged weight, that of the second evaluation, and square matrices of PEFT's."""
        return 6

    @property
    def rank(self) -> int | None:
        """See `Adapter`."""
        rank = self.config.get("r") if self.name == "LoRA" else None
        return int(rank) if rank is not None and not self.config.get("use_dora") else None

    def check_target(self, module: str, shape: tuple[int, int]) -> None:
        """See `Adapter`."""
        for key, tensor in self.tensors[module].items():
            rows, columns = _extents(key, tuple(tensor.shape))
            if rows not in (None, shape[0]) or columns not in (None, shape[1]):
                raise MismatchError(
                    f"target module '{module}': its tensor '{key}' {list(tensor.shape)} does "
                    f"not fit a weight {list(shape)}; the adapter was trained on another base"
                )

    def numbers_beside(self, module: str, shape: tuple[int, int]) -> int:
        """Of its tensors, and of two square matrices that a forward pass may form."""
        return sum(t.numel() for t in self.tensors[module].values()) + 2 * shape[1] ** 2

    def change(self, module: str, basis: Basis | None) -> PeftLayer:
        """See `Adapter`."""
        return PeftLayer(module, self.config, self.tensors[module], self.rank)


def matches(files: AdapterFiles) -> bool:
    """Whether the files are of one of these kinds."""
    return files.config["peft_type"] in _NAMES


def read(files: AdapterFiles, _: Reading) -> Adapter:
    """The adapter in these files.

    Raises:
        AdapterError: a field cannot be used, or a tensor has no partner.
        UnsupportedError: an option that is more than a change of weights.
    """
    name = _NAMES[files.config["peft_type"]]
    for field, why in _REFUSED.items():
        if files.config.get(field):
            raise UnsupportedError(f"{files.config_path}: field '{field}' is set; {why}")
    start = files.config.get("init_lora_weights")
    if name == "LoRA" and start not in _PLAIN_INITS:
        raise UnsupportedError(
            f"{files.config_path}: field 'init_lora_weights' is {start!r}: PEFT changes the base's "
            "weights when it loads such an adapter; save it as a plain LoRA from training "
            "(path_initial_model_for_weight_conversion)"
        )
    tensors, saved = _sort_tensors(name, files)
    return PeftLayersAdapter(
        source=files.source,
        weights_file=files.weights.name,
        config=files.config,
        saved=saved,
        sha256=files.sha256,
        name=name,
        tensors=tensors,
    )


def _sort_tensors(
    method: str, files: AdapterFiles
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Module → name in the file → tensor, and the tensors of `modules_to_save`."""
    tensors: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, name in model_names(files).items():
        mark = next((mark for mark in MARKS[method] if mark in name), None)
        if mark is not None:
            tensors.setdefault(name.partition(mark)[0], {})[key] = files.tensors[key]
        elif (kept := saved_name(name)) is not None:
            saved[kept] = files.tensors[key]
    for module, own in tensors.items():
        if ".lora_embedding_" in next(iter(own)):
            raise UnsupportedError(
                f"{files.weights}: '{module}' is an embedding; only linear layers can be merged"
            )
        for pair in (("lora_A", "lora_B"), ("boft_R", "boft_s")):
            present = [part for part in pair if any(f".{part}" in key for key in own)]
            if len(present) == 1:
                absent = next(part for part in pair if part not in present)
                raise AdapterError(f"{files.weights}: '{module}' has {present[0]} and no {absent}")
        if any("lora_magnitude" in key for key in own) and len(own) < 3:
            raise AdapterError(f"{files.weights}: '{module}' has neither lora_A nor lora_B")
    return tensors, saved


def _extents(key: str, shape: tuple[int, ...]) -> tuple[int | None, int | None]:
    """Rows and columns of the weight that a tensor is for, where its shape says them."""
    if ".lora_A." in key and len(shape) == 2:
        return None, shape[1]
    if (".lora_B." in key and len(shape) == 2) or ".lora_magnitude" in key or ".boft_s" in key:
        return shape[0], None
    if ".hra_u" in key and len(shape) == 2:
        return None, shape[0]
    if ".boft_R" in key and len(shape) == 4:
        return None, shape[1] * shape[2]
    if ".oft_R." in key and len(shape) == 2 and shape[0] > 1:  # one block may be shared by all
        block = round((1 + math.sqrt(1 + 8 * shape[1])) / 2)  # of block · (block − 1) / 2 entries
        return None, shape[0] * block
    return None, None
