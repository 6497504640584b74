"""What a verification found, as data. Reports, pages and exit codes are made from it alone."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class WeightFigures:
    """How far one merged weight is from W + ΔW evaluated in float64.

    Attributes:
        module: module path, as the adapter names it.
        tensor: name of the checkpoint tensor.
        shape: out × in.
        dtype: dtype code of the merged tensor (`BF16`).
        largest_error_ulp: largest |merged − (W + ΔW)| in units of the last place; 0.5 is perfect.
        not_nearest: number of entries that are not the number of `dtype` nearest to the sum (what
            the float64 evaluation itself cannot tell apart counts as nearest).
        relative_error: ‖merged − (W + ΔW)‖ / ‖W + ΔW‖, Frobenius.
        relative_delta: ‖ΔW‖ / ‖W‖, Frobenius.
        applied: how many times ΔW is in the merged weight, ⟨(merged − W) V, ΔW V⟩ / ‖ΔW V‖² of
            random vectors V: 1 to rounding; 0 where the adapter was forgotten, 2 where it was
            applied twice. None where ΔW is zero, or below the rounding of W V.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    dtype: str
    largest_error_ulp: float
    not_nearest: int
    relative_error: float
    relative_delta: float
    applied: float | None


@dataclass(frozen=True)
class WeightsLevel:
    """The checkpoint's tensors, every one of them.

    Attributes:
        modules: the merged weights, in the order of the checkpoint.
        copied: number of other tensors that are byte for byte the base's, or the nearest numbers
            to the base's where the output has another dtype.
        saved: number of tensors that are the adapter's own (`modules_to_save`).
        problems: what is wrong, one plain sentence each; empty when equivalent.
    """

    modules: tuple[WeightFigures, ...]
    copied: int
    saved: int
    problems: tuple[str, ...]

    @property
    def equivalent(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def summary(self) -> dict[str, Any]:
        """The level in a few figures, JSON-ready."""
        return {
            "equivalent": self.equivalent,
            "merged_tensors": len(self.modules),
            "copied_tensors": self.copied,
            "saved_tensors": self.saved,
            "largest_error_ulp": max((m.largest_error_ulp for m in self.modules), default=0.0),
            "not_nearest": sum(m.not_nearest for m in self.modules),
            "largest_relative_error": max((m.relative_error for m in self.modules), default=0.0),
        }


@dataclass(frozen=True)
class GeometryFigures:
    """What the rotation of one module does to its principal subspace.

    The columns meant are those of the paper's orientation: one vector for each output, the rows
    of B A here. Changes of angles and energy are over all pairs of a fixed sample of them.

    Attributes:
        module: module path, as the adapter names it.
        strict: whether the adapter promises to keep the geometry: R orthogonal by construction
            (exact Cayley transform), without scaling vectors, on an orthonormal A.
        orthogonality_error: ‖RᵀR − I‖_F.
        norm_change: largest |‖after‖ / ‖before‖ − 1|.
        angle_change: largest change of a pairwise angle, in degrees.
        energy_change: |after / before − 1| of the hyperspherical energy Σ 1 / ‖ŵᵢ − ŵⱼ‖.
        basis_residual: how well the basis is one of W: the largest of ‖W vᵢ − σᵢ uᵢ‖ / σ₁, of
            |⟨vᵢ, vⱼ⟩ − δᵢⱼ|, and of what the lengths of A's rows are off.
        largest_angle: largest rotation angle, in degrees.
        median_angle: median rotation angle, in degrees.
    """

    module: str
    strict: bool
    orthogonality_error: float
    norm_change: float
    angle_change: float
    energy_change: float
    basis_residual: float
    largest_angle: float
    median_angle: float


@dataclass(frozen=True)
class GeometryLevel:
    """The rotations and what they keep. `problems` as of `WeightsLevel`."""

    modules: tuple[GeometryFigures, ...]
    problems: tuple[str, ...]

    @property
    def equivalent(self) -> bool:
        """Whether every strict module keeps its geometry, and every basis is one of its weight."""
        return not self.problems

    def summary(self) -> dict[str, Any]:
        """The level in a few figures, JSON-ready."""
        return {
            "equivalent": self.equivalent,
            "strict": all(m.strict for m in self.modules),
            **{
                name: max((getattr(m, name) for m in self.modules), default=0.0)
                for name in (
                    "orthogonality_error",
                    "norm_change",
                    "angle_change",
                    "energy_change",
                    "basis_residual",
                )
            },
        }


@dataclass(frozen=True)
class OutputDistance:
    """How far a model's outputs are from the truth, over all positions that are not padding.

    Attributes:
        rms: root mean square of the differences of single outputs (logits, or hidden states).
        largest: largest |difference|.
        mean: mean |difference|.
        divergence: mean KL divergence of the truth's distribution from the model's, in nats; None
            where outputs are not logits.
        top1: share of positions with the same largest logit; None where outputs are not logits.
    """

    rms: float
    largest: float
    mean: float
    divergence: float | None
    top1: float | None


@dataclass(frozen=True)
class Generation:
    """Greedy generation, token by token against the truth's.

    Attributes:
        tokens: number of tokens generated, over all prompts.
        merged: share of them at which the merged model still follows the truth.
        unmerged: the same of base and adapter side by side, in the merged model's dtype.
    """

    tokens: int
    merged: float
    unmerged: float


@dataclass(frozen=True)
class OutputsLevel:
    """The merged model run beside its base with the adapter not merged.

    Attributes:
        inputs: what was run, in words (`text`, lengths, padding).
        output: what was compared: `logits` or `last_hidden_state`.
        dtype: dtype code of the merged model.
        truth: dtype code in which the truth (base and adapter, not merged) was computed.
        positions: number of positions compared.
        merged: distance of the merged model from the truth.
        unmerged: distance of base and adapter, not merged, both in `dtype`, from the truth.
        factor: `merged.rms` may be this many times `unmerged.rms`.
        generation: greedy generation, or None where the model does not generate.
        losses: task loss in nats per token of `truth`, `unmerged` and `merged`, or None where no
            text was given.
        skipped: why the level was not run, or None. Then all figures are None or zero.
        problems: what is wrong, one plain sentence each.
    """

    inputs: str
    output: str
    dtype: str
    truth: str
    positions: int
    merged: OutputDistance | None
    unmerged: OutputDistance | None
    factor: float
    generation: Generation | None
    losses: Mapping[str, float] | None
    skipped: str | None
    problems: tuple[str, ...]

    @property
    def equivalent(self) -> bool:
        """Whether nothing is wrong; also when the level was not run, which `skipped` says."""
        return not self.problems

    def summary(self) -> dict[str, Any]:
        """The level as one JSON-ready object."""
        return {"equivalent": self.equivalent if self.skipped is None else None, **asdict(self)}


@dataclass(frozen=True)
class VerificationReport:
    """A verdict and what it rests on.

    Attributes:
        base: base as `manifest.source_record` gives it: kind, name, revision, SHA-256 by file.
        adapter: the adapter, likewise.
        merged: the merged checkpoint, likewise: the bytes that the verdict is about.
        method: the adapter's method and options in words.
        basis: where the bases came from, as in `psoft_export.json`.
        weights: the level, or None where it was not asked for; likewise the others.
        geometry: the level.
        outputs: the level.
        warnings: what the user should know, one plain sentence each.
    """

    base: Mapping[str, Any]
    adapter: Mapping[str, Any]
    merged: Mapping[str, Any]
    method: str
    basis: Mapping[str, Any]
    weights: WeightsLevel | None
    geometry: GeometryLevel | None
    outputs: OutputsLevel | None
    warnings: tuple[str, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """All that is wrong, over all levels."""
        levels = (self.weights, self.geometry, self.outputs)
        found = tuple(text for level in levels if level is not None for text in level.problems)
        skipped = self.outputs.skipped if self.outputs is not None else None
        if skipped is not None and self.weights is None and self.geometry is None:
            return (*found, f"outputs: not compared, and nothing else was: {skipped}")
        return found

    @property
    def first_problem(self) -> str:
        """The first problem, and how many more there are; empty where there is none."""
        first, *others = self.problems or ("",)
        return f"{first} (and {len(others)} more)" if others else first

    @property
    def equivalent(self) -> bool:
        """The verdict: nothing wrong at any level that was run, and not none of those asked."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON-ready object; None stands for what is not finite."""
        return {"equivalent": self.equivalent, **_finite(asdict(self))}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
