"""qGOFT: both readings against dense matrices in float64, from file to merged checkpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import psoft_export
from psoft_export.algebra.givens import distance_between_forms, row_mixing
from psoft_export.algebra.parameters import GivensParameters
from psoft_export.algebra.rounding import round_to_nearest
from psoft_export.changes.givens import GivensTransform
from psoft_export.cli.main import run
from psoft_export.errors import UsageError
from psoft_export.model_card import lora_card, merged_card
from psoft_export.reports.wording import levels
from tests import files
from tests.trained_elsewhere import Givens, givens_matrix, save, train
from tests.trained_elsewhere import replace as put

QUERY = "model.layers.0.self_attn.q_proj"


def parameters(dimension: int, form: Any, *, strict: bool, scaled: bool) -> GivensParameters:
    return GivensParameters(
        torch.randn(dimension - 1) if strict else None,
        None if strict else torch.eye(2) + 0.5 * torch.randn(dimension - 1, 2, 2),
        1 + 0.3 * torch.randn(dimension) if scaled else None,
        form,
    )


def dense(of: GivensParameters) -> torch.Tensor:
    """P = Gᵀ in float64."""
    stored = {"givens_hard": of.angles, "givens_soft": of.blocks, "givens_scaler": of.scaler}
    given = {name: tensor.double() for name, tensor in stored.items() if tensor is not None}
    return givens_matrix(given, of.form, of.dimension).T


@pytest.mark.parametrize(
    ("form", "dimension"),
    [
        *(("reference", d) for d in (2, 6, 48, 64, 66, 128, 200)),
        *(("paper", d) for d in (2, 3, 6, 7, 48, 64, 65, 97, 128, 200)),
    ],
)
@pytest.mark.parametrize("kind", ["strict", "strict and scaled", "relaxed"])
def test_both_evaluations_are_the_dense_product(dimension: int, form: str, kind: str) -> None:
    of = parameters(dimension, form, strict=kind != "relaxed", scaled="scaled" in kind)
    weight = torch.randn(9, dimension, dtype=torch.float64)
    exact = weight @ dense(of)
    tolerance = {"rtol": 1e-11, "atol": 1e-12 * float(exact.abs().max())}
    torch.testing.assert_close(row_mixing(of).apply(weight.clone()), exact, **tolerance)
    change = GivensTransform(of)
    rows = slice(2, 6)
    torch.testing.assert_close(
        change.merging(weight)(weight[rows].clone(), rows), exact[rows], **tolerance
    )
    expected = change.expected(weight)
    total = weight[rows].clone()
    squares = expected.delta.add_to(total, expected.of_rows(slice(2, 9)).rows(0, 4))
    torch.testing.assert_close(total, exact[rows], **tolerance)
    assert squares == pytest.approx(float((total - weight[rows]).square().sum()), rel=1e-9)
    reach = expected.reach_left[:, None] * expected.reach_right
    assert bool((weight.abs() @ dense(of).abs() <= reach * (1 + 1e-12)).all())


def test_strict_transforms_are_rotations_on_paper_alone() -> None:
    for form, kept in (("paper", True), ("reference", False)):
        of = parameters(48, form, strict=True, scaled=False)
        product = row_mixing(of).apply(torch.eye(48, dtype=torch.float64))
        off = float((product @ product.T - torch.eye(48)).abs().max())
        assert (off < 1e-13) == kept


@pytest.mark.parametrize("dimension", [2, 6, 32, 66, 200, 258])
@pytest.mark.parametrize("strict", [True, False])
def test_distance_between_the_readings(strict: bool, dimension: int) -> None:
    of = parameters(dimension, "reference", strict=strict, scaled=strict)
    apart = dense(of) - dense(replace(of, form="paper"))
    expected = float(apart.norm()) / dimension**0.5
    assert distance_between_forms(of) == pytest.approx(expected, rel=1e-9)
    nothing = GivensParameters(torch.zeros(31), None, None, "reference")
    assert distance_between_forms(nothing) == 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of odd and non-power-of-two dimensions: 48 and 97 inputs."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=97,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(20, 37)[None]
    with torch.no_grad():
        return model(input_ids=tokens).logits


def trained(base: Path, folder: Path, kinds: dict[str, dict[str, Any]], form: str) -> Any:
    """An adapter trained for some steps, its layers, and the model with them."""
    model = LlamaForCausalLM.from_pretrained(base)
    layers = {
        path: Givens(module, form=form, **kinds[path.rpartition(".")[2]])
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in kinds and ".layers.0." in path
    }
    put(model, layers)
    train(model, layers)
    strict = [options.get("strict", True) for options in kinds.values()]
    relaxed = {name: False for name, is_strict in zip(kinds, strict, strict=True) if not is_strict}
    unscaled = {name: True for name, o in kinds.items() if not o.get("scaled", True)}
    save(
        folder,
        layers,
        peft_type="GIVENS",
        task_type="CAUSAL_LM",
        target_modules=list(kinds),
        layers_to_transform=[0],
        strict_oft=True,
        strict_oft_pattern=relaxed,
        no_scaling_pattern=unscaled,
    )
    return layers, model


def assert_merged(base: Path, folder: Path, made: Any, **options: Any) -> None:
    """The merged weights are the nearest to the dense formula, and the outputs the same."""
    layers, model = made
    output = folder / "out"
    report = psoft_export.merge(base, folder / "adapter", output, **options)
    assert len(report.modules) == len(layers) and report.verification.equivalent
    merged = load_file(output / "model.safetensors")
    for path, layer in layers.items():
        exact = layer.exact()
        found = merged[f"{path}.weight"]
        assert float((found - exact).abs().max()) <= 2.0**-24 * float(exact.abs().max())
        agree = found == round_to_nearest(exact, torch.float32)
        assert float(agree.float().mean()) > 0.999  # where the dense sum rounds otherwise
    loaded = type(model).from_pretrained(output).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


KINDS = {
    "q_proj": {"strict": True, "scaled": True},
    "v_proj": {"strict": False},
    "up_proj": {"strict": True, "scaled": False},
}


def test_a_trained_adapter_merges_as_its_code_computes(llama: Path, tmp_path: Path) -> None:
    made = trained(llama, tmp_path / "adapter", KINDS, "reference")
    assert_merged(llama, tmp_path, made)
    manifest = json.loads((tmp_path / "out" / "psoft_export.json").read_text())
    assert manifest["adapter"]["options"]["givens"] == "reference"
    assert "qGOFT" in manifest["adapter"]["method"]
    report = psoft_export.verify(llama, tmp_path / "adapter", tmp_path / "out")
    assert report.equivalent and report.geometry is None
    assert report.outputs.merged.rms <= 2 * report.outputs.unmerged.rms
    words = {level.name: level.reason for level in levels(report)}
    assert words["geometry"] == "The method rotates no principal subspace."
    card = merged_card(manifest, ("model.safetensors",), "me/merged", None)
    assert "with the qGOFT adapter" in card and "arXiv 2404.04316" in card and "PSOFT" not in card
    assert files.card_metadata(card)["tags"] == ["qgoft", "psoft-export"]


def test_a_trained_adapter_merges_as_the_paper_says(llama: Path, tmp_path: Path) -> None:
    kinds = KINDS | {"down_proj": {"strict": True}}  # 97 inputs
    made = trained(llama, tmp_path / "adapter", kinds, "paper")
    assert_merged(llama, tmp_path, made, givens="paper")
    report = psoft_export.verify(llama, tmp_path / "adapter", tmp_path / "out", givens="paper")
    assert report.equivalent


def test_an_odd_dimension_tells_the_version(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trained(llama, tmp_path / "adapter", {"down_proj": {}}, "paper")
    assert_merged(llama, tmp_path, made)
    (warning,) = psoft_export.load_adapter(tmp_path / "adapter").warnings
    assert "97 inputs, an odd number" in warning and "--givens paper" in warning
    line = ["merge", "--base", str(llama), "--adapter", str(tmp_path / "adapter")]
    assert run([*line, "--output", str(tmp_path / "no"), "--givens", "reference"]) == 2
    assert "'reference'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("adapter_name", ["", "default"])
def test_gpt2_stores_its_weights_the_other_way(adapter_name: str, tmp_path: Path) -> None:
    config = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    layers = {
        path: Givens(module, form="reference", strict="c_attn" in path)
        for path, module in model.named_modules()
        if path.endswith(("attn.c_attn", "mlp.c_fc"))
    }
    put(model, layers)
    train(model, layers)
    save(
        tmp_path / "adapter",
        layers,
        adapter_name=adapter_name,
        peft_type="GIVENS",
        task_type="CAUSAL_LM",
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=not adapter_name,  # the reference code sets it by the layer
    )
    report = psoft_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert {module.shape for module in report.modules} == {(144, 48), (192, 48)}
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for path, layer in layers.items():
        name = next(n for n in merged if n.endswith(f"{path.removeprefix('transformer.')}.weight"))
        found, exact = merged[name].T, layer.exact()
        assert float((found - exact).abs().max()) <= 2.0**-24 * float(exact.abs().max())
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert psoft_export.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").equivalent
    dumped = psoft_export.to_lora(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "lora", approximate=16
    )
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["fan_in_fan_out"]
    made = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for module in dumped.modules:
        layer, prefix = layers[module.module], f"base_model.model.{module.module}"
        delta = layer.exact() - layer.weight.double()
        a, b = (made[f"{prefix}.lora_{side}.weight"].double() for side in "AB")
        error = float((delta - b @ a).norm() / delta.norm())
        values = torch.linalg.svdvals(delta)
        assert module.relative_error == pytest.approx(error, rel=1e-6)
        assert error == pytest.approx(float(values[16:].norm() / values.norm()), rel=1e-4)


def test_the_other_reading_is_found_out(llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS, "reference")
    psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out", givens="paper")
    report = psoft_export.verify(llama, tmp_path / "adapter", tmp_path / "out", level="weights")
    first, *others = report.problems
    assert "made with --givens paper, this check with reference" in first
    assert len(others) == 3 and all("not the F32 number nearest" in text for text in others)


@pytest.mark.parametrize("fault", ["transposed", "levels reversed", "scaler behind", "no tanh"])
def test_planted_faults_are_found(fault: str, llama: Path, tmp_path: Path) -> None:
    layers, _ = trained(llama, tmp_path / "adapter", {"q_proj": {}}, "paper")
    psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out", givens="paper")
    (tmp_path / "out" / "psoft_export.json").unlink()
    layer = layers[QUERY]
    stored = {name: value.detach().double() for name, value in layer.stored.items()}
    matrix = givens_matrix(stored, "paper", 48)
    scaler = torch.diag(stored.pop("givens_scaler"))
    turn = givens_matrix(stored, "paper", 48)
    wrong = {
        "transposed": matrix.T,
        "levels reversed": turn.T @ scaler,
        "scaler behind": scaler @ turn,
        "no tanh": givens_matrix({"givens_hard": stored["givens_hard"].atanh()}, "paper", 48)
        @ scaler,
    }[fault]
    files.edit_tensors(
        tmp_path / "out" / "model.safetensors",
        lambda t: t | {f"{QUERY}.weight": (layer.weight.double() @ wrong.T).float()},
    )
    report = psoft_export.verify(
        llama, tmp_path / "adapter", tmp_path / "out", level="weights", givens="paper"
    )
    (problem,) = report.problems
    assert f"{QUERY}.weight" in problem


def test_lora_is_refused_and_approximated(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers, _ = trained(llama, tmp_path / "adapter", {"q_proj": {}, "up_proj": {}}, "reference")
    line = ["lora", "--base", str(llama), "--adapter", str(tmp_path / "adapter")]
    assert run([*line, "--output", str(tmp_path / "lora")]) == 6
    said = capsys.readouterr().err
    assert "full rank" in said and "--approximate" in said and not (tmp_path / "lora").exists()
    report = psoft_export.to_lora(llama, tmp_path / "adapter", tmp_path / "lora", approximate=20)
    made = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for module in report.modules:
        layer, prefix = layers[module.module], f"base_model.model.{module.module}"
        delta = layer.exact() - layer.weight.double()
        product = (
            made[f"{prefix}.lora_B.weight"].double() @ made[f"{prefix}.lora_A.weight"].double()
        )
        assert module.relative_error == pytest.approx(
            float((delta - product).norm() / delta.norm()), rel=1e-6
        )
        values = torch.linalg.svdvals(delta)
        best = float(values[20:].norm() / values.norm())
        assert best <= module.relative_error <= best * (1 + 1e-5) + 1e-7
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 20
    card = lora_card(report.manifest, config, ("adapter_model.safetensors",), "me/lora", None)
    assert "of rank 20, the nearest to its change" in card and "the same change" not in card
    with pytest.raises(UsageError, match="approximate 49"):
        psoft_export.to_lora(llama, tmp_path / "adapter", tmp_path / "x", approximate=49)
    with pytest.raises(UsageError, match="chooses the rank"):
        psoft_export.to_lora(
            llama, tmp_path / "adapter", tmp_path / "x", approximate=4, reduce_rank=0.1
        )


def test_inspect_says_how_far_the_readings_are_apart(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers, _ = trained(llama, tmp_path / "adapter", KINDS, "reference")
    summary = psoft_export.inspect(tmp_path / "adapter", base=llama)
    for layer in summary.layers:
        stored = {n: v.detach().double() for n, v in layers[layer.module].stored.items()}
        apart = givens_matrix(stored, "reference", 48) - givens_matrix(stored, "paper", 48)
        assert layer.form_distance == pytest.approx(float(apart.norm()) / 48**0.5, rel=1e-9)
        assert layer.shape[1] == 48 and layer.rank is None
    picture = tmp_path / "angles.png"
    assert run(["inspect", str(tmp_path / "adapter"), "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "reference and paper apart" in shown and "basis record" not in shown
    assert "GOFT (strict) and qGOFT (relaxed) with a scaler, as the reference code" in shown


Q_PROJ = f"base_model.model.{QUERY}"
BAD = {
    "both forms": (lambda t: t | {f"{Q_PROJ}.givens_soft": torch.zeros(47, 2, 2)}, 3, "both"),
    "neither form": (
        lambda t: {n: v for n, v in t.items() if n != f"{Q_PROJ}.givens_hard"},
        3,
        "neither of them",
    ),
    "scaler of another length": (
        lambda t: t | {f"{Q_PROJ}.givens_scaler": torch.ones(47)},
        3,
        "needs [48]",
    ),
    "a part twice": (
        lambda t: t | {f"{Q_PROJ}.givens_hard.default": torch.zeros(47)},
        3,
        "holds 'givens_hard' twice",
    ),
    "unknown tensor": (
        lambda t: t | {f"{Q_PROJ}.givens_other": torch.ones(2)},
        3,
        "not part of the qGOFT format",
    ),
    "another base": (
        lambda t: (
            t | {f"{Q_PROJ}.givens_hard": torch.ones(51), f"{Q_PROJ}.givens_scaler": torch.ones(52)}
        ),
        5,
        "trained on another base",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(llama, tmp_path / "adapter", {"q_proj": {}}, "reference")
    damage, code, words = BAD[name]
    files.edit_tensors(tmp_path / "adapter" / "adapter_model.safetensors", damage)
    line = ["merge", "--base", str(llama), "--adapter", str(tmp_path / "adapter"), "--quiet"]
    assert run([*line, "--output", str(tmp_path / "out")]) == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
