"""Several adapters as one: files, forms, records, and what is refused."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import psoft_export
from psoft_export import Combination, errors
from psoft_export.algebra.combination import METHODS
from psoft_export.algebra.rotation import skew_symmetric
from psoft_export.cli.main import run
from tests import files, machines, models
from tests.conftest import BUNDLED, EXAMPLES
from tests.test_lora import deltas
from tests.test_parity_with_peft import OPTIONS, logits

BASE = EXAMPLES / "base"
PROSE, SUMS, RECORDS = (EXAMPLES / "adapters" / name for name in BUNDLED)
DOCS = Path(__file__).parent.parent / "docs"
STRICT: dict[str, Any] = OPTIONS["strict"]


def adapter(llama: Path, folder: Path, seed: int, **options: Any) -> Path:
    models.save_adapter("llama", llama, folder, seed=seed, **options)
    psoft_export.record(llama, folder, device="cpu")
    return folder


@pytest.fixture
def two(llama: Path, tmp_path: Path) -> dict[str, str | Path]:
    """Two strict adapters of one small Llama."""
    return {
        "math": adapter(llama, tmp_path / "math", 1, **STRICT),
        "code": adapter(llama, tmp_path / "code", 2, **STRICT),
    }


def delta(llama: Path, folder: str | Path, target: Path) -> dict[str, torch.Tensor]:
    """ΔW of every module of an adapter, by way of a LoRA."""
    psoft_export.to_lora(llama, folder, target, device="cpu", overwrite=True)
    return deltas(target)


def assert_near(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], share: float = 1e-5
) -> None:
    assert found.keys() == expected.keys()
    for path, wanted in expected.items():
        assert float((found[path] - wanted).norm()) <= share * float(wanted.norm()), path


@pytest.mark.parametrize("kind", ["signs", "full"])
def test_linear_is_the_sum_of_the_changes_whatever_their_form(
    kind: Any, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks, scalings, initialisations, vectors, solvers and the machines' signs all differ."""
    forms: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": ("here", {}),
        "small": ("numpy", {"r": 4, "psoft_alpha": 3, "psoft_mag_b": False}),
        "pissa": ("random signs", {"ab_svd_init": "pissa_init", **STRICT}),
        "free": ("float64", {"psoft_orth": False}),
        "series": ("here", {"use_cayley_neumann": True, "target_modules": ["q_proj"]}),
    }
    adapters: dict[str, str | Path] = {}
    for seed, (name, (machine, options)) in enumerate(forms.items()):
        folder = models.save_adapter("llama", llama, tmp_path / name, seed=seed, **options)
        with monkeypatch.context() as patch:
            if machine != "here":
                machines.pretend(machines.MACHINES[machine], patch)
            psoft_export.record(llama, folder, kind=kind, cache=False)
        adapters[name] = folder
    shares = dict(zip(adapters, [0.6, -0.4, 0.3, 0.2, 1.0], strict=True))
    single = {name: delta(llama, a, tmp_path / "lora") for name, a in adapters.items()}
    expected = {
        path: sum(shares[n] * single[n][path] for n in adapters if path in single[n])
        for path in single["plain"]
    }
    combination = Combination(adapters, "linear", shares)
    report = psoft_export.combine(llama, combination, tmp_path / "sum", device="cpu")
    assert report.kind == kind and report.method == "PSOFT with a free R"
    # Each full record holds what its own machine's float32 SVD found.
    tolerance = 1e-4 if kind == "full" else 1e-5
    assert max(module.outside for module in report.modules) < tolerance
    named = {module.module: module.adapters for module in report.modules}
    assert named["model.layers.0.self_attn.q_proj"] == tuple(forms)
    assert named["model.layers.0.mlp.up_proj"] == tuple(forms)[:-1]
    assert_near(delta(llama, tmp_path / "sum", tmp_path / "lora"), expected, tolerance)


@pytest.mark.parametrize("method", [n for n in METHODS if METHODS[n].is_orthogonal])
def test_strict_adapters_make_a_strict_one_that_peft_loads(
    method: str, two: dict[str, str | Path], llama: Path, tmp_path: Path
) -> None:
    combination = Combination(two, method, {"math": 0.6, "code": 0.4})
    report = psoft_export.combine(llama, combination, tmp_path / "both", device="cpu")
    assert report.method == "PSOFT-SO (strict), Cayley transform"
    merged = psoft_export.merge(llama, tmp_path / "both", tmp_path / "merged", device="cpu")
    assert all(m.orthogonality_error < 1e-6 for m in merged.modules)  # type: ignore[operator]
    assert merged.manifest["adapter"]["combination"]["method"] == method
    model = models.load_with_peft("llama", llama, tmp_path / "both")
    psoft_export.restore_basis(model, tmp_path / "both")
    ours = logits(models.load_task_model("llama", tmp_path / "merged"), "llama")
    torch.testing.assert_close(ours, logits(model, "llama"), atol=1e-4, rtol=1e-4)
    base = logits(models.load_task_model("llama", llama), "llama")
    assert float((ours - base).abs().max()) > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_signs_of_another_machine_do_not_matter(
    method: str,
    two: dict[str, str | Path],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        machines.pretend(machines.random_signs, patch)
        elsewhere = tmp_path / "elsewhere"
        psoft_export.convert(llama, two["code"], elsewhere, to="this-machine", cache=False)
    name = "adapter_model.safetensors"
    assert (elsewhere / name).read_bytes() != (Path(two["code"]) / name).read_bytes()
    found = []
    for code in (two["code"], elsewhere):
        combination = Combination({"math": two["math"], "code": code}, method, {"math": 0.7})
        psoft_export.combine(llama, combination, tmp_path / "both", device="cpu", overwrite=True)
        found.append(delta(llama, tmp_path / "both", tmp_path / "lora"))
    assert_near(found[1], found[0], 1e-5)


def test_modules_are_combined_as_a_union(llama: Path, tmp_path: Path) -> None:
    one = adapter(llama, tmp_path / "one", 1, target_modules=["q_proj"])
    other = adapter(llama, tmp_path / "other", 2, r=4, target_modules=["v_proj", "up_proj"])
    combination = Combination({"one": one, "other": other}, "lie")
    report = psoft_export.combine(llama, combination, tmp_path / "both", device="cpu")
    assert len(report.modules) == 6 and report.method.startswith("PSOFT-RO")
    alone = delta(llama, one, tmp_path / "lora") | delta(llama, other, tmp_path / "lora")
    assert_near(delta(llama, tmp_path / "both", tmp_path / "lora"), alone)
    model = models.load_with_peft("llama", llama, tmp_path / "both")
    changed = [n for n, m in model.named_modules() if hasattr(m, "psoft_R") and m.psoft_R]
    assert len(changed) == 6


def test_one_command_does_what_combining_first_does(
    two: dict[str, str | Path], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = [
        "--adapter", f"math={two['math']}:0.6", "--adapter", f"{two['code']}:0.4",
        "--method", "karcher", "--base", str(llama), "--device", "cpu",
    ]  # fmt: skip
    both, merged = tmp_path / "both", tmp_path / "merged"
    assert run(["combine", *several, "--output", str(both), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(a["name"], a["weight"]) for a in said["combination"]["adapters"]] == [
        ("math", 0.6),
        ("code", 0.4),
    ]
    assert run(["merge", *several, "--output", str(merged)]) == 0
    psoft_export.merge(llama, both, tmp_path / "by-folder", device="cpu")
    weights = "model.safetensors"
    assert (merged / weights).read_bytes() == (tmp_path / "by-folder" / weights).read_bytes()
    manifest = json.loads((merged / "psoft_export.json").read_text())
    assert manifest["adapter"]["name"] == "math:0.6 + code:0.4, karcher"
    assert manifest["adapter"]["combination"] == said["combination"]
    assert str(tmp_path) not in json.dumps(manifest)
    line = ["verify", "--level", "weights", "--merged", str(merged)]
    assert run([*line, *several]) == 0
    assert run([*line, "--base", str(llama), "--adapter", str(both), "--device", "cpu"]) == 0
    other = [text.replace(":0.6", ":0.7") for text in several]
    capsys.readouterr()
    assert run([*line, *other]) == errors.NotEquivalentError.exit_code
    assert "made from another combination of adapters" in capsys.readouterr().out
    assert run(["lora", *several, "--output", str(tmp_path / "lora")]) == 0
    assert_near(deltas(tmp_path / "lora"), delta(llama, both, tmp_path / "lora2"), 1e-6)
    out = str(tmp_path / "dry")
    assert run(["merge", *several, "--output", out, "--dry-run"]) == 0
    assert "14 of" in capsys.readouterr().out and not Path(out).exists()


def test_the_same_bytes_every_time(two: dict[str, str | Path], llama: Path, tmp_path: Path) -> None:
    combination = Combination(two, "dare-ties", density=0.3, seed=5)
    for name in ("first", "second"):
        psoft_export.combine(llama, combination, tmp_path / name, device="cpu")
    first = files.tree(tmp_path / "first")
    assert first == files.tree(tmp_path / "second")
    assert first.keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "psoft_basis.safetensors",
        "psoft_export.json",
    }
    combination = Combination(two, "dare-ties", density=0.3, seed=6)
    psoft_export.combine(llama, combination, tmp_path / "other", device="cpu")
    weights = "adapter_model.safetensors"
    assert files.tree(tmp_path / "other")[weights] != first[weights]


def test_bundled_adapters_combine_and_peft_computes_the_same(tmp_path: Path) -> None:
    """Relaxed of rank 64, strict of rank 32, and a series of rank 48."""
    combination = Combination({"prose": PROSE, "sums": SUMS, "records": RECORDS}, "lie")
    report = psoft_export.combine(BASE, combination, tmp_path / "all", device="cpu")
    assert report.kind == "signs" and len(report.modules) == 28
    assert report.method == "PSOFT with a free R", "the series is not quite a rotation"
    psoft_export.merge(BASE, tmp_path / "all", tmp_path / "merged", device="cpu", dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, tmp_path / "all")
    psoft_export.restore_basis(model, tmp_path / "all")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(40).view(2, 20) + 60
    with torch.inference_mode():
        found, expected = merged(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_relaxed_adapters_of_two_machines_stay_relaxed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their full records differ by the last digits of two SVDs."""
    here = models.save_adapter("llama", llama, tmp_path / "here", seed=1)
    psoft_export.record(llama, here, kind="full", cache=False)
    there = models.save_adapter("llama", llama, tmp_path / "there", seed=2)
    with monkeypatch.context() as patch:
        machines.pretend(machines.float64_svd, patch)
        psoft_export.record(llama, there, kind="full", cache=False)
    combination = Combination({"here": here, "there": there}, "lie", {"here": 0.5, "there": 0.5})
    report = psoft_export.combine(llama, combination, tmp_path / "out", device="cpu")
    assert report.method.startswith("PSOFT-RO") and report.kind == "full"
    assert 0 < max(module.outside for module in report.modules) < 1e-3


def test_nothing_that_is_read_is_replaced(
    two: dict[str, str | Path], llama: Path, tmp_path: Path
) -> None:
    calls: list[Any] = [
        lambda: psoft_export.combine(llama, Combination(two), tmp_path, overwrite=True),
        lambda: psoft_export.merge(llama, Combination(two), tmp_path, overwrite=True),
        lambda: psoft_export.to_lora(llama, Combination(two), two["math"], overwrite=True),
    ]
    before = files.tree(tmp_path)
    for call in calls:
        with pytest.raises(errors.OutputError, match="is or holds the input"):
            call()
    assert files.tree(tmp_path) == before


@pytest.mark.slow
def test_a_combination_is_exported_to_onnx(
    two: dict[str, str | Path], llama: Path, tmp_path: Path
) -> None:
    line = [
        "onnx", "--base", str(llama), "--adapter", f"math={two['math']}:0.5",
        "--adapter", f"code={two['code']}:0.5", "--method", "cayley",
        "--output", str(tmp_path / "onnx"), "--device", "cpu", "--quiet",
    ]  # fmt: skip
    assert run(line) == 0
    both = Combination(two, "cayley", {"math": 0.5, "code": 0.5})
    psoft_export.merge(llama, both, tmp_path / "merged", device="cpu")
    expected = logits(models.load_task_model("llama", tmp_path / "merged"), "llama")
    graph = psoft_export.onnx.load(tmp_path / "onnx", device="cpu")
    found = graph(**models.FAMILIES["llama"].inputs())
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=1e-4)


def half_turned(folder: Path, llama: Path, planes: float, **options: Any) -> Path:
    """A free R that turns a plane by π in one layer, or mirrors it."""
    adapter(llama, folder, 1, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False, **options)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    entries = 0.1 * torch.arange(28.0).sin()
    for name in tensors:
        tensors[name] = torch.linalg.matrix_exp(skew_symmetric(entries, 8)).float()
    name = "base_model.model.model.layers.1.self_attn.q_proj.psoft_R.weight"
    turn = torch.eye(8)
    turn[0, 0], turn[1, 1] = -1, planes
    tensors[name] = turn
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_a_half_turn_is_named_and_has_a_direction(llama: Path, tmp_path: Path) -> None:
    turned = half_turned(tmp_path / "turned", llama, -1.0)
    combination = Combination({"turned": turned}, "lie", {"turned": 1.0})
    report = psoft_export.combine(llama, combination, tmp_path / "out", device="cpu")
    (warning,) = report.manifest["warnings"]
    assert "module 'model.layers.1.self_attn.q_proj': turns 1 plane(s) by π" in warning
    single = delta(llama, turned, tmp_path / "lora")
    assert_near(delta(llama, tmp_path / "out", tmp_path / "lora"), single, 1e-5)


def test_a_reflection_is_refused_by_methods_on_the_group(llama: Path, tmp_path: Path) -> None:
    mirrored = half_turned(tmp_path / "mirrored", llama, 1.0)
    words = (
        "adapter 'mirrored', module 'model.layers.1.self_attn.q_proj': R holds a reflection.*"
        "use linear"
    )
    with pytest.raises(errors.UnsupportedError, match=words):
        psoft_export.combine(llama, Combination({"mirrored": mirrored}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    combination = Combination({"mirrored": mirrored}, "linear")
    psoft_export.combine(llama, combination, tmp_path / "out", device="cpu")


def test_different_bases_are_refused(
    two: dict[str, str | Path], llama: Path, base_folder: Any, tmp_path: Path
) -> None:
    other = files.copy_of(llama, tmp_path / "other-base")
    path = other / "model.safetensors"
    weight = "model.layers.0.mlp.up_proj.weight"
    files.edit_tensors(path, lambda tensors: tensors | {weight: 1.01 * tensors[weight]})
    stranger = adapter(other, tmp_path / "stranger", 4)
    combination = Combination({"math": two["math"], "law": stranger}, "linear")
    words = "adapters 'math' and 'law': were recorded with different bases.*up_proj"
    with pytest.raises(errors.MismatchError, match=words):
        psoft_export.combine(llama, combination, tmp_path / "out")
    alone = Combination({"law": stranger}, "linear", {"law": 0.5})
    with pytest.raises(errors.MismatchError, match="not the base that the adapter's basis"):
        psoft_export.combine(llama, alone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_records_that_disagree_are_refused(
    two: dict[str, str | Path], llama: Path, tmp_path: Path
) -> None:
    """A full record that holds another subspace than the base's principal one."""
    psoft_export.convert(llama, two["code"], tmp_path / "full", to="full")
    path = tmp_path / "full" / "psoft_basis.safetensors"
    module = "model.layers.0.mlp.up_proj"
    a = load_file(path)[f"{module}.A"].roll(1, dims=1)
    files.edit_keeping_metadata(path, **{f"{module}.A": a.contiguous()})
    combination = Combination({"math": two["math"], "code": tmp_path / "full"}, "lie")
    words = f"adapter 'code', module '{module}': .*% of its ΔW lies outside the subspace"
    with pytest.raises(errors.MismatchError, match=words):
        psoft_export.combine(llama, combination, tmp_path / "out", kind="full")


def test_heads_are_kept_where_they_agree(base_folder: Any, tmp_path: Path) -> None:
    base = base_folder("minilm")
    first, second = (
        models.save_adapter("minilm", base, tmp_path / str(seed), seed=seed) for seed in (1, 2)
    )
    combination = Combination({"first": first, "second": second}, "lie")
    words = "adapters 'first' and 'second': each bring their own 'classifier.bias'"
    with pytest.raises(errors.UnsupportedError, match=words):
        psoft_export.combine(base, combination, tmp_path / "out", device="cpu")
    path = second / "adapter_model.safetensors"
    tensors, theirs = load_file(path), load_file(first / "adapter_model.safetensors")
    tensors |= {name: t for name, t in theirs.items() if "classifier" in name}
    save_file(tensors, path, {"format": "pt"})
    psoft_export.combine(base, combination, tmp_path / "out", device="cpu")
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {n for n in theirs if "classifier" in n} <= kept.keys()
    psoft_export.merge(base, tmp_path / "out", tmp_path / "merged", device="cpu")


def test_other_kinds_are_refused(two: dict[str, str | Path], llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        models.load_task_model("llama", llama), LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "lora")
    combination = Combination({"math": two["math"], "law": tmp_path / "lora"})
    with pytest.raises(errors.UnsupportedError, match=r"adapter 'law': LoRA.*rotates no principal"):
        psoft_export.combine(llama, combination, tmp_path / "out")
    with pytest.raises(errors.UsageError, match="givens paper: is for qGOFT"):
        psoft_export.merge(llama, Combination(two), tmp_path / "out", givens="paper")


def test_without_records_the_same_warning_as_a_merge(llama: Path, tmp_path: Path) -> None:
    bare = models.save_adapter("llama", llama, tmp_path / "bare")
    combination = Combination({"bare": bare}, "lie", {"bare": 0.5})
    report = psoft_export.combine(llama, combination, tmp_path / "out", device="cpu")
    (warning,) = report.manifest["warnings"]
    assert warning.startswith("adapter 'bare': the adapter has no basis record")
    merged = psoft_export.merge(llama, tmp_path / "out", tmp_path / "merged", device="cpu")
    assert warning in merged.manifest["warnings"], "what nobody knew is not forgotten"
    with pytest.raises(errors.RecordMissingError):
        psoft_export.combine(llama, combination, tmp_path / "no", require_record=True)
    line = ["merge", "--base", str(llama), "--adapter", str(bare), "--method", "lie"]
    line += ["--output", str(tmp_path / "no"), "--dry-run", "--require-record"]
    assert run(line) == errors.RecordMissingError.exit_code


A, B = f"math={PROSE}", f"code={SUMS}"
BAD: dict[str, tuple[list[str], str]] = {
    "method": (["--adapter", A, "--method", "mean"], "method 'mean' is not one of linear, "),
    "one of two": (["--adapter", A, "--method", "slerp"], "takes 2 adapters, not 1"),
    "weight": (["--adapter", f"{A}:much"], "weight 'much' is not a number"),
    "infinite": (["--adapter", f"{A}:inf"], "weight inf of adapter 'math': is not a number"),
    "twice": (["--adapter", A, "--adapter", A], "'math' is there twice"),
    "no name": (["--adapter", f"={PROSE}"], "is not [NAME=]ADAPTER[:WEIGHT]"),
    "strange name": (["--adapter", f"../x={PROSE}"], "is not a name"),
    "factor": (["--adapter", A, "--factor", "2"], "factor 2.0: is for task-arithmetic, ties"),
    "density": (["--adapter", A, "--method", "ties", "--density", "0"], "density 0.0: above 0"),
    "kind": (["--adapter", A, "--kind", "none"], "--kind"),
    "no output": (["--adapter", A], "pass --output to write an adapter, or --evaluate"),
    "no file": (["--adapter", A, "--evaluate", "prose"], "is not NAME=FILE"),
    "base": (["--adapter", f"base={PROSE}", "--evaluate", "a=b"], "is what the table calls"),
    "picture": (["--adapter", A, "--evaluate", "a=b", "--sweep", "--plot", "x"], "needs a suffix"),
    "no text": (["--adapter", A, "--evaluate", "prose=/nowhere"], "/nowhere: cannot be read"),
    "sweep": (["--adapter", A, "--output", "x", "--sweep"], "pass the texts"),
    "plot": (["--adapter", A, "--output", "x", "--plot", "p.png"], "pass --sweep"),
    "nowhere": (["--adapter", "math=/nowhere", "--output", "x"], "/nowhere: no such folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    more, words = BAD[name]
    line = ["combine", "--base", str(BASE), *more]
    code = errors.OutputError if name == "picture" else errors.UsageError
    if "x" not in more and not {"--evaluate"} & set(more) and name != "no output":
        line += ["--output", "x"]
    assert run(line) == code.exit_code
    said = capsys.readouterr().err
    assert words in said and "internal" not in said
    assert not any(tmp_path.iterdir())


def test_several_adapters_need_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["merge", "--output", "x"], ["verify", "--merged", "x"]):
        assert run([*command, "--base", str(BASE), "--adapter", A, "--adapter", B]) == 2
        assert "several adapters become one by a --method" in capsys.readouterr().err
        line = [*command, "--base", str(BASE), "--adapter", str(PROSE), "--density", "0.5"]
        assert run(line) == 2
        assert "--density: only with --method" in capsys.readouterr().err


def test_a_combination_says_what_is_wrong_with_it() -> None:
    for arguments, words in [
        (({},), "no adapter is given"),
        (({"a": "x"}, "lie", {"b": 1.0}), "weight of 'b': there is no such adapter, but 'a'"),
        (({"a": "x"}, "lie", {"a": "1"}), "weight '1' of adapter 'a': is not a number"),
        (({"a": "x"}, "lie", {"a": True}), "is not a number"),
        (({"": "x"},), "adapter '': is not a name"),
        (({"a": "x"}, "ties", {}, float("nan")), "factor nan: a number is needed"),
    ]:
        with pytest.raises(errors.UsageError, match=re.escape(words)):
            Combination(*arguments)  # type: ignore[arg-type]


def test_every_method_is_in_the_docs() -> None:
    text = (DOCS / "combining.md").read_text("utf-8")
    for method in METHODS.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{method.name}` |"))
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        orthogonal = "yes" if method.is_orthogonal else "no"
        assert cells[1:] == [
            method.idea, f"`{method.formula}`", method.source, method.use, orthogonal
        ]  # fmt: skip


@pytest.mark.slow
def test_losses_are_those_of_the_merged_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "sums.txt"
    text.write_text("".join(f"{i} + {i + 7} = {2 * i + 7}\n" for i in range(40)))
    short = tmp_path / "short.txt"
    short.write_text("2 + 2 = 4\n")
    combination = Combination({"prose": PROSE, "sums": SUMS}, "lie", {"prose": 0.3})
    table = psoft_export.evaluate(BASE, combination, {"sums": text}, device="cpu")
    losses = table.losses["sums"]
    assert list(losses) == ["base", "prose", "sums", "combination"]
    assert losses["sums"] < losses["combination"] < losses["base"]
    psoft_export.merge(BASE, combination, tmp_path / "merged", dtype="fp32", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([list(text.read_bytes())])
    windows = ids[0, : ids.shape[1] // 256 * 256].view(-1, 256)
    assert table.tokens == {"sums": windows.shape[0] * 255}
    with torch.inference_mode():
        scores = model(input_ids=windows).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(scores, windows[:, 1:].flatten())
    assert losses["combination"] == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(errors.UsageError, match="has 10 tokens; at least 256 are needed"):
        psoft_export.evaluate(BASE, combination, {"short": short})
    with pytest.raises(errors.UsageError, match="no text to evaluate on"):
        psoft_export.evaluate(BASE, combination, {})
    with pytest.raises(errors.UsageError, match="method 'mean' is not one of"):
        psoft_export.sweep(BASE, combination, {"sums": text}, methods=["mean"])
    swept = psoft_export.sweep(
        BASE, combination, {"sums": text}, methods=["lie", "slerp"], scales=(1.0, 0.0)
    )
    points = {(p.method, p.scale): p for p in swept.points}
    assert points["lie", 1.0].losses["sums"] == pytest.approx(losses["combination"], abs=1e-9)
    assert points["lie", 0.0].losses["sums"] == pytest.approx(losses["base"], abs=1e-6)
    assert "weights sum to 0" in str(points["slerp", 0.0].problem)
    assert swept.best.mean == min(p.mean for p in swept.points)
    line = ["combine", "--base", str(BASE), "--adapter", B, "--evaluate", f"sums={text}"]
    picture = tmp_path / "losses.png"
    assert run([*line, "--sweep", "--plot", str(picture), "--device", "cpu"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "lowest mean" in said and f"{losses['sums']:.3f}" in said


def test_losses_need_a_causal_model(base_folder: Any, tmp_path: Path) -> None:
    base = base_folder("minilm")
    folder = models.save_adapter("minilm", base, tmp_path / "a")
    with pytest.raises(errors.UnsupportedError, match="losses are evaluated for causal"):
        psoft_export.evaluate(base, Combination({"a": folder}), {"a": tmp_path / "t.txt"})
