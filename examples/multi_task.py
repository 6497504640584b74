"""Several tasks of one base: combined, switched in memory, and mixed in one batch.

Takes two of the bundled adapters, prints what their combination does to the loss on each task's
held-out text, and then lets one model write for each task. About a minute on two cores.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from corpora import CORPORA
from transformers import AutoModelForCausalLM, AutoTokenizer

import psoft_export

FOLDER = Path(__file__).parent / "byte_llama"
BASE = FOLDER / "base"
TASKS = {"prose": "prose-relaxed-r64", "sums": "arithmetic-strict-r32"}
TEXT_BYTES = 20_000
PROMPTS = {"prose": "The value of ", "sums": "12 + 30 = "}


def evaluate(texts: dict[str, Path], *, sweep: bool, plot: Path | None) -> None:
    """Print the loss of base, adapters and combination on each text, or of every method."""
    combination = psoft_export.Combination(
        {task: FOLDER / "adapters" / name for task, name in TASKS.items()},
        method="lie",
        weights=dict.fromkeys(TASKS, 0.5),
    )
    if not sweep:
        found = psoft_export.evaluate(BASE, combination, texts)
        print(f"loss, nats per byte; combination: {found.combination}")
        for text, losses in found.losses.items():
            figures = ", ".join(f"{model} {loss:.3f}" for model, loss in losses.items())
            print(f"  {text:<6} {figures}")
        return
    swept = psoft_export.sweep(BASE, combination, texts)
    print("method, weights times, loss on " + " and ".join(texts))
    for point in swept.points:
        figures = " ".join(f"{loss:7.3f}" for loss in point.losses.values())
        print(f"  {point.method:<16} {point.scale:<5g} {figures}")
    if plot is not None:
        from psoft_export.plots import plot_sweep

        plot_sweep(swept, plot)


def serve() -> None:
    """Switch one model between tasks, and give each row of a batch its own."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()

    def written(ids: torch.Tensor, **options: object) -> list[str]:
        found = model.generate(ids, max_new_tokens=24, do_sample=False, **options)
        return [repr(text) for text in tokenizer.batch_decode(found, skip_special_tokens=True)]

    bank = psoft_export.AdapterBank(model)
    for task, name in TASKS.items():
        bank.add(task, FOLDER / "adapters" / name)
    bank.combine("both", dict.fromkeys(TASKS, 0.5), "lie")
    print("\none task at a time, merged into the weights")
    for prompt in PROMPTS.values():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for task in (None, *bank.tasks):
            with bank.using(task):
                print(f"  {task or 'base':<6} {written(ids)[0]}")
    bank.close()

    bank = psoft_export.AdapterBank(model, form="unmerged")
    for task, name in TASKS.items():
        bank.add(task, FOLDER / "adapters" / name)
    rows = ["sums", None, "prose"]
    ids = tokenizer([PROMPTS["sums"]] * len(rows), return_tensors="pt").input_ids
    print("\none batch, a task for each row")
    for task, text in zip(rows, written(ids, tasks=rows), strict=True):
        print(f"  {task or 'base':<6} {text}")
    bank.close()


def main() -> None:
    """Evaluate, then serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sweep", action="store_true", help="every method, many weights (4 minutes)"
    )
    parser.add_argument("--plot", type=Path, help="with --sweep: draw it into this file")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        texts = {}
        for task, name in TASKS.items():
            texts[task] = Path(folder) / f"{task}.txt"
            texts[task].write_text(CORPORA[name]().held_out[:TEXT_BYTES], "utf-8")
        evaluate(texts, sweep=arguments.sweep, plot=arguments.plot)
    if not arguments.sweep:
        serve()


if __name__ == "__main__":
    main()
