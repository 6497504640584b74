"""How far two sets of signs agree, each layer up to its sign as a whole."""

import math

import torch
from torch import Tensor


def agreement(signs: Tensor, others: Tensor, matters: Tensor) -> float:
    """Share of the signs that matter that are the same; arguments as of `same_signs`."""
    return float(same_signs(signs, others, matters)[matters].double().mean())


def same_signs(signs: Tensor, others: Tensor, matters: Tensor) -> Tensor:
    """Which signs agree (bool), each layer up to its sign as a whole, which says nothing.

    Args:
        signs: modules × r, ±1.
        others: the same.
        matters: which signs tell a layer's sign as a whole (bool, modules × r).
    """
    products = signs * others
    turned = (products * matters).sum(1, keepdim=True) < 0
    return products * torch.where(turned, -1.0, 1.0) > 0


def agreement_by_chance(matters: Tensor) -> float:
    """What `agreement` of signs drawn at random is in the mean; the argument as above."""
    counts = [int(count) for count in matters.sum(1) if count]
    # Of n fair coins n/2 + n C(n − 1, ⌊n/2⌋) / 2ⁿ show, in the mean, the side that more of them do.
    alike = (n / 2 + n * (math.comb(n - 1, n // 2) / 2**n) for n in counts)
    return float(sum(alike) / sum(counts))
