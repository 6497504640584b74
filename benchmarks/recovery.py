"""How far `recover` gets on adapters whose true signs are known: right signs and held-out loss.

Each adapter is rewritten as if another machine had trained it (`scrambled.py`), its signs are
recovered from text that it is not evaluated on, and its loss on held-out text is measured with the
signs found, with the true ones, and with none (the base).

    python -m benchmarks.recovery            # the first table of docs/recovery.md
                                             # (half an hour on two cores)
    python -m benchmarks.recovery --study    # and all else that is there: hours
    python -m benchmarks.recovery --device cuda --dtype bf16

Each result is kept as soon as it is measured, and a case that is kept is not run again. The study
trains adapters of other ranks and angles (`examples/train.py`) and draws its results
(`recovery_plots.py`).
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

import psoft_export
from benchmarks.children import machine_line, say
from benchmarks.scrambled import random_signs, right_signs, scramble
from psoft_export.adapters.adapter import SubspaceAdapter
from psoft_export.adapters.basis_record import write_record
from psoft_export.algebra.rotation import rotation_angles
from psoft_export.basis.signs import signs_at
from psoft_export.recovery.examples import WINDOW
from psoft_export.recovery.run import LEAST_STEPS, STEPS, STEPS_OF_LATER
from psoft_export.recovery.verdict import is_settled

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from corpora import CORPORA  # noqa: E402
from evaluate import held_out_loss, load_base, load_with_peft  # noqa: E402
from train import RECIPES, Recipe, train_adapter  # noqa: E402

BUNDLED = EXAMPLES / "byte_llama"
STUDY = Path("study")  # results, and adapters that only the study needs; `make lint` empties build
QUARTER = STEPS // 4
STUDIED_STEPS = LEAST_STEPS + 3 * STEPS_OF_LATER  # where many cases would take all of `STEPS`
ARITHMETIC, PROSE = "arithmetic-strict-r32", "prose-relaxed-r64"


def _variant(rank: int, learning_rate: float) -> Recipe:
    """The recipe of the strict adapter at another rank or speed."""
    known = RECIPES[ARITHMETIC]
    return Recipe(
        options=known.options | {"r": rank, "psoft_alpha": 3 * rank // 2},
        schedule=replace(known.schedule, learning_rate=learning_rate),
    )


VARIANTS = {
    "arithmetic-strict-r16": _variant(16, 1e-2),
    "arithmetic-strict-r64": _variant(64, 1e-2),
    "arithmetic-strict-r128": _variant(128, 1e-2),
    "arithmetic-strict-r32-slow": _variant(32, 1e-3),
    "arithmetic-strict-r32-fast": _variant(32, 3e-2),
}


@dataclass(frozen=True)
class Case:
    """One recovery.

    Attributes:
        adapter: name of a bundled adapter, or of one of `VARIANTS`.
        start: `random`: signs drawn; `numpy`: those of NumPy's SVD, which is then not tried.
        kilobytes: of text.
        steps: of the search, at most.
        seed: of the planted signs and the search.
        text: the adapter whose task the text is of; empty: its own.
        dtype: in which the model computes.
        device: on which.
    """

    adapter: str
    start: str
    kilobytes: int = 16
    steps: int = STEPS
    seed: int = 0
    text: str = ""
    dtype: str = "fp32"
    device: str = "cpu"

    @property
    def corpus(self) -> str:
        """The name in `CORPORA` of what the adapter was trained on."""
        return self.adapter if self.adapter in CORPORA else ARITHMETIC

    @property
    def models(self) -> Path:
        """The folder that holds the base and the adapter."""
        return BUNDLED if self.adapter in CORPORA else STUDY


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        case: which.
        verdict: of `recover`.
        right: share of all signs that are right, each layer up to its sign as a whole.
        wrong: number of the others.
        expected_wrong: how many the evidence for each sign leads to expect.
        right_settled: share of those that are settled, whether they matter or not; None where
            none is.
        loss: on held-out text of the task, in nats a byte, with the signs found.
        true_loss: with the true signs.
        base_loss: of the base.
        preferred: nats by which the text that `recover` was given prefers the signs found to the
            true ones.
        returned: see `RecoveryReport`.
        settled: see `RecoveryReport`.
        steps: done.
        angle: the median of the rotations' angles, in degrees.
        rank: r.
        threads: that computed.
        seconds: wall time.
        peak_bytes: see `RecoveryReport`.
    """

    case: Case
    verdict: str
    right: float
    wrong: int
    expected_wrong: float
    right_settled: float | None
    loss: float
    true_loss: float
    base_loss: float
    preferred: float
    returned: float
    settled: float
    steps: int
    angle: float
    rank: int
    threads: int
    seconds: float
    peak_bytes: int

    @property
    def above_true(self) -> float:
        """The loss with the signs found against that with the true ones, less one."""
        return self.loss / self.true_loss - 1


def table() -> Iterator[Case]:
    """The cases of the first table in the documentation."""
    for adapter in CORPORA:
        yield Case(adapter, "random")
        yield Case(adapter, "numpy", steps=QUARTER)


def study() -> Iterator[Case]:
    """Those, and text of other tasks, other amounts of text and of steps, ranks, angles and seeds.

    The likeliest to be asked for first, as all of it takes hours.
    """
    yield from table()
    others = dict(zip(CORPORA, [*list(CORPORA)[1:], *list(CORPORA)[:1]], strict=True))
    for adapter in CORPORA:
        yield Case(adapter, "random", steps=LEAST_STEPS, text=others[adapter])
    # With the usual text the other adapters end after the fewest steps by themselves.
    for steps in (LEAST_STEPS, QUARTER):
        yield Case(PROSE, "random", steps=steps)
    for adapter in VARIANTS:
        yield Case(adapter, "random", steps=STUDIED_STEPS)
    for kilobytes in (4, 8, 32):
        for adapter in CORPORA:
            yield Case(adapter, "random", kilobytes=kilobytes, steps=STUDIED_STEPS)
    for adapter in CORPORA:
        yield Case(adapter, "numpy", kilobytes=4, steps=QUARTER)
    for adapter in CORPORA:
        yield Case(adapter, "random", seed=1, steps=STUDIED_STEPS)


def measured(case: Case, threads: int) -> Result:
    """One recovery, in a folder of its own, in a process of its own."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with tempfile.TemporaryDirectory() as scratch:
        return _measured_in(Path(scratch), case)


def _measured_in(folder: Path, case: Case) -> Result:
    base, original = case.models / "base", case.models / "adapters" / case.adapter
    corpus = CORPORA[case.corpus]()
    given = CORPORA[case.text]() if case.text else corpus
    text = folder / "task.txt"
    searched = given.train[: case.kilobytes * 1024]
    text.write_text(searched, encoding="utf-8")
    planted = _planted(case, original)
    adapter = scramble(original, folder / "adapter", planted)
    began = time.monotonic()
    report = psoft_export.recover(
        base,
        adapter,
        text,
        steps=case.steps,
        seed=case.seed,
        random_start=case.start == "random",
        readings=["cpu", "cpu-float64", "cpu-transposed"] if case.start == "numpy" else None,
        device=case.device,
        dtype=case.dtype,
        cache=False,
    )
    seconds = time.monotonic() - began
    right = torch.cat(list(right_signs(base, original, planted, dict(report.signs)).values()))
    evidence = torch.cat(list(report.evidence.values()))
    settled = is_settled(evidence, torch.cat(list(report.alike.values())))
    loaded = psoft_export.load_adapter(original)
    assert isinstance(loaded, SubspaceAdapter)
    known = loaded.record
    assert known is not None
    shapes = {module: known.base[module].shape for module in report.signs}
    layers = [(module, known.base[module], signs) for module, signs in report.signs.items()]
    write_record(adapter, "signs", known.rank, known.svd, shapes, layers)
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = load_base(base), load_with_peft(base, original), load_with_peft(base, adapter)
    losses = [held_out_loss(model, tokenizer, corpus.held_out) for model in models]
    windows = len(searched) // WINDOW
    true, found = (held_out_loss(m, tokenizer, searched, windows=windows) for m in models[1:])
    return Result(
        case=case,
        verdict=report.verdict,
        right=float(right.float().mean()),
        wrong=int((~right).sum()),
        expected_wrong=float(torch.sigmoid(-evidence).sum()),
        right_settled=float(right[settled].float().mean()) if settled.any() else None,
        base_loss=losses[0],
        true_loss=losses[1],
        loss=losses[2],
        preferred=(true - found) * windows * (WINDOW - 1),
        returned=report.returned,
        settled=report.settled,
        steps=report.steps,
        angle=_median_angle(loaded),
        rank=loaded.rank,
        threads=torch.get_num_threads(),
        seconds=seconds,
        peak_bytes=report.peak_bytes,
    )


def _median_angle(adapter: SubspaceAdapter) -> float:
    """The median of the angles of an adapter's rotations, in degrees."""
    angles = [rotation_angles(parameters) for parameters in adapter.rotations.values()]
    return float(torch.cat(angles).rad2deg().median())


def _planted(case: Case, adapter: Path) -> dict[str, Tensor]:
    """The signs of another machine's SVD against those recorded."""
    if case.start == "random":
        return random_signs(adapter, seed=1000 + case.seed)
    loaded = psoft_export.load_adapter(adapter)
    assert isinstance(loaded, SubspaceAdapter)
    assert loaded.record is not None
    weights = load_file(case.models / "base" / "model.safetensors")
    found = {}
    for module in loaded.modules:
        left = np.linalg.svd(weights[f"{module}.weight"].float().numpy(), full_matrices=False)[0]
        known = loaded.record.signs(module)
        there = signs_at(torch.from_numpy(left)[:, : loaded.rank], known.anchor)
        found[module] = known.sign.float() * there.float()
    return found


def rows(results: Sequence[Result]) -> Iterator[str]:
    """A table of results, as Markdown; its columns are explained in `docs/recovery.md`."""
    yield (
        "| adapter | signs of training | text | steps | verdict | right | wrong | expected wrong | "
        "of settled | found again | settled | base | true signs | found | above true | "
        "text prefers found, nats | minutes |"
    )
    yield "| --- | --- | --- | --: | --- |" + " --: |" * 12
    for r in results:
        c = r.case
        signs = "NumPy's" if c.start == "numpy" else c.start
        signs += f", seed {c.seed}" if c.seed else ""
        text = f"{c.kilobytes} KB" + (f" of `{c.text}`" if c.text else "")
        yield (
            f"| `{c.adapter}` | {signs} | {text} | {r.steps} | {r.verdict} | "
            f"{_percent(r.right)} | {r.wrong} | {r.expected_wrong:.1f} | "
            f"{_percent(r.right_settled)} | {_percent(r.returned)} | {_percent(r.settled)} | "
            f"{r.base_loss:.3f} | {r.true_loss:.3f} | {r.loss:.3f} | {r.above_true:+z.2%} | "
            f"{r.preferred:+z.0f} | {r.seconds / 60:.1f} |"
        )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def read_results(path: Path) -> list[Result]:
    """Results that were kept, the oldest first."""
    if not path.exists():
        return []
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [Result(**line | {"case": Case(**line["case"])}) for line in lines]


def _train(names: Sequence[str]) -> None:
    """Train the adapters that are not there yet, on a copy of the bundled base."""
    if not (STUDY / "base").exists():
        shutil.copytree(BUNDLED / "base", STUDY / "base")
    for name in names:
        if not (STUDY / "adapters" / name / "psoft_basis.safetensors").exists():
            say(f"training {name}")
            train_adapter(name, CORPORA[ARITHMETIC](), VARIANTS[name], STUDY)


def main() -> None:
    """Run the cases that were not run yet, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", action="store_true", help="every case, and plots; hours")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the searches")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the models")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time, sharing the threads")
    parser.add_argument("--output", type=Path, default=STUDY / "results.jsonl")
    arguments = parser.parse_args()
    computed = {"device": arguments.device, "dtype": arguments.dtype}
    cases = [replace(case, **computed) for case in (study() if arguments.study else table())]
    known = {result.case: result for result in read_results(arguments.output)}
    to_run = [case for case in cases if case not in known]
    _train(sorted({case.adapter for case in to_run} & VARIANTS.keys()))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, torch.get_num_threads() // arguments.jobs)
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(arguments.jobs, mp_context=spawn, max_tasks_per_child=1) as pool,
        arguments.output.open("a", encoding="utf-8") as file,
    ):
        futures = {pool.submit(measured, case, threads): case for case in to_run}
        for done in as_completed(futures):
            problem = done.exception()
            if problem is not None:
                say(f"{futures[done]}: {type(problem).__name__}: {problem}")
                continue
            result = done.result()
            known[result.case] = result
            print(json.dumps(asdict(result)), file=file, flush=True)
            say(list(rows([result]))[-1])
    results = [known[case] for case in cases if case in known]
    print(machine_line(threads, ("torch", "transformers", "psoft-export")))
    print(f"{arguments.dtype} on {arguments.device}")
    print("\n".join(rows(results)))
    if arguments.study:
        from benchmarks.recovery_plots import draw

        draw(results, arguments.output.with_suffix(".png"))
    if len(results) < len(cases):
        sys.exit(f"{len(cases) - len(results)} cases failed")


if __name__ == "__main__":
    main()
