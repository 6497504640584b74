"""The LoRA adapter is the PSOFT adapter, for PEFT and for what servers ask of its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from psoft_export import to_lora
from psoft_export.algebra.low_rank import needed_rank, product_difference, spectral_factors
from psoft_export.cli.main import run
from psoft_export.errors import NonFiniteError, RecordMissingError, UsageError
from tests import files, models
from tests.conftest import BUNDLED, EXAMPLES
from tests.test_bundled_adapters import load_base, load_with_peft
from tests.test_parity_with_peft import OPTIONS, logits

BASE = EXAMPLES / "base"
PROSE = EXAMPLES / "adapters" / BUNDLED[0]


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Module path → scaling · lora_B lora_A in float64, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            assert a.shape[0] == b.shape[1] == config["r"]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[path] = scaling * (b.double() @ a.double())
    return found


def exact_deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    layers = dict(model.get_base_model().named_modules())
    return {
        path: weight - layers[path].get_base_layer().weight.double()
        for path, weight in models.exact_weights(model).items()
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_peft_loads_the_same_change_of_every_weight(name: str, llama: Path, tmp_path: Path) -> None:
    adapter = models.save_adapter("llama", llama, tmp_path / "adapter", **OPTIONS[name])
    report = to_lora(llama, adapter, tmp_path / "lora", device="cpu")
    exact = exact_deltas(models.load_with_peft("llama", llama, adapter))
    ours = deltas(tmp_path / "lora")
    assert ours.keys() == exact.keys() and len(report.modules) == len(exact)
    for module in report.modules:
        delta = exact[module.module]
        error = float((ours[module.module] - delta).norm() / delta.norm())
        assert error < 1e-6 and error == pytest.approx(module.relative_error, rel=0.1, abs=1e-9)
    unmerged = logits(models.load_with_peft("llama", llama, adapter), "llama")
    as_lora = logits(models.load_with_peft("llama", llama, tmp_path / "lora"), "llama")
    assert float((as_lora - unmerged).abs().max()) < 2e-5 * float(unmerged.abs().max())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_gives_the_same_logits(family: str, base_folder: Any, tmp_path: Path) -> None:
    base = base_folder(family)
    adapter = models.save_adapter(family, base, tmp_path / "adapter")
    to_lora(base, adapter, tmp_path / "lora", device="cpu")
    unmerged = logits(models.load_with_peft(family, base, adapter), family)
    as_lora = logits(models.load_with_peft(family, base, tmp_path / "lora"), family)
    assert float((as_lora - unmerged).abs().max()) < 2e-5 * float(unmerged.abs().max())


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_adapters_as_lora_give_the_recorded_models_logits(
    name: str, tmp_path: Path
) -> None:
    adapter = EXAMPLES / "adapters" / name
    to_lora(BASE, adapter, tmp_path / "lora", device="cpu")
    tokens = torch.arange(200).view(2, 100) % 250
    with torch.no_grad():
        wanted = load_with_peft(BASE, adapter)(tokens).logits
        lora = PeftModel.from_pretrained(load_base(BASE), str(tmp_path / "lora")).eval()
        found = lora(tokens).logits
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_files_are_what_servers_ask_for(tmp_path: Path) -> None:
    to_lora(BASE, PROSE, tmp_path / "lora", dtype="bf16", device="cpu")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    # vLLM's required fields, and those that it refuses with other values.
    assert config["peft_type"] == "LORA" and (config["r"], config["lora_alpha"]) == (64, 64)
    assert config["bias"] == "none" and not config["use_dora"] and not config["use_rslora"]
    assert config["modules_to_save"] is None
    # SGLang goes through a list of names.
    assert set(config["target_modules"]) == {f"{n}_proj" for n in "qkvo"} | {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    # llama.cpp's converter takes no other endings.
    assert all(name.startswith("base_model.model.model.layers.") for name in tensors)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_patterns_become_lists_of_paths(llama: Path, tmp_path: Path) -> None:
    chosen = OPTIONS["regex targets"]
    adapter = models.save_adapter("llama", llama, tmp_path / "adapter", **chosen)
    to_lora(llama, adapter, tmp_path / "lora", device="cpu")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(deltas(tmp_path / "lora"))


def test_saved_modules_come_along_with_a_warning(base_folder: Any, tmp_path: Path) -> None:
    base = base_folder("minilm")
    adapter = models.save_adapter("minilm", base, tmp_path / "adapter")
    report = to_lora(base, adapter, tmp_path / "lora", dtype="bf16", device="cpu")
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    heads = [name for name in before if "classifier" in name]
    assert heads and all(torch.equal(before[name], after[name]) for name in heads)
    assert any("vLLM" in warning for warning in report.manifest["warnings"])


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.3])
def test_a_reduced_rank_keeps_its_tolerance(tolerance: float, tmp_path: Path) -> None:
    report = to_lora(BASE, PROSE, tmp_path / "lora", reduce_rank=tolerance, device="cpu")
    exact = exact_deltas(load_with_peft(BASE, PROSE))
    ours = deltas(tmp_path / "lora")
    needed = {}
    for path, delta in exact.items():
        error = float((ours[path] - delta).norm() / delta.norm())
        assert error < tolerance + 1e-6
        values = torch.linalg.svdvals(delta)
        tails = values.square().flip(0).cumsum(0).flip(0).sqrt() / values.norm()
        needed[path] = int((tails[:64] > max(tolerance, 1e-7)).sum())
    assert {m.module: m.needed_rank for m in report.modules} == needed
    assert report.rank == max(needed.values()) and (report.rank < 64) == (tolerance > 0)
    assert not list((tmp_path / "lora").glob("*unreduced*"))
    for module in report.modules:
        found = float((ours[module.module] - exact[module.module]).norm())
        size = float(exact[module.module].norm())
        assert found / size == pytest.approx(module.relative_error, rel=0.01, abs=1e-7)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 12), st.integers(12, 40), st.integers(12, 30), st.integers(0, 2**31), st.data()
)
def test_cutting_a_product_is_the_best_approximation(
    rank: int, rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    random = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=random, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=random, dtype=torch.float64)
    new_left, new_right, values = spectral_factors(left, right)
    product = left @ right
    assert torch.allclose(new_left @ new_right, product, atol=1e-12 * float(values[0]))
    assert torch.allclose(values, torch.linalg.svdvals(product)[:rank], rtol=1e-10, atol=1e-10)
    kept = data.draw(st.integers(1, rank))
    error = product_difference(new_left, new_right, new_left[:, :kept], new_right[:kept])
    assert error == pytest.approx(float(values[kept:].norm()), rel=1e-6, abs=1e-10)
    tolerance = error / float(values.norm())
    assert needed_rank(values, tolerance * (1 + 1e-9)) <= kept


def test_command_prints_rank_and_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["lora", "--base", str(BASE), "--adapter", str(PROSE), "--output", str(tmp_path / "o")]
    assert run([*line, "--reduce-rank", "0.05"]) == 0
    shown = capsys.readouterr().out
    assert "28 modules, rank 64" in shown and "LoRA rank" in shown and "need 50 to 57" in shown
    assert "basis" in shown and "recorded (signs; full SVD, cpu" in shown
    assert run([*line, "--overwrite", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rank"] == 64 and len(result["modules"]) == 28
    manifest = json.loads((tmp_path / "o" / "psoft_export.json").read_text())
    assert manifest["options"] == {"dtype": "F32", "reduce_rank": None, "approximate": None}
    assert manifest["base"]["sha256"]["model.safetensors"]


def test_bad_input_leaves_nothing(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="reduce-rank 1"):
        to_lora(llama, llama_adapter, out, reduce_rank=1.0)
    with pytest.raises(UsageError, match="dtype 'int8'"):
        to_lora(llama, llama_adapter, out, dtype="int8")
    with pytest.raises(RecordMissingError):
        to_lora(llama, llama_adapter, out, require_record=True)
    large = files.copy_of(llama_adapter, tmp_path / "large")
    files.edit_json(large / "adapter_config.json", psoft_alpha=1e-9)
    with pytest.raises(NonFiniteError, match="do not fit F16"):
        to_lora(llama, large, out, dtype="fp16")
    assert not out.exists() and not list(tmp_path.glob(".out*"))
