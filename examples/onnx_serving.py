"""Serves many tasks from one ONNX graph: switches between them and streams what each writes.

Needs a folder that `psoft-export onnx --adapter NAME=… --adapter NAME=…` wrote (without
`--mixed-batch`). First it generates through `psoft_export.onnx`; then it makes the same switch with
ONNX Runtime alone, as a server written in C++ or C# would.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

from psoft_export import onnx

NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
ERRORS_ONLY = 3


def stream(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tasks: list[str | None],
    tokens: int,
) -> None:
    """Print what each task writes after the prompt, as it comes; None is the base."""
    model = onnx.load(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for task in tasks:
        print(f"[{task or 'base'}]", flush=True)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(ids, task=task, max_new_tokens=tokens, do_sample=False, streamer=streamer)


def next_tokens(folder: Path, ids: list[int], tasks: list[str | None]) -> list[int]:
    """The most likely next token in each task, with nothing but ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    # ONNX Runtime warns that the rotations can be replaced by call. That is their purpose.
    options.log_severity_level = ERRORS_ONLY
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    feeds = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
        "position_ids": np.arange(len(ids))[None],
    }
    for cache in session.get_inputs():
        if cache.name.startswith("past_key_values"):  # empty: nothing came before the prompt
            _, heads, _, width = cache.shape
            feeds[cache.name] = np.empty((1, heads, 0, width), NUMPY_TYPES[cache.type])
    found = []
    for task in tasks:
        run = onnxruntime.RunOptions()
        if task is not None:
            adapter = onnxruntime.LoraAdapter()  # a server loads it once
            adapter.Load(str(folder / f"{task}.onnx_adapter"))
            run.add_active_adapter(adapter)
        (logits,) = session.run(["logits"], feeds, run)
        found.append(int(logits[0, -1].argmax()))
    return found


def main() -> None:
    """Serve the tasks named on the command line; by default the base and all tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what psoft-export onnx wrote")
    parser.add_argument("--prompt", default="The value ")
    parser.add_argument("--tokens", type=int, default=60, help="that each task writes")
    parser.add_argument("--task", action="append", help="may be repeated; default: all")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    folder, prompt = arguments.folder, arguments.prompt
    known = sorted(file.stem for file in folder.glob("*.onnx_adapter"))
    if not known or not set(arguments.task or ()) <= set(known):
        parser.error(f"{folder}: has the tasks {', '.join(known) or '(none)'}")
    tasks = [None, *(arguments.task or known)]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    stream(folder, tokenizer, prompt, tasks, arguments.tokens)
    print("\nmost likely next token, by ONNX Runtime alone")
    ids = tokenizer(prompt).input_ids
    for task, token in zip(tasks, next_tokens(folder, ids, tasks), strict=True):
        print(f"  {task or 'base':<30} {tokenizer.decode([token])!r}")


if __name__ == "__main__":
    main()
