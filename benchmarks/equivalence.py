"""How far right merges, and wrong ones, are from the truth: `python -m benchmarks.equivalence`.

Prints the ratio that the outputs level of `psoft-export verify` judges by (at most 2) as
Markdown: of the bundled adapters, of the tests' small models of several families, and of faults
planted in a bundled adapter's merge. Some minutes on two cores.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import psoft_export
from tests import models

_EXAMPLES = Path(__file__).parent.parent / "examples" / "byte_llama"
_BASE, _ADAPTERS = _EXAMPLES / "base", _EXAMPLES / "adapters"
_PROSE = _ADAPTERS / "prose-relaxed-r64"
_DTYPES = ("fp32", "bf16", "fp16")
_SEEDS = (3, 4)  # of the families' adapters
_MODULE = "model.layers.2.mlp.up_proj"


def ratio(base: Path, adapter: Path, merged: Path) -> float:
    """Distance of the merged model from the truth over that of base and adapter side by side."""
    outputs = psoft_export.verify(base, adapter, merged, level="outputs").outputs
    assert outputs is not None and outputs.merged is not None and outputs.unmerged is not None
    return outputs.merged.rms / outputs.unmerged.rms


def right_merges(scratch: Path) -> Iterator[str]:
    """One row for each bundled adapter and family."""
    for adapter in sorted(_ADAPTERS.iterdir()):
        yield _row(adapter.name, [(_BASE, adapter)], scratch / adapter.name)
    for family in models.FAMILIES:
        base = scratch / f"base-{family}"
        models.save_base(family, base)
        pairs = [
            (base, models.save_adapter(family, base, scratch / f"{family}-{seed}", seed=seed))
            for seed in _SEEDS
        ]
        yield _row(family, pairs, scratch / family)


def _row(name: str, pairs: list[tuple[Path, Path]], output: Path) -> str:
    cells = []
    for dtype in _DTYPES:
        found = []
        for base, adapter in pairs:
            psoft_export.merge(base, adapter, output, dtype=dtype, overwrite=True)
            found.append(ratio(base, adapter, output))
        low, high = f"{min(found):.2f}", f"{max(found):.2f}"
        cells.append(low if low == high else f"{low}–{high}")
    return f"| {name} | {' | '.join(cells)} |"


def faults(scratch: Path) -> Iterator[str]:
    """One row for each fault in the merge of the prose adapter, in bf16."""
    merged, wrong = scratch / "prose", scratch / "wrong"
    psoft_export.merge(_BASE, _PROSE, merged)
    original = load_file(_BASE / "model.safetensors")
    name = f"{_MODULE}.weight"

    def with_delta(times: int) -> Callable[[Tensor], Tensor]:
        def change(value: Tensor) -> Tensor:
            weight = original[name].double()
            return (weight + times * (value.double() - weight)).to(value.dtype)

        return change

    for fault, change in (("left out", with_delta(0)), ("merged twice", with_delta(2))):
        psoft_export.merge(_BASE, _PROSE, wrong, overwrite=True)
        tensors = load_file(wrong / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
        yield f"| one module {fault} | {ratio(_BASE, _PROSE, wrong):.3g} |"
    for pair in (1, 64):
        adapter = _with_flipped_sign(scratch / f"flipped-{pair}", pair - 1)
        psoft_export.merge(_BASE, adapter, wrong, overwrite=True)
        found = ratio(_BASE, _PROSE, wrong)
        yield f"| one sign flipped, of pair {pair} of 64 | {found:.3g} |"


def _with_flipped_sign(folder: Path, pair: int) -> Path:
    """The prose adapter with another sign recorded for one pair of one module."""
    folder.mkdir()
    for path in _PROSE.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    record = folder / "psoft_basis.safetensors"
    with safe_open(record, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(record)
    tensors[f"{_MODULE}.sign"][pair] *= -1
    save_file(tensors, record, metadata)
    return folder


def main() -> None:
    """Print both tables as they are measured."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="psoft-bench-") as scratch:
        print(f"| merged / not merged, rms | {' | '.join(_DTYPES)} |\n| --- | --- | --- | --- |")
        for row in right_merges(Path(scratch)):
            print(row, flush=True)
        print(f"\n| fault in the prose adapter, bf16 ({_MODULE}) | merged / not merged |")
        print("| --- | --- |")
        for row in faults(Path(scratch)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
