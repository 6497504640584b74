"""A qGOFT merge against forming the dense matrix: `python -m benchmarks.givens`.

Prints Markdown: the time of one weight's merge, W P rounded to bf16, by psoft-export and by way of
the d × d matrix (formed level by level as the method's own code forms it, then one product), both
in float64 on all threads, and how far the two are apart. A minute on two cores.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from psoft_export.algebra.givens import levels, transforms
from psoft_export.algebra.parameters import GivensParameters
from psoft_export.algebra.rounding import round_to_nearest
from psoft_export.changes.givens import GivensTransform
from psoft_export.verification.evaluation import measure
from psoft_export.verification.tiles import row_parts

_SHAPES = ((4096, 4096), (11008, 4096))


def dense(parameters: GivensParameters, weight: Tensor) -> Tensor:
    """W P by way of P: every level applied to the whole of a d × d matrix, then one product."""
    dimension, stored = parameters.dimension, transforms(parameters)
    assert parameters.scaler is not None
    matrix = torch.diag(parameters.scaler.double())
    for level in levels(dimension):
        own, stride = stored[level.transforms], 2 * level.step
        end = stride * level.count
        near, far = slice(0, end, stride), slice(level.step, end, stride)
        if parameters.form == "reference":
            cosine, sine = torch.ones(dimension).double(), torch.zeros(dimension).double()
            cosine[near], cosine[far] = own[:, 0, 0], own[:, 1, 1]
            sine[near], sine[far] = -own[:, 0, 1], own[:, 1, 0]
            even, odd = matrix[:, ::2], matrix[:, 1::2]
            pairs = (
                even * cosine[::2] + odd * sine[1::2],
                odd * cosine[1::2] - even * sine[::2],
            )
            matrix = torch.stack(pairs, dim=2).flatten(1)
        else:
            first, second = matrix[:, near], matrix[:, far]
            turned = matrix.clone()
            turned[:, near] = first * own[:, 0, 0] + second * own[:, 0, 1]
            turned[:, far] = first * own[:, 1, 0] + second * own[:, 1, 1]
            matrix = turned
    return round_to_nearest(weight.double() @ matrix, torch.bfloat16)


class OurMerge:
    """W P as psoft-export merges it: rows divided among threads that compute with one each."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def merged(
        self, parameters: GivensParameters, weight: Tensor, *, with_check: bool = False
    ) -> Tensor:
        """The merged weight, as written; checked as every merge is, or not."""
        change = GivensTransform(parameters)
        merge, merged = change.merging(weight), torch.empty(weight.shape, dtype=torch.bfloat16)
        expected = change.expected(weight) if with_check else None

        def work(rows: slice) -> None:
            torch.set_num_threads(1)
            if expected is None:
                exact = merge(weight[rows].double(), rows)
                merged[rows] = round_to_nearest(exact, torch.bfloat16)
            else:
                of = expected.of_rows(rows)
                deviation = measure(weight[rows], merged[rows], of, merge=merge)
                assert not deviation.not_nearest, "psoft-export's own check"

        # Without a check tile by tile, as a check itself goes through its part.
        count = self._threads if with_check else len(weight)
        list(self._pool.map(work, row_parts(weight, count)))
        torch.set_num_threads(self._threads)
        return merged


def rows(threads: int, repeats: int) -> Iterator[str]:
    """One row for each shape and form."""
    ours_of = OurMerge(threads)
    for shape in _SHAPES:
        for form in ("reference", "paper"):
            torch.manual_seed(0)
            count = shape[1]
            parameters = GivensParameters(
                0.1 * torch.randn(count - 1), None, 1 + 0.1 * torch.randn(count), form
            )
            weight = (0.02 * torch.randn(shape)).bfloat16()
            works = [
                partial(dense, parameters, weight),
                partial(ours_of.merged, parameters, weight),
                partial(ours_of.merged, parameters, weight, with_check=True),
            ]
            (slow, theirs), (fast, ours), (with_check, _) = _timed(works, repeats)
            same = float((ours == theirs).float().mean())
            assert same > 0.9999, "the two disagree"
            yield (
                f"| {shape[0]} × {shape[1]}, `{form}` | {slow:.2f} s | {fast:.3f} s | "
                f"{slow / fast:.0f} | {with_check:.3f} s | {slow / with_check:.0f} | {same:.6f} |"
            )


def _timed(works: list[Callable[[], Tensor]], repeats: int) -> list[tuple[float, Tensor]]:
    """The shortest time of each work's runs, in turns, and what came out."""
    times: list[list[float]] = [[] for _ in works]
    results = [torch.empty(0) for _ in works]
    for _ in range(repeats):
        for index, work in enumerate(works):
            start = time.monotonic()
            results[index] = work()
            times[index].append(time.monotonic() - start)
    return [(min(taken), result) for taken, result in zip(times, results, strict=True)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads\n")
    print("| weight, form | dense | merge | times | merge and check | times | same entries |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for row in rows(arguments.threads, arguments.repeat):
        print(row, flush=True)


if __name__ == "__main__":
    main()
