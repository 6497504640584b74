"""What models are exported for: which class a task takes, and what a graph is traced with.

Tasks have the names that `transformers.pipeline` gives them.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from psoft_export.errors import UnsupportedError, UsageError
from psoft_export.model.key_value_cache import cache_argument, cache_of
from psoft_export.model.skeleton import mapped_classes
from psoft_export.verification.inputs import decoder_start_token, pad_token

BATCH = "batch_size"
_LENGTH = "sequence_length"
_PAST = "past_sequence_length"
_TOTAL = "total_sequence_length"
_SOURCE = "encoder_sequence_length"
_ROWS = 2
_TOKENS = 3  # of a call; one would be traced as a constant
_CACHED = 5
_SIZE = 224  # of images, where the config does not say


@dataclass(frozen=True)
class Sample:
    """Arguments to trace a model with, and the names of the extents that vary.

    Attributes:
        arguments: of the model's `forward`.
        axes: input name → extent → name; of a cache by the name that all its inputs begin with.
        part: the part of the model that is traced; None for all of it.
    """

    arguments: dict[str, Any]
    axes: Mapping[str, Mapping[int, str]]
    part: PreTrainedModel | None = None


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: as `transformers.pipeline` calls it.
        classes: transformers' mapping from configs to model classes.
        samples: a model → what each graph (component) of its export is traced with.
    """

    name: str
    classes: Any
    samples: Callable[[PreTrainedModel], dict[str, Sample]]

    def model_class(self, config: PretrainedConfig) -> type[PreTrainedModel]:
        """The class of a model of this task.

        Raises:
            UnsupportedError: transformers has none for this config.
        """
        found = mapped_classes(self.classes, config)
        if not found:
            has = ", ".join(task.name for task in TASKS.values() if type(config) in task.classes)
            raise UnsupportedError(
                f"task '{self.name}': transformers has no such class for model type "
                f"'{config.model_type}'; it has {has or 'none for any task exported here'}"
            )
        return found[0]


def find_task(config: PretrainedConfig, class_name: str | None, wanted: str | None) -> Task:
    """The task asked for, or else that of a model class.

    Args:
        config: the model's config.
        class_name: the class that the checkpoint was saved as (`architectures`), if it says.
        wanted: a task's name, or None.

    Raises:
        UsageError: no such task.
        UnsupportedError: the class is of no task that is exported.
    """
    if wanted is not None:
        if wanted not in TASKS:
            raise UsageError(f"task '{wanted}': is not one of {', '.join(TASKS)}")
        return TASKS[wanted]
    for task in TASKS.values():
        if any(one.__name__ == class_name for one in mapped_classes(task.classes, config)):
            return task
    names = f"'{class_name}' is of no task that is exported" if class_name else "no model class"
    raise UnsupportedError(f"config.json: {names}; tasks are {', '.join(TASKS)} (--task)")


def _decoder(model: PreTrainedModel) -> dict[str, Sample]:
    """One graph for prefill and decoding: some tokens after some that are cached."""
    length = _CACHED + _TOKENS
    ids, mask = _tokens(model, length, pad_left=True)
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in _parameters(model):
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    head = {name: value[:, :_CACHED] for name, value in arguments.items()}
    tail = {name: value[:, _CACHED:] for name, value in arguments.items()}
    with torch.no_grad():
        cache = cache_of(model(**head, use_cache=True))
    axes = {
        "input_ids": {0: BATCH, 1: _LENGTH},
        "attention_mask": {0: BATCH, 1: _TOTAL},
        "position_ids": {0: BATCH, 1: _LENGTH},
        "past_key_values": {0: BATCH, 2: _PAST},
    }
    arguments = {**tail, "attention_mask": mask, cache_argument(model): cache, "use_cache": True}
    return {"model": Sample(arguments, axes)}


def _encoder(model: PreTrainedModel) -> dict[str, Sample]:
    """One graph over whole sequences, padded on the right."""
    ids, mask = _tokens(model, _CACHED + _TOKENS, pad_left=False)
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in _parameters(model) and getattr(model.config, "type_vocab_size", 0) > 0:
        arguments["token_type_ids"] = torch.zeros_like(ids)
    axes = {name: {0: BATCH, 1: _LENGTH} for name in arguments}
    if "use_cache" in _parameters(model):
        arguments["use_cache"] = False
    return {"model": Sample(arguments, axes)}


def _features(model: PreTrainedModel) -> dict[str, Sample]:
    """One graph over what the model reads.

    Raises:
        UnsupportedError: neither tokens nor images.
    """
    if model.main_input_name == "pixel_values":
        return _images(model)
    if model.main_input_name != "input_ids":
        raise UnsupportedError(
            f"{type(model).__name__}: reads '{model.main_input_name}', neither tokens nor images"
        )
    return _encoder(model)


def _images(model: PreTrainedModel) -> dict[str, Sample]:
    """One graph over images of the config's size."""
    config: Any = model.config
    size = getattr(config, "image_size", None) or _SIZE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", None) or 3
    pixels = torch.zeros(_ROWS, channels, height, width)
    return {"model": Sample({"pixel_values": pixels}, {"pixel_values": {0: BATCH}})}


def _encoder_decoder(model: PreTrainedModel) -> dict[str, Sample]:
    """Three graphs: the encoder, the first target tokens, and those that follow.

    The first ones make the cache of the source, which stays the same from then on.
    """
    ids, mask = _tokens(model, _CACHED + _TOKENS, pad_left=False)
    targets = torch.full((_ROWS, _CACHED + _TOKENS), decoder_start_token(model.config))
    encode: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    encoder = model.get_encoder()
    with torch.no_grad():
        states = BaseModelOutput(last_hidden_state=encoder(**encode).last_hidden_state)
        prefill: dict[str, Any] = {
            "encoder_outputs": states,
            "attention_mask": mask,
            "decoder_input_ids": targets[:, :_CACHED],
            "use_cache": True,
        }
        cache = cache_of(model(**prefill))
    targets = targets[:, _CACHED:]
    decode = {**prefill, "decoder_input_ids": targets, cache_argument(model): cache}
    axes = {
        "input_ids": {0: BATCH, 1: _SOURCE},
        "attention_mask": {0: BATCH, 1: _SOURCE},
        "decoder_input_ids": {0: BATCH, 1: _LENGTH},
        "encoder_outputs": {0: BATCH, 1: _SOURCE},
        "past_key_values.self_attention_cache": {0: BATCH, 2: _PAST},
        "past_key_values.cross_attention_cache": {0: BATCH, 2: _SOURCE},
    }
    return {
        "encoder": Sample(encode, axes, encoder),
        "prefill": Sample(prefill, axes),
        "decode": Sample(decode, axes),
    }


def _tokens(model: PreTrainedModel, length: int, *, pad_left: bool) -> tuple[Tensor, Tensor]:
    """Rows × length tokens and their mask; the first row is padded, or the mask would be left out
    of the graph."""
    config: Any = model.config
    vocabulary = int(config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (_ROWS, length), generator=generator)
    mask = torch.ones_like(ids)
    padded = slice(0, 2) if pad_left else slice(length - 2, length)
    ids[0, padded], mask[0, padded] = pad_token(config), 0
    return ids, mask


def _parameters(model: PreTrainedModel) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters


TASKS = {
    task.name: task
    for task in (
        Task("text-generation", transformers.MODEL_FOR_CAUSAL_LM_MAPPING, _decoder),
        Task(
            "text2text-generation",
            transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
            _encoder_decoder,
        ),
        Task(
            "text-classification",
            transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
            _encoder,
        ),
        Task(
            "token-classification",
            transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
            _encoder,
        ),
        Task("fill-mask", transformers.MODEL_FOR_MASKED_LM_MAPPING, _encoder),
        Task(
            "image-classification",
            transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
            _images,
        ),
        Task("feature-extraction", transformers.MODEL_MAPPING, _features),
    )
}
