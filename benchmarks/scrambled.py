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
from psoft_export.basis.signs import SignRecord, signs_at
from psoft_export.basis.solver import leading_triplets

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
    base: Path, adapter: Path, planted: dict[str, Tensor], found: dict[str, SignRecord]
) -> dict[str, Tensor]:
    """Which signs found for a scrambled adapter are right, each layer up to its sign as a whole.

    Args:
        base: the base's folder, with one file of weights.
        adapter: the one that was scrambled, with its `signs` record.
        planted: the signs it was scrambled with.
        found: module → signs, as `RecoveryReport.signs` has them.

    Returns:
        Module → r truth values.
    """
    loaded = psoft_export.load_adapter(adapter)
    assert isinstance(loaded, SubspaceAdapter)
    assert loaded.record is not None
    weights = load_file(base / "model.safetensors")
    right = {}
    for module, signs in found.items():
        known = loaded.record.signs(module)
        # Of entries that are nearly as large, two solvers may take either for the anchor.
        left = leading_triplets(weights[f"{module}.weight"], loaded.rank).triplets.left
        turned = signs_at(left, known.anchor) * signs_at(left, signs.anchor)
        same = known.sign.float() * planted[module] * signs.sign.float() * turned
        right[module] = same * (1 if same.sum() >= 0 else -1) > 0
    return right
