"""The leading singular triplets by five programs, side by side: `python -m benchmarks.solver`.

One process, each program in turn on the same matrix. On the CPU SciPy takes part where it is
installed (`pip install ".[bench]"`), and so does PRIMME, which has no wheels: `pip install primme`
compiles it and needs a C compiler and the system's BLAS and LAPACK.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import claim
from benchmarks.spectra import SPECTRA, decaying
from psoft_export.basis.solver import leading_triplets
from psoft_export.basis.svd import Triplets

_SEED = 20261122
_OURS, _BASE = "psoft-export", "torch.linalg.svd"
_REFERENCE_SIDE = 1024  # up to here a float64 SVD takes seconds
_WARM_UP = (640, 768, 8)  # rows, columns, rank
_CLAIMED_RANK = 64
# Times as fast as torch.linalg.svd, by device and shape.
_CLAIMS = {
    "cpu": {(4096, 4096): 8, (4096, 11008): 12},
    "cuda": {(4096, 4096): 30, (4096, 11008): 30},
}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_STYLES = (".3f", ".1f", ".1e", ".1e", ".1e", ".1e")  # seconds, ratio, errors
_Found = tuple[Triplets, str]  # the triplets, in any order and dtype, and a remark


def _ours(weight: Tensor, rank: int) -> _Found:
    solution = leading_triplets(weight, rank)
    method, columns = solution.certificate.method, solution.certificate.columns
    return solution.triplets, f"{method}, {columns} columns" if columns else method


def _svd(weight: Tensor, rank: int) -> _Found:
    return Triplets(*torch.linalg.svd(weight, full_matrices=False)).truncated(rank), ""


def _lowrank(weight: Tensor, rank: int) -> _Found:
    torch.manual_seed(0)
    left, values, right = torch.svd_lowrank(weight, q=rank, niter=10)
    return Triplets(left, values, right.T), ""


def _arpack(weight: Tensor, rank: int) -> _Found:
    from scipy.sparse.linalg import svds

    start = torch.randn(min(weight.shape), dtype=torch.float64, generator=_generator())
    return _from_numpy(svds(weight.double().numpy(), rank, solver="arpack", v0=start.numpy()))


def _primme(weight: Tensor, rank: int) -> _Found:
    import primme

    return _from_numpy(primme.svds(weight.double().numpy(), rank))


def _from_numpy(factors: Any) -> _Found:
    left, values, right = (torch.from_numpy(factor.copy()) for factor in factors)
    return Triplets(left, values, right), ""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


@dataclass(frozen=True)
class Program:
    """One way to the triplets of W (float32), where it runs, and the module that it needs."""

    name: str
    run: Callable[[Tensor, int], _Found]
    devices: tuple[str, ...] = ("cpu", "cuda")
    module: str = "torch"


PROGRAMS = (
    Program(_OURS, _ours),
    Program(_BASE, _svd),
    Program("torch.svd_lowrank", _lowrank),
    Program("SciPy svds (ARPACK)", _arpack, ("cpu",), "scipy"),
    Program("PRIMME svds", _primme, ("cpu",), "primme"),
)


@dataclass(frozen=True)
class Row:
    """One program on one matrix. Errors are those of its result rounded to float32.

    `right_residual` is the largest ‖Wᵀuᵢ − σᵢvᵢ‖ / σ₁, `left_residual` the largest
    ‖Wvᵢ − σᵢuᵢ‖ / σ₁, in float64. `vector_error` is the largest ‖uᵢ − uᵢ*‖ or ‖vᵢ − vᵢ*‖ (with
    the better sign of the pair) and `value_error` the largest |σᵢ − σᵢ*| / σ₁*, where * is the
    float64 SVD; None without it. Where the program failed, all but the remark are None.
    """

    rows: int
    columns: int
    rank: int
    spectrum: str
    program: str
    seconds: float | None = None
    right_residual: float | None = None
    left_residual: float | None = None
    vector_error: float | None = None
    value_error: float | None = None
    remark: str = ""


def measure(
    shape: tuple[int, int],
    rank: int,
    spectrum: str,
    programs: list[Program],
    repeat: int,
    reference: bool,
    device: str,
) -> Iterator[Row]:
    """One row a program, as soon as it is measured."""
    weight = SPECTRA[spectrum](*shape, _generator()).to(device)
    exact = _svd(weight.double(), rank)[0] if reference else None
    for program in programs:
        _say(f"{shape[0]} × {shape[1]}, r = {rank}, {spectrum}: {program.name}")
        case = (*shape, rank, spectrum, program.name)
        taken = []
        try:
            for _ in range(repeat):
                start = time.perf_counter()
                found, remark = program.run(weight, rank)
                if device == "cuda":
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
        except RuntimeError as error:  # of ARPACK and PRIMME too, where they do not converge
            yield Row(*case, remark=f"failed: {error}".splitlines()[0])
            continue
        triplets = _sorted(found.to(torch.float32).to(torch.float64))
        on_right, on_left = residuals(weight.double(), triplets)
        of_vectors, of_values = _differences(triplets, exact) if exact else (None, None)
        figures = (statistics.median(taken), on_right, on_left, of_vectors, of_values)
        yield Row(*case, *figures, remark)


def _sorted(triplets: Triplets) -> Triplets:
    values, order = triplets.values.sort(descending=True)
    return Triplets(triplets.left[:, order], values, triplets.right[order])


def residuals(weight: Tensor, found: Triplets) -> tuple[float, float]:
    """The largest ‖Wᵀuᵢ − σᵢvᵢ‖ and ‖Wvᵢ − σᵢuᵢ‖, both relative to σ₁, in the dtype of W."""
    left, values, right = found.left, found.values, found.right
    on_right = torch.linalg.vector_norm(left.T @ weight - values[:, None] * right, dim=1)
    on_left = torch.linalg.vector_norm(weight @ right.T - left * values, dim=0)
    return float(on_right.max() / values[0]), float(on_left.max() / values[0])


def _differences(found: Triplets, exact: Triplets) -> tuple[float, float]:
    either = []
    for sign in (1, -1):
        left = torch.linalg.vector_norm(found.left - sign * exact.left, dim=0)
        right = torch.linalg.vector_norm(found.right - sign * exact.right, dim=1)
        either.append(torch.maximum(left, right))
    values = (found.values - exact.values).abs().max() / exact.values[0]
    return float(torch.minimum(*either).max()), float(values)


def tables(rows: list[Row]) -> Iterator[str]:
    """Markdown of one shape and rank, line by line."""
    base = {row.spectrum: row.seconds for row in rows if row.program == _BASE}
    yield f"### {rows[0].rows} × {rows[0].columns}, r = {rows[0].rank}"
    yield ""
    yield (
        f"| spectrum | program | seconds | times as fast as `{_BASE}` | ‖Wᵀu − σv‖ / σ₁ "
        "| ‖Wv − σu‖ / σ₁ | u and v against float64 | σ against float64, / σ₁ | remark |"
    )
    yield "| --- | --- | --: | --: | --: | --: | --: | --: | --- |"
    for row in rows:
        ratio = _ratio(row, base[row.spectrum])
        errors = (row.right_residual, row.left_residual, row.vector_error, row.value_error)
        cells = " | ".join(
            "–" if figure is None else format(figure, style)
            for figure, style in zip((row.seconds, ratio, *errors), _STYLES, strict=True)
        )
        yield f"| {row.spectrum} | `{row.program}` | {cells} | {row.remark} |"
    yield ""


def claims(rows: list[Row], device: str) -> Iterator[str]:
    """One line a claim and spectrum."""
    seconds = {
        (row.rows, row.columns, row.spectrum, row.program): row.seconds
        for row in rows
        if row.rank == _CLAIMED_RANK
    }
    for (height, width), times in _CLAIMS[device].items():
        text = f"{height} × {width}, r = {_CLAIMED_RANK}: {times} times as fast as `{_BASE}`"
        for spectrum in SPECTRA:
            ours, base = (seconds.get((height, width, spectrum, name)) for name in (_OURS, _BASE))
            if ours is None or base is None:
                yield f"- {text}, {spectrum}: not measured"
                continue
            figures = f"{ours:.3f} against {base:.2f} s, {base / ours:.1f} times"
            yield claim(f"{text}, {spectrum}", base >= times * ours, figures)


def _ratio(row: Row, base: float | None) -> float | None:
    return None if row.seconds is None or base is None else base / row.seconds


def _installed(device: str) -> list[Program]:
    """The programs for a device whose module is there, warmed up; says which are missing."""
    weight, programs = decaying(*_WARM_UP[:2], _generator()).to(device), []
    for program in PROGRAMS:
        if device not in program.devices:
            continue
        if importlib.util.find_spec(program.module) is None:
            _say(f"{program.name}: not installed (`pip install {program.module}`)")
            continue
        program.run(weight, _WARM_UP[2])
        programs.append(program)
    return programs


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _shape(text: str) -> tuple[int, int]:
    try:
        rows, columns = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxCOLUMNS, 2048x2048 say") from None
    return rows, columns


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.solver", description=__doc__)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        default=[(2048, 2048), (4096, 4096), (4096, 11008)],
        metavar="ROWSxCOLUMNS",
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[_CLAIMED_RANK])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=sorted(_CLAIMS), default="cpu")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; medians are shown")
    parser.add_argument(
        "--reference",
        action="store_true",
        help=f"compare with a float64 SVD also where both sides are above {_REFERENCE_SIDE}",
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    if max(options.ranks) >= min(map(min, options.shapes)):
        parser.error("a rank must be below both sides of every shape")
    return options


def _set_threads(count: int) -> None:
    """The same number for torch and NumPy, which reads it from the environment at import only."""
    if any(os.environ.get(name) != str(count) for name in _THREADS):
        environment = os.environ | dict.fromkeys(_THREADS, str(count))
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.solver", *sys.argv[1:]], environment
        )
    torch.set_num_threads(count)


def main() -> None:
    """Measure and print, whatever the figures are."""
    options = _arguments()
    _set_threads(options.threads)
    programs = _installed(options.device)
    results: list[Row] = []
    for shape, rank in itertools.product(options.shapes, options.ranks):
        reference = options.reference or min(shape) <= _REFERENCE_SIDE
        rows = [
            row
            for spectrum in SPECTRA
            for row in measure(
                shape, rank, spectrum, programs, options.repeat, reference, options.device
            )
        ]
        print("\n".join(tables(rows)), flush=True)
        results += rows
    print("\n".join(claims(results, options.device)))
    if options.json is not None:
        text = json.dumps([asdict(row) for row in results], indent=2)
        options.json.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
