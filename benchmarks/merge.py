"""Merges and conversions to LoRA by PEFT and psoft-export: `python -m benchmarks.merge --help`.

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
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from benchmarks.process import ProgramError, Usage, run_measured
from benchmarks.report import (
    COLD,
    COPY,
    FULL,
    LORA_FULL,
    LORA_SIGNS,
    LORA_WARM,
    LORAS,
    MERGES,
    PEFT,
    PEFT_LORA,
    SIGNS,
    VERIFY,
    WARM,
    Accuracy,
    Result,
    claims,
    tables,
)
from benchmarks.shapes import SHAPES


@dataclass(frozen=True)
class _Program:
    """One command, its output if it has one, and what makes ready for it, not measured."""

    name: str
    command: list[str | Path]
    output: Path | None
    prepare: list[list[str | Path]]


def _programs(scratch: Path, base: Path, adapter: Path, rank: int, device: str) -> list[_Program]:
    """What is measured, in the order in which it runs: later runs use what earlier ones left."""

    signs, full = scratch / "signs", scratch / "full"

    def record(recorded: Path) -> list[list[str | Path]]:
        kind = recorded.name
        options = ("--kind", kind, "--device", device, "--overwrite")
        command = _psoft_export("record", "--base", base, "--adapter", recorded, *options)
        return [["cp", "-rT", adapter, recorded], command]

    def merge(name: str, source: Path, *options: str) -> _Program:
        output = scratch / f"ours-{MERGES.index(name)}"
        inputs = ("--base", base, "--adapter", source, "--output", output)
        command = _psoft_export("merge", *inputs, "--device", device, *options)
        return _Program(name, command, output, prepare[name])

    prepare: dict[str, list[list[str | Path]]] = {
        COLD: [_psoft_export("cache", "clear")],
        WARM: [],
        SIGNS: record(signs),
        FULL: record(full),
    }

    def lora(name: str, source: Path, *options: str) -> _Program:
        output = scratch / f"lora-{LORAS.index(name)}"
        inputs = ("--base", base, "--adapter", source, "--output", output)
        command = _psoft_export("lora", *inputs, "--device", device, *options)
        return _Program(name, command, output, [])

    copy, peft, peft_lora = scratch / "copy", scratch / "peft", scratch / "peft-lora"
    convert = _python("peft_lora", base, adapter, str(rank), peft_lora, device)
    merged = scratch / f"ours-{MERGES.index(FULL)}"
    inputs = ("--base", base, "--adapter", full, "--merged", merged, "--no-cache")
    verify = _psoft_export("verify", *inputs, "--level", "weights", "--device", device)
    return [
        _Program(COPY, ["cp", "-r", base, copy], copy, []),
        _Program(PEFT, _python("peft_merge", base, adapter, peft, device), peft, []),
        merge(COLD, adapter),
        merge(WARM, adapter),
        merge(SIGNS, signs, "--no-cache"),
        merge(FULL, full),  # which takes no basis from the cache, only the layout
        _Program(VERIFY, verify, None, []),
        _Program(PEFT_LORA, convert, peft_lora, []),
        lora(LORA_WARM, adapter),
        lora(LORA_SIGNS, signs, "--no-cache"),
        lora(LORA_FULL, full),
    ]


def measure(options: argparse.Namespace, size: str, scratch: Path) -> Result:
    """Make a checkpoint of `size`, merge it in each way in turn, and clean up."""
    base, adapter, log = scratch / "base", scratch / "adapter", scratch / "log.txt"
    rank, device = options.rank, options.device
    programs = _programs(scratch, base, adapter, rank, device)
    if options.merges_only:
        programs = [program for program in programs if program.name in (COPY, PEFT, *MERGES)]
    if device == "cuda":  # whose SVD signs do not give back: docs/basis.md
        programs = [program for program in programs if program.name not in (SIGNS, LORA_SIGNS)]
    count = str(options.threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "PSOFT_EXPORT_CACHE": str(scratch / "cache"),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its bytecode
    run_measured(_python("synthetic", size, str(rank), base, adapter), environment, log)
    runs: dict[str, list[Usage]] = {program.name: [] for program in programs}
    for _ in range(options.repeat):
        for program in programs:
            if program.output is not None:
                shutil.rmtree(program.output, ignore_errors=True)
            for command in program.prepare:
                run_measured(command, environment, log)
            _settle(base)
            _say(f"{size}: {program.name}")
            runs[program.name].append(run_measured(program.command, environment, log))
            _say(f"{size}: {program.name} took {runs[program.name][-1].seconds:.1f} s")
    _say(f"{size}: accuracy")
    outputs = {p.name: p.output for p in programs if p.output is not None and p.name != COPY}
    printed = subprocess.run(
        _python("accuracy", device, base, adapter, *outputs.values()),
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    found = json.loads(printed)
    loras = [name for name in outputs if name in (PEFT_LORA, *LORAS)]
    merges = [name for name in outputs if name not in loras]
    accuracy = [Accuracy(**fields) for fields in found["merged"]]
    for path in scratch.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return Result(
        size,
        SHAPES[size].parameters,
        rank,
        device,
        {name: _median(usages) for name, usages in runs.items()},
        dict(zip(merges, accuracy, strict=True)),
        dict(zip(loras, found["lora"], strict=True)),
    )


def _psoft_export(*arguments: str | Path) -> list[str | Path]:
    return [Path(sys.executable).with_name("psoft-export"), *arguments, "--quiet"]


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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of all programs")
    parser.add_argument("--merges-only", action="store_true", help="no verification, no LoRA")
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
                result = measure(options, size, Path(scratch))
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
