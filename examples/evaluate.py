"""Loads the example models through transformers and PEFT and measures their loss on a text.

It neither trains nor merges: it is the yardstick that a merged model is held against.
"""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from psoft_export import restore_basis


def load_base(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model saved in `folder`, its weights cast to `dtype`, ready for inference."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def load_with_peft(
    base_folder: str | Path, adapter_folder: str | Path, dtype: torch.dtype = torch.float32
) -> PeftModel:
    """The base in `dtype` with the adapter run by PEFT beside it, not merged.

    PEFT finds a basis by an SVD on this machine; the recorded one, of training, takes its place.
    """
    model = PeftModel.from_pretrained(load_base(base_folder, dtype), str(adapter_folder))
    restore_basis(model, adapter_folder)
    return model.eval()


@torch.inference_mode()
def held_out_loss(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 256,
    windows: int = 64,
) -> float:
    """Mean cross-entropy, in nats per byte, over the first `windows` windows of `text`.

    Windows are consecutive and do not share context; the first byte of each is given. The model
    computes in its own dtype, the losses are added up in float64. Raises ValueError when the text
    is shorter than the windows asked for.
    """
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    if len(tokens) < window * windows:
        raise ValueError(
            f"the text has {len(tokens)} tokens, {windows} windows of {window} need "
            f"{window * windows}: ask for fewer windows or give more text"
        )
    was_training = model.training
    model.eval()
    losses = [
        _token_losses(model, batch)
        for batch in tokens[: window * windows].view(windows, window).split(16)
    ]
    model.train(was_training)
    return torch.cat(losses).double().mean().item()


def _token_losses(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every predicted token: (rows, window) to (rows * (window - 1),)."""
    device = next(model.parameters()).device
    logits = model(input_ids=tokens.to(device)).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten().to(device), reduction="none"
    )
