"""A small model that an adapter moves far, and text that the adapted one wrote: a planted task.

And, for tests of the loss alone, trainings that tell nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PsoftConfig, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import psoft_export
from psoft_export.recovery.retraining import Kinship, Known
from tests.conftest import EXAMPLES
from tests.models import perturb

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
PRINTABLE = range(32, 127)


@dataclass(frozen=True)
class Planted:
    """A task whose right signs are known.

    Attributes:
        base: the base's folder, with a tokenizer of bytes.
        adapter: the adapter's folder, with its record.
        text: what the adapted model writes.
    """

    base: Path
    adapter: Path
    text: Path


def plant(
    folder: Path, *, windows: int = 60, length: int = 64, equal: str | None = None
) -> Planted:
    """Make base, adapter and text.

    Args:
        folder: to write.
        windows: of the text.
        length: of each, in tokens.
        equal: name of a weight whose first two singular values are made equal.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.25)
        if equal is not None:
            weight = model.get_parameter(equal)
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            values[1] = values[0]
            weight.copy_(left * values @ right)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(EXAMPLES / "base").save_pretrained(folder / "base")
    options = {"r": 6, "psoft_alpha": 6, "psoft_mag_a": False, "psoft_mag_b": False}
    adapted = get_peft_model(
        model, PsoftConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **options)
    )
    perturb(adapted, 5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("psoft_R.default.weight"):
                parameter.mul_(4)
    adapted.save_pretrained(folder / "adapter")
    psoft_export.record_basis(adapted, folder / "adapter")
    written = _written(adapted.eval(), windows, length)
    (folder / "task.txt").write_bytes(bytes(written))
    return Planted(folder / "base", folder / "adapter", folder / "task.txt")


def told_nothing(signs: Tensor) -> Known:
    """Trainings that say nothing."""
    modules, rank = signs.shape
    nothing = torch.zeros(modules)
    related = Kinship(signs, nothing, nothing, torch.ones(modules))
    return Known(signs, torch.zeros(modules, rank, rank), related)


@torch.no_grad()
def _written(model: torch.nn.Module, windows: int, length: int) -> list[int]:
    """Printable bytes, each drawn as the model says, in windows that each start anew."""
    generator = torch.Generator().manual_seed(1)
    allowed = torch.tensor(list(PRINTABLE))
    ids = allowed[torch.randint(len(allowed), (windows, 1), generator=generator)]
    for _ in range(length - 1):
        scores = model(input_ids=ids).logits[:, -1, allowed]
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, allowed[drawn]], dim=1)
    return ids.flatten().tolist()
