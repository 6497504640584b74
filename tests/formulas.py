"""What PEFT's other methods do to a weight, in float64 from their papers' formulas.

Plain and dense. Tensors are those of one module, named as in the file but for the prefix.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def merged(method: str, weight: Tensor, stored: Mapping[str, Tensor], config: Any) -> Tensor:
    """The merged weight (out × in) in float64."""
    w = weight.double()
    stored = {name: tensor.double() for name, tensor in stored.items()}
    return {"LORA": _lora, "OFT": _oft, "BOFT": _boft, "HRA": _hra}[method](w, stored, config)


def _lora(w: Tensor, stored: Mapping[str, Tensor], config: Any) -> Tensor:
    """W + s B A with s = alpha / r, or alpha / √r; DoRA: each row of it at the stored norm."""
    a, b = stored["lora_A.weight"], stored["lora_B.weight"]
    scaling = config["alpha"] / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
    changed = w + scaling * b @ a
    if not config.get("use_dora"):
        return changed
    norms = changed.square().sum(dim=1).sqrt()
    return changed * (stored["lora_magnitude_vector"] / norms)[:, None]


def _oft(w: Tensor, stored: Mapping[str, Tensor], config: Any) -> Tensor:
    """W Rᵀ, R block-diagonal with R = (I − Q)(I + Q)⁻¹, or its series I + 2Q + 2Q² + … + Qⁿ of −Q.

    Of the series PEFT takes Q itself where the exact form takes −Q.
    """
    size = config["oft_block_size"]
    blocks = []
    for entries in stored["oft_R.weight"]:
        q = torch.zeros(size, size, dtype=torch.float64)
        number = 0
        for i in range(size):
            for j in range(i + 1, size):
                q[i, j], q[j, i] = entries[number], -entries[number]
                number += 1
        one = torch.eye(size, dtype=torch.float64)
        if config.get("use_cayley_neumann"):
            powers = [torch.linalg.matrix_power(q, n) for n in range(config["terms"])]
            blocks.append(powers[0] + 2 * sum(powers[1:-1], torch.zeros_like(q)) + powers[-1])
        else:
            blocks.append((one - q) @ torch.linalg.inv(one + q))
    rotation = torch.block_diag(*(blocks * (w.shape[1] // size // len(blocks))))
    return w @ rotation.T


def _boft(w: Tensor, stored: Mapping[str, Tensor], _: Any) -> Tensor:
    """diag(s) W Rᵀ, one factor of blocks (I − K)(I + K)⁻¹, K the skew part of what is stored."""
    blocks = []
    for block in stored["boft_R"][0]:
        k = (block - block.T) / 2
        one = torch.eye(len(k), dtype=torch.float64)
        blocks.append((one - k) @ torch.linalg.inv(one + k))
    return stored["boft_s"] * (w @ torch.block_diag(*blocks).T)


def _hra(w: Tensor, stored: Mapping[str, Tensor], config: Any) -> Tensor:
    """W H₁ H₂ … with H = I − 2 u uᵀ, of unit u; after Gram–Schmidt where it is asked for."""
    vectors = stored["hra_u"]
    if config.get("apply_GS"):
        vectors, triangle = torch.linalg.qr(vectors)
        vectors = vectors * triangle.diagonal().sign()
    for u in vectors.T:
        u = u / u.norm()
        w = w - 2 * torch.outer(w @ u, u)
    return w
