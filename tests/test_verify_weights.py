"""The weights and geometry levels: right merges pass, planted faults are found and named."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import psoft_export
from psoft_export.algebra.merged_weight import low_rank_factors
from psoft_export.algebra.parameters import CayleyNeumann, RotationParameters
from psoft_export.algebra.rotation import generator_size
from psoft_export.algebra.rotation import rotation as merging_rotation
from psoft_export.checkpoint.written_hash import Stretch
from psoft_export.cli.main import run
from psoft_export.errors import (
    CheckpointError,
    MismatchError,
    NotEquivalentError,
    UsageError,
)
from psoft_export.reference.rotation import expected_product, reference_rotation
from psoft_export.verification.evaluation import Deviation, measure
from psoft_export.verification.tiles import unit_in_last_place
from tests import files, models
from tests.conftest import BUNDLED, EXAMPLES

BASE = EXAMPLES / "base"
RELAXED = EXAMPLES / "adapters" / "prose-relaxed-r64"
STRICT = EXAMPLES / "adapters" / "arithmetic-strict-r32"
QUERY = "model.layers.{}.self_attn.q_proj.weight"

Tensors = dict[str, torch.Tensor]


def verify(merged: Path, base: Path = BASE, adapter: Path = RELAXED) -> Any:
    return psoft_export.verify(base, adapter, merged, level="weights")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """Merged checkpoints of two bundled adapters, by adapter."""
    folder = tmp_path_factory.mktemp("merged")
    for adapter in (RELAXED, STRICT):
        psoft_export.merge(BASE, adapter, folder / adapter.name)
    return {adapter: folder / adapter.name for adapter in (RELAXED, STRICT)}


@pytest.fixture
def merged(made: dict[Path, Path], tmp_path: Path) -> Path:
    """A checkpoint to damage, without `psoft_export.json`, which would tell of any change."""
    copy = files.copy_of(made[RELAXED], tmp_path / "merged")
    (copy / "psoft_export.json").unlink()
    return copy


def edit(merged: Path, edited: Callable[[Tensors], Tensors]) -> None:
    files.edit_tensors(merged / "model.safetensors", edited)


@pytest.mark.parametrize("dtype", [None, "fp32", "fp16"])
@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_adapters_merge_to_the_nearest_numbers(
    name: str, dtype: str | None, tmp_path: Path
) -> None:
    adapter = EXAMPLES / "adapters" / name
    merge = psoft_export.merge(BASE, adapter, tmp_path / "merged", dtype=dtype)
    report = verify(tmp_path / "merged", adapter=adapter)
    assert report.equivalent and report.problems == ()
    assert len(report.weights.modules) == 28 and report.weights.copied == 11
    assert all(m.not_nearest == 0 for m in report.weights.modules)
    # In float32 the two evaluations may differ by more than rounding where W and ΔW cancel.
    largest = 0.51 if dtype == "fp32" else 0.5
    assert 0.4 < max(m.largest_error_ulp for m in report.weights.modules) <= largest
    assert all(abs(m.applied - 1) < 1e-3 for m in report.weights.modules)
    # What the merge said of itself is what an outsider finds, who evaluates ΔW otherwise.
    assert merge.verification.weights.summary() == merge.manifest["verification"]["weights"]
    said, found = merge.manifest["verification"]["weights"], report.weights.summary()
    error, ulp = found["largest_relative_error"], found["largest_error_ulp"]
    assert said == found | {
        "largest_relative_error": pytest.approx(error, rel=1e-6),
        "largest_error_ulp": pytest.approx(ulp, abs=1e-6 if dtype != "fp32" else 0.01),
    }
    assert merge.manifest["files"] == report.merged["sha256"]


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, None) for family in models.FAMILIES), ("minilm", "bf16")]
)
def test_every_family_is_equivalent(
    family: str, dtype: str | None, base_folder: Any, tmp_path: Path
) -> None:
    base = base_folder(family)
    adapter = models.save_adapter(family, base, tmp_path / "adapter")
    psoft_export.merge(base, adapter, tmp_path / "merged", dtype=dtype)
    report = verify(tmp_path / "merged", base, adapter)
    assert report.problems == ()
    assert report.weights.saved == len(psoft_export.load_adapter(adapter).saved)


def test_shards_and_another_layout_are_equivalent(made: dict[Path, Path], tmp_path: Path) -> None:
    copy = files.copy_of(made[RELAXED], tmp_path / "merged")
    (copy / "psoft_export.json").unlink()
    files.as_shards(copy, 3)
    assert verify(copy).equivalent


def flipped_sign(adapter: Path) -> None:
    path, name = adapter / "psoft_basis.safetensors", "model.layers.2.mlp.up_proj.sign"
    signs = load_file(path)[name]
    signs[5] *= -1
    files.edit_keeping_metadata(path, **{name: signs})


def swapped_vectors(adapter: Path) -> None:
    def swap(tensors: Tensors) -> Tensors:
        name = "base_model.model.model.layers.1.self_attn.v_proj.psoft_R.vector_{}"
        first, second = name.format("a"), name.format("b")
        return tensors | {first: tensors[second], second: tensors[first]}

    files.edit_tensors(adapter / "adapter_model.safetensors", swap)


@pytest.mark.parametrize(
    ("fault", "tensor"),
    [
        (flipped_sign, "model.layers.2.mlp.up_proj.weight"),
        (swapped_vectors, "model.layers.1.self_attn.v_proj.weight"),
    ],
)
def test_a_fault_in_the_adapter_that_was_merged_is_found(
    fault: Callable[[Path], None], tensor: str, tmp_path: Path
) -> None:
    wrong = files.copy_of(RELAXED, tmp_path / "wrong")
    fault(wrong)
    psoft_export.merge(BASE, wrong, tmp_path / "merged")
    (tmp_path / "merged" / "psoft_export.json").unlink()
    problem = one_problem(verify(tmp_path / "merged"))
    assert f"tensor '{tensor}'" in problem and "nearest to W + ΔW" in problem


def one_problem(report: Any) -> str:
    assert not report.equivalent
    assert len(report.problems) == 1
    return str(report.problems[0])


def test_swapped_layers_are_found(merged: Path) -> None:
    first, second = QUERY.format(0), QUERY.format(1)
    edit(merged, lambda t: t | {first: t[second], second: t[first]})
    report = verify(merged)
    assert [p.split("'")[1] for p in report.problems] == [first, second]


def test_an_unmerged_layer_is_named_as_such(merged: Path) -> None:
    name = QUERY.format(3)
    edit(merged, lambda t: t | {name: load_file(BASE / "model.safetensors")[name]})
    problem = one_problem(verify(merged))
    assert name in problem and problem.endswith("the adapter is not in it")


def test_a_layer_merged_twice_is_named_as_such(merged: Path, tmp_path: Path) -> None:
    name = QUERY.format(3)
    # The adapter on top of the merged weight, as a second merge would have it.
    original = load_file(BASE / "model.safetensors")[name].double()
    edit(merged, lambda t: t | {name: (2 * t[name].double() - original).bfloat16()})
    problem = one_problem(verify(merged))
    assert name in problem and problem.endswith("the adapter is in it twice")


def test_a_forgotten_scaling_is_found(made: dict[Path, Path], tmp_path: Path) -> None:
    copy = files.copy_of(made[STRICT], tmp_path / "merged")
    (copy / "psoft_export.json").unlink()
    scaling = psoft_export.load_adapter(STRICT).basis_options.scaling
    assert scaling == 1.5
    original = load_file(BASE / "model.safetensors")
    targets = {f"{module}.weight" for module in psoft_export.load_adapter(STRICT).rotations}

    def unscaled(tensors: Tensors) -> Tensors:
        return {
            name: (
                (original[name] + (value.double() - original[name]) / scaling).bfloat16()
                if name in targets
                else value
            )
            for name, value in tensors.items()
        }

    edit(copy, unscaled)
    report = verify(copy, adapter=STRICT)
    assert len(report.problems) == 28
    assert all(abs(m.applied - 1 / scaling) < 1e-3 for m in report.weights.modules)
    assert "ΔW is in it 0.667 times" in report.problems[0]


def test_a_base_of_another_revision_is_found(merged: Path, tmp_path: Path) -> None:
    other = files.copy_of(BASE, tmp_path / "other")
    norm = "model.norm.weight"
    files.edit_tensors(other / "model.safetensors", lambda t: t | {norm: t[norm] * 1.01})
    assert "not the base's, byte for byte" in one_problem(verify(merged, base=other))
    # A target's weight that differs is caught by the adapter's basis record.
    name = QUERY.format(0)
    files.edit_tensors(other / "model.safetensors", lambda t: t | {name: t[name] * 1.01})
    with pytest.raises(MismatchError, match=r"layers\.0\.self_attn\.q_proj"):
        verify(merged, base=other)


def test_the_manifest_tells_of_another_base_and_adapter(
    made: dict[Path, Path], tmp_path: Path
) -> None:
    other = files.copy_of(BASE, tmp_path / "other")
    path = other / "model.safetensors"  # the same numbers, other bytes
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"tp"'))
    assert "made from another base (it differs in model.safetensors)" in one_problem(
        verify(made[RELAXED], base=other)
    )
    report = verify(made[RELAXED], adapter=STRICT)
    assert "made from another adapter" in report.problems[0]


@pytest.mark.parametrize("name", [QUERY.format(2), "model.embed_tokens.weight"])
@pytest.mark.parametrize("position", [0, 1001, -2])
def test_one_corrupted_byte_is_found(name: str, position: int, merged: Path) -> None:
    def corrupt(tensors: Tensors) -> Tensors:
        tensors[name].view(-1).view(torch.uint8)[position] ^= 1  # the last bit of a number
        return tensors

    edit(merged, corrupt)
    assert f"'{name}'" in one_problem(verify(merged))


def test_a_corrupted_header_is_found(made: dict[Path, Path], tmp_path: Path) -> None:
    copy = files.copy_of(made[RELAXED], tmp_path / "merged")
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"tp"'))
    assert "model.safetensors has been changed since" in one_problem(verify(copy))


def test_missing_strange_and_misshapen_tensors_are_named(merged: Path) -> None:
    def mess(tensors: Tensors) -> Tensors:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.input_layernorm.weight"] = torch.ones(7, dtype=torch.bfloat16)
        tensors[QUERY.format(1)] = tensors[QUERY.format(1)].to(torch.int32)
        return tensors | {"model.extra": torch.zeros(3)}

    edit(merged, mess)
    text = "\n".join(verify(merged).problems)
    for expected in (
        "'model.norm.weight' is missing",
        "'model.extra' is in neither base nor adapter",
        "input_layernorm.weight' has shape [7]",
        "q_proj.weight' has dtype I32",
    ):
        assert expected in text


def test_a_number_that_is_not_finite_is_found(merged: Path) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors[QUERY.format(1)][3, 4] = math.nan
        return tensors

    edit(merged, spoil)
    report = verify(merged)
    assert "1 of 65536 entries" in one_problem(report)
    assert max(m.largest_error_ulp for m in report.weights.modules) == math.inf
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_head_that_is_not_the_adapters_is_found(base_folder: Any, tmp_path: Path) -> None:
    base = base_folder("minilm")
    adapter = models.save_adapter("minilm", base, tmp_path / "adapter")
    out = tmp_path / "merged"
    psoft_export.merge(base, adapter, out, labels=["a", "b", "c"])
    assert verify(out, base, adapter).equivalent
    (out / "psoft_export.json").unlink()
    edit(out, lambda t: t | {"classifier.bias": t["classifier.bias"] + 1e-6})
    assert "'classifier.bias' is not the adapter's" in one_problem(verify(out, base, adapter))
    files.edit_json(out / "config.json", id2label={"0": "a"}, label2id={"a": 0})
    text = "\n".join(verify(out, base, adapter).problems)
    assert "id2label does not name the head's 3 classes" in text


def test_rounding_to_another_dtype_is_checked(tmp_path: Path) -> None:
    psoft_export.merge(BASE, RELAXED, tmp_path / "merged", dtype="fp32")
    (tmp_path / "merged" / "psoft_export.json").unlink()

    def nudge(tensors: Tensors) -> Tensors:
        tensors["model.norm.weight"][0] *= 1 + 2**-20
        return tensors

    edit(tmp_path / "merged", nudge)
    assert "'model.norm.weight' is not the base's, rounded to F32" in one_problem(
        verify(tmp_path / "merged")
    )


def test_a_wrong_product_in_the_merge_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_identity(a: Any, b: Any, turn: torch.Tensor, scaling: float) -> Any:
        return low_rank_factors(a, b, turn + torch.eye(len(turn)), scaling)

    monkeypatch.setattr("psoft_export.changes.subspace.low_rank_factors", without_identity)
    with pytest.raises(NotEquivalentError, match="nothing was written"):
        psoft_export.merge(BASE, RELAXED, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("shard_size", "damaged"), [(None, ""), ("1MB", "-00001-of-")])
def test_bytes_that_change_on_disk_leave_nothing(
    shard_size: str | None, damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_back_damaged(self: Stretch, path: Path) -> bool:
        if damaged in path.name:
            with path.open("r+b") as file:
                file.seek(self.end - 5)
                byte = file.read(1)
                file.seek(self.end - 5)
                file.write(bytes([byte[0] ^ 1]))
        return reads_back(self, path)

    reads_back = Stretch.reads_back
    monkeypatch.setattr(Stretch, "reads_back", read_back_damaged)
    words = rf"model{damaged}.*safetensors reads back as other bytes"
    with pytest.raises(NotEquivalentError, match=words):
        psoft_export.merge(
            BASE, RELAXED, tmp_path / "merged", cache=False, max_shard_size=shard_size
        )
    assert list(tmp_path.iterdir()) == []


def test_strict_adapters_keep_the_geometry(made: dict[Path, Path]) -> None:
    level = verify(made[STRICT], adapter=STRICT).geometry
    assert level.equivalent and all(m.strict for m in level.modules)
    for module in level.modules:
        assert module.orthogonality_error < 1e-12
        assert module.norm_change < 1e-6 and module.angle_change < 1e-4
        assert module.energy_change < 1e-6 and module.basis_residual < 1e-5
        assert module.largest_angle > 30


def test_relaxed_adapters_change_the_geometry_and_say_how_much(made: dict[Path, Path]) -> None:
    level = verify(made[RELAXED]).geometry
    assert level.equivalent and not any(m.strict for m in level.modules)
    assert all(0.01 < m.norm_change < 1 and 0.1 < m.angle_change < 90 for m in level.modules)


def test_a_basis_of_another_weight_is_found(made: dict[Path, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "full"
    psoft_export.convert(BASE, RELAXED, adapter, to="full")
    path = adapter / "psoft_basis.safetensors"
    tensors = load_file(path)
    first, second = "model.layers.0.mlp.up_proj.A", "model.layers.1.mlp.up_proj.A"
    files.edit_keeping_metadata(path, **{first: tensors[second], second: tensors[first]})
    found = verify(made[RELAXED], adapter=adapter).geometry.problems
    assert len(found) == 2 and "its basis is not one of this weight" in found[0]


forms = st.builds(
    dict,
    rank=st.integers(2, 9),
    seed=st.integers(0, 10**6),
    orthogonal=st.booleans(),
    vectors=st.tuples(st.booleans(), st.booleans()),
    series=st.one_of(
        st.none(),
        st.builds(CayleyNeumann, st.integers(0, 7), st.one_of(st.none(), st.floats(0.1, 2))),
    ),
    size=st.floats(0, 3),
)


@settings(deadline=None, max_examples=200)
@given(forms)
def test_two_evaluations_of_the_rotation_agree(form: dict[str, Any]) -> None:
    rank, generator = form["rank"], torch.Generator().manual_seed(form["seed"])

    def numbers(*shape: int) -> torch.Tensor:
        return form["size"] * torch.randn(*shape, generator=generator)

    orthogonal = form["orthogonal"]
    parameters = RotationParameters(
        rank,
        numbers(generator_size(rank)) if orthogonal else numbers(rank, rank),
        numbers(rank) if form["vectors"][0] else None,
        numbers(rank) if form["vectors"][1] else None,
        orthogonal,
        form["series"] if orthogonal else None,
    )
    first, second = merging_rotation(parameters), reference_rotation(parameters)
    torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-9 * float(first.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_distances_are_in_units_of_the_last_place(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 30, dtype=torch.float64)
    a, b = torch.randn(4, 30), torch.randn(40, 4)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    of = expected_product(a, b, RotationParameters(4, turn, orthogonal=False), 0.5)
    exact = weight + 0.5 * b.double() @ (turn - torch.eye(4)) @ a.double()
    nearest = exact.to(dtype)
    assert measure(weight, nearest, of).not_nearest == 0
    for ulps in (1, 3):
        moved = nearest.clone()
        step = unit_in_last_place(exact[7, 11:12], dtype)
        moved[7, 11] = (exact[7, 11] + ulps * step[0]).to(dtype)
        deviation = Deviation(of)
        for rows in (slice(0, 13), slice(13, 40)):
            deviation.add(weight[rows], moved[rows])
        assert deviation.not_nearest == 1
        assert abs(deviation.largest_ulp - ulps) <= 0.5


def test_command_prints_the_verdict_and_its_code(
    made: dict[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["verify", "--base", str(BASE), "--adapter", str(RELAXED), "--level", "weights"]
    assert run([*line, "--merged", str(made[RELAXED])]) == 0
    shown = capsys.readouterr().out
    assert "merged weights 28; largest error 0.5 ulp" in shown
    assert shown.rstrip().endswith("\nequivalent")
    broken = files.copy_of(made[RELAXED], tmp_path / "broken")
    name = QUERY.format(0)
    edit(broken, lambda t: t | {name: -t[name]})
    assert run([*line, "--merged", str(broken)]) == 14
    streams = capsys.readouterr()
    assert streams.out.rstrip().endswith("not equivalent") and name in streams.out
    assert "broken: not equivalent: " in streams.err
    assert run([*line, "--merged", str(broken), "--json"]) == 14
    result = json.loads(capsys.readouterr().out)
    assert result["equivalent"] is False and len(result["weights"]["modules"]) == 28


def test_bad_input_is_one_clear_line(made: dict[Path, Path], tmp_path: Path) -> None:
    merged = files.copy_of(made[RELAXED], tmp_path / "merged")
    with pytest.raises(UsageError, match="level 'bytes'"):
        psoft_export.verify(BASE, RELAXED, merged, level="bytes")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="text: is for the outputs level"):
        psoft_export.verify(BASE, RELAXED, merged, level="weights", text="task.txt")
    with pytest.raises(UsageError, match="no such folder"):
        verify(tmp_path / "nowhere")
    (merged / "psoft_export.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a file that psoft-export wrote"):
        verify(merged)
    (merged / "psoft_export.json").unlink()
    files.truncate(merged / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors"):
        verify(merged)
    (merged / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        verify(merged)


def test_reports_are_plain_data(made: dict[Path, Path]) -> None:
    report = verify(made[RELAXED])
    assert json.loads(json.dumps(report.to_dict()))["equivalent"] is True
    assert dataclasses.is_dataclass(report)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_a_gpu_finds_the_same(dtype: str | None, tmp_path: Path) -> None:
    merge = psoft_export.merge(BASE, RELAXED, tmp_path / "merged", dtype=dtype, device="cuda")
    for device in ("cuda", "cpu"):
        report = psoft_export.verify(
            BASE, RELAXED, tmp_path / "merged", level="weights", device=device
        )
        assert report.problems == ()
        ours = [m.relative_error for m in report.weights.modules]
        theirs = [m.relative_error for m in merge.verification.weights.modules]
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_an_adapter_beside_merged_weights_is_found(merged: Path) -> None:
    (merged / "adapter_config.json").write_text("{}")
    assert "would apply that adapter on top" in one_problem(verify(merged))


def test_a_config_of_another_model_is_found(merged: Path) -> None:
    files.edit_json(merged / "config.json", rms_norm_eps=1e-3, transformers_version="1.0")
    assert "rms_norm_eps is 0.001; 1e-06 is needed" in one_problem(verify(merged))


def test_half_turns_are_no_fault(llama: Path, tmp_path: Path) -> None:
    """Near 180° the Cayley transform magnifies rounding; the bound knows."""
    adapter = models.save_adapter("llama", llama, tmp_path / "adapter")

    def grow(tensors: Tensors) -> Tensors:
        return {n: t * 3000 if n.endswith("psoft_R.weight") else t for n, t in tensors.items()}

    files.edit_tensors(adapter / "adapter_model.safetensors", grow)
    merge = psoft_export.merge(llama, adapter, tmp_path / "merged", dtype="fp32")
    assert max(module.largest_angle for module in merge.modules) > 179.5
    assert verify(tmp_path / "merged", llama, adapter).equivalent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_neighbour_below_a_power_of_two_is_not_nearest(dtype: torch.dtype) -> None:
    weight = torch.ones(2, 3)
    nothing = RotationParameters(1, torch.eye(1).double(), orthogonal=False)
    of = expected_product(torch.zeros(1, 3), torch.zeros(2, 1), nothing, 1.0)
    given = weight.to(dtype, copy=True)
    assert measure(weight, given, of).not_nearest == 0
    given[1, 2] = 1 - torch.finfo(dtype).eps / 2
    assert measure(weight, given, of).not_nearest == 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_another_number_of_threads_finds_the_same(
    threads: int, dtype: str, made: dict[Path, Path], tmp_path: Path
) -> None:
    """The solver's vectors may differ in their last bits; the verdict does not."""
    psoft_export.merge(BASE, RELAXED, tmp_path / "merged", dtype=dtype, cache=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        report = psoft_export.verify(
            BASE, RELAXED, tmp_path / "merged", level="weights", cache=False
        )
    finally:
        torch.set_num_threads(before)
    assert report.problems == ()


def test_a_rescaled_basis_is_found(made: dict[Path, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "full"
    psoft_export.convert(BASE, RELAXED, adapter, to="full")
    path, name = adapter / "psoft_basis.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    wrong = {f"{name}.A": tensors[f"{name}.A"] * 2, f"{name}.B": tensors[f"{name}.B"] / 2}
    files.edit_keeping_metadata(path, **wrong)
    (found,) = verify(made[RELAXED], adapter=adapter).geometry.problems
    assert f"module '{name}': its basis is not one of this weight" in found


def test_a_level_that_was_not_run_is_no_pass(
    made: dict[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psoft_export.verification.outputs.available_bytes", lambda _: 1000)
    line = ["verify", "--base", str(BASE), "--adapter", str(RELAXED), "--merged"]
    assert run([*line, str(made[RELAXED]), "--level", "outputs"]) == 14
    said = capsys.readouterr()
    assert said.out.rstrip().endswith("not checked") and "GiB" in said.err
    assert run([*line, str(made[RELAXED]), "--level", "all"]) == 0
    said = capsys.readouterr()
    assert "warning: outputs were not compared: base and adapter in F32 need" in said.err


def test_control_characters_of_names_reach_no_terminal(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(merged, lambda t: t | {"x\n::error::\x1b[2Jequivalent": torch.zeros(1)})
    line = ["verify", "--base", str(BASE), "--adapter", str(RELAXED), "--level", "weights"]
    assert run([*line, "--merged", str(merged)]) == 14
    said = capsys.readouterr()
    assert "\x1b[2J" not in said.out + said.err
    assert not any(text.startswith("::error") for text in (said.out + said.err).splitlines())


@pytest.mark.parametrize(("may_overflow", "wrong"), [(True, 1), (False, 3)])
def test_buffers_may_overflow_where_weights_may_not(may_overflow: bool, wrong: int) -> None:
    limit = torch.finfo(torch.float32).min
    values = torch.tensor([[limit, -limit, 1.0, limit]])
    given = values.half()
    given[0, 3] = math.inf  # of the other sign
    deviation = Deviation(None, may_overflow=may_overflow)
    deviation.add(values, given)
    assert deviation.not_nearest == wrong
