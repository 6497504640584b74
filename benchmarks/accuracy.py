"""How far merged weights and LoRA adapters are from W + scaling · B (R − I) A, in float64 here.

Independent of psoft-export: A and B from PEFT's SVD call, everything else written out again.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.report import Accuracy

_NEAREST = 0.5 + 1e-6  # ulp; the allowance is for this evaluation's own rounding
_BASE_PREFIX = "base_model.model."
_SUFFIX = ".psoft_R.weight"
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass
class _Sums:
    largest: float = 0.0
    squares: float = 0.0
    misses: int = 0
    entries: int = 0
    error: float = 0.0
    delta: float = 0.0

    def add(self, merged: Tensor, weight: Tensor, delta: Tensor) -> None:
        exact = weight + delta
        error = (merged.double() - exact).abs()
        ulps = error / _ulp(exact, merged.dtype)
        self.largest = max(self.largest, float(ulps.max()))
        self.squares += float(ulps.square().sum())
        self.misses += int((ulps > _NEAREST).sum())
        self.entries += ulps.numel()
        self.error += float(error.square().sum())
        self.delta += float(delta.square().sum())

    def result(self) -> Accuracy:
        return Accuracy(
            self.largest,
            math.sqrt(self.squares / self.entries),
            self.misses / self.entries,
            math.sqrt(self.error / self.delta),
        )


@dataclass
class _LoraSums:
    """Of one LoRA adapter: its files, and squared norms."""

    folder: Path
    error: float = 0.0
    delta: float = 0.0

    def __post_init__(self) -> None:
        config = json.loads((self.folder / _ADAPTER_CONFIG).read_text("utf-8"))
        self._scaling = config["lora_alpha"] / config["r"]
        self._tensors = load_file(self.folder / _ADAPTER)

    def add(self, module: str, delta: Tensor) -> None:
        down, up = (self._tensors[f"{module}.lora_{side}.weight"].double() for side in "AB")
        self.error += float((self._scaling * up @ down - delta).square().sum())
        self.delta += float(delta.square().sum())


def measure(
    base: Path, adapter: Path, outputs: list[Path], loras: list[Path], device: str
) -> tuple[list[Accuracy], list[float]]:
    """Accuracy over the target modules of the first and the last layer, with SVDs on `device`.

    Returns:
        Of each merged checkpoint in `outputs`; and ‖error‖ / ‖ΔW‖ of each adapter in `loras`.
    """
    config = json.loads((adapter / _ADAPTER_CONFIG).read_text("utf-8"))
    parameters = load_file(adapter / _ADAPTER)
    scaling = config["psoft_alpha"] / config["r"]
    sums, lora_sums = [_Sums() for _ in outputs], [_LoraSums(folder) for folder in loras]
    with ExitStack() as stack:
        source, *merged = (
            stack.enter_context(safe_open(folder / "model.safetensors", "pt"))
            for folder in (base, *outputs)
        )
        for module in _sample(parameters):
            name = module.removeprefix(_BASE_PREFIX) + ".weight"
            weight = source.get_tensor(name)
            delta = _delta(weight, parameters, module, config["r"], scaling, device)
            for file, total in zip(merged, sums, strict=True):
                total.add(file.get_tensor(name), weight.double(), delta)
            for lora in lora_sums:
                lora.add(module, delta)
    errors = [math.sqrt(lora.error / lora.delta) for lora in lora_sums]
    return [total.result() for total in sums], errors


def _sample(parameters: dict[str, Tensor]) -> Iterator[str]:
    modules = [name.removesuffix(_SUFFIX) for name in parameters if name.endswith(_SUFFIX)]
    layers = {int(module.split(".layers.")[1].split(".")[0]) for module in modules}
    for layer in sorted({min(layers), max(layers)}):
        yield from (module for module in modules if f".layers.{layer}." in module)


def _delta(
    weight: Tensor,
    parameters: dict[str, Tensor],
    module: str,
    rank: int,
    scaling: float,
    device: str,
) -> Tensor:
    """scaling · B (R − I) A in float64, from the float32 A and B that PEFT would hold."""
    factors = torch.linalg.svd(weight.float().to(device), full_matrices=False)
    left, values, right = (factor.cpu() for factor in factors)
    a = right[:rank].double()
    b = (left[:, :rank] * (values[:rank] / scaling)).double()
    stored = {
        name: parameters[f"{module}.psoft_R.{name}"].double()
        for name in ("weight", "vector_a", "vector_b")
    }
    q = torch.zeros(rank, rank, dtype=torch.float64)
    q[*torch.triu_indices(rank, rank, 1)] = stored["weight"]
    q = q - q.T
    identity = torch.eye(rank, dtype=torch.float64)
    cayley = torch.linalg.inv(identity - q) @ (identity + q)
    rotation = torch.diag(stored["vector_b"]) @ cayley @ torch.diag(stored["vector_a"])
    delta: Tensor = scaling * (b @ (rotation - identity) @ a)
    return delta


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=limits.tiny)).exponent
    return torch.ldexp(torch.full_like(values, limits.eps), exponent - 1)


def main() -> None:
    """`python -m benchmarks.accuracy DEVICE BASE ADAPTER FOLDER...`; prints a JSON object.

    Folders are merged checkpoints and LoRA adapters, in any order.
    """
    device = sys.argv[1]
    base, adapter, *folders = map(Path, sys.argv[2:])
    loras = [folder for folder in folders if (folder / _ADAPTER).exists()]
    outputs = [folder for folder in folders if folder not in loras]
    merged, errors = measure(base, adapter, outputs, loras, device)
    print(json.dumps({"merged": [asdict(accuracy) for accuracy in merged], "lora": errors}))


if __name__ == "__main__":
    main()
