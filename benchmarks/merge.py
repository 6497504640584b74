"""Whole merges by PEFT and by psoft-export, side by side: `python -m benchmarks.merge --help`.

Imports no torch: `run_measured` says why.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, astuple
from pathlib import Path

from benchmarks.process import ProgramError, Usage, run_measured
from benchmarks.report import COPY, OURS, PEFT, Accuracy, Result, claims, tables
from benchmarks.shapes import SHAPES


def measure(size: str, rank: int, repeat: int, threads: int, scratch: Path) -> Result:
    """Make a checkpoint of `size`, merge it with each program in turn, and clean up."""
    base, adapter, log = scratch / "base", scratch / "adapter", scratch / "log.txt"
    outputs = {COPY: scratch / "copy", PEFT: scratch / "peft", OURS: scratch / "ours"}
    commands: dict[str, list[str | Path]] = {
        COPY: ["cp", "-r", base, outputs[COPY]],
        PEFT: _python("peft_merge", base, adapter, outputs[PEFT]),
        OURS: [
            *(Path(sys.executable).with_name("psoft-export"), "merge"),
            *("--base", base, "--adapter", adapter, "--output", outputs[OURS]),
            *("--device", "cpu", "--quiet"),
        ],
    }
    count = str(threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
    }
    run_measured(_python("synthetic", size, str(rank), base, adapter), environment, log)
    runs: dict[str, list[Usage]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            shutil.rmtree(outputs[name], ignore_errors=True)
            _settle(base)
            _say(f"{size}: {name}")
            runs[name].append(run_measured(command, environment, log))
            _say(f"{size}: {name} took {runs[name][-1].seconds:.1f} s")
    _say(f"{size}: accuracy")
    printed = subprocess.run(
        _python("accuracy", base, adapter, outputs[PEFT], outputs[OURS]),
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    accuracy = [Accuracy(**fields) for fields in json.loads(printed)]
    for folder in (base, adapter, *outputs.values()):
        shutil.rmtree(folder)
    return Result(
        size,
        SHAPES[size].parameters,
        rank,
        {name: _median(usages) for name, usages in runs.items()},
        dict(zip((PEFT, OURS), accuracy, strict=True)),
    )


def _python(module: str, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", f"benchmarks.{module}", *arguments]


def _settle(base: Path) -> None:
    """The same start for each run: earlier writes on disk, the base in the page cache."""
    os.sync()
    for path in base.iterdir():
        with path.open("rb") as file:
            while file.read(2**20):
                pass


def _median(usages: list[Usage]) -> Usage:
    return Usage(*map(statistics.median, zip(*map(astuple, usages), strict=True)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.merge", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["0.5b", "1b"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; medians are shown")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each program")
    parser.add_argument("--folder", type=Path, help="scratch space; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


def main() -> None:
    """Measure and print; an error only when a program fails, whatever the figures are."""
    options = _arguments()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="psoft-bench-", dir=options.folder) as scratch:
        for size in options.sizes:
            try:
                result = measure(size, options.rank, options.repeat, options.threads, Path(scratch))
            except (ProgramError, subprocess.CalledProcessError) as error:
                sys.exit(f"{size}: {error}")
            print("\n".join(tables(result)), flush=True)
            results.append(result)
    print("\n".join(claims(results)))
    if options.json is not None:
        text = json.dumps([asdict(result) for result in results], indent=2)
        options.json.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
