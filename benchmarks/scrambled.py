"""Adapters as another machine would have trained them: one model, in a basis of other signs."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import psoft_export
from psoft_export.adapters.adapter import SubspaceAdapter
from psoft_export.adapters.psoft import tensor_name
from psoft_export.algebra.rotation import conjugated
from psoft_export.basis.signs import SignRecord

WEIGHTS = "adapter_model.safetensors"


def scramble(adapter: Path, folder: Path, signs: dict[str, Tensor]) -> Path:
    """Write a copy of an adapter, without its record, that means the same in another basis.

    Args:
        adapter: in PEFT's format.
        folder: to write.
        signs: module → ±1 (r): the other basis's signs against the adapter's.
    """
    folder.mkdir(parents=True)
    for path in adapter.iterdir():
        if path.name not in (WEIGHTS, "psoft_basis.safetensors"):
            shutil.copyfile(path, folder / path.name)
    loaded = psoft_export.load_adapter(adapter)
    assert isinstance(loaded, SubspaceAdapter)
    tensors = load_file(adapter / WEIGHTS)
    for module, parameters in loaded.rotations.items():
        other = conjugated(parameters, signs[module]).weight.contiguous()
        tensors[tensor_name(module, "weight")] = other
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def random_signs(adapter: Path, seed: int) -> dict[str, Tensor]:
    """Signs drawn at random for every module of an adapter."""
    loaded = psoft_export.load_adapter(adapter)
    assert isinstance(loaded, SubspaceAdapter)
    generator = torch.Generator().manual_seed(seed)
    return {
        module: torch.randint(2, (loaded.rank,), generator=generator) * 2.0 - 1
        for module in loaded.modules
    }


def right_signs(
    adapter: Path, planted: dict[str, Tensor], found: dict[str, SignRecord]
) -> dict[str, Tensor]:
    """Which signs found for a scrambled adapter are right, each layer up to its sign as a whole.

    Args:
        adapter: the one that was scrambled, with its `signs` record.
        planted: the signs it was scrambled with.
        found: module → signs, as `RecoveryReport.signs` has them.

    Returns:
        Module → r truth values.
    """
    record = psoft_export.load_adapter(adapter).record
    assert record is not None
    right = {}
    for module, signs in found.items():
        known = record.signs(module)
        if not torch.equal(known.anchor, signs.anchor):
            raise ValueError(f"{module}: the records anchor their signs in different rows")
        same = known.sign.float() * planted[module] * signs.sign.float()
        right[module] = same * (1 if same.sum() >= 0 else -1) > 0
    return right
