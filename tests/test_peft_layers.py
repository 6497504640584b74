"""PEFT's other methods: merged through the same pipeline, equal to PEFT's own model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import psoft_export
from psoft_export.cli.main import run
from psoft_export.errors import AdapterError, MismatchError, UnsupportedError
from tests import files, formulas, models

TARGETS = ["q_proj", "down_proj"]
METHODS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=9, target_modules=TARGETS),
    "lora-patterns": lambda: peft.LoraConfig(
        r=4,
        target_modules=TARGETS,
        rank_pattern={"down_proj": 6},
        alpha_pattern={r"layers\.1.*q_proj": 32},
        layers_to_transform=None,
    ),
    "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=16, target_modules=TARGETS),
    "oft-exact": lambda: peft.OFTConfig(
        r=0, oft_block_size=16, use_cayley_neumann=False, target_modules=TARGETS
    ),
    "oft-shared": lambda: peft.OFTConfig(
        r=0, oft_block_size=16, block_share=True, coft=True, eps=1.0, target_modules=TARGETS
    ),
    "boft": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=TARGETS),
    "boft-two": lambda: peft.BOFTConfig(
        boft_block_size=8, boft_n_butterfly_factor=2, target_modules=["q_proj"]
    ),
    "hra": lambda: peft.HRAConfig(r=6, target_modules=TARGETS),
    "hra-gs": lambda: peft.HRAConfig(r=6, apply_GS=True, target_modules=TARGETS),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20, 37)[None]).logits


def trained(base: Path, folder: Path, config: Any, steps: int = 4) -> PeftModel:
    """An adapter that PEFT trains for some steps and saves."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    models.perturb(model, 3)
    tokens = torch.arange(30, 54).view(2, 12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_merged_is_what_peft_computes(method: str, llama: Path, tmp_path: Path) -> None:
    model = trained(llama, tmp_path / "adapter", METHODS[method]())
    report = psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out")
    assert len(report.modules) == (2 if method == "boft-two" else 4)
    assert min(module.relative_delta for module in report.modules) > 1e-3
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    verdict = psoft_export.verify(llama, tmp_path / "adapter", tmp_path / "out")
    assert verdict.equivalent and verdict.geometry is None
    assert verdict.outputs.skipped is None
    theirs = model.merge_and_unload(safe_merge=False).state_dict()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6)


def stored_of(adapter: Path, module: str) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{module}."
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def formula(method: str, module: str, adapter: Path, base: Path) -> torch.Tensor:
    """The merged weight by the method's formula, in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    alpha = 32 if method == "lora-patterns" and "layers.1.self_attn.q_proj" in module else None
    options = config | {
        "alpha": alpha or config.get("lora_alpha"),
        "terms": config.get("num_cayley_neumann_terms"),
    }
    weight = load_file(base / "model.safetensors")[f"{module}.weight"]
    return formulas.merged(config["peft_type"], weight, stored_of(adapter, module), options)


# PEFT projects `oft-shared` before it rotates (COFT), which is its own.
@pytest.mark.parametrize("method", [name for name in METHODS if name != "oft-shared"])
def test_merged_is_the_formula(method: str, llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter", METHODS[method]())
    report = psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for module in report.modules:
        exact = formula(method, module.module, tmp_path / "adapter", llama)
        off = (found[f"{module.module}.weight"] - exact).abs()
        assert float(off.max()) <= 2.0**-24 * float(exact.abs().max())
        nearest = found[f"{module.module}.weight"] == exact.float()
        assert float(nearest.float().mean()) > 0.999
    ranks = {module.module: module.rank for module in report.modules}
    if method == "lora-patterns":
        assert {r for m, r in ranks.items() if "down_proj" in m} == {6} and 4 in ranks.values()
    elif method in ("lora", "rslora"):
        assert set(ranks.values()) == {4}
    else:
        assert set(ranks.values()) == {None}


@pytest.mark.parametrize(
    "fault",
    ["other alpha", "magnitudes reversed", "rotation transposed", "blocks reversed", "order"],
)
def test_planted_faults_are_found(fault: str, llama: Path, tmp_path: Path) -> None:
    method = {"other alpha": "lora", "magnitudes reversed": "dora", "order": "hra"}.get(
        fault, "oft-exact"
    )
    module = "model.layers.0.self_attn.q_proj"
    trained(llama, tmp_path / "adapter", METHODS[method]())
    psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "out" / "psoft_export.json").unlink()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    options = config | {"alpha": config.get("lora_alpha")}
    stored = stored_of(tmp_path / "adapter", module)
    if fault == "other alpha":
        options["alpha"] = 8
    elif fault == "magnitudes reversed":
        stored["lora_magnitude_vector"] = stored["lora_magnitude_vector"].flip(0)
    elif fault == "rotation transposed":
        stored["oft_R.weight"] = -stored["oft_R.weight"]
    elif fault == "blocks reversed":
        stored["oft_R.weight"] = stored["oft_R.weight"].flip(0)
    else:
        stored["hra_u"] = stored["hra_u"].flip(1)
    weight = load_file(llama / "model.safetensors")[f"{module}.weight"]
    wrong = formulas.merged(config["peft_type"], weight, stored, options).float()
    files.edit_tensors(
        tmp_path / "out" / "model.safetensors", lambda t: t | {f"{module}.weight": wrong}
    )
    report = psoft_export.verify(llama, tmp_path / "adapter", tmp_path / "out", level="weights")
    (problem,) = report.problems
    assert f"{module}.weight" in problem


@pytest.mark.parametrize("method", ["lora", "oft", "boft", "hra"])
def test_a_forgotten_adapter_is_found(method: str, llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter", METHODS[method]())
    psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "out" / "psoft_export.json").unlink()
    name = "model.layers.0.self_attn.q_proj.weight"
    original = load_file(llama / "model.safetensors")[name]
    files.edit_tensors(tmp_path / "out" / "model.safetensors", lambda t: t | {name: original})
    report = psoft_export.verify(llama, tmp_path / "adapter", tmp_path / "out", level="weights")
    (problem,) = report.problems
    assert name in problem and "the adapter is not in it" in problem


def test_saved_modules_and_biases_are_carried_over(base_folder: Any, tmp_path: Path) -> None:
    base = base_folder("minilm")
    config = peft.LoraConfig(
        r=4,
        task_type="SEQ_CLS",
        target_modules=["query"],
        modules_to_save=["classifier"],
        bias="all",
    )
    model = get_peft_model(models.load_task_model("minilm", base), config)
    models.perturb(model, 3)
    model.save_pretrained(tmp_path / "adapter")
    psoft_export.merge(base, tmp_path / "adapter", tmp_path / "out")
    loaded = type(model.get_base_model()).from_pretrained(tmp_path / "out").eval()
    inputs = models.FAMILIES["minilm"].inputs()
    with torch.no_grad():
        expected, found = model.eval()(**inputs).logits, loaded(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_conv1d_layers(tmp_path: Path) -> None:
    base = GPT2LMHeadModel(
        GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
    )
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(base, config)
    models.perturb(model, 3)
    model.save_pretrained(tmp_path / "adapter")
    report = psoft_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert {module.shape for module in report.modules} == {(144, 48)}
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model.eval()), rtol=1e-4, atol=1e-5)
    assert psoft_export.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").equivalent


def test_lora_of_a_lora_and_of_a_full_rank(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(llama, tmp_path / "lora", METHODS["lora"]())
    line = ["lora", "--base", str(llama), "--output", str(tmp_path / "out")]
    assert run([*line, "--adapter", str(tmp_path / "lora")]) == 6
    assert "is a LoRA adapter already" in capsys.readouterr().err
    trained(llama, tmp_path / "oft", METHODS["oft"]())
    assert run([*line, "--adapter", str(tmp_path / "oft")]) == 6
    assert "full rank" in capsys.readouterr().err
    report = psoft_export.to_lora(llama, tmp_path / "oft", tmp_path / "out", approximate=32)
    assert 0 < max(module.relative_error for module in report.modules) < 0.7


def test_inspect_and_push_say_what_it_is(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(llama, tmp_path / "adapter", METHODS["hra"]())
    assert run(["inspect", str(tmp_path / "adapter"), "--base", str(llama)]) == 0
    shown = capsys.readouterr().out
    assert "HRA, by PEFT's own layers" in shown and "every target fits" in shown
    picture = tmp_path / "angles.png"
    assert run(["inspect", str(tmp_path / "adapter"), "--plot", str(picture)]) == 2
    assert "no rotation angles" in capsys.readouterr().err and not picture.exists()
    assert run(["push", str(tmp_path / "adapter"), "me/hra"]) == 2
    assert "PEFT's PSOFT format" in capsys.readouterr().err


BAD_FIELDS = {
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base's weights"),
    "lora_bias": ({"lora_bias": True}, "changes biases"),
    "layer_replication": ({"layer_replication": [[0, 2]]}, "other layers"),
    "kasa": ({"kasa_config": {"beta": 1}}, "KaSA"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_what_is_more_than_a_change_of_weights_is_refused(
    name: str, llama: Path, tmp_path: Path
) -> None:
    trained(llama, tmp_path / "adapter", METHODS["lora"](), steps=2)
    fields, words = BAD_FIELDS[name]
    files.edit_json(tmp_path / "adapter" / "adapter_config.json", **fields)
    with pytest.raises(UnsupportedError, match=words):
        psoft_export.load_adapter(tmp_path / "adapter")


def test_older_versions_meant_another_oft(llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter", METHODS["oft"](), steps=2)
    config = tmp_path / "adapter" / "adapter_config.json"
    written = config.read_text()
    for version in ("0.17.1", None):
        files.edit_json(config, use_cayley_neumann=True, peft_version=version)
        with pytest.raises(UnsupportedError, match=r"before 0\.18 summed another series"):
            psoft_export.load_adapter(tmp_path / "adapter")
    config.write_text(written)
    files.edit_json(config, oft_block_size=None)
    with pytest.raises(UnsupportedError, match=r"before 0\.14"):
        psoft_export.load_adapter(tmp_path / "adapter")


BAD_CONFIGS = {
    "rank in words": ({"r": "four"}, 3, "field 'r' is 'four'"),
    "alpha in words": ({"lora_alpha": "x"}, 3, "field 'lora_alpha' is 'x'"),
    "rank of other tensors": ({"r": 5}, 6, "size mismatch"),
    "a list of types": ({"peft_type": ["LORA"]}, 3, "a name is needed"),
    "a field of the future": ({"use_magic": True}, 6, "'use_magic'"),
    "DoRA without magnitudes": ({"use_dora": True}, 3, "has no lora_magnitude_vector"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(
    name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(llama, tmp_path / "adapter", METHODS["lora"](), steps=2)
    fields, code, words = BAD_CONFIGS[name]
    files.edit_json(tmp_path / "adapter" / "adapter_config.json", **fields)
    line = ["merge", "--base", str(llama), "--adapter", str(tmp_path / "adapter"), "--quiet"]
    assert run([*line, "--output", str(tmp_path / "out")]) == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_bad_tensors(llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter", METHODS["lora"](), steps=2)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    whole = load_file(path)
    files.edit_tensors(path, lambda t: {n: v for n, v in t.items() if n != f"{key}.lora_B.weight"})
    with pytest.raises(AdapterError, match=r"q_proj' has no lora_B"):
        psoft_export.load_adapter(tmp_path / "adapter")
    for damaged, words in (
        ({f"{key}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int8)}, "a float is needed"),
        ({f"{key}.lora_A.weight": torch.zeros(64)}, "has 1 dimensions; 2 are needed"),
        ({f"{key}.lora_A.weight": torch.zeros(5, 64)}, "not of one rank"),
        ({f"{key}.lora_magnitude_vector": torch.zeros(64)}, "does not say use_dora"),
    ):
        files.edit_tensors(path, lambda _, damaged=damaged: whole | damaged)
        with pytest.raises(AdapterError, match=words):
            psoft_export.load_adapter(tmp_path / "adapter")
    files.edit_tensors(path, lambda _: whole | {f"{key}.lora_diag": torch.zeros(4)})
    with pytest.raises(UnsupportedError, match="a variant of the method"):
        psoft_export.load_adapter(tmp_path / "adapter")
    files.edit_tensors(path, lambda _: whole | {f"{key}.lora_A.weight": torch.zeros(4, 63)})
    with pytest.raises(MismatchError, match=r"lora_A\.weight' \[4, 63\] does not fit a weight"):
        psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out")
    files.edit_tensors(path, lambda _: whole | {f"{key}.oft_R.weight": torch.zeros(4, 6)})
    with pytest.raises(AdapterError, match=r"of two kinds, of LoRA .* and of OFT"):
        psoft_export.load_adapter(tmp_path / "adapter")
    files.edit_tensors(path, lambda _: {"base_model.model.a.vera_A": torch.zeros(2)})
    with pytest.raises(AdapterError, match=r"found 'base_model\.model\.a\.vera_A'.*Kinds known"):
        psoft_export.load_adapter(tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


def test_without_peft_the_line_says_what_to_install(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(llama, tmp_path / "adapter", METHODS["lora"](), steps=2)
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "peft.py").write_text("raise ImportError('no peft here')")
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from psoft_export.cli.main import run\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(run(sys.argv[1:]))\n"
    )
    arguments = ["merge", "--base", llama, "--adapter", tmp_path / "adapter"]
    done = subprocess.run(
        [sys.executable, script, *arguments, "--output", tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(blocked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 11 and "psoft-export[peft]" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_manifest_names_the_method(llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter", METHODS["oft"](), steps=2)
    psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "psoft_export.json").read_text())
    assert manifest["adapter"]["method_name"] == "OFT"
    assert manifest["adapter"]["paper"].endswith("2306.07280")
    assert manifest["product"] == {"dtype": "float64", "relative_error_bound": None}
