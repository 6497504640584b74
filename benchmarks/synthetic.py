"""Makes a Llama-shaped base with decaying spectra, and a PSOFT adapter for it, without any SVD.

Tensor by tensor into the file, so that memory stays small; the same numbers for the same seed.
"""

import sys
from pathlib import Path

import torch
from peft import PsoftConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.shapes import SHAPES, TARGETS, Shape
from benchmarks.spectra import decaying, gaussian
from psoft_export.checkpoint.writer import ShardWriter, TensorSpec

_SEED = 20261122
_DTYPE = torch.bfloat16
_GENERATOR_ENTRY = 0.01  # of Q; rotates planes by up to some 18 degrees at rank 64
_VECTOR_DEVIATION = 0.02


def make_base(shape: Shape, folder: Path) -> None:
    """Write `config.json` and one bf16 `model.safetensors`."""
    folder.mkdir(parents=True)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    tensors = list(shape.tensors())
    specs = [
        TensorSpec(name, "BF16", (columns,) if rows == 1 else (rows, columns))
        for name, (rows, columns) in tensors
    ]
    random = torch.Generator().manual_seed(_SEED)
    writer = ShardWriter(folder / "model.safetensors", specs, {"format": "pt"})
    for name, (rows, columns) in tensors:
        values = _values(name, rows, columns, random).to(_DTYPE)
        writer.append(values.reshape(-1).view(torch.uint8))
    writer.close()


def make_adapter(shape: Shape, rank: int, folder: Path) -> None:
    """Write a PSOFT adapter of scaling 1 on every linear map of every layer, as PEFT saves it."""
    config = PsoftConfig(
        task_type="CAUSAL_LM",
        r=rank,
        psoft_alpha=rank,
        target_modules=list(TARGETS),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    random = torch.Generator().manual_seed(_SEED + 1)
    tensors = {}
    for layer in range(shape.layers):
        for path in shape.linears():
            prefix = f"base_model.model.model.layers.{layer}.{path}.psoft_R"
            entries = torch.randn(rank * (rank - 1) // 2, generator=random)
            tensors[f"{prefix}.weight"] = _GENERATOR_ENTRY * entries
            for vector in ("vector_a", "vector_b"):
                deviation = torch.randn(rank, generator=random)
                tensors[f"{prefix}.{vector}"] = 1 + _VECTOR_DEVIATION * deviation
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _values(name: str, rows: int, columns: int, random: torch.Generator) -> Tensor:
    if rows == 1:
        return gaussian(rows, columns, random).add_(1)
    make = decaying if name.startswith("model.layers.") else gaussian
    return make(rows, columns, random)


def main() -> None:
    """`python -m benchmarks.synthetic SIZE RANK BASE ADAPTER`."""
    size, rank, base, adapter = sys.argv[1:]
    make_base(SHAPES[size], Path(base))
    make_adapter(SHAPES[size], int(rank), Path(adapter))


if __name__ == "__main__":
    main()
