"""The figures of a benchmark run, and their text: Markdown tables and a line a claim. No torch."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass

from benchmarks.process import Usage

COPY, PEFT = "cp -r", "PEFT"
COLD = "psoft-export"
SIGNS, FULL = "psoft-export, signs record", "psoft-export, full record"
WARM = "psoft-export, warm cache"
MERGES = (COLD, WARM, SIGNS, FULL)
VERIFY = "psoft-export verify --level weights, full record"
PEFT_LORA = "PEFT, save_as_lora"
LORA_WARM, LORA_SIGNS, LORA_FULL = (
    f"psoft-export lora, {basis}" for basis in ("warm cache", "signs record", "full record")
)
LORAS = (LORA_WARM, LORA_SIGNS, LORA_FULL)
_PEAK_SIZE, _PEAK_RATIO = "1b", 0.25
_PEAK_SPREAD = 0.10
_TIMES_AS_FAST = {SIGNS: 6, WARM: 40, FULL: 40}
_OF_THE_COPY = 3
_LORA_TIMES, _LORA_ACCURACY = 20, 10
_MB = 1e6


@dataclass(frozen=True)
class Accuracy:
    """Errors of merged entries in units of the last place of their dtype; 0.5 is perfect.

    `not_nearest` is the share of entries that another number of the dtype would be closer to,
    `relative` is ‖error‖ / ‖ΔW‖ (Frobenius).
    """

    largest_ulp: float
    rms_ulp: float
    not_nearest: float
    relative: float


@dataclass(frozen=True)
class Result:
    """One size on one device: usage of each program by its name, accuracy of each merge.

    `lora_error` is ‖error‖ / ‖ΔW‖ of each LoRA adapter.
    """

    size: str
    parameters: int
    rank: int
    device: str
    usage: dict[str, Usage]
    accuracy: dict[str, Accuracy]
    lora_error: dict[str, float]

    def of(self, names: Iterable[str]) -> list[str]:
        """Those of some programs that were measured."""
        return [name for name in names if name in self.usage]

    def ratio(self, field: str, name: str = COLD, other: str = PEFT) -> float:
        """One program's figure over another's."""
        ours, theirs = (getattr(self.usage[program], field) for program in (name, other))
        return float(ours / theirs)


def tables(result: Result) -> Iterator[str]:
    """Markdown of one size, line by line."""
    of = f"{result.parameters:,} parameters, bf16, r = {result.rank}, {result.device}"
    yield f"### {result.size}: {of}"
    yield ""
    yield "| | wall time | peak memory | peak anonymous | read | written |"
    yield "| --- | --: | --: | --: | --: | --: |"
    for name, usage in result.usage.items():
        seconds, *sizes = astuple(usage)
        cells = " | ".join(f"{size / _MB:,.0f} MB" for size in sizes)
        yield f"| `{name}` | {seconds:.1f} s | {cells} |"
    for name in result.of(MERGES):
        cells = " | ".join(f"**{result.ratio(field, name):.3f}**" for field in asdict(usage))
        yield f"| **{name} / PEFT** | {cells} |"
    for name in result.of(LORAS):
        ratios = (result.ratio(field, name, PEFT_LORA) for field in asdict(usage))
        cells = " | ".join(f"**{ratio:.3f}**" for ratio in ratios)
        yield f"| **{name} / {PEFT_LORA}** | {cells} |"
    for name in result.of([VERIFY]):
        cells = " | ".join(f"**{result.ratio(field, name, FULL):.3f}**" for field in asdict(usage))
        yield f"| **{name} / the merge** | {cells} |"
    yield ""
    yield "| | largest error | RMS error | not the nearest number | ‖error‖ / ‖ΔW‖ |"
    yield "| --- | --: | --: | --: | --: |"
    for name, figures in result.accuracy.items():
        yield (
            f"| `{name}` | {figures.largest_ulp:.4g} ulp | {figures.rms_ulp:.4f} ulp "
            f"| {figures.not_nearest:.3%} | {figures.relative:.2e} |"
        )
    for name, error in result.lora_error.items():
        yield f"| `{name}` | | | | {error:.2e} |"
    yield ""


def claims(results: list[Result]) -> Iterator[str]:
    """One line a claim."""
    for result in results:
        ours, theirs = result.usage[COLD], result.usage[PEFT]
        on_cpu = result.device == "cpu"
        if on_cpu and result.size == _PEAK_SIZE:
            yield claim(
                f"{result.size}: peak memory at most a quarter of PEFT's",
                result.ratio("peak_bytes") <= _PEAK_RATIO,
                f"{ours.peak_bytes / _MB:,.0f} of {theirs.peak_bytes / _MB:,.0f} MB, "
                f"{result.ratio('peak_bytes'):.3f}",
            )
        yield claim(
            f"{result.size}: wall time no longer than PEFT's",
            ours.seconds <= theirs.seconds,
            f"{ours.seconds:.1f} against {theirs.seconds:.1f} s, {result.ratio('seconds'):.3f}",
        )
        for name, times in _TIMES_AS_FAST.items() if on_cpu else ():
            yield claim(
                f"{result.size}: {name}: at least {times} times as fast as PEFT",
                result.ratio("seconds", PEFT, name) >= times,
                f"{result.usage[name].seconds:.1f} s, {result.ratio('seconds', PEFT, name):.1f}",
            )
            if times > min(_TIMES_AS_FAST.values()):
                yield claim(
                    f"{result.size}: {name}: within {_OF_THE_COPY} times of the copy",
                    result.ratio("seconds", name, COPY) <= _OF_THE_COPY,
                    f"{result.ratio('seconds', name, COPY):.1f}",
                )
        exact = result.accuracy[COLD]
        twice = result.accuracy[PEFT]
        yield claim(
            f"{result.size}: more exact than PEFT's",
            exact.rms_ulp < twice.rms_ulp and exact.largest_ulp < twice.largest_ulp,
            f"RMS {exact.rms_ulp:.4f} against {twice.rms_ulp:.4f} ulp, "
            f"largest {exact.largest_ulp:.4g} against {twice.largest_ulp:.4g} ulp",
        )
        for name in result.of(LORAS):
            times = result.ratio("seconds", PEFT_LORA, name)
            yield claim(
                f"{result.size}: {name}: at least {_LORA_TIMES} times as fast as PEFT",
                times >= _LORA_TIMES,
                f"{result.usage[name].seconds:.1f} s, {times:.1f}",
            )
            error, other = result.lora_error[name], result.lora_error[PEFT_LORA]
            yield claim(
                f"{result.size}: {name}: an error {_LORA_ACCURACY} times smaller than PEFT's",
                error * _LORA_ACCURACY <= other,
                f"{error:.1e} against {other:.1e} of ‖ΔW‖",
            )
    if len(results) > 1:
        peaks = {result.size: result.usage[COLD].peak_bytes for result in results}
        spread = max(peaks.values()) / min(peaks.values()) - 1
        yield claim(
            "peak memory the same for every size within 10 %",
            spread <= _PEAK_SPREAD,
            ", ".join(f"{size} {peak / _MB:,.0f} MB" for size, peak in peaks.items())
            + f", {spread:.1%} apart",
        )


def claim(text: str, holds: bool, figures: str) -> str:
    """One line: the claim, whether it holds, and the figures that say so."""
    return f"- {text}: {'holds' if holds else 'does not hold'} ({figures})"
