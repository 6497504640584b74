"""The merge that PEFT's users write.

`python -m benchmarks.peft_merge BASE ADAPTER OUTPUT DEVICE`
"""

import sys

from peft import PeftModel
from transformers import LlamaForCausalLM


def main() -> None:
    """Load, merge, save."""
    base, adapter, output, device = sys.argv[1:]
    model = LlamaForCausalLM.from_pretrained(base, dtype="auto").to(device)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output)


if __name__ == "__main__":
    main()
