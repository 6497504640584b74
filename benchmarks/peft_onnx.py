"""The export that PEFT's users write: `python -m benchmarks.peft_onnx BASE ADAPTER OUTPUT`."""

import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter

_ROWS, _CACHED, _TOKENS = 2, 5, 3


def sample(model: Any) -> dict[str, Any]:
    """What the model is traced with: some tokens after some that are cached, one row padded."""
    ids = torch.randint(model.config.vocab_size, (_ROWS, _CACHED + _TOKENS))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = model(
            input_ids=ids[:, :_CACHED],
            attention_mask=mask[:, :_CACHED],
            position_ids=positions[:, :_CACHED],
            use_cache=True,
        ).past_key_values
    return {
        "input_ids": ids[:, _CACHED:],
        "attention_mask": mask,
        "position_ids": positions[:, _CACHED:],
        "past_key_values": cache,
        "use_cache": True,
    }


def main() -> None:
    """Load, merge, save, export, save."""
    base, adapter, output = sys.argv[1:]
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
    merged.save_pretrained(Path(output) / "merged")
    exporter = OnnxExporter()
    exported = exporter.export(merged, sample(merged), OnnxConfig(dynamic=True))
    exported.save_pretrained(output)


if __name__ == "__main__":
    main()
