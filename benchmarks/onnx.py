"""Exports to ONNX by hand and by psoft-export, one graph or several: `python -m benchmarks.onnx`.

Prints Markdown: what an export takes beside merging with PEFT and exporting with transformers;
then what one graph for three tasks takes, on disk, in memory, at a switch and in generation, beside
a graph for each task. All of the bundled Llama, in fp32. `--quick` measures everything once.

The measuring process imports no torch (`run_measured` says why); its children import their own.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.children import child, child_environment, machine_line, say, seconds_of
from benchmarks.process import ProgramError, Usage, run_measured

_EXAMPLES = Path(__file__).parent.parent / "examples" / "byte_llama"
_MODEL = _EXAMPLES / "base"
_TASKS = {
    "prose": _EXAMPLES / "adapters" / "prose-relaxed-r64",
    "arithmetic": _EXAMPLES / "adapters" / "arithmetic-strict-r32",
    "records": _EXAMPLES / "adapters" / "records-neumann-r48",
}
_MODULE = "benchmarks.onnx"
_PACKAGES = ("torch", "transformers", "peft", "onnx", "onnxruntime")
_MB = 1e6

_BASE, _MANY, _MIXED = "base", "many", "mixed"
_SEPARATE = "separate"
_PROMPT, _NEW = 16, 64
_ROWS = 8
_SETTLED = 3  # calls of a session before it is timed


# The parent: programs, and what is said of them.


def export_table(repeat: int, scratch: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Markdown of one adapter's way to a graph, line by line."""
    task, adapter = next(iter(_TASKS.items()))
    by_hand, ours, noted = (scratch / name for name in ("by-hand", "ours", "noted"))
    inputs = ("--base", _MODEL, "--adapter", adapter, "--output", ours)
    options = ("--no-cache", "--device", "cpu", "--quiet")
    programs: dict[str, tuple[Path, list[str | Path]]] = {
        "PEFT, transformers.exporters": (
            by_hand,
            [sys.executable, "-m", "benchmarks.peft_onnx", _MODEL, adapter, by_hand],
        ),
        "psoft-export onnx": (ours, [_program(), "onnx", *inputs, *options]),
    }
    runs: dict[str, list[Usage]] = {name: [] for name in programs}
    steps: list[dict[str, float]] = []
    for _ in range(repeat):
        for name, (output, command) in programs.items():
            say(f"{name}")
            shutil.rmtree(output, ignore_errors=True)
            runs[name].append(run_measured(command, environment, scratch / "log.txt"))
        shutil.rmtree(noted, ignore_errors=True)
        steps.append(child(_MODULE, "steps", environment, _MODEL, adapter, noted))
    usage = {
        name: Usage(*map(statistics.median, zip(*map(astuple, of), strict=True)))
        for name, of in runs.items()
    }
    theirs, own = usage.values()
    took = {step: statistics.median(run[step] for run in steps) for step in steps[0]}
    total = sum(took.values())
    unchecked = own.seconds * (1 - took["check"] / total)
    yield f"### From an adapter to a graph: the bundled Llama, {task}, fp32"
    yield ""
    yield "| | wall time | peak memory | peak anonymous |"
    yield "| --- | --: | --: | --: |"
    for name, of in usage.items():
        peaks = f"{of.peak_bytes / _MB:,.0f} MB | {of.anonymous_bytes / _MB:,.0f} MB"
        yield f"| `{name}` | {of.seconds:.1f} s | {peaks} |"
    peaks = " | ".join(
        f"**{getattr(own, field) / getattr(theirs, field):.2f}**"
        for field in ("peak_bytes", "anonymous_bytes")
    )
    yield f"| **psoft-export / by hand** | **{own.seconds / theirs.seconds:.2f}** | {peaks} |"
    yield (
        f"| **psoft-export but for its check / by hand** | **{unchecked / theirs.seconds:.2f}** "
        "| | |"
    )
    yield ""
    shares = ", ".join(f"{step} {taken / total:.0%}" for step, taken in took.items())
    yield f"Of psoft-export's time: {shares}. By hand nothing is checked."
    yield ""


def serving_tables(repeat: int, scratch: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Markdown of one graph for the tasks beside a graph for each, line by line."""
    graphs = scratch / "graphs"
    pairs = [f"{task}={adapter}" for task, adapter in _TASKS.items()]
    say(f"exporting {len(pairs) + 3} graphs")
    child(_MODULE, "export", environment, _MODEL, graphs, *pairs)
    separate = {task: graphs / task for task in _TASKS}
    kinds = {
        f"{len(pairs)} graphs, one a task": (_SEPARATE, list(separate.values())),
        "one graph for all tasks": (_MANY, [graphs / _MANY]),
        "the same, `--mixed-batch`": (_MIXED, [graphs / _MIXED]),
        "the base's graph alone": (_BASE, [graphs / _BASE]),
    }
    several = next(iter(kinds))
    sizes = {name: sum(map(_size, folders)) for name, (_, folders) in kinds.items()}
    memory: dict[str, dict[str, float]] = {}
    for name, (kind, _) in kinds.items():
        say(f"memory of {name}")
        found = [
            child(_MODULE, "memory", environment, graphs, kind, *separate)
            for _ in range(min(repeat, 3))  # a process each; they differ little
        ]
        memory[name] = {key: statistics.median(one[key] for one in found) for key in found[0]}
    yield f"### One graph for {len(pairs)} tasks: the bundled Llama, fp32"
    yield ""
    yield "| | on disk | ratio | memory | ratio | anonymous |"
    yield "| --- | --: | --: | --: | --: | --: |"
    for name, of in memory.items():
        on_disk = f"{sizes[name] / _MB:.1f} MB | {sizes[name] / sizes[several]:.2f}"
        share = of["resident"] / memory[several]["resident"]
        resident = f"{of['resident'] / _MB:.1f} MB | {share:.2f}"
        yield f"| {name} | {on_disk} | {resident} | {of['anonymous'] / _MB:.1f} MB |"
    yield ""
    say("switching")
    switch = child(_MODULE, "switch", environment, graphs, repeat, *separate)
    adapters = [path for path in (graphs / _MANY).iterdir() if path.suffix == ".onnx_adapter"]
    further = max(path.stat().st_size for path in adapters)
    merged = max(map(_size, separate.values()))
    yield "| to another task | one graph for all tasks | a graph a task | ratio |"
    yield "| --- | --: | --: | --: |"
    ours, theirs = switch["many_first"], switch["separate_first"]
    yield (f"| from disk | {1e3 * ours:.2f} ms | {1e3 * theirs:.1f} ms | {_ratio(ours, theirs)} |")
    yield f"| in memory already | {1e3 * switch['many_later']:.2f} ms | 0 ms | |"
    yield (
        f"| disk for a further task | {further / _MB:.2f} MB | {merged / _MB:.1f} MB "
        f"| {further / merged:.3f} |"
    )
    yield f"| one call of {_PROMPT} tokens | {1e3 * switch['many_call']:.2f} ms " + (
        f"| {1e3 * switch['separate_call']:.2f} ms "
        f"| {_ratio(switch['many_call'], switch['separate_call'])} |"
    )
    yield ""
    say("generation")
    speeds = child(_MODULE, "generate", environment, graphs, repeat, *separate)
    yield (
        f"| tokens a second, {_NEW} after {_PROMPT} | batch 1 | of the base's "
        f"| batch {_ROWS} | of the base's |"
    )
    yield "| --- | --: | --: | --: | --: |"
    for name, batches in speeds.items():
        cells = (_speed_cells(batches.get(rows), speeds[_ALONE][rows]) for rows in ("1", "8"))
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def _speed_cells(seconds: list[float] | None, of_base: list[float]) -> str:
    """Tokens a second, and the ratio to the base's in the same turn; medians."""
    if seconds is None:
        return "| "
    ratio = statistics.median(b / own for own, b in zip(seconds, of_base, strict=True))
    return f"{1 / statistics.median(seconds):,.0f} | {ratio:.2f}"


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.3f}"


def _program() -> Path:
    return Path(sys.executable).with_name("psoft-export")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# The children: each imports what it needs, measures, and returns what is printed as JSON.

_ALONE = "the base's graph"


def _child_steps(base: str, adapter: str, output: str) -> dict[str, float]:
    """How long each step of an export takes."""
    names = {"merging": "merge", "tracing": "trace and write", "running the models": "check"}
    marks = [("imports", time.monotonic())]

    def note(text: str) -> None:
        step = names.get(text.partition(":")[0])
        if step is not None and step != marks[-1][0]:
            marks.append((step, time.monotonic()))

    from psoft_export import onnx

    onnx.export(output, base=base, adapter=adapter, cache=False, device="cpu", note=note)
    ends = [moment for _, moment in marks[1:]] + [time.monotonic()]
    return {step: end - start for (step, start), end in zip(marks, ends, strict=True)}


def _child_export(base: str, graphs: str, *pairs: str) -> None:
    """All graphs of a model: the base's, one a task, one for all tasks, one of mixed batches."""
    from psoft_export import onnx

    adapters = dict(pair.split("=", 1) for pair in pairs)
    wanted: dict[str, dict[str, Any]] = {_BASE: {"model": base}}
    wanted |= {task: {"base": base, "adapter": adapter} for task, adapter in adapters.items()}
    wanted[_MANY] = {"base": base, "adapters": adapters}
    wanted[_MIXED] = {"base": base, "adapters": adapters, "mixed_batch": True}
    for name, options in wanted.items():
        Path(graphs).mkdir(exist_ok=True)
        onnx.export(Path(graphs) / name, **options, device="cpu")


def _child_memory(graphs: str, kind: str, *tasks: str) -> dict[str, float]:
    """What opening graphs and running each task once adds to a process that has run one before."""
    from psoft_export import onnx

    load = partial(_open, Path(graphs))
    ids = _prompts(1)
    first = load(_BASE)  # brings what the first graph of a process brings
    first(input_ids=ids)
    before = _resident()
    opened: list[onnx.OnnxModel] = []
    if kind == _SEPARATE:
        for task in tasks:
            opened.append(load(task))
            opened[-1](input_ids=ids)
    else:
        opened.append(load(kind))
        for task in tasks if kind != _BASE else [None]:
            opened[-1](input_ids=ids, task=task)
    return {name: now - before[name] for name, now in _resident().items()}


def _child_switch(graphs: str, repeat: str, *tasks: str) -> dict[str, float]:
    """Seconds that the first call in another task takes more than one in the same."""
    load = partial(_open, Path(graphs))
    ids = _prompts(1)
    one, other = tasks[:2]
    found: dict[str, list[float]] = {}

    def keep(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    for _ in range(2 * int(repeat) + 1):
        many, separate = load(_MANY), load(one)
        call = partial(many, input_ids=ids)
        same = _settled(partial(call, task=one))
        keep("many_call", same)
        keep("many_first", seconds_of(partial(call, task=other)) - same)
        for task in (one, other) * 8:
            switched = seconds_of(partial(call, task=task))
            keep("many_later", switched - seconds_of(partial(call, task=task)))
        same = _settled(partial(separate, input_ids=ids))
        keep("separate_call", same)
        keep("separate_first", seconds_of(lambda: load(other)(input_ids=ids)) - same)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _child_generate(graphs: str, repeat: str, *tasks: str) -> dict[str, dict[int, list[float]]]:
    """Seconds a token of each way to generate, by batch size, in each turn."""
    load = partial(_open, Path(graphs))
    base, many, mixed = load(_BASE), load(_MANY), load(_MIXED)
    separate = {task: load(task) for task in tasks}
    one = tasks[0]
    of_rows = [tasks[row % len(tasks)] for row in range(_ROWS)]
    counts = {task: of_rows.count(task) for task in tasks}

    def in_turn(models: Mapping[str, tuple[Any, str | None]]) -> None:
        for task, (model, name) in models.items():
            _generate(model, counts[task], task=name)

    merged = separate[one]
    alternatives: dict[str, dict[int, Callable[[], object]]] = {
        _ALONE: {rows: partial(_generate, base, rows) for rows in (1, _ROWS)},
        "one task's graph": {rows: partial(_generate, merged, rows) for rows in (1, _ROWS)},
        "graph for all tasks, in one of them": {
            rows: partial(_generate, many, rows, task=one) for rows in (1, _ROWS)
        },
        "graph for all tasks, in none": {
            rows: partial(_generate, many, rows) for rows in (1, _ROWS)
        },
        "`--mixed-batch`, all rows in one task": {
            rows: partial(_generate, mixed, rows, task=one) for rows in (1, _ROWS)
        },
        f"`--mixed-batch`, {len(tasks)} tasks in a batch": {
            _ROWS: partial(_generate, mixed, _ROWS, tasks=of_rows)
        },
        f"{len(tasks)} tasks' graphs, one after another": {
            _ROWS: partial(in_turn, {task: (separate[task], None) for task in tasks})
        },
        "graph for all tasks, one task after another": {
            _ROWS: partial(in_turn, {task: (many, task) for task in tasks})
        },
    }
    found: dict[str, dict[int, list[float]]] = {
        name: {rows: [] for rows in works} for name, works in alternatives.items()
    }
    for turn in range(int(repeat) + 1):
        for name, works in alternatives.items():
            for rows, work in works.items():
                seconds = seconds_of(work)
                if turn:  # the first is to settle
                    found[name][rows].append(seconds / (rows * _NEW))
    return found


def _generate(model: Any, rows: int, **task: Any) -> None:
    ids = _prompts(rows)
    options = {"min_new_tokens": _NEW, "max_new_tokens": _NEW, "do_sample": False}
    found = model.generate(ids, attention_mask=ids.new_ones(ids.shape), **options, **task)
    assert found.shape == (rows, _PROMPT + _NEW)


def _prompts(rows: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (rows, _PROMPT), generator=generator)


def _open(graphs: Path, name: str) -> Any:
    from psoft_export import onnx

    return onnx.load(graphs / name, device="cpu")


def _settled(work: Callable[[], object]) -> float:
    """The median of a few calls, after some that are not counted."""
    return statistics.median([seconds_of(work) for _ in range(2 * _SETTLED)][_SETTLED:])


def _resident() -> dict[str, float]:
    """Bytes of this process in memory: all, and those that no file backs."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"resident": "VmRSS", "anonymous": "RssAnon"}
    return {name: 1024 * float(fields[field].split()[0]) for name, field in names.items()}


_PARTS: dict[str, Callable[..., Any]] = {
    "steps": _child_steps,
    "export": _child_export,
    "memory": _child_memory,
    "switch": _child_switch,
    "generate": _child_generate,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.onnx", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="turns of generation; medians")
    parser.add_argument("--exports", type=int, default=3, help="runs of each export; medians")
    parser.add_argument("--quick", action="store_true", help="everything once")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each program")
    parser.add_argument("--folder", type=Path, help="scratch space; default: a temporary folder")
    return parser.parse_args()


def main() -> None:
    """Print the tables of each model as they are measured."""
    if sys.argv[1:2] == ["--part"]:
        _, part, *arguments = sys.argv[1:]
        print(json.dumps(_PARTS[part](*arguments) or {}))
        return
    options = _arguments()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    repeat, exports = (1, 1) if options.quick else (options.repeat, options.exports)
    print(machine_line(options.threads, _PACKAGES) + "\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="psoft-bench-", dir=options.folder) as folder:
        scratch = Path(folder)
        environment = child_environment(options.threads, Path(folder) / "cache")
        try:
            for table, turns in ((export_table, exports), (serving_tables, repeat)):
                for line in table(turns, scratch, environment):
                    print(line, flush=True)
        except ProgramError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
