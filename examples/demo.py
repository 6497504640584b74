"""The main job on the bundled example: merge an adapter, then measure what came out.

Prints the loss on the task's held-out text for the base, the adapter run by PEFT, and the merged
checkpoint. Ends with an error if the merged model is not the adapter to the fourth decimal.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import transformers
from corpora import CORPORA
from evaluate import held_out_loss, load_base, load_with_peft
from transformers import AutoTokenizer

FOLDER = Path(__file__).parent / "byte_llama"
DECIMALS = 4


def demonstrate(name: str, output: Path) -> bool:
    """Merge one adapter, print the three losses, and say whether the last two agree."""
    base, adapter = FOLDER / "base", FOLDER / "adapters" / name
    program = str(Path(sys.executable).with_name("psoft-export"))
    command = [program, "merge", "--base", base, "--adapter", adapter, "--output", output]
    shown = " ".join(_short(part) for part in command)
    print(f"$ {shown}\n", flush=True)
    subprocess.run([*command, "--device", "cpu"], check=True)

    text = CORPORA[name]().held_out
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = {
        "base": load_base(base),
        "base + adapter, run by PEFT": load_with_peft(base, adapter),
        "merged checkpoint": load_base(output),
    }
    losses = {label: held_out_loss(model, tokenizer, text) for label, model in models.items()}
    print("\nloss on the task's held-out text, nats per byte")
    for label, loss in losses.items():
        print(f"  {label:<30} {loss:.{DECIMALS}f}")
    base_loss, adapter_loss, merged_loss = losses.values()
    agree = abs(merged_loss - adapter_loss) < 10**-DECIMALS
    verdict = "agree" if agree else "DO NOT agree"
    print(
        f"merged and adapter {verdict} to the {DECIMALS}th decimal "
        f"(difference {abs(merged_loss - adapter_loss):.1e}); "
        f"{base_loss - merged_loss:.2f} below the base\n"
    )
    return agree


def _short(part: str | Path) -> str:
    path = Path(part)
    if path.name == "psoft-export":
        return path.name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def main() -> int:
    """Demonstrate the adapters named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--adapter", action="append", choices=list(CORPORA), help="may be repeated; default: prose"
    )
    parser.add_argument("--output", type=Path, help="keep the merged checkpoints in this folder")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # PEFT calls a name that transformers has renamed; nothing a reader of the demo can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        names = arguments.adapter or list(CORPORA)[:1]
        results = [demonstrate(name, folder / name) for name in names]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
