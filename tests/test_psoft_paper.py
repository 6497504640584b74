"""Checkpoints of the PSOFT paper's code: read, merged, converted, against its formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import psoft_export
from psoft_export.algebra.rounding import round_to_nearest
from psoft_export.cli.main import run
from psoft_export.errors import MismatchError, UnsupportedError, UsageError
from tests import files, models
from tests.trained_elsewhere import Paper, replace, save, train

TARGETS = ("q_proj", "v_proj", "down_proj")
QUERY = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{QUERY}"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20, 37)[None]).logits


def trained(base: Path, folder: Path, *, adapter_name: str = "", **options: Any) -> Any:
    """A checkpoint of the paper's code after some steps, its layers, and the model with them."""
    model = LlamaForCausalLM.from_pretrained(base)
    settings = {"rank": 8, "alpha": 8, **options}
    layers = {
        path: Paper(module, **settings)
        for path, module in model.named_modules()
        if path.endswith(TARGETS)
    }
    replace(model, layers)
    train(model, layers)
    save(
        folder,
        layers,
        adapter_name=adapter_name,
        buffers=not adapter_name,
        peft_type="LORA",
        task_type="CAUSAL_LM",
        init_lora_weights="pissa_orth",
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        use_rslora=options.get("rslora", False),
        target_modules=list(TARGETS),
        bias="none",
    )
    return layers, model


def assert_exact(folder: Path, layers: Any) -> None:
    merged = load_file(folder / "model.safetensors")
    for path, layer in layers.items():
        exact, found = layer.exact(), merged[f"{path}.weight"]
        assert float((found - exact).abs().max()) <= 2.0**-24 * float(exact.abs().max())
        assert float((found == round_to_nearest(exact, torch.float32)).float().mean()) > 0.999


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, {}),
        ({"adapter_name": "default"}, {}),
        ({"terms": 0}, {"neumann_terms": 0}),
        ({"terms": 1, "vectors": "b"}, {"neumann_terms": 1}),
        ({"terms": 2, "vectors": "a"}, {"neumann_terms": 2}),
        ({"terms": 9, "vectors": ""}, {"neumann_terms": 9}),
        ({"terms": "exact", "alpha": 24}, {"neumann_terms": "exact"}),
        ({"orthogonal": False}, {}),
        ({"alpha": 20, "rslora": True}, {}),
    ],
    ids=str,
)
def test_a_trained_checkpoint_merges(options: Any, said: Any, llama: Path, tmp_path: Path) -> None:
    layers, model = trained(llama, tmp_path / "adapter", **options)
    report = psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out", **said)
    assert len(report.modules) == len(layers) == 6
    assert_exact(tmp_path / "out", layers)
    assert all(module.basis_uncertainty == 0 for module in report.modules)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    report = psoft_export.verify(llama, tmp_path / "adapter", tmp_path / "out", **said)
    assert report.equivalent and report.geometry.equivalent
    warned = any("how many terms" in text for text in report.warnings)
    assert warned == (not said and options.get("orthogonal", True))


def test_no_svd_is_computed_and_no_record_asked_for(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(llama, tmp_path / "adapter")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("an SVD")

    monkeypatch.setattr("psoft_export.bases.training_svd", refuse)
    monkeypatch.setattr("psoft_export.bases.leading_triplets", refuse)
    psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out", require_record=True)
    manifest = json.loads((tmp_path / "out" / "psoft_export.json").read_text())
    assert manifest["basis"]["stored"] == "adapter_model.safetensors"
    assert not any("signs" in text for text in manifest["warnings"])


@pytest.mark.parametrize(
    ("terms", "field"), [(5, 7), (2, 4), (1, None), (0, None), ("exact", None)]
)
def test_conversion_to_peft_means_the_same_weights(
    terms: Any, field: int | None, llama: Path, tmp_path: Path
) -> None:
    _, model = trained(llama, tmp_path / "adapter", terms=terms, alpha=16)
    report = psoft_export.convert(
        llama, tmp_path / "adapter", tmp_path / "peft", to="peft", neumann_terms=terms
    )
    assert report.kind == "full" and len(report.modules) == 6
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PSOFT" and config["psoft_alpha"] == 16
    assert config.get("num_cayley_neumann_terms") == field
    assert config["psoft_orth"] == (terms not in (0, 1))
    psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "one", neumann_terms=terms)
    psoft_export.merge(llama, tmp_path / "peft", tmp_path / "other", require_record=True)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "other"))
    for name, tensor in one.items():
        if terms in (0, 1):  # a free R is rounded to float32
            torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(other[name], tensor), name
    loaded = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(llama), tmp_path / "peft"
    ).eval()
    psoft_export.restore_basis(loaded, tmp_path / "peft")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_conversion_to_lora_from_the_command_line(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, model = trained(llama, tmp_path / "adapter", alpha=16)
    line = ["convert", "--base", str(llama), "--adapter", str(tmp_path / "adapter")]
    assert run([*line, "--to", "lora", "--output", str(tmp_path / "lora")]) == 0
    assert "6 modules, rank 8" in capsys.readouterr().out
    loaded = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(llama), tmp_path / "lora"
    ).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert run([*line, "--to", "peft", "--output", str(tmp_path / "peft")]) == 0
    assert (tmp_path / "peft" / "psoft_basis.safetensors").exists()
    capsys.readouterr()
    assert run([*line, "--to", "full", "--output", str(tmp_path / "x")]) == 6
    assert "convert --to peft" in capsys.readouterr().err
    assert run([*line[1:], "--output", str(tmp_path / "x")]) == 2
    peft = ["convert", "--base", str(llama), "--adapter", str(tmp_path / "peft"), "--to", "peft"]
    assert run([*peft, "--output", str(tmp_path / "x")]) == 6
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "fault", ["other terms", "other triangle", "transposed", "vectors swapped"]
)
def test_planted_faults_are_found(fault: str, llama: Path, tmp_path: Path) -> None:
    layers, _ = trained(llama, tmp_path / "adapter")
    if fault == "other terms":
        psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out", neumann_terms=4)
    else:
        psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out")
        layer = layers[QUERY]
        stored = {name: value.detach().clone() for name, value in layer.stored.items()}
        if fault == "other triangle":  # the entries above the diagonal, row by row
            matrix = torch.zeros(8, 8)
            matrix[tuple(torch.triu_indices(8, 8, 1))] = stored["a_params"]
            stored["a_params"] = matrix.T[tuple(torch.tril_indices(8, 8, -1))]
        elif fault == "transposed":
            stored["a_params"] = -stored["a_params"]
        else:
            a, b = stored["mag_vector_a"], stored["mag_vector_b"]
            stored |= {"mag_vector_a": b, "mag_vector_b": a}
        exact = {name: value.double() for name, value in stored.items()}
        wrong = layer.changed(layer.weight.double(), exact).float()
        files.edit_tensors(
            tmp_path / "out" / "model.safetensors", lambda t: t | {f"{QUERY}.weight": wrong}
        )
    report = psoft_export.verify(llama, tmp_path / "adapter", tmp_path / "out", level="weights")
    assert not report.equivalent
    assert any(f"{QUERY}.weight" in problem for problem in report.problems)


def test_the_order_of_the_triangle_is_checked(llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter")
    upper = torch.triu_indices(8, 8, 1)
    files.edit_tensors(
        tmp_path / "adapter" / "adapter_model.safetensors",
        lambda t: t | {f"{KEY}.lora_orth.indices_lower": upper},
    )
    with pytest.raises(psoft_export.PsoftExportError, match="tril_indices") as error:
        psoft_export.load_adapter(tmp_path / "adapter")
    assert error.value.exit_code == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_basis_in_half_precision(dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter")
    files.edit_tensors(
        tmp_path / "adapter" / "adapter_model.safetensors",
        lambda t: {n: v.to(dtype) if v.is_floating_point() else v for n, v in t.items()},
    )
    psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out", verify_outputs=True)
    assert psoft_export.verify(llama, tmp_path / "adapter", tmp_path / "out").equivalent
    psoft_export.convert(llama, tmp_path / "adapter", tmp_path / "peft", to="peft")
    psoft_export.merge(llama, tmp_path / "peft", tmp_path / "other", verify_outputs=True)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "other"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_a_head_whose_keys_keep_the_name(base_folder: Any, tmp_path: Path) -> None:
    base = base_folder("minilm")
    model = models.load_task_model("minilm", base)
    layers = {
        path: Paper(module, rank=4, alpha=4)
        for path, module in model.named_modules()
        if path.endswith("attention.self.query")
    }
    save(
        tmp_path / "adapter",
        layers,
        adapter_name="default",
        peft_type="LORA",
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=4,
        target_modules=["query"],
        modules_to_save=["classifier"],
    )
    head = {
        f"base_model.model.classifier.modules_to_save.default.{n}": torch.randn(p.shape)
        for n, p in model.classifier.named_parameters()
    }
    bias = "bert.encoder.layer.0.attention.self.query"
    head[f"base_model.model.{bias}.base_layer.bias"] = torch.randn(384)
    files.edit_tensors(tmp_path / "adapter" / "adapter_model.safetensors", lambda t: t | head)
    psoft_export.merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in head.items():
        plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        assert torch.equal(merged[plain.replace("base_layer.", "")], tensor)
    # The same from PEFT's own formats, as PEFT loads them.
    inputs = models.FAMILIES["minilm"].inputs()
    with torch.no_grad():
        expected = type(model).from_pretrained(tmp_path / "out").eval()(**inputs).logits
    psoft_export.convert(base, tmp_path / "adapter", tmp_path / "peft", to="peft")
    psoft_export.to_lora(base, tmp_path / "adapter", tmp_path / "lora")
    for folder in ("peft", "lora"):
        loaded = PeftModel.from_pretrained(
            models.load_task_model("minilm", base), tmp_path / folder
        ).eval()
        if folder == "peft":
            psoft_export.restore_basis(loaded, tmp_path / folder)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_conversion_of_a_narrowed_checkpoint(llama: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    layers = {QUERY: Paper(model.get_submodule(QUERY), rank=8, alpha=8)}
    save(
        tmp_path / "adapter",
        layers,
        peft_type="LORA",
        r=8,
        lora_alpha=8,
        target_modules=["q_proj"],
        layers_to_transform=[0],
    )
    psoft_export.convert(llama, tmp_path / "adapter", tmp_path / "peft", to="peft")
    report = psoft_export.merge(llama, tmp_path / "peft", tmp_path / "out")
    assert [module.module for module in report.modules] == [QUERY]


def test_verify_tells_of_another_reading(llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter")
    psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out", neumann_terms=9)
    report = psoft_export.verify(llama, tmp_path / "adapter", tmp_path / "out", level="weights")
    assert any("--neumann-terms 9, this check with 5" in text for text in report.problems)


def test_another_base_is_noticed(base_folder: Any, llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter")
    other = LlamaForCausalLM.from_pretrained(llama)
    other.model.layers[1].self_attn.v_proj.weight.data.normal_(0, 0.1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match=r"layers\.1\.self_attn\.v_proj.*another base"):
        psoft_export.merge(tmp_path / "other", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conv1d_layers(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    layers = {
        path: Paper(module, rank=6, alpha=6)
        for path, module in model.named_modules()
        if path.endswith("attn.c_attn")
    }
    replace(model, layers)
    train(model, layers)
    save(
        tmp_path / "adapter",
        layers,
        peft_type="LORA",
        task_type="CAUSAL_LM",
        r=6,
        lora_alpha=6,
        fan_in_fan_out=True,
        target_modules=["c_attn"],
    )
    psoft_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    report = psoft_export.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.equivalent and report.geometry.equivalent
    with pytest.raises(UnsupportedError, match="Conv1D"):
        psoft_export.convert(tmp_path / "base", tmp_path / "adapter", tmp_path / "peft", to="peft")
    psoft_export.to_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "lora")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    served = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    torch.testing.assert_close(logits(served), logits(model), rtol=1e-4, atol=1e-5)


def test_nothing_of_it_is_recorded(llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="its own file holds A and B"):
        psoft_export.record(llama, tmp_path / "adapter")


def without(part: str) -> Any:
    return lambda t: {name: v for name, v in t.items() if f"{QUERY}.{part}" not in name}


BAD = {
    "no lora_A": (without("lora_A"), "has no 'lora_A'"),
    "no lora_B": (without("lora_B"), "has no 'lora_B'"),
    "a module without rotation": (without("lora_orth"), "has no 'lora_orth.a_params'"),
    "lora_A of another rank": (
        lambda t: t | {f"{KEY}.lora_A.weight": torch.zeros(7, 64)},
        "needs [8, 64]",
    ),
    "lora_A is a vector": (lambda t: t | {f"{KEY}.lora_A.weight": torch.zeros(8)}, "has shape [8]"),
    "lora_B is a vector": (lambda t: t | {f"{KEY}.lora_B.weight": torch.zeros(8)}, "has shape [8]"),
    "too few angles": (
        lambda t: t | {f"{KEY}.lora_orth.a_params": torch.zeros(27)},
        "needs [28]",
    ),
    "one module is free": (
        lambda t: (
            {n: v for n, v in t.items() if n != f"{KEY}.lora_orth.indices_lower"}
            | {f"{KEY}.lora_orth.a_params": torch.eye(8)}
        ),
        "other tensors in lora_orth",
    ),
    "unknown tensor": (
        lambda t: t | {f"{KEY}.lora_orth.other": torch.zeros(1)},
        "not part of the format",
    ),
    "a part twice": (
        lambda t: t | {f"{KEY}.lora_A.default.weight": torch.zeros(8, 64)},
        "holds 'A' twice",
    ),
    "two adapters": (
        lambda t: (
            t
            | {
                f"{KEY}.lora_A.one.weight": torch.zeros(8, 64),
                f"{KEY}.lora_A.two.weight": torch.ones(8),
            }
        ),
        "several adapters (one, two)",
    ),
    "mixed with PEFT's PSOFT": (
        lambda t: t | {f"{KEY}.psoft_R.weight": torch.zeros(28)},
        "of two kinds",
    ),
    "mixed with qGOFT": (lambda t: t | {f"{KEY}.givens_hard": torch.zeros(63)}, "of two kinds"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(llama, tmp_path / "adapter")
    damage, words = BAD[name]
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(damage(load_file(path)), path)
    line = ["merge", "--base", str(llama), "--adapter", str(tmp_path / "adapter"), "--quiet"]
    assert run([*line, "--output", str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_is_told_must_be_asked_for(
    llama: Path, llama_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["merge", "--base", str(llama), "--adapter", str(llama_adapter)]
    assert run([*line, "--output", str(tmp_path / "out"), "--givens", "paper"]) == 2
    assert "givens paper: is for qGOFT; this adapter is of PSOFT" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"neumann-terms 1\.5"):
        psoft_export.load_adapter(llama_adapter, neumann_terms=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("terms", ["many", "-1", "1.5"])
def test_terms_that_are_no_number(
    terms: str, llama: Path, llama_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["merge", "--base", str(llama), "--adapter", str(llama_adapter)]
    assert run([*line, "--output", str(tmp_path / "out"), "--neumann-terms", terms]) == 2
    assert f"neumann-terms {terms}" in capsys.readouterr().err.replace("'", "")
