"""The models that are compared: the merged one, and its base with the adapter beside it.

Transformers builds them from tensors that are read here, so it follows no path and finds no
further adapter in a folder. Unmerged means that each layer computes with W and the change beside
it, as its formula stands; no merged weight is formed.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from psoft_export.bases import BasisFinder
from psoft_export.changes.change import WeightChange
from psoft_export.checkpoint.reader import Checkpoint
from psoft_export.errors import CheckpointError, first_line
from psoft_export.model.skeleton import Skeleton, find_skeleton, read_config
from psoft_export.pipeline import Target, TargetPipeline
from psoft_export.plan import MergePlan
from psoft_export.verification.inputs import pad_token
from psoft_export.weights import BaseReader

EAGER = "eager"  # the implementation of attention that every model class has


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: the transformers model, in evaluation mode, on the device.
        missing: names of parameters that its tensors do not hold; they are zero.
    """

    model: Any
    missing: frozenset[str]


def find_changes(
    plan: MergePlan,
    bases: BasisFinder,
    device: torch.device,
) -> dict[str, WeightChange]:
    """What the adapter does, by module path as the adapter names modules; on the CPU.

    Args:
        plan: names base and adapter.
        bases: finds the bases.
        device: where it does so.

    Raises:
        MismatchError: the adapter's record was made from another base.
        NonFiniteError: a weight holds NaN or infinity.
        CheckpointError: the base cannot be read.
    """
    cpu = torch.device("cpu")

    def change(target: Target) -> WeightChange:
        assert target.basis is not None
        basis = target.basis.basis
        return plan.adapter.change(target.module, basis.to(cpu) if basis is not None else None)

    found: dict[str, WeightChange] = {}
    largest = max(target.spec.nbytes for target in plan.targets)
    pipeline = TargetPipeline(bases, device, change, largest)
    with BaseReader(plan) as base:
        read = (Target(tensor, base.target(tensor)) for tensor in plan.targets)
        with closing(pipeline.run(read)) as finished:
            for target, made in finished:
                assert made is not None
                found[target.module] = made
    return found


class UnmergedLoader:
    """Loads the base of a plan with the adapter beside it.

    Attributes:
        skeleton: the model class with the plan's config.
    """

    def __init__(self, plan: MergePlan) -> None:
        """Build the model class without weights; reads no tensors."""
        adapter = plan.adapter
        self._plan = plan
        config = read_config(plan.base.folder)
        changes = {n: v for n, v in plan.layout.config_changes.items() if n != "dtype"}
        self.skeleton = find_skeleton(config, adapter.config, adapter.modules)
        if changes:
            self.skeleton = self.skeleton.rebuilt(**changes)

    @property
    def numbers(self) -> int:
        """How many numbers the model holds, what stands beside its layers apart."""
        return self.skeleton.numbers

    def load(
        self,
        changes: Mapping[str, WeightChange],
        dtype: torch.dtype,
        device: torch.device,
        *,
        attention: str | None = EAGER,
    ) -> LoadedModel:
        """The model in one dtype.

        Args:
            changes: as `find_changes` gives them.
            dtype: of all parameters and of what stands beside them.
            device: to run on.
            attention: the implementation, by transformers' name; None for the class's own choice.

        Raises:
            CheckpointError: transformers cannot load the base.
        """
        skeleton, saved = self.skeleton, self._plan.adapter.saved
        tensors = {}
        for name, tensor in read_tensors(self._plan.checkpoint).items():
            in_model, reshaped = skeleton.tensor_name(name)
            tensors[name if reshaped else in_model] = tensor
        tensors |= {skeleton.tensor_name(name)[0]: tensor for name, tensor in saved.items()}
        folder = self._plan.base.folder
        loaded = _load(skeleton.model_class, skeleton.config, tensors, dtype, folder, attention)
        loaded.model.to(device)
        for module, change in changes.items():
            change.stand_beside(loaded.model, skeleton.module_path(module), dtype)
        return loaded


class MergedLoader:
    """Loads a merged checkpoint in the class that its adapter was trained in."""

    def __init__(self, checkpoint: Checkpoint, like: Skeleton) -> None:
        """Read the config.

        Args:
            checkpoint: the merged checkpoint.
            like: the model that it should be.

        Raises:
            CheckpointError: its config is missing or malformed.
            UnsupportedError: it is quantized, or of an unknown model type.
        """
        self._checkpoint = checkpoint
        self._like = like
        self._config = read_config(checkpoint.folder)

    def load(self, dtype: torch.dtype, device: torch.device) -> LoadedModel:
        """The model in one dtype.

        Raises:
            CheckpointError: it is of another class, or transformers cannot load it.
        """
        folder, config, like = self._checkpoint.folder, self._config, self._like
        if type(config) is not type(like.config):
            raise CheckpointError(
                f"{folder}: its model type is '{config.model_type}', that of the base "
                f"'{like.config.model_type}'"
            )
        loaded = _load(like.model_class, config, read_tensors(self._checkpoint), dtype, folder)
        loaded.model.to(device)
        return loaded


class PlainLoader:
    """Loads a checkpoint on its own, in a class of transformers.

    Attributes:
        skeleton: the model class with the checkpoint's config.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton) -> None:
        """Keep what to load; reads no tensors."""
        self._checkpoint = checkpoint
        self.skeleton = skeleton

    @property
    def numbers(self) -> int:
        """How many numbers the model holds."""
        return self.skeleton.numbers

    def load(
        self, dtype: torch.dtype, device: torch.device, *, attention: str | None = EAGER
    ) -> LoadedModel:
        """The model in one dtype.

        Args:
            dtype: of all parameters.
            device: to run on.
            attention: the implementation, by transformers' name; None for the class's own choice.

        Raises:
            CheckpointError: transformers cannot load it.
        """
        skeleton, folder = self.skeleton, self._checkpoint.folder
        tensors = read_tensors(self._checkpoint)
        model_class, config = skeleton.model_class, skeleton.config
        loaded = _load(model_class, config, tensors, dtype, folder, attention)
        loaded.model.to(device)
        return loaded


def read_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, memory-mapped.

    Raises:
        CheckpointError: a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for file in checkpoint.files:
        try:
            tensors |= load_file(file.path) if file.tensors is None else file.tensors
        except (SafetensorError, OSError) as cause:
            raise CheckpointError(f"{file.path}: not readable ({first_line(cause)})") from cause
    return tensors


def _load(
    model_class: Any,
    config: PretrainedConfig,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    folder: Path,
    attention: str | None = EAGER,
) -> LoadedModel:
    """A model from tensors, on the CPU; `folder` is what errors name."""
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = pad_token(config)  # classifiers on decoders refuse batches without
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as cause:  # model classes raise errors of many kinds
        raise CheckpointError(
            f"{folder}: transformers cannot load it as {model_class.__name__} ({first_line(cause)})"
        ) from cause
    missing = frozenset(info["missing_keys"])
    for name, parameter in model.named_parameters():
        if name in missing:
            parameter.data.zero_()  # transformers has drawn them at random
        elif parameter.is_floating_point() and parameter.dtype != dtype:
            # What a class keeps in float32 (T5's `wo` in float16) is not `dtype` otherwise.
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return LoadedModel(model.eval().requires_grad_(False), missing)


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its progress bars and loading reports."""
    logging: Any = transformers.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
