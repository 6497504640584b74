"""Trains the example models: a small byte-level Llama and three PSOFT adapters of it.

It trains and saves, with transformers and PEFT; measuring is `evaluate.py`, text `corpora.py`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from corpora import CORPORA, Corpus, python_sources
from evaluate import held_out_loss, load_base
from peft import PsoftConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

import psoft_export

WINDOW = 256
SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What an adapter names as its base: the way there from the adapter's own folder.
BASE_FROM_ADAPTER = "../../base"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: AdamW, linear warmup, cosine decay to a tenth."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup: float = 0.05
    seed: int = 0


BASE_SCHEDULE = Schedule(steps=1000, batch=16, learning_rate=3e-3, weight_decay=0.1)


@dataclass(frozen=True)
class Recipe:
    """One adapter: its PSOFT options and its training schedule."""

    options: dict[str, int | bool]
    schedule: Schedule


RECIPES = {
    "prose-relaxed-r64": Recipe(
        options={"r": 64, "psoft_alpha": 64},
        schedule=Schedule(steps=400, batch=8, learning_rate=5e-3, seed=1),
    ),
    "arithmetic-strict-r32": Recipe(
        options={"r": 32, "psoft_alpha": 48, "psoft_mag_a": False, "psoft_mag_b": False},
        schedule=Schedule(steps=250, batch=8, learning_rate=1e-2, seed=2),
    ),
    "records-neumann-r48": Recipe(
        options={"r": 48, "psoft_alpha": 48, "use_cayley_neumann": True},
        schedule=Schedule(steps=250, batch=8, learning_rate=5e-3, seed=3),
    ),
}


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose token `b` is the byte `b`, followed by three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # ByteLevel writes a printable byte as its own character and the others, in order, from U+0100.
    printable = {ord(char): char for char in alphabet if ord(char) < 256}
    others = iter(char for char in alphabet if ord(char) >= 256)
    vocabulary = {printable.get(byte) or next(others): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )


def base_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A fresh Llama of 3.3 million parameters for the tokenizer's vocabulary."""
    token_ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL_TOKENS}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            **token_ids,
        )
    )
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=128, **token_ids)
    return model


def fit(model: torch.nn.Module, tokens: torch.Tensor, schedule: Schedule) -> None:
    """Train the model's trainable parameters in place, on windows drawn at random from `tokens`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=schedule.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=schedule.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(schedule))
    generator = torch.Generator().manual_seed(schedule.seed)
    model.train()
    started = time.perf_counter()
    for step in range(1, schedule.steps + 1):
        starts = torch.randint(len(tokens) - WINDOW, (schedule.batch, 1), generator=generator)
        batch = tokens[starts + torch.arange(WINDOW)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == schedule.steps:
            seconds = time.perf_counter() - started
            print(
                f"  step {step:5d}/{schedule.steps}  loss {loss.item():.3f}  {seconds:.0f} s",
                flush=True,
            )
    model.eval()


def _rate(schedule: Schedule) -> Callable[[int], float]:
    """The learning rate's factor at a step: up a line, then down half a cosine to 0.1."""
    warmup = max(1, round(schedule.warmup * schedule.steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, schedule.steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    return factor


def train_base(output: Path, schedule: Schedule) -> None:
    """Train the base in float32 and save it, in bfloat16, with its tokenizer."""
    set_seed(schedule.seed)
    corpus = python_sources()
    tokenizer = byte_tokenizer()
    model = base_model(tokenizer)
    fit(model, _tokens(tokenizer, corpus.train), schedule)
    folder = output / "base"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loss = held_out_loss(load_base(folder), tokenizer, corpus.held_out)
    print(f"base: held-out loss on Python sources {loss:.3f} nats per byte", flush=True)


def train_adapter(name: str, corpus: Corpus, recipe: Recipe, output: Path) -> None:
    """Train one adapter on the base as saved, that is on its rounded weights, and save it."""
    set_seed(recipe.schedule.seed)
    tokenizer = AutoTokenizer.from_pretrained(output / "base")
    base = load_base(output / "base")
    before = held_out_loss(base, tokenizer, corpus.held_out)
    config = PsoftConfig(task_type="CAUSAL_LM", target_modules=TARGET_MODULES, **recipe.options)
    model = get_peft_model(base, config)
    fit(model, _tokens(tokenizer, corpus.train), recipe.schedule)
    folder = output / "adapters" / name
    model.save_pretrained(folder, save_embedding_layers=False)
    psoft_export.record_basis(model, folder)
    _make_portable(folder)
    after = held_out_loss(model, tokenizer, corpus.held_out)
    print(f"{name}: held-out loss {before:.3f} (base) -> {after:.3f} nats per byte", flush=True)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def _make_portable(folder: Path) -> None:
    """Take this machine out of a saved adapter: the base's path, a set's order, the empty card."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = BASE_FROM_ADAPTER
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def _scaled(schedule: Schedule, factor: float) -> Schedule:
    return replace(schedule, steps=max(1, round(schedule.steps * factor)))


def main() -> None:
    """Train what the command line names, in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models",
        nargs="*",
        choices=["base", *RECIPES, "all"],
        default="all",
        help="what to train; an adapter needs the base in the output folder (default: all)",
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "byte_llama")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="train this fraction of the steps"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    chosen = ["base", *RECIPES] if "all" in arguments.models else arguments.models
    for name in chosen:
        started = time.perf_counter()
        print(f"training {name}", flush=True)
        if name == "base":
            train_base(arguments.output, _scaled(BASE_SCHEDULE, arguments.steps_scale))
        else:
            schedule = _scaled(RECIPES[name].schedule, arguments.steps_scale)
            recipe = replace(RECIPES[name], schedule=schedule)
            train_adapter(name, CORPORA[name](), recipe, arguments.output)
        print(f"{name}: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
