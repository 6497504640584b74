"""Switching and mixing tasks in memory, against PEFT: `python -m benchmarks.bank`.

Both run the same adapters of the same models, in one run: the bundled Llama with its three
adapters, and a Llama of 1 B parameters with two made for this.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.children import child, child_environment, machine_line, say, seconds_of
from benchmarks.process import ProgramError

_MODULE = "benchmarks.bank"
_PACKAGES = ("torch", "transformers", "peft")
_EXAMPLE = Path(__file__).parent.parent / "examples" / "byte_llama"
_BUNDLED = ("prose-relaxed-r64", "arithmetic-strict-r32", "records-neumann-r48")
_COUNTS = (2, 8, 32)
_SWITCHES = 1000
_MB = 1e6
_CHILDREN = ("peft", "merged", "files", "hot", "unmerged")
_PROMPT, _GROUPS, _ROWS = 16, 4, 2  # tokens; tasks of a mixed batch, and rows of each
_SIZE, _RANK = "1b", 64


def tables(
    name: str, model: Sequence[object], tokens: int, repeat: int, environment: Mapping[str, str]
) -> Iterator[str]:
    """The tables of one model, as Markdown.

    Args:
        name: of the model.
        model: base and adapters, as the children take them.
        tokens: new tokens of each row in a mixed batch.
        repeat: turns; medians are taken.
        environment: of the children.
    """
    for dtype in ("float32", "bfloat16"):
        found = {}
        for part in _CHILDREN:
            say(f"{name}, {dtype}: {part}")
            found[part] = child(_MODULE, part, environment, dtype, repeat, tokens, *model)
        theirs = found["peft"]
        yield f"### {name}, {dtype}\n"
        yield "| switch, ms | one task to another | PEFT takes | back to the base | PEFT takes |"
        yield "| --- | ---: | ---: | ---: | ---: |"
        yield _switch_row("PEFT, unmerge and merge", theirs, theirs)
        yield _switch_row("bank, merged, copies of the weights", found["merged"], theirs)
        yield _switch_row("bank, merged, the base's files", found["files"], theirs)
        yield _switch_row("bank, merged, two tasks hot", found["hot"], theirs)
        yield _switch_row("bank, unmerged", found["unmerged"], theirs)
        yield f"| PEFT, unmerged (`set_adapter`) | {theirs['set'] * 1e3:.2f} | | | |"
        yield ""
        counts = [count for count in _COUNTS if str(count) in found["merged"]["memory"]]
        yield "| MB beside the model, for tasks | " + " | ".join(map(str, counts)) + " |"
        yield "| --- |" + " ---: |" * len(counts)
        for label, part in (
            ("PEFT", "peft"),
            ("bank, merged, copies of the weights", "merged"),
            ("bank, merged, the base's files", "files"),
            ("bank, merged, two tasks hot", "hot"),
            ("bank, unmerged", "unmerged"),
        ):
            memory = found[part]["memory"]
            cells = [
                f"{memory[str(count)] / _MB:.1f}" if str(count) in memory else "not measured"
                for count in counts
            ]
            yield f"| {label} | {' | '.join(cells)} |"
        yield ""
        speed, ours = theirs["speed"], found["unmerged"]["speed"]
        alone = found["merged"]["speed"]
        rows = _GROUPS * _ROWS
        yield f"| tokens/s, {rows} rows, {_GROUPS} tasks | | to PEFT |"
        yield "| --- | ---: | ---: |"
        yield f"| PEFT, a pass for each task | {speed:.1f} | 1.00 |"
        yield f"| bank, unmerged, one mixed batch | {ours:.1f} | {ours / speed:.2f} |"
        yield f"| bank, merged, a pass for each task | {alone:.1f} | {alone / speed:.2f} |"
        base = theirs["base_speed"]
        yield f"| the base alone, one batch | {base:.1f} | {base / speed:.2f} |"
        yield ""
        if "drift" in theirs:
            drift = theirs["drift"]
            yield (
                f"After {_SWITCHES} switches and back: PEFT's weights differ from the base in "
                f"{drift['share']:.1%} of their entries, by {drift['largest']:.2g} at most; the "
                f"bank's in {found['merged']['drift']['share']:.0%}.\n"
            )


def _switch_row(label: str, found: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    cells = []
    for what in ("switch", "back"):
        cells += [f"{found[what] * 1e3:.2f}", f"{theirs[what] / found[what]:.1f} times"]
    return f"| {label} | {' | '.join(cells)} |"


# The children: each imports what it needs, measures, and returns what is printed as JSON.


def _make(size: str, rank: str, folder: str) -> None:
    """A base of one of the shapes, and two adapters of it that PEFT has made, with records."""
    import torch
    from peft import PsoftConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from benchmarks.shapes import SHAPES, TARGETS
    from benchmarks.synthetic import make_base
    from psoft_export import record_basis

    base = Path(folder) / "base"
    make_base(SHAPES[size], base)
    # A low-rank SVD: what is measured does not depend on the solver, and 400 s are saved.
    config = PsoftConfig(
        task_type="CAUSAL_LM",
        r=int(rank),
        psoft_alpha=int(rank),
        target_modules=list(TARGETS),
        psoft_svd="lowrank",
        psoft_svd_lowrank_niter=1,
    )
    plain = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(plain, config)
    random = torch.Generator().manual_seed(1)
    for number in range(2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("psoft_R.default.weight"):
                    parameter.copy_(0.01 * torch.randn(parameter.shape, generator=random))
        adapter = Path(folder) / f"adapter-{number}"
        model.save_pretrained(adapter)
        record_basis(model, adapter)


def _peft(dtype: str, repeat: str, tokens: str, base: str, *adapters: str) -> dict[str, Any]:
    """PEFT with every adapter loaded."""
    import torch
    from peft import PeftModel

    model = _load(base, dtype)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base_speed = _speed(_batch(int(tokens), lambda ids, n: _generate(model, ids, n)), int(repeat))
    held = sum(t.nbytes for t in _tensors(model))
    memory = {}
    tuned: Any = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters[1:], 1):
        tuned.load_adapter(adapter, adapter_name=str(number))
    memory[str(len(adapters))] = sum(t.nbytes for t in _tensors(tuned)) - held
    names = [str(number) for number in range(len(adapters))]

    def switch(name: str) -> None:
        tuned.unmerge_adapter()
        tuned.merge_adapter([name])

    tuned.merge_adapter([names[0]])
    times = [seconds_of(partial(switch, names[turn % 2])) for turn in range(1, 2 * int(repeat) + 1)]
    found: dict[str, Any] = {"switch": statistics.median(times), "base_speed": base_speed}
    found["back"] = seconds_of(tuned.unmerge_adapter)
    turns = range(2 * int(repeat))
    found["set"] = statistics.median(
        seconds_of(partial(tuned.set_adapter, names[turn % 2])) for turn in turns
    )

    def passes(ids: Any, new: int) -> None:
        for number, group in enumerate(ids.split(_ROWS)):
            tuned.set_adapter(names[number % len(names)])
            _generate(tuned, group, new)

    found["speed"] = _speed(_batch(int(tokens), passes), int(repeat))
    if base == str(_EXAMPLE / "base"):
        tuned.merge_adapter([names[0]])
        for turn in range(_SWITCHES):
            switch(names[turn % len(names)])
        tuned.unmerge_adapter()
        now = {
            name.replace(".base_layer", ""): tensor
            for name, tensor in tuned.get_base_model().state_dict().items()
            if "psoft" not in name
        }
        found["drift"] = _drift(plain, now)
        for count in (c for c in _COUNTS if c > len(adapters)):
            for number in range(len(tuned.peft_config), count):
                tuned.load_adapter(adapters[number % len(adapters)], adapter_name=str(number))
            memory[str(count)] = sum(t.nbytes for t in _tensors(tuned)) - held
        one = PeftModel.from_pretrained(_load(base, dtype), adapters[0], adapter_name="0")
        one.load_adapter(adapters[1], adapter_name="1")
        memory["2"] = sum(t.nbytes for t in _tensors(one)) - held
    found["memory"] = memory
    torch.set_grad_enabled(True)
    return found


def _bank(form: Any, *, of_files: bool = False, hot: int = 0) -> Callable[..., dict[str, Any]]:
    def part(dtype: str, repeat: str, tokens: str, base: str, *adapters: str) -> dict[str, Any]:
        """A bank with every adapter added."""
        from psoft_export import AdapterBank

        model = _load(base, dtype)
        plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        bank = AdapterBank(model, form=form, base=base if of_files else None, hot=hot)
        memory = {}
        for number, adapter in enumerate(adapters):
            bank.add(str(number), adapter)
            memory[str(len(bank.tasks))] = bank.memory.total
        names = bank.tasks
        for name in (names[1], names[0]):
            bank.activate(name)
        times = [
            seconds_of(partial(bank.activate, names[turn % 2]))
            for turn in range(1, 2 * int(repeat) + 1)
        ]
        memory = {count: total + bank.memory.hot for count, total in memory.items()}
        backs = []
        for _ in range(int(repeat)):
            backs.append(seconds_of(partial(bank.activate, None)))
            bank.activate(names[0])
        found: dict[str, Any] = {
            "switch": statistics.median(times),
            "back": statistics.median(backs),
        }
        chosen = [names[n % len(names)] for n in range(_GROUPS) for _ in range(_ROWS)]

        def mixed(ids: Any, new: int) -> None:
            model.generate(ids, tasks=chosen, **_options(new))

        def passes(ids: Any, new: int) -> None:
            for number, group in enumerate(ids.split(_ROWS)):
                bank.activate(names[number % len(names)])
                _generate(model, group, new)

        if not of_files and not hot:
            run = mixed if form == "unmerged" else passes
            found["speed"] = _speed(_batch(int(tokens), run), int(repeat))
        if form == "merged":
            for turn in range(_SWITCHES if base == str(_EXAMPLE / "base") else 0):
                bank.activate(names[turn % len(names)])
            bank.activate(None)
            found["drift"] = _drift(plain, model.state_dict())
        for count in (c for c in _COUNTS if c > len(adapters)):
            for number in range(len(bank.tasks), count):
                share = number / count
                bank.combine(str(number), {"0": share, "1": 1 - share}, "cayley")
            memory[str(count)] = bank.memory.total
        found["memory"] = memory
        return found

    return part


def _load(base: str, dtype: str) -> Any:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    return AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()


def _tensors(model: Any) -> Iterator[Any]:
    """Parameters and buffers, each once."""
    seen = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()] if t.numel()}
    return iter(seen.values())


def _drift(plain: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
    different = total = 0
    largest = 0.0
    for name, tensor in plain.items():
        off = (now[name].float() - tensor.float()).abs()
        different += int(off.count_nonzero())
        total += tensor.numel()
        largest = max(largest, float(off.max()))
    return {"share": different / total, "largest": largest}


def _options(new: int) -> dict[str, Any]:
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}


def _generate(model: Any, ids: Any, new: int) -> None:
    model.generate(input_ids=ids, **_options(new))


def _batch(tokens: int, run: Callable[[Any, int], None]) -> Callable[[], int]:
    """One turn: generate for a batch of all tasks; returns how many tokens were new."""
    import torch

    random = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 200, (_GROUPS * _ROWS, _PROMPT), generator=random)

    def turn() -> int:
        run(ids, tokens)
        return len(ids) * tokens

    return turn


def _speed(turn: Callable[[], int], repeat: int) -> float:
    """Tokens a second: the median turn, after one that is not counted."""
    turn()
    speeds = []
    for _ in range(repeat):
        start = time.perf_counter()
        count = turn()
        speeds.append(count / (time.perf_counter() - start))
    return statistics.median(speeds)


_PARTS: dict[str, Callable[..., Any]] = {
    "make": _make,
    "peft": _peft,
    "merged": _bank("merged"),
    "files": _bank("merged", of_files=True),
    "hot": _bank("merged", hot=2),
    "unmerged": _bank("unmerged"),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=_MODULE, description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="turns of each; medians")
    parser.add_argument("--quick", action="store_true", help="the bundled Llama only, once")
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
    print(machine_line(options.threads, _PACKAGES) + "\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="psoft-bench-", dir=options.folder) as folder:
        environment = child_environment(options.threads, Path(folder) / "cache")
        bundled = [_EXAMPLE / "base", *(_EXAMPLE / "adapters" / name for name in _BUNDLED)]
        repeat = 1 if options.quick else options.repeat
        try:
            for line in tables("bundled Llama, 3 adapters", bundled, 32, repeat, environment):
                print(line, flush=True)
            if options.quick:
                return
            say(f"making the {_SIZE} base and its adapters")
            child(_MODULE, "make", environment, _SIZE, _RANK, folder)
            made = [Path(folder) / name for name in ("base", "adapter-0", "adapter-1")]
            for line in tables(f"{_SIZE} shape, 2 adapters", made, 8, repeat, environment):
                print(line, flush=True)
        except ProgramError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
