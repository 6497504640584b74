"""The small files beside the weights: config, tokenizer, chat template, processors, licence."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from psoft_export.checkpoint.source import member
from psoft_export.errors import CheckpointError

CONFIG = "config.json"
ROOM_BYTES = 64 * 2**20  # for headers, config and tokenizer, in a check of the disk
_TOKENIZER = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
}
_PROCESSOR = {
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
}
_TEMPLATES = {"chat_template.jinja", "chat_template.json"}
BROUGHT = _TOKENIZER | _TEMPLATES | _PROCESSOR  # what an adapter may bring
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".codes")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_WRITTEN_ANEW = {CONFIG, "psoft_export.json", "adapter_config.json", "export.json"}
_WEIGHT_INDEX = ".index.json"
_PIPELINE_FOLDER = re.compile(r"\d+_[^/]+/[^/]+")  # of sentence-transformers: 1_Pooling/…


def companion_names(names: Iterable[str]) -> list[str]:
    """Of a checkpoint's top-level file names, those that belong beside any weights.

    Model cards stay behind: they speak of another model.
    """
    return [
        name
        for name in sorted(names)
        if "/" not in name
        and not name.startswith(".")
        and name not in _WRITTEN_ANEW
        and not name.endswith(_WEIGHT_INDEX)
        and (name.endswith(_SUFFIXES) or name.upper().startswith(_LEGAL))
    ]


def base_files(names: Iterable[str]) -> list[str]:
    """Of a repository's file names, those to fetch for a base, weights apart.

    Beside `modules.json` that is the folders of a sentence-transformers pipeline, whole.
    """
    names = list(names)
    pipeline = [n for n in names if "modules.json" in names and _PIPELINE_FOLDER.fullmatch(n)]
    return [CONFIG, *companion_names(names), *pipeline]


def gather(base: Path, adapter: Path) -> dict[str, Path]:
    """Output name → file to copy. The adapter's tokenizer and processor take precedence.

    A tokenizer is taken whole from one side; a chat template that the adapter brings without a
    tokenizer replaces the base's.

    Raises:
        CheckpointError: `modules.json` names a path outside the folder.
    """
    ours = {name: base / name for name in companion_names(p.name for p in base.iterdir())}
    theirs = brought(adapter)
    if theirs.keys() & {"tokenizer.json", "tokenizer_config.json"}:
        replaced = _TOKENIZER
    else:
        replaced = _TEMPLATES if theirs.keys() & _TEMPLATES else set()
    replaced = replaced | (_PROCESSOR if theirs.keys() & _PROCESSOR else set())
    files = {name: path for name, path in ours.items() if name not in replaced and path.is_file()}
    files |= {name: path for name, path in theirs.items() if name in replaced}
    return dict(sorted((files | _pipeline_files(base)).items()))


def gather_one(folder: Path) -> dict[str, Path]:
    """As `gather`, of a checkpoint on its own.

    Raises:
        CheckpointError: `modules.json` names a path outside the folder.
    """
    names = companion_names(path.name for path in folder.iterdir() if path.is_file())
    return dict(sorted(({name: folder / name for name in names} | _pipeline_files(folder)).items()))


def brought(adapter: Path) -> dict[str, Path]:
    """The tokenizer, chat template and processor files that an adapter brings, by name."""
    return {path.name: path for path in sorted(adapter.iterdir()) if path.name in BROUGHT}


def write_companions(files: Mapping[str, Path], target: Path) -> None:
    """Copy the files into `target`, making folders as needed."""
    for name, path in files.items():
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, destination)


def write_config(base: Path, changes: Mapping[str, Any], target: Path) -> None:
    """Write `config.json`: the base's file itself, or with some fields changed."""
    path = base / CONFIG
    if not changes:
        shutil.copyfile(path, target / CONFIG)
        return
    fields = json.loads(path.read_text("utf-8"))
    if "dtype" in changes:
        fields.pop("torch_dtype", None)  # the name before transformers 5
    if "id2label" in changes:
        fields.pop("num_labels", None)  # follows from the labels
    write_json(target / CONFIG, {**fields, **changes})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object in the order of its keys, indented by two spaces.

    Configs of some models hold a bare `Infinity`, which stays as it is.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def _pipeline_files(base: Path) -> dict[str, Path]:
    """The files in the folders that a sentence-transformers `modules.json` names."""
    modules = base / "modules.json"
    if not modules.is_file():
        return {}
    try:
        folders = [str(module["path"]) for module in json.loads(modules.read_text("utf-8"))]
    except (ValueError, KeyError, TypeError) as cause:
        raise CheckpointError(f"{modules}: not a readable list of modules") from cause
    files: dict[str, Path] = {}
    for name in filter(None, folders):
        folder = member(base, name, modules.name, CheckpointError)
        if folder.is_dir():
            files |= {f"{name}/{p.name}": p for p in sorted(folder.iterdir()) if p.is_file()}
    return files
