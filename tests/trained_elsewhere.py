"""Adapters in formats of code that is not PEFT's, trained here by layers written from formulas.

The layers compute what the papers and their code say, slowly and plainly, with dense matrices that
are built entry by entry. Nothing of the package is used.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Terms = int | Literal["exact"]
_STEPS = 6


def pairs(dimension: int) -> Iterator[list[tuple[int, int, int]]]:
    """The levels of qGOFT: lists of (number of the transform, first input, second input)."""
    alive, step, number = dimension, 1, 0
    while alive > 1:
        count = alive // 2
        yield [(number + i, 2 * step * i, 2 * step * i + step) for i in range(count)]
        number, alive, step = number + count, alive - count, 2 * step


def givens_blocks(stored: Mapping[str, Tensor]) -> Tensor:
    """The 2 × 2 transforms of a module."""
    if "givens_soft" in stored:
        return stored["givens_soft"]
    angles = math.pi * torch.tanh(stored["givens_hard"])
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)


def givens_matrix(stored: Mapping[str, Tensor], form: str, dimension: int) -> Tensor:
    """G (d × d) with merged weight W Gᵀ and layer output W Gᵀ x.

    `paper`: G = L_last … L₁ S with true transforms L of the pairs. `reference`: what the forward
    pass of the code's second version does to x, level after level from the last, x' = cos x +
    sin (−x₁, x₀, −x₃, x₂, …), then the scaler; Gᵀ is that map.
    """
    blocks = givens_blocks(stored)
    kind = {"dtype": blocks.dtype}
    identity = torch.eye(dimension, **kind)
    scaler = stored.get("givens_scaler", torch.ones(dimension, **kind))
    levels = list(pairs(dimension))
    if form == "paper":
        product = torch.diag(scaler)
        for level in levels:
            transform = identity.clone()
            for number, i, j in level:
                for row, left in enumerate((i, j)):
                    for column, right in enumerate((i, j)):
                        transform[left, right] = blocks[number, row, column]
            product = transform @ product
        return product
    mapped = identity
    for level in reversed(levels):
        cosine, sine = torch.ones(dimension, **kind), torch.zeros(dimension, **kind)
        for number, i, j in level:
            cosine[i], cosine[j] = blocks[number, 0, 0], blocks[number, 1, 1]
            sine[i], sine[j] = -blocks[number, 0, 1], blocks[number, 1, 0]
        turn = torch.zeros(dimension, dimension, **kind)
        for i in range(0, dimension, 2):
            turn[i, i], turn[i, i + 1] = cosine[i], -sine[i]
            turn[i + 1, i], turn[i + 1, i + 1] = sine[i + 1], cosine[i + 1]
        mapped = turn @ mapped
    return (torch.diag(scaler) @ mapped).T


def paper_rotation(stored: Mapping[str, Tensor], terms: Terms, rank: int) -> Tensor:
    """R of the PSOFT paper's code: K from the entries below the diagonal, row by row."""
    params = stored["a_params"]
    identity = torch.eye(rank, dtype=params.dtype)
    if params.ndim == 2:
        turn = params
    else:
        k = torch.zeros(rank, rank, dtype=params.dtype)
        places = [(i, j) for i in range(rank) for j in range(i)]
        for number, (i, j) in enumerate(places):
            k[i, j], k[j, i] = params[number], -params[number]
        if terms == "exact":
            turn = (identity - k) @ torch.linalg.inv(identity + k)
        else:
            powers = [torch.linalg.matrix_power(-k, n) for n in range(terms + 2)]
            turn = powers[0] + 2 * sum(powers[1:-1], torch.zeros_like(k)) + powers[-1]
    for name, shape in (("mag_vector_b", (rank, 1)), ("mag_vector_a", (1, rank))):
        if name in stored:
            turn = turn * stored[name].reshape(shape)
    return turn


class Layer(nn.Module):
    """A linear layer (or `Conv1D`) whose weight a method changes; out × in whatever it stores."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.bias = layer.bias
        weight: Any = layer.weight
        self.weight = weight.detach().T if isinstance(layer, Conv1D) else weight.detach()
        self.stored = nn.ParameterDict()

    def changed(self, weight: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weight = self.changed(self.weight, dict(self.stored.items()))
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)

    def exact(self) -> Tensor:
        """The merged weight in float64."""
        stored = {name: value.detach().double() for name, value in self.stored.items()}
        return self.changed(self.weight.double(), stored)


class Givens(Layer):
    def __init__(
        self, layer: nn.Module, *, form: str, strict: bool = True, scaled: bool = True
    ) -> None:
        super().__init__(layer)
        self.form, dimension = form, self.weight.shape[1]
        if strict:
            self.stored["givens_hard"] = nn.Parameter(torch.zeros(dimension - 1))
            if scaled:
                self.stored["givens_scaler"] = nn.Parameter(torch.ones(dimension))
        else:
            eyes = torch.eye(2).repeat(dimension - 1, 1, 1)
            self.stored["givens_soft"] = nn.Parameter(eyes)

    def changed(self, weight: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        return weight @ givens_matrix(stored, self.form, weight.shape[1]).to(weight).T


class Paper(Layer):
    """PSOFT as the paper's code trains it; its base weight becomes the residual, as there."""

    def __init__(
        self,
        layer: nn.Module,
        *,
        rank: int,
        alpha: float,
        terms: Terms = 5,
        orthogonal: bool = True,
        vectors: str = "ab",
        rslora: bool = False,
    ) -> None:
        super().__init__(layer)
        self.rank, self.terms = rank, terms
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        u, s, v = torch.linalg.svd(self.weight.float(), full_matrices=False)
        self.a = v[:rank].contiguous()
        self.b = (u[:, :rank] * s[:rank] / self.scaling).contiguous()
        size = (rank * (rank - 1) // 2,)
        start = torch.zeros(size) if orthogonal else torch.eye(rank)
        self.stored["a_params"] = nn.Parameter(start)
        for name in vectors:
            self.stored[f"mag_vector_{name}"] = nn.Parameter(torch.ones(rank))

    def changed(self, weight: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        a, b = self.a.to(weight), self.b.to(weight)
        residual = weight - self.scaling * b @ a
        return residual + self.scaling * b @ paper_rotation(stored, self.terms, self.rank) @ a


def replace(model: PreTrainedModel, targets: Mapping[str, Layer]) -> None:
    """Put layers into a model."""
    for path, layer in targets.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)


def train(model: PreTrainedModel, layers: Mapping[str, Layer]) -> None:
    """A few steps of Adam on random tokens, from a start that is not the identity."""
    model.requires_grad_(False)
    parameters = [p for layer in layers.values() for p in layer.stored.values()]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tokens = torch.randint(5, 90, (2, 12), generator=generator)
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    losses = []
    for _ in range(_STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], "it trains"
    model.eval()


def save(
    folder: Path,
    layers: Mapping[str, Layer],
    *,
    adapter_name: str = "",
    buffers: bool = True,
    **config: Any,
) -> Path:
    """Write an adapter's folder as the code of its method does.

    `adapter_name` stands in the keys of checkpoints that keep it; `buffers` says whether those
    that `state_dict` holds are there.
    """
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    suffix = f".{adapter_name}" if adapter_name else ""
    for path, layer in layers.items():
        prefix = f"base_model.model.{path}"
        stored = {name: value.detach().clone() for name, value in layer.stored.items()}
        if isinstance(layer, Paper):
            tensors |= {f"{prefix}.lora_orth{suffix}.{n}": t for n, t in stored.items()}
            tensors[f"{prefix}.lora_A{suffix}.weight"] = layer.a
            tensors[f"{prefix}.lora_B{suffix}.weight"] = layer.b
            if buffers and stored["a_params"].ndim == 1:
                lower = torch.tril_indices(layer.rank, layer.rank, -1)
                tensors[f"{prefix}.lora_orth{suffix}.indices_lower"] = lower
        else:
            tensors |= {f"{prefix}.{n}{suffix}": t for n, t in stored.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
