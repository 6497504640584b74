"""Model cards: every fact of psoft_export.json in words, valid metadata, no path of the machine."""

import json
from pathlib import Path
from typing import Any

import pytest

import psoft_export
from psoft_export.model_card import adapter_card, is_handwritten, lora_card, merged_card
from tests import files, models
from tests.conftest import BUNDLED, EXAMPLES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = ("config.json", "model.safetensors", "tokenizer_config.json", "LICENSE.txt")
OUTPUTS = {
    "equivalent": True,
    "inputs": "24 lengths of random tokens, with padding",
    "output": "logits",
    "dtype": "BF16",
    "truth": "F32",
    "positions": 4096,
    "merged": {"rms": 0.0123, "largest": 0.1, "mean": 0.01, "divergence": 1e-5, "top1": 0.9985},
    "unmerged": {"rms": 0.0145, "largest": 0.1, "mean": 0.01, "divergence": 1e-5, "top1": 0.998},
    "factor": 2.0,
    "generation": {"tokens": 256, "merged": 0.97, "unmerged": 0.96},
    "losses": {"truth": 1.1397, "unmerged": 1.1401, "merged": 1.1398},
    "skipped": None,
    "problems": [],
}
WEIGHTS = {
    "equivalent": True,
    "merged_tensors": 28,
    "copied_tensors": 11,
    "saved_tensors": 0,
    "largest_error_ulp": 0.5,
    "not_nearest": 0,
    "largest_relative_error": 1.66e-3,
}


@pytest.fixture
def manifest() -> dict[str, Any]:
    """Of a merge of two Hub repositories, without a basis record."""
    module = {
        "module": "model.layers.0.mlp.up_proj",
        "tensor": "model.layers.0.mlp.up_proj.weight",
        "shape": [768, 256],
        "rank": 64,
        "basis_uncertainty": 0.0004,
    }
    changes = {"relative_delta": 0.25, "largest_angle": 71.2, "orthogonality_error": 7e-15}
    return {
        "base": {"kind": "hub", "name": "me/base", "revision": COMMIT, "sha256": {}},
        "adapter": {
            "kind": "hub",
            "name": "you/adapter",
            "revision": COMMIT[::-1],
            "sha256": {},
            "method": "PSOFT-SO (strict), Cayley transform",
            "base_model": None,
        },
        "tool": {"psoft_export": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "model_class": "LlamaForCausalLM",
        "options": {"dtype": "BF16"},
        "basis": {"record": None},
        "modules": [module | changes | {"relative_rounding": 0.004}],
        "warnings": ["the adapter has no basis record, see /home/ada/cache/bases for more"],
    }


def test_a_merged_checkpoint(manifest: dict[str, Any]) -> None:
    card = merged_card(manifest, FILES, "me/merged", "me/base")
    assert files.card_metadata(card) == {
        "base_model": "me/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["psoft", "psoft-export"],
    }
    for words in (
        "# merged\n",
        f"[me/base](https://huggingface.co/me/base/tree/{COMMIT})",
        f"[you/adapter](https://huggingface.co/you/adapter/tree/{COMMIT[::-1]})",
        "PSOFT-SO (strict), Cayley transform, rank 64",
        "‖ΔW‖ / ‖W‖ from 0.25 to 0.25; largest rotation angle 71.2°",
        'LlamaForCausalLM.from_pretrained("me/merged")',
        "Not checked",
        "- The adapter has no basis record, see bases for more.",
        "The base's licence is in `LICENSE.txt`.",
        "arXiv 2505.11235",
    ):
        assert words in card, words
    assert "/home" not in card
    classifier = merged_card(manifest, {*FILES, "modules.json"}, "me/merged", None)
    assert files.card_metadata(classifier)["library_name"] == "transformers"
    manifest["model_class"] = "BertModel"
    pipeline = merged_card(manifest, {*FILES, "modules.json"}, "me/merged", None)
    assert files.card_metadata(pipeline)["library_name"] == "sentence-transformers"
    assert 'SentenceTransformer("me/merged")' in pipeline


def test_the_verdict_in_figures(manifest: dict[str, Any]) -> None:
    manifest["verification"] = {"weights": WEIGHTS, "outputs": OUTPUTS}
    card = merged_card(manifest, FILES, "me/merged", "me/base")
    for words in (
        "Weights: **equivalent**",
        "28 merged tensors are off by 0.5 units in the last place at most",
        "11 tensors are the base's",
        "Outputs: **equivalent**. logits of 24 lengths",
        "1.23e-02 root mean square",
        "unmerged in BF16 they are 1.45e-02 away",
        "same at 99.85% of the positions",
        "97.0% of 256 tokens",
        "merged 1.1398",
    ):
        assert words in card, words
    skipped = OUTPUTS | {"equivalent": None, "skipped": "no memory", "merged": None}
    manifest["verification"] = {"weights": None, "outputs": skipped}
    card = merged_card(manifest, FILES, "me/merged", "me/base")
    assert "Outputs: not compared (no memory)" in card and "Weights: not checked" in card
    assert "**equivalent**" not in card


def test_local_folders_get_their_names_and_no_link(manifest: dict[str, Any]) -> None:
    manifest["base"] = {"kind": "local", "name": "base", "revision": None, "sha256": {}}
    manifest["adapter"] |= {"kind": "local", "name": "run-7", "revision": None}
    card = merged_card(manifest, FILES, "me/merged", None)
    assert not {"base_model", "base_model_relation"} & files.card_metadata(card).keys()
    assert "| base | `base`, a local folder" in card and "`run-7`" in card
    said = merged_card(manifest, FILES, "me/merged", "meta/base")
    assert files.card_metadata(said)["base_model"] == "meta/base"
    assert "the adapter's config names [meta/base](https://huggingface.co/meta/base)" in said


def test_of_the_bundled_adapter(tmp_path: Path) -> None:
    base, prose = EXAMPLES / "base", EXAMPLES / "adapters" / BUNDLED[0]
    config = json.loads((prose / "adapter_config.json").read_text())
    card = adapter_card(psoft_export.inspect(prose), config, "me/prose", "me/base")
    assert files.card_metadata(card)["base_model_relation"] == "adapter"
    assert files.card_metadata(card)["library_name"] == "peft"
    assert "inside: signs; full SVD, cpu" in card
    assert "psoft_export.restore_basis(model, folder)" in card
    assert "--base me/base --adapter me/prose" in card and "../../base" not in card
    report = psoft_export.to_lora(base, prose, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    card = lora_card(report.manifest, config, ("adapter_model.safetensors",), "me/lora", None)
    assert files.card_metadata(card)["tags"] == ["psoft", "psoft-export", "lora"]
    worst = max(module.relative_error for module in report.modules)
    assert f"is {worst:.1e} at most" in card and "Outputs were not compared" in card
    assert str(EXAMPLES) not in card


def test_the_code_in_a_card_runs(tmp_path: Path) -> None:
    base, prose = EXAMPLES / "base", EXAMPLES / "adapters" / BUNDLED[0]
    merged, lora = str(tmp_path / "merged"), str(tmp_path / "lora")
    report = psoft_export.merge(base, prose, merged)
    names = [path.name for path in (tmp_path / "merged").iterdir()]
    whole = _run(merged_card(report.manifest, names, merged, None))
    assert whole["tokenizer"]("a")["input_ids"]
    other = psoft_export.to_lora(base, prose, lora)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    card = lora_card(other.manifest, config, (), lora, None).replace('"BASE"', repr(str(base)))
    assert type(_run(card)["model"]).__name__ == "PeftModelForCausalLM"
    config = json.loads((prose / "adapter_config.json").read_text())
    card = adapter_card(psoft_export.inspect(prose), config, "me/prose", None)
    card = card.replace('"BASE"', repr(str(base)))
    card = card.replace('snapshot_download("me/prose")', repr(str(prose)))
    assert _run(card)["model"].peft_config["default"].r == 64


def _run(card: str) -> dict[str, Any]:
    """What the first Python example of a card defines."""
    names: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    return names


def test_whose_card_it_is(manifest: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    made = merged_card(manifest, FILES, "me/merged", "me/base")
    assert not is_handwritten(made)
    assert is_handwritten(made.replace("# merged", "# Merged with love"))
    assert is_handwritten(made + "\nOne more line.\n")
    assert is_handwritten("# Mine\n")
    form = models.save_adapter("llama", llama, tmp_path / "adapter") / "README.md"
    assert not is_handwritten(form.read_text()), "PEFT's empty form"
