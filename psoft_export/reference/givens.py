"""qGOFT's W P a second time: level by level, without blocks and products of matrices."""

import math

import torch
from torch import Tensor

from psoft_export.algebra.parameters import GivensParameters
from psoft_export.reference.expected import DeltaRows, Expected


def expected_rows(parameters: GivensParameters, weight: Tensor) -> Expected:
    """W P − W.

    Args:
        parameters: of P.
        weight: W (out × in), any floating dtype; on its device the result is computed.
    """
    steps = list(_steps(parameters.dimension))
    transform = _transforms(parameters).to(weight.device)
    scaler = None
    if parameters.scaler is not None:
        scaler = parameters.scaler.to(weight.device, torch.float64)
    fused = (
        _fused(transform, steps, parameters.dimension) if parameters.form == "reference" else None
    )

    def delta(rows: Tensor, _: slice) -> Tensor:
        turned = rows.clone() if scaler is None else rows * scaler
        if fused is not None:
            left, right = turned[:, 0::2], turned[:, 1::2]
            turned = torch.stack(
                [left * fused[0] + right * fused[2], left * fused[1] + right * fused[3]], dim=2
            ).flatten(1)
        else:
            start = 0
            for near, far in steps:
                own = transform[start : start + len(near)]
                start += len(near)
                # Slices are several times as fast as indices.
                one = turned[:, near.start : near.stop : near.step]
                other = turned[:, far.start : far.stop : far.step]
                first = one * own[:, 0, 0] + other * own[:, 0, 1]
                other.mul_(own[:, 1, 1]).add_(one * own[:, 1, 0])
                one.copy_(first)
        return turned.sub_(rows)

    growth = _growth(transform, steps, parameters)
    if scaler is not None:
        growth = growth * max(1.0, float(scaler.abs().max()))
    return Expected(
        delta=DeltaRows(delta),
        reach_left=torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64),
        reach_right=1 + growth,
        terms=3 * len(steps) + 2,
    )


def _growth(
    transform: Tensor, steps: list[tuple[range, range]], parameters: GivensParameters
) -> Tensor:
    """A bound for each input (d) of how far P's levels, all signs alike, magnify a row's norm."""
    if parameters.form == "reference":
        p, q, r, s = _fused(transform, steps, parameters.dimension, absolute=True)
        return torch.stack([torch.hypot(p, r), torch.hypot(q, s)], dim=1).flatten()
    bound, start = 1.0, 0
    for near, _ in steps:
        own = transform[start : start + len(near)].abs()
        start += len(near)
        bound *= max(1.0, float(torch.linalg.matrix_norm(own, 2).max()))
    return torch.full((parameters.dimension,), bound, dtype=torch.float64, device=transform.device)


def _steps(dimension: int) -> list[tuple[range, range]]:
    """The inputs paired at each level: those not yet merged into another, two by two."""
    found, alive, step = [], dimension, 1
    while alive > 1:
        pairs = alive // 2
        near = range(0, 2 * step * pairs, 2 * step)
        found.append((near, range(step, step + 2 * step * pairs, 2 * step)))
        alive, step = alive - pairs, 2 * step
    return found


def _transforms(parameters: GivensParameters) -> Tensor:
    """L, in the strict form by tanh x = 1 − 2 / (e²ˣ + 1) and cofunctions."""
    if parameters.blocks is not None:
        return parameters.blocks.to("cpu", torch.float64).clone()
    assert parameters.angles is not None
    stored = parameters.angles.to("cpu", torch.float64)
    angles = math.pi * (1 - 2 / (torch.exp(2 * stored) + 1))
    made = torch.empty(len(stored), 2, 2, dtype=torch.float64)
    made[:, 0, 0] = made[:, 1, 1] = torch.sin(math.pi / 2 - angles)
    made[:, 1, 0] = torch.cos(math.pi / 2 - angles)
    made[:, 0, 1] = -made[:, 1, 0]
    return made


def _fused(
    transform: Tensor, steps: list[tuple[range, range]], dimension: int, *, absolute: bool = False
) -> list[Tensor]:
    """The four entries of each neighbours' 2 × 2 product, over all levels (`reference`).

    With `absolute`, of the factors' absolute values.
    """
    cosine_sine = []
    start = 0
    for near, far in steps:
        own = transform[start : start + len(near)]
        start += len(near)
        cosine = torch.ones(dimension, dtype=torch.float64, device=transform.device)
        sine = torch.zeros_like(cosine)
        for inputs, diagonal, beside in (
            (near, own[:, 0, 0], -own[:, 0, 1]),
            (far, own[:, 1, 1], own[:, 1, 0]),
        ):
            index = torch.tensor(list(inputs), device=transform.device)
            cosine[index], sine[index] = diagonal, beside
        cosine_sine.append((cosine, sine))
    ones, zeros = torch.ones_like(cosine_sine[0][0][::2]), torch.zeros_like(cosine_sine[0][0][::2])
    product = [ones, zeros, zeros, ones]  # of a row (left, right): 00, 01, 10, 11
    for cosine, sine in cosine_sine:
        factor = [cosine[::2], -sine[::2], sine[1::2], cosine[1::2]]
        a, b, c, d = [entry.abs() for entry in factor] if absolute else factor
        p, q, r, s = product
        product = [p * a + q * c, p * b + q * d, r * a + s * c, r * b + s * d]
    return product
