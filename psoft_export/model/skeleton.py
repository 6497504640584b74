"""A transformers model on the meta device: which modules it has, and how files name its tensors.

Nothing here holds weights. Names in files are matched to module paths by transformers' own
conversion mapping and base-model prefix, the same functions that `from_pretrained` uses.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from psoft_export.errors import CheckpointError, MismatchError, UnsupportedError, first_line

# PEFT's task types (peft/utils/peft_types.py) and the transformers classes they stand for.
_TASK_CLASSES = {
    "SEQ_CLS": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "SEQ_2_SEQ_LM": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "CAUSAL_LM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    "TOKEN_CLS": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "QUESTION_ANS": transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "FEATURE_EXTRACTION": transformers.MODEL_MAPPING,
}


class Skeleton:
    """One model class with one config, on the meta device.

    Attributes:
        config: the transformers config.
        class_name: the model class (`BertForSequenceClassification`).
        shapes: shape of each tensor of the model's state dict, by name.
        parameters: names of the tensors that are parameters, not buffers.
        tied: name → name of the tensor it shares its storage with.
        prefix: the base-model prefix (`bert`).
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
        """Build the model without weights."""
        with torch.device("meta"):
            self._model: Any = model_class(config)
        self._state = self._model.state_dict()
        transforms = get_model_conversion_mapping(self._model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._modules: dict[str, nn.Module] = dict(self._model.named_modules())
        self.config = config
        self.model_class = model_class
        self.class_name = model_class.__name__
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        self.parameters = {name for name, _ in self._model.named_parameters()}
        self.tied: dict[str, str] = dict(self._model.all_tied_weights_keys)
        self.prefix = self._model.base_model_prefix

    @property
    def numbers(self) -> int:
        """How many numbers the model holds; what is tied counts once."""
        shapes = (shape for name, shape in self.shapes.items() if name not in self.tied)
        return sum(map(math.prod, shapes))

    def tensor_name(self, checkpoint_name: str) -> tuple[str, bool]:
        """The model's name of a checkpoint tensor, and whether loading reshapes or joins it.

        Follows `convert_and_load_state_dict_in_model` of transformers 5.
        """
        name, pattern = rename_source_key(
            checkpoint_name, self._renamings, self._converters, self.prefix, self._state
        )
        if name not in self._state and checkpoint_name in self._state:
            return checkpoint_name, False
        return name, pattern is not None

    def module_path(self, stored: str) -> str:
        """The module path of an adapter's key, also if it was saved under an older name."""
        if stored in self._modules:
            return stored
        name, _ = self.tensor_name(f"{stored}.weight")
        return name.removesuffix(".weight")

    def has_module(self, stored: str) -> bool:
        """Whether an adapter's key names a module of this model."""
        return self.module_path(stored) in self._modules

    def module(self, path: str) -> nn.Module:
        """The module at a path."""
        return self._modules[path]

    def linear_paths(self, *, with_conv1d: bool = False) -> Iterator[str]:
        """Paths of all `torch.nn.Linear` modules, and of transformers' `Conv1D` if asked for."""
        classes = (nn.Linear, Conv1D) if with_conv1d else (nn.Linear,)
        return (path for path, m in self._modules.items() if isinstance(m, classes))

    def sharing(self, tensor_name: str) -> str | None:
        """Another tensor that shares the storage of this one (tied weights), or None."""
        for target, source in self.tied.items():
            if tensor_name == target:
                return source
            if tensor_name == source:
                return target
        return None

    def embedding_names(self) -> set[str]:
        """Names of the weights whose first extent is the vocabulary's size."""
        modules = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        known = {id(module) for module in modules if module is not None}
        return {f"{path}.weight" for path, m in self._modules.items() if id(m) in known}

    def label_tensors(self) -> set[str]:
        """Names of the weights whose shape follows the number of labels (a classifier's last)."""
        count = getattr(self.config, "num_labels", None)
        if count is None:
            return set()
        labels = {str(i): str(i) for i in range(count + 1)}
        other = self.rebuilt(id2label=labels, label2id={name: int(i) for i, name in labels.items()})
        return {name for name, shape in self.shapes.items() if other.shapes[name] != shape}

    def rebuilt(self, **changes: Any) -> "Skeleton":
        """The same class with some fields of its config changed."""
        config = type(self.config).from_dict({**self.config.to_dict(), **changes})
        return Skeleton(self.model_class, config)


def read_config(folder: Path) -> PretrainedConfig:
    """The transformers config of a checkpoint folder.

    Raises:
        CheckpointError: `config.json` is missing or malformed.
        UnsupportedError: the model type is unknown, needs its own code, or is quantized.
    """
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as cause:
        raise CheckpointError(
            f"{path}: no such file; is this folder a transformers checkpoint?"
        ) from cause
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{path}: not readable JSON") from cause
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise CheckpointError(f"{path}: field 'model_type' is missing")
    quantization = fields.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedError(
            f"{path}: the base is quantized ({method or 'quantization_config is set'}); "
            "adapters are defined on float weights: merge into the unquantized base"
        )
    if fields["model_type"] not in transformers.CONFIG_MAPPING:
        raise UnsupportedError(
            f"{path}: model type '{fields['model_type']}' is not one that transformers "
            f"{transformers.__version__} knows; code from a checkpoint is never run"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as cause:  # config classes raise errors of many kinds
        raise CheckpointError(
            f"{path}: transformers cannot read it ({first_line(cause)})"
        ) from cause
    return config


def find_skeleton(
    config: PretrainedConfig, adapter_config: Mapping[str, Any], modules: Iterable[str]
) -> Skeleton:
    """The model class that an adapter was trained on, among those the files point to.

    In this order: the class that PEFT recorded (`auto_mapping`), the one of the adapter's
    `task_type`, the base's own `architectures`, the bare model. The first that has every module
    of the adapter is taken.

    Raises:
        MismatchError: none has them all; names one that is missing.
        UnsupportedError: transformers has no class for this config.
    """
    modules = list(modules)
    missing: tuple[str, str] | None = None
    for model_class in _candidates(config, adapter_config):
        try:
            skeleton = Skeleton(model_class, config)
        except Exception as cause:  # model classes raise errors of many kinds
            raise CheckpointError(
                f"config.json: {model_class.__name__} cannot be built ({first_line(cause)})"
            ) from cause
        absent = [path for path in modules if not skeleton.has_module(path)]
        if not absent:
            return skeleton
        missing = missing or (skeleton.class_name, absent[0])
    if missing is None:
        raise UnsupportedError(f"transformers has no model class for '{config.model_type}'")
    raise MismatchError(
        f"target module '{missing[1]}' of the adapter is not in the base ({missing[0]}); "
        "was the adapter trained on another base?"
    )


def _candidates(
    config: PretrainedConfig, adapter_config: Mapping[str, Any]
) -> list[type[PreTrainedModel]]:
    recorded = (adapter_config.get("auto_mapping") or {}).get("base_model_class")
    task = _TASK_CLASSES.get(str(adapter_config.get("task_type")))
    classes = [
        library_class(recorded),
        *mapped_classes(task, config)[:1],
        *(library_class(name) for name in config.architectures or []),
        *mapped_classes(transformers.MODEL_MAPPING, config)[:1],
    ]
    return list(dict.fromkeys(c for c in classes if c is not None))


def library_class(name: Any) -> type[PreTrainedModel] | None:
    """A model class of transformers by name; anything else is not imported."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def mapped_classes(mapping: Any, config: PretrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """The classes of a config in one of transformers' mappings, which imports no others."""
    found = mapping.get(type(config), ()) if mapping is not None else ()
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)
