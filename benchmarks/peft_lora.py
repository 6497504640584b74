"""PEFT's conversion to LoRA.

`python -m benchmarks.peft_lora BASE ADAPTER RANK OUTPUT DEVICE`
"""

import sys

from peft import PeftModel, save_as_lora
from transformers import LlamaForCausalLM


def main() -> None:
    """Load, convert, save."""
    base, adapter, rank, output, device = sys.argv[1:]
    model = LlamaForCausalLM.from_pretrained(base, dtype="auto").to(device)
    save_as_lora(output, PeftModel.from_pretrained(model, adapter), rank=int(rank))


if __name__ == "__main__":
    main()
