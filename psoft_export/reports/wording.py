"""What a verification found, in words and rounded figures. Page and summary say the same."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from psoft_export.manifest import basis_source
from psoft_export.verification.figures import (
    GeometryFigures,
    GeometryLevel,
    OutputsLevel,
    VerificationReport,
    WeightFigures,
    WeightsLevel,
)

PERFECT_ULP = 0.5
_HASH_DIGITS = 12
_NOT_RECORDED = (
    " The basis was not recorded: this holds for the signs found here, and cannot tell whether "
    "they are those of training."
)

_NOT_ASKED = "It was not asked for."
_NO_SUBSPACE = "The method rotates no principal subspace."

FiguresT = TypeVar("FiguresT", WeightFigures, GeometryFigures)


@dataclass(frozen=True)
class Verdict:
    """The verdict for readers.

    Attributes:
        kind: `good`, `bad` or `open`.
        title: the verdict in capitals.
        sentence: what it says of the merged checkpoint.
    """

    kind: str
    title: str
    sentence: str


@dataclass(frozen=True)
class Fact:
    """One figure of a level.

    Attributes:
        name: what it is.
        value: the figure.
        meaning: what it means, in one line.
        module: the module that it is of, or None where it is of all.
        brief: whether a report of few words has it.
    """

    name: str
    value: str
    meaning: str
    module: str | None = None
    brief: bool = False


@dataclass(frozen=True)
class LevelWords:
    """One level.

    Attributes:
        name: its name.
        kind: `good`, `bad` or `open` (not run).
        status: that in words.
        reason: why it was not run, else empty.
    """

    name: str
    kind: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """One figure of the outputs level, of both models; `brief` as of `Fact`."""

    name: str
    merged: str
    unmerged: str
    meaning: str
    brief: bool = True


def verdict(report: VerificationReport) -> Verdict:
    """The verdict, and what it rests on."""
    run = [level.name for level in levels(report) if level.kind != "open"]
    if not run:
        return Verdict("open", "NOT CHECKED", "No level was run, so there is no verdict.")
    if not report.equivalent:
        count = len(report.problems)
        return Verdict(
            "bad",
            "NOT EQUIVALENT",
            "The merged checkpoint is not what base and adapter mean: "
            f"{count} problem{'s' if count > 1 else ''} found.",
        )
    unknown = _NOT_RECORDED if basis_source(report.basis) == "svd" else ""
    checked = " and ".join((", ".join(run[:-1]), run[-1])) if len(run) > 1 else run[0]
    return Verdict(
        "good",
        "EQUIVALENT",
        f"The merged checkpoint is what base and adapter mean. Checked: {checked}.{unknown}",
    )


def levels(report: VerificationReport) -> tuple[LevelWords, LevelWords, LevelWords]:
    """Weights, geometry and outputs, run or not."""
    outputs = report.outputs
    skipped = outputs.skipped if outputs is not None else None
    has_subspace = basis_source(report.basis) != "none"
    return (
        _level("weights", report.weights),
        _level("geometry", report.geometry, _NOT_ASKED if has_subspace else _NO_SUBSPACE),
        _level("outputs", outputs)
        if skipped is None
        else LevelWords("outputs", "open", "not run", skipped),
    )


def _level(
    name: str,
    level: WeightsLevel | GeometryLevel | OutputsLevel | None,
    absent: str = _NOT_ASKED,
) -> LevelWords:
    if level is None:
        return LevelWords(name, "open", "not run", absent)
    if level.equivalent:
        return LevelWords(name, "good", "equivalent")
    count = len(level.problems)
    return LevelWords(name, "bad", f"{count} problem{'s' if count > 1 else ''}")


def in_brief(report: VerificationReport) -> list[tuple[LevelWords, list[str]]]:
    """Each level with its most telling figures; none where it was not run."""
    weights, geometry, outputs = report.weights, report.geometry, report.outputs
    compared = output_facts(outputs) if outputs else ()
    figures = (
        _figures(weight_facts(weights) if weights else ()),
        _figures(geometry_facts(geometry) if geometry else ()),
        [
            f"{_inside(fact.name)} {fact.merged} (not merged: {fact.unmerged})"
            for fact in compared
            if fact.brief
        ],
    )
    return list(zip(levels(report), figures, strict=True))


def _figures(facts: Sequence[Fact]) -> list[str]:
    return [f"{_inside(fact.name)} {fact.value}" for fact in facts if fact.brief]


def _inside(name: str) -> str:
    """A name as inside a sentence."""
    return name if name[:2].isupper() else name[0].lower() + name[1:]


def weight_facts(level: WeightsLevel) -> tuple[Fact, ...]:
    """The level in a few figures."""
    modules = level.modules
    entries = sum(math.prod(m.shape) for m in modules)
    wrong = sum(m.not_nearest for m in modules)
    return (
        Fact("Merged weights", f"{len(modules):,}", f"{entries:,} entries", brief=True),
        *_of_worst(
            "Largest error",
            modules,
            lambda m: m.largest_error_ulp,
            in_ulp,
            "in units in the last place, the spacing of the numbers of the merged dtype; "
            "0.5 is perfect: no number is nearer to W + ΔW",
            brief=True,
        ),
        Fact(
            "Entries not the nearest",
            f"{wrong:,}",
            "entries of merged weights for which there is a number nearer to W + ΔW",
            brief=True,
        ),
        *_of_worst(
            "Largest relative error",
            modules,
            lambda m: m.relative_error,
            number,
            "‖merged − (W + ΔW)‖ / ‖W + ΔW‖: what rounding costs",
        ),
        *_of_worst(
            "Largest change",
            modules,
            lambda m: m.relative_delta,
            number,
            "‖ΔW‖ / ‖W‖: how much the adapter changes a weight",
        ),
        *_of_worst(
            "Times applied",
            modules,
            times_applied_error,
            lambda _: _range_applied(modules),
            "how many times ΔW is in the merged weight: 1 is right, 0 forgotten, 2 twice",
            brief=True,
        ),
        Fact(
            "Other tensors",
            f"{level.copied:,} + {level.saved:,}",
            "the base's, unchanged, + the adapter's own (modules_to_save)",
        ),
    )


def geometry_facts(level: GeometryLevel) -> tuple[Fact, ...]:
    """The level in a few figures."""
    modules = level.modules
    strict = sum(m.strict for m in modules)
    return (
        Fact(
            "Strict modules",
            f"{strict:,} of {len(modules):,}",
            "a strict module promises to keep norms, angles and energy; others may change them",
            brief=True,
        ),
        *_of_worst(
            "Orthogonality error",
            modules,
            lambda m: m.orthogonality_error,
            number,
            "‖RᵀR − I‖: 0 for a rotation that stretches nothing",
            brief=True,
        ),
        *_of_worst(
            "Change of norms",
            modules,
            lambda m: m.norm_change,
            number,
            "largest |‖after‖ / ‖before‖ − 1|",
        ),
        *_of_worst(
            "Change of angles",
            modules,
            lambda m: m.angle_change,
            degrees,
            "largest change of an angle between two vectors, over a sample of pairs",
        ),
        *_of_worst(
            "Change of energy",
            modules,
            lambda m: m.energy_change,
            number,
            "of the hyperspherical energy, relative, over the same pairs",
        ),
        *_of_worst(
            "Basis residual",
            modules,
            lambda m: m.basis_residual,
            number,
            "‖W vᵢ − σᵢ uᵢ‖ / σ₁, or what A is off orthonormal: 0 where the basis is one of this "
            "weight",
            brief=True,
        ),
        *_of_worst(
            "Largest rotation angle",
            modules,
            lambda m: m.largest_angle,
            degrees,
            "how far the adapter turns a direction",
        ),
    )


def _of_worst(
    name: str,
    modules: Sequence[FiguresT],
    figure: Callable[[FiguresT], float | None],
    text: Callable[[float], str],
    meaning: str,
    *,
    brief: bool = False,
) -> list[Fact]:
    """The largest figure with its module; nothing where no module has one."""
    module = worst(modules, figure)
    value = figure(module) if module is not None else None
    if module is None or value is None:
        return []
    return [Fact(name, text(value), meaning, module.module, brief)]


def output_facts(level: OutputsLevel) -> tuple[Comparison, ...]:
    """The merged model and the one that is not merged, figure by figure; nothing if not run."""
    facts = []
    merged, unmerged = level.merged, level.unmerged
    if merged is not None and unmerged is not None:
        facts += [
            _compared("RMS difference", merged.rms, unmerged.rms, "root mean square; decides"),
            _compared("Mean difference", merged.mean, unmerged.mean, "of single outputs", False),
            _compared(
                "Largest difference", merged.largest, unmerged.largest, "of a single output", False
            ),
        ]
        if merged.divergence is not None and unmerged.divergence is not None:
            facts.append(
                _compared(
                    "KL divergence", merged.divergence, unmerged.divergence, "mean, in nats", False
                )
            )
        if merged.top1 is not None and unmerged.top1 is not None:
            facts.append(
                Comparison(
                    "Same top token", share(merged.top1), share(unmerged.top1), "share of positions"
                )
            )
    if (generation := level.generation) is not None:
        facts.append(
            Comparison(
                "Same generation",
                share(generation.merged),
                share(generation.unmerged),
                f"share of {generation.tokens:,} greedy tokens that follow the truth's",
            )
        )
    if (losses := level.losses) is not None:
        facts.append(
            Comparison(
                "Task loss",
                f"{losses['merged']:.4f}",
                f"{losses['unmerged']:.4f}",
                f"nats per token; the truth's is {losses['truth']:.4f}",
            )
        )
    return tuple(facts)


def _compared(
    name: str, merged: float, unmerged: float, meaning: str, brief: bool = True
) -> Comparison:
    return Comparison(name, number(merged), number(unmerged), meaning, brief)


def outputs_ratio(level: OutputsLevel) -> str | None:
    """What the outputs verdict rests on, in one sentence; None where nothing was measured."""
    if level.merged is None or level.unmerged is None or level.unmerged.rms == 0:
        return None
    return (
        f"The merged model is {number(level.merged.rms / level.unmerged.rms)} times as far from "
        f"the truth as base and adapter side by side; {number(level.factor)} times is allowed."
    )


def worst(
    modules: Sequence[FiguresT], figure: Callable[[FiguresT], float | None]
) -> FiguresT | None:
    """The first module with the largest figure, one that is not a number before all others."""

    return max(modules, key=lambda module: _comparable(figure(module)), default=None)


def faults(modules: Sequence[WeightFigures]) -> list[int]:
    """Indices of the modules with entries that are not the nearest, the largest error first."""
    wrong = [i for i, m in enumerate(modules) if m.not_nearest > 0]
    return sorted(wrong, key=lambda i: -_comparable(modules[i].largest_error_ulp))


def number(value: float, digits: int = 3) -> str:
    """A figure for people: 0.5, 12,345, 1.2e-15, `not a number`."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    size = abs(value)
    if value == 0:
        return "0"
    if 1e3 <= size < 1e6:
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    if 1e-3 <= size < 1e3 or "e" in text:
        return text
    return f"{value:.{digits - 1}e}"


def ulp(value: float) -> str:
    """An error in ulp; one above 0.5 never reads as 0.5, but for the rounding of float64."""
    text = number(value, 4)
    return f"{value:.7g}" if text == "0.5" and value > PERFECT_ULP + 1e-6 else text


def in_ulp(value: float) -> str:
    """An error with its unit."""
    return f"{ulp(value)} ulp" if math.isfinite(value) else ulp(value)


def degrees(value: float) -> str:
    """An angle."""
    return f"{number(value)}°"


def share(value: float) -> str:
    """A share in percent; only all of it reads as 100 %."""
    text = f"{100 * value:.2f}"
    if value < 1 and text == "100.00":
        text = "99.99"
    return ("100" if value == 1 else text) + " %"


def source_name(source: Mapping[str, Any]) -> str:
    """Base, adapter or output as the user named it, with the commit of the Hub."""
    revision = source.get("revision")
    return f"{source['name']} @ {revision[:_HASH_DIGITS]}" if revision else str(source["name"])


def weight_files(source: Mapping[str, Any]) -> dict[str, str]:
    """Of a source, the files that hold tensors with the first digits of their SHA-256."""
    hashes: Mapping[str, str] = source["sha256"]
    names = [n for n in hashes if n.endswith((".safetensors", ".bin"))] or list(hashes)
    return {name: hashes[name][:_HASH_DIGITS] for name in names}


def times_applied_error(module: WeightFigures) -> float | None:
    """How far ΔW is from being in the weight once; None where it is zero."""
    return abs(module.applied - 1) if module.applied is not None else None


def _comparable(value: float | None) -> float:
    """For orders in which what is not a number is the worst, and None no figure at all."""
    if value is None:
        return -math.inf
    return math.inf if math.isnan(value) else value


def _range_applied(modules: Sequence[WeightFigures]) -> str:
    values = [m.applied for m in modules if m.applied is not None]
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"
