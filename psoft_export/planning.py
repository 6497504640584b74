"""Making the plan of a merge: every tensor of the output gets its origin, before any is read.

Everything that can be wrong with names, shapes and configs is found here. Importing this module
loads transformers, which takes seconds and over 100 MB.
"""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from psoft_export.adapters.adapter import Adapter
from psoft_export.adapters.files import is_narrowed
from psoft_export.checkpoint.dtypes import CODES, WEIGHT_CODES, config_name
from psoft_export.checkpoint.reader import Checkpoint, WeightFile
from psoft_export.checkpoint.safetensors_file import TensorEntry
from psoft_export.checkpoint.writer import TensorSpec, aligned_order
from psoft_export.errors import MismatchError, UnsupportedError, UsageError
from psoft_export.model.skeleton import Skeleton, find_skeleton, read_config
from psoft_export.plan import Layout, OutputOptions, PlannedShard, PlannedTensor


def make_layout(checkpoint: Checkpoint, adapter: Adapter, options: OutputOptions) -> Layout:
    """Match an adapter to a base checkpoint and lay out the output.

    Args:
        checkpoint: the base's weight files, opened; its folder holds the config.
        adapter: the adapter.
        options: what is asked of the output.

    Raises:
        CheckpointError: the base's config is missing or malformed.
        MismatchError: the adapter does not fit this base.
        UnsupportedError: a target is tied, quantized or not a linear layer.
        UsageError: `labels` or `max_shard_size` cannot be used.
    """
    dtype = options.dtype
    config = read_config(checkpoint.folder)
    skeleton = find_skeleton(config, adapter.config, adapter.modules)
    skeleton, changes = _fit_head(skeleton, adapter, options.labels)
    base_names = _Names(skeleton, checkpoint)
    targets = _match_targets(skeleton, base_names, adapter)
    _check_coverage(skeleton, adapter)
    saved = _match_saved(skeleton, adapter)
    renamed = bool(saved) and [skeleton.class_name] != config.architectures
    if renamed:
        changes["architectures"] = [skeleton.class_name]
    if dtype is not None:
        changes["dtype"] = config_name(dtype)

    groups: list[tuple[str, Mapping[str, str], list[PlannedTensor]]] = []
    for file in checkpoint.files:
        tensors = []
        for entry in file.entries:
            if entry.name in base_names.aliases:
                continue
            name = base_names.model_name[entry.name]
            output = base_names.with_prefix(entry.name) if renamed else entry.name
            kept = name in skeleton.parameters
            if name in saved:
                stored, tensor = saved.pop(name)
                tensors.append(PlannedTensor(_saved_spec(output, tensor, dtype), saved=stored))
            else:
                spec = TensorSpec(output, _output_code(entry.dtype, dtype), entry.shape)
                module, transposed = targets.get(entry.name, (None, False))
                tensors.append(
                    PlannedTensor(spec, entry, module, is_parameter=kept, transposed=transposed)
                )
        groups.append((_output_filename(file), file.metadata or {"format": "pt"}, tensors))
    for name, (stored, tensor) in saved.items():
        groups[-1][2].append(PlannedTensor(_saved_spec(name, tensor, dtype), saved=stored))

    shards = _lay_out(groups, options.max_shard_size)
    missing = _missing_tensors(skeleton, base_names, adapter)
    warnings = [*_missing_warning(missing, skeleton, renamed), *adapter.warnings]
    return Layout(shards, skeleton.class_name, changes, tuple(warnings))


class _Names:
    """The base's tensors by model name, and what loading does to each.

    Attributes:
        entries: every tensor of the files, by its name there.
        model_name: name in the files → name in the model; `by_model_name` is the inverse.
        reshaped: names in the files whose tensors loading splits, joins or permutes.
        aliases: second names, in pickle files, of a tied weight; written once is enough.
    """

    def __init__(self, skeleton: Skeleton, checkpoint: Checkpoint) -> None:
        self._skeleton = skeleton
        self._pickled = {n: t for f in checkpoint.files for n, t in (f.tensors or {}).items()}
        self.entries = checkpoint.entries
        self.model_name: dict[str, str] = {}
        self.reshaped: set[str] = set()
        for name in self.entries:
            self.model_name[name], converted = skeleton.tensor_name(name)
            if converted:
                self.reshaped.add(name)
        self.by_model_name = {model: name for name, model in self.model_name.items()}
        self.aliases = {name for name in self._pickled if self._is_alias(name)}

    def with_prefix(self, name: str) -> str:
        """The name with the base-model prefix in front, where the model class has it there.

        A file of the bare model says `encoder.…`; one of a model with a head, `bert.encoder.…`.
        """
        prefix = f"{self._skeleton.prefix}."
        model_name = self.model_name[name]
        if name.startswith(prefix) or not model_name.startswith(prefix):
            return name
        same = self._skeleton.tensor_name(prefix + name)[0] == model_name
        return prefix + name if same else name

    def sharing(self, name: str) -> str | None:
        """Another tensor of the pickle files over the same memory, or None."""
        return next((n for n in self._pickled if n != name and self._overlap(n, name)), None)

    def _is_alias(self, name: str) -> bool:
        source = self._skeleton.tied.get(self.model_name[name], "")
        first = self.by_model_name.get(source)
        return first in self._pickled and self._overlap(first, name)

    def _overlap(self, first: str, second: str) -> bool:
        one, other = self._pickled[first], self._pickled.get(second)
        if other is None:
            return False
        return (
            one.data_ptr() < other.data_ptr() + other.nbytes
            and other.data_ptr() < one.data_ptr() + one.nbytes
        )


def _match_targets(
    skeleton: Skeleton, names: _Names, adapter: Adapter
) -> dict[str, tuple[str, bool]]:
    """Checkpoint tensor name → adapter module, and whether it is stored in × out, for all."""
    targets: dict[str, tuple[str, bool]] = {}
    for stored in adapter.modules:
        path = skeleton.module_path(stored)
        module = skeleton.module(path)
        transposed = adapter.takes_conv1d and isinstance(module, Conv1D)
        if not (transposed or isinstance(module, nn.Linear)):
            raise UnsupportedError(
                f"target module '{stored}' is {type(module).__name__}, not torch.nn.Linear; "
                "such adapters are of linear layers only"
            )
        weight = f"{path}.weight"
        if (other := skeleton.sharing(weight)) is not None:
            raise UnsupportedError(
                f"target module '{stored}': its weight is tied to '{other}'; merging would change "
                "both. Untie the base (tie_word_embeddings: false) and train on that"
            )
        name = names.by_model_name.get(weight)
        if name is None:
            raise MismatchError(
                f"target module '{stored}': the base checkpoint has no tensor '{weight}'"
            )
        if (other := names.sharing(name)) is not None:
            raise UnsupportedError(
                f"target module '{stored}': its tensor '{name}' shares its storage with '{other}' "
                "in the base's file; merging would change both"
            )
        targets[name] = (stored, transposed)
        _check_target(stored, names.entries[name], name in names.reshaped, skeleton.shapes[weight])
        rows, columns = names.entries[name].shape
        adapter.check_target(stored, (columns, rows) if transposed else (rows, columns))
    return targets


def _check_target(module: str, entry: TensorEntry, reshaped: bool, shape: tuple[int, ...]) -> None:
    where = f"{entry.file.name}: tensor '{entry.name}' of target module '{module}'"
    if reshaped:
        raise UnsupportedError(
            f"{where} is split, joined or permuted when transformers loads it; "
            "the file has no plain matrix to merge into"
        )
    if entry.dtype not in WEIGHT_CODES:
        known = ", ".join(WEIGHT_CODES)
        raise UnsupportedError(f"{where} has dtype {entry.dtype}; one of {known} is needed")
    if entry.shape != shape:
        raise MismatchError(
            f"{where} has shape {list(entry.shape)}, but the base's config says {list(shape)}"
        )


def _check_coverage(skeleton: Skeleton, adapter: Adapter) -> None:
    """Refuse a base with layers that the adapter's own `target_modules` names but it lacks.

    PEFT adapts every match, so a gap means that the base is another (a deeper) model.
    """
    wanted = adapter.config.get("target_modules")
    if wanted == "all-linear" or is_narrowed(adapter.config):
        return
    paths = list(skeleton.linear_paths(with_conv1d=adapter.takes_conv1d))
    # PEFT adapts nothing inside a module that is trained and saved whole.
    whole = [re.escape(str(name)) for name in adapter.config.get("modules_to_save") or ()]
    inside_saved = re.compile(rf"(.*\.)?({'|'.join(whole)})(\..*)?") if whole else None
    if isinstance(wanted, str):
        matches = [p for p in paths if re.fullmatch(wanted, p)]
    else:
        suffixes = tuple(str(name) for name in wanted or ())
        matches = [p for p in paths if any(p == s or p.endswith("." + s) for s in suffixes)]
    adapted = {skeleton.module_path(stored) for stored in adapter.modules}
    missing = [
        path
        for path in matches
        if path not in adapted and not (inside_saved and inside_saved.fullmatch(path))
    ]
    if missing:
        raise MismatchError(
            f"{adapter.source.folder / adapter.weights_file}: no tensors for '{missing[0]}', which "
            f"target_modules names and the base has ({len(missing)} such); "
            "the adapter was trained on another base"
        )


def _fit_head(
    skeleton: Skeleton, adapter: Adapter, labels: tuple[str, ...] | None
) -> tuple[Skeleton, dict[str, Any]]:
    """Change the config so that the model has the shapes of the adapter's saved modules."""
    changes: dict[str, Any] = {}
    shapes = {skeleton.tensor_name(s)[0]: tuple(t.shape) for s, t in adapter.saved.items()}
    for name in skeleton.embedding_names() & shapes.keys():
        if shapes[name][0] != skeleton.shapes[name][0]:
            changes["vocab_size"] = shapes[name][0]
    head = skeleton.label_tensors() & shapes.keys() if shapes else set()
    if labels is not None and not head:
        raise UsageError("labels: the adapter has no classification head (modules_to_save)")
    if head:
        count = shapes[min(head)][0]
        recorded: Mapping[Any, str] = skeleton.config.id2label or {}
        names = labels or tuple(
            recorded.get(i, f"LABEL_{i}") if len(recorded) == count else f"LABEL_{i}"
            for i in range(count)
        )
        if len(names) != count:
            raise UsageError(f"labels: {len(names)} names for a head of {count} classes")
        if len(set(names)) != count:
            raise UsageError(f"labels: a name occurs twice in {', '.join(names)}")
        changes["id2label"] = {str(i): name for i, name in enumerate(names)}
        changes["label2id"] = {name: i for i, name in enumerate(names)}
    return (skeleton.rebuilt(**changes) if changes else skeleton), changes


def _match_saved(skeleton: Skeleton, adapter: Adapter) -> dict[str, tuple[str, Tensor]]:
    """Model name → (stored name, tensor) for every tensor of `modules_to_save`."""
    path = adapter.source.folder / adapter.weights_file
    result = {}
    for stored, tensor in adapter.saved.items():
        name, _ = skeleton.tensor_name(stored)
        where = f"{path}: tensor '{stored}' (modules_to_save)"
        if name not in skeleton.shapes:
            raise MismatchError(f"{where} is not part of {skeleton.class_name}")
        if tuple(tensor.shape) != skeleton.shapes[name]:
            raise MismatchError(
                f"{where} has shape {list(tensor.shape)}; "
                f"{skeleton.class_name} of this base needs {list(skeleton.shapes[name])}"
            )
        if (other := skeleton.sharing(name)) is not None:
            raise UnsupportedError(
                f"{where} is tied to '{other}' in this base; replacing one would untie them. "
                "Untie the base (tie_word_embeddings: false) and train on that"
            )
        if tensor.dtype not in CODES:
            raise UnsupportedError(f"{where} has dtype {tensor.dtype}, which cannot be written")
        result[name] = (stored, tensor)
    return result


def _saved_spec(name: str, tensor: Tensor, dtype: str | None) -> TensorSpec:
    return TensorSpec(name, _output_code(CODES[tensor.dtype], dtype), tuple(tensor.shape))


def _output_code(stored: str, dtype: str | None) -> str:
    floating = (*WEIGHT_CODES, "F64")
    return dtype if dtype is not None and stored in floating else stored


def _output_filename(file: WeightFile) -> str:
    name = file.name
    if name.endswith(".bin"):
        name = name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
    return name


def _lay_out(
    groups: list[tuple[str, Mapping[str, str], list[PlannedTensor]]],
    max_shard_size: str | int | None,
) -> tuple[PlannedShard, ...]:
    if max_shard_size is not None:
        planned = {t.spec.name: t for _, _, tensors in groups for t in tensors}
        try:
            split = split_state_dict_into_shards_factory(
                planned,
                get_storage_size=lambda tensor: tensor.spec.nbytes,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=max_shard_size,
            )
        except ValueError as cause:
            raise UsageError(f"max-shard-size '{max_shard_size}': {cause}") from cause
        metadata = groups[0][1]
        groups = [
            (filename, metadata, [planned[name] for name in names])
            for filename, names in split.filename_to_tensors.items()
        ]
    return tuple(
        PlannedShard(filename, _in_order(tensors), metadata)
        for filename, metadata, tensors in groups
        if tensors
    )


def _in_order(tensors: list[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    by_name = {tensor.spec.name: tensor for tensor in tensors}
    return tuple(by_name[spec.name] for spec in aligned_order(t.spec for t in tensors))


def _missing_tensors(skeleton: Skeleton, names: _Names, adapter: Adapter) -> list[str]:
    have = set(names.by_model_name) | {skeleton.tensor_name(s)[0] for s in adapter.saved}
    return sorted(
        name for name in skeleton.parameters if name not in have and name not in skeleton.tied
    )


def _missing_warning(missing: list[str], skeleton: Skeleton, renamed: bool) -> list[str]:
    if not missing:
        return []
    listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
    if renamed:
        return [
            f"{skeleton.class_name} has parameters that neither base nor adapter holds ({listed}); "
            "loading the output will initialise them at random"
        ]
    return [
        f"the adapter was trained in {skeleton.class_name}, whose {listed} it does not bring "
        "(modules_to_save); the output keeps the base's own architecture"
    ]
