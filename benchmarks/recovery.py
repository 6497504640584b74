"""How far `recover` gets on the bundled adapters: share of right signs and held-out loss.

Each adapter is rewritten as if another machine had trained it (`scrambled.py`), its signs are
recovered from text that it is not evaluated on, and its loss on held-out text is measured with the
signs found, with the true ones, and with none (the base).

    python -m benchmarks.recovery            # the cases of docs/recovery.md
    python -m benchmarks.recovery --study    # more text, less text, more seeds: hours
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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
from psoft_export.basis.signs import signs_at
from psoft_export.recovery.polish import SETTLED

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from corpora import CORPORA  # noqa: E402
from evaluate import held_out_loss, load_base, load_with_peft  # noqa: E402

FOLDER = EXAMPLES / "byte_llama"


@dataclass(frozen=True)
class Case:
    """One recovery.

    Attributes:
        adapter: name of a bundled adapter.
        start: `random`: signs drawn; `numpy`: those of NumPy's SVD, which is then not tried.
        kilobytes: of text.
        steps: of the search.
        seed: of the planted signs and the search.
    """

    adapter: str
    start: str
    kilobytes: int = 16
    steps: int = 1080
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        case: which.
        verdict: of `recover`.
        right: share of all signs that are right, each layer up to its sign as a whole.
        right_settled: share of those with as much evidence as settled ones have.
        loss: on held-out text of the task, in nats a byte, with the signs found.
        true_loss: with the true signs.
        base_loss: of the base.
        returned: see `RecoveryReport`.
        settled: see `RecoveryReport`.
        seconds: wall time.
        peak_bytes: see `RecoveryReport`; of the process, so of all cases so far.
    """

    case: Case
    verdict: str
    right: float
    right_settled: float
    loss: float
    true_loss: float
    base_loss: float
    returned: float
    settled: float
    seconds: float
    peak_bytes: int


def table() -> Iterator[Case]:
    """The cases of the table in the documentation."""
    for adapter in CORPORA:
        yield Case(adapter, "random")
        yield Case(adapter, "numpy", steps=270)


def study() -> Iterator[Case]:
    """Those, and other amounts of text, steps and seeds."""
    yield from table()
    for adapter in CORPORA:
        for kilobytes in (4, 8, 32, 64):
            yield Case(adapter, "random", kilobytes=kilobytes)
        for steps in (240, 480, 1920):
            yield Case(adapter, "random", steps=steps)
        for seed in (1, 2):
            yield Case(adapter, "random", seed=seed)


def measured(case: Case, work: Path) -> Result:
    """One recovery, in a folder of its own."""
    folder = work / f"{case.adapter}-{case.start}-{case.kilobytes}-{case.steps}-{case.seed}"
    folder.mkdir()
    original, corpus = FOLDER / "adapters" / case.adapter, CORPORA[case.adapter]()
    text = folder / "task.txt"
    text.write_text(corpus.train[: case.kilobytes * 1024], encoding="utf-8")
    planted = _planted(case, original)
    adapter = scramble(original, folder / "adapter", planted)
    began = time.monotonic()
    report = psoft_export.recover(
        FOLDER / "base",
        adapter,
        text,
        steps=case.steps,
        seed=case.seed,
        random_start=case.start == "random",
        readings=["cpu", "cpu-float64", "cpu-transposed"] if case.start == "numpy" else None,
        device="cpu",
        cache=False,
    )
    seconds = time.monotonic() - began
    right = torch.cat(list(right_signs(original, planted, dict(report.signs)).values()))
    settled = torch.cat(list(report.evidence.values())) >= SETTLED
    known = psoft_export.load_adapter(original).record
    assert known is not None
    shapes = {module: known.base[module].shape for module in report.signs}
    layers = [(module, known.base[module], signs) for module, signs in report.signs.items()]
    write_record(adapter, "signs", known.rank, known.svd, shapes, layers)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "base")
    base = load_base(FOLDER / "base")
    found, true = (load_with_peft(FOLDER / "base", a) for a in (adapter, original))
    losses = [held_out_loss(m, tokenizer, corpus.held_out) for m in (base, true, found)]
    return Result(
        case=case,
        verdict=report.verdict,
        right=float(right.float().mean()),
        right_settled=float(right[settled].float().mean()),
        base_loss=losses[0],
        true_loss=losses[1],
        loss=losses[2],
        returned=report.returned,
        settled=report.settled,
        seconds=seconds,
        peak_bytes=report.peak_bytes,
    )


def _planted(case: Case, adapter: Path) -> dict[str, Tensor]:
    """The signs of another machine's SVD against those recorded."""
    if case.start == "random":
        return random_signs(adapter, seed=1000 + case.seed)
    loaded = psoft_export.load_adapter(adapter)
    assert isinstance(loaded, SubspaceAdapter)
    assert loaded.record is not None
    weights = load_file(FOLDER / "base" / "model.safetensors")
    found = {}
    for module in loaded.modules:
        left = np.linalg.svd(weights[f"{module}.weight"].float().numpy(), full_matrices=False)[0]
        known = loaded.record.signs(module)
        there = signs_at(torch.from_numpy(left)[:, : loaded.rank], known.anchor)
        found[module] = known.sign.float() * there.float()
    return found


def _rows(results: list[Result]) -> Iterator[str]:
    yield (
        "| adapter | signs | text, KB | steps | seed | verdict | right | right of settled | "
        "base | true signs | found | above true | found again | settled | minutes | memory, GB |"
    )
    yield "| --- | --- | --: | --: | --: | --- |" + " --: |" * 10
    for r in results:
        c = r.case
        yield (
            f"| `{c.adapter}` | {c.start} | {c.kilobytes} | {c.steps} | {c.seed} | {r.verdict} | "
            f"{r.right:.1%} | {r.right_settled:.1%} | "
            f"{r.base_loss:.3f} | {r.true_loss:.3f} | {r.loss:.3f} | "
            f"{r.loss / r.true_loss - 1:.1%} | {r.returned:.1%} | {r.settled:.1%} | "
            f"{r.seconds / 60:.1f} | {r.peak_bytes / 1e9:.1f} |"
        )


def main() -> None:
    """Run the cases and print their table; each is kept as JSON as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", action="store_true", help="every case; hours")
    parser.add_argument("--only", choices=list(CORPORA), help="cases of this adapter")
    parser.add_argument("--start", choices=["random", "numpy"], help="cases of these signs")
    parser.add_argument("--output", type=Path, default=Path("build/recovery.jsonl"))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in study() if arguments.study else table():
            if arguments.only in (None, case.adapter) and arguments.start in (None, case.start):
                say(str(case))
                results.append(measured(case, Path(scratch)))
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(results[-1])) + "\n")
                say(list(_rows(results[-1:]))[-1])
    print(machine_line(torch.get_num_threads(), ("torch", "transformers", "psoft-export")))
    print("\n".join(_rows(results)))


if __name__ == "__main__":
    main()
