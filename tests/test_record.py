"""A recorded adapter means the same weights on every machine; an unrecorded one says so."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import psoft_export
from psoft_export import recording
from psoft_export.adapters.basis_record import FILENAME
from psoft_export.checkpoint.writer import ShardWriter
from psoft_export.cli.main import run
from psoft_export.errors import (
    OutputError,
    RecordError,
    RecordMissingError,
    UnsupportedError,
    UsageError,
)
from tests import files, models
from tests.conftest import BUNDLED, EXAMPLES
from tests.machines import MACHINES, coarse_svd, numpy_svd, pretend, pretend_training, random_signs

BASE = EXAMPLES / "base"
MISMATCH, OUTPUT, RECORD, MISSING = 5, 8, 12, 13


def bundled(name: str, folder: Path, *, recorded: bool = True) -> Path:
    """A copy of a bundled adapter."""
    adapter = files.copy_of(EXAMPLES / "adapters" / name, folder)
    if not recorded:
        (adapter / FILENAME).unlink()
    return adapter


def merged(adapter: Path, output: Path, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    settings = {"dtype": "fp32", "device": "cpu", "cache": False}
    report = psoft_export.merge(BASE, adapter, output, **{**settings, **options})
    return report, load_file(output / "model.safetensors")


def deviations(
    report: Any, one: dict[str, Tensor], other: dict[str, Tensor]
) -> dict[str, tuple[float, Any]]:
    """Module → ‖ΔW − ΔW'‖ / ‖ΔW‖, and what the report says of the module."""
    base = load_file(BASE / "model.safetensors")
    found = {}
    for module in report.modules:
        delta = one[module.tensor].double() - base[module.tensor].double()
        apart = (one[module.tensor].double() - other[module.tensor].double()).norm()
        found[module.module] = (float(apart / delta.norm()), module)
    return found


def trained_elsewhere(adapter: Path, name: str = BUNDLED[1]) -> Path:
    """A bundled adapter as a machine with other signs would have saved and recorded it."""
    bundled(name, adapter)
    generator = torch.Generator().manual_seed(4)
    flips: dict[str, Tensor] = {}

    def flip_record(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        for key in [key for key in tensors if key.endswith(".sign")]:
            module = key.removesuffix(".sign")
            flip = torch.randint(0, 2, tensors[key].shape, generator=generator) * 2 - 1
            flips[module] = flip
            tensors[key] = (tensors[key] * flip).to(torch.int8)
            held = flip[tensors[f"{module}.cluster"].long()]
            tensors[f"{module}.cluster_A"] = tensors[f"{module}.cluster_A"] * held[:, None]
            tensors[f"{module}.cluster_B"] = tensors[f"{module}.cluster_B"] * held

    files.edit_record(adapter, flip_record)
    return adapter


# The same weights everywhere


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", BUNDLED)
def test_signs_give_the_same_weights_to_the_stated_bound(
    name: str, machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = bundled(name, tmp_path / "adapter")
    report, here = merged(adapter, tmp_path / "here")
    assert not report.manifest["warnings"]
    there_svd = Mock(wraps=MACHINES[machine])
    pretend(there_svd, monkeypatch)
    _, there = merged(adapter, tmp_path / "there")
    apart = deviations(report, here, there)
    for module, (deviation, figures) in apart.items():
        bound = figures.basis_uncertainty + 2 * figures.relative_rounding
        assert deviation <= bound < 1e-2, module
    # Not that the weights differ: two SVDs in float64 may round to the very same vectors.
    assert there_svd.call_count == len(apart), "it is another SVD"


@pytest.mark.parametrize("machine", MACHINES)
def test_a_full_record_gives_the_same_bits(
    machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    psoft_export.convert(
        BASE, EXAMPLES / "adapters" / BUNDLED[0], tmp_path / "full", to="full", device="cpu"
    )
    report, here = merged(tmp_path / "full", tmp_path / "here")
    assert all(module.basis_uncertainty == 0 for module in report.modules)
    pretend(MACHINES[machine], monkeypatch)
    _, there = merged(tmp_path / "full", tmp_path / "there")
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_without_a_record_the_weights_are_others_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = bundled(BUNDLED[0], tmp_path / "adapter", recorded=False)
    report, here = merged(adapter, tmp_path / "here")
    pretend(random_signs, monkeypatch)
    _, there = merged(adapter, tmp_path / "there")
    apart = deviations(report, here, there)
    assert min(deviation for deviation, _ in apart.values()) > 0.5
    (warning,) = report.manifest["warnings"]
    assert "nobody knows the signs" in warning and "psoft-export record" in warning
    assert report.manifest["basis"]["record"] is None
    line = ["merge", "--base", str(BASE), "--adapter", str(adapter), "--device", "cpu"]
    assert run([*line, "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert "nobody knows the signs" in capsys.readouterr().err


def test_the_record_is_bound_to_no_folder(tmp_path: Path) -> None:
    copied = bundled(BUNDLED[1], tmp_path / "some" / "where")
    _, here = merged(EXAMPLES / "adapters" / BUNDLED[1], tmp_path / "here")
    _, there = merged(copied, tmp_path / "there")
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_require_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = bundled(BUNDLED[1], tmp_path / "bare", recorded=False)
    line = ["merge", "--base", str(BASE), "--require-record", "--device", "cpu", "--quiet"]
    assert run([*line, "--adapter", str(bare), "--output", str(tmp_path / "out")]) == MISSING
    assert "psoft-export record" in capsys.readouterr().err and not (tmp_path / "out").exists()
    plan = [*line, "--adapter", str(bare), "--output", str(tmp_path / "out"), "--dry-run"]
    assert run(plan) == MISSING and "psoft-export record" in capsys.readouterr().err
    assert psoft_export.inspect(bare).record is None
    recorded = EXAMPLES / "adapters" / BUNDLED[1]
    assert run([*line, "--adapter", str(recorded), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr() == ("", "")


def test_svd_device_is_where_training_was(tmp_path: Path) -> None:
    bare = bundled(BUNDLED[1], tmp_path / "bare", recorded=False)
    report, there = merged(bare, tmp_path / "out", svd_device="cpu")
    assert report.manifest["basis"]["device"] == "cpu"
    _, here = merged(bare, tmp_path / "default")
    assert all(torch.equal(here[name], there[name]) for name in here)
    with pytest.raises(UsageError, match="no-such-device"):
        merged(bare, tmp_path / "none", svd_device="no-such-device")


# Making and checking


def test_record_then_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = bundled(BUNDLED[2], tmp_path / "adapter", recorded=False)
    _, before = merged(adapter, tmp_path / "before")
    line = ["record", "--base", str(BASE), "--adapter", str(adapter), "--device", "cpu"]
    assert run(line) == 0
    said = capsys.readouterr().out
    assert (psoft_export.inspect(adapter).record or "").startswith("signs; full SVD, cpu")
    assert "model.layers.3.mlp.down_proj" in said and f"signs record {adapter / FILENAME}" in said
    assert run([*line, "--check", "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert len(checked["modules"]) == 28
    assert all(m["differing"] == m["turned"] == 0 for m in checked["modules"])
    report, after = merged(adapter, tmp_path / "after")
    for deviation, figures in deviations(report, after, before).values():
        assert deviation <= figures.basis_uncertainty + 2 * figures.relative_rounding


def test_check_counts_the_signs_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = bundled(BUNDLED[1], tmp_path / "adapter")
    before = files.tree(adapter)
    changed = "model.layers.2.mlp.up_proj"

    def flip(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        assert not len(tensors[f"{changed}.cluster"]), "every vector by its sign"
        tensors[f"{changed}.sign"][[3, 17, 30]] *= -1

    files.edit_record(adapter, flip)
    report = psoft_export.check_record(BASE, adapter, device="cpu")
    differing = {module.module: module.differing for module in report.modules}
    assert differing.pop(changed) == 3 and set(differing.values()) == {0}
    assert set(files.tree(adapter)) == set(before), "a check writes nothing there"
    line = ["record", "--check", "--base", str(BASE), "--adapter", str(adapter)]
    assert run([*line, "--device", "cpu"]) == 0
    assert "3 of 896 signs differ" in capsys.readouterr().out
    assert run([*line, "--overwrite"]) == UsageError.exit_code


@pytest.mark.parametrize("kind", ["signs", "full", "auto"])
def test_kinds(kind: Any, tmp_path: Path) -> None:
    adapter = bundled(BUNDLED[1], tmp_path / "adapter", recorded=False)
    report = psoft_export.record(BASE, adapter, kind=kind, device="cpu")
    assert report.kind == ("full" if kind == "full" else "signs")
    assert report.path == adapter / FILENAME and len(report.modules) == 28
    record = psoft_export.load_adapter(adapter).record
    assert record is not None and record.kind == report.kind and record.rank == 32
    if kind == "full":
        assert all(module.uncertainty == 0 for module in report.modules)
    else:
        assert report.path.stat().st_size < 50_000
        assert all(0 < (module.uncertainty or 0) < 1e-2 for module in report.modules)


def test_near_equal_values_are_held_and_uncertain_ones_recorded_whole(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = files.copy_of(llama, tmp_path / "base")
    twins = "model.layers.0.mlp.up_proj.weight"

    def make_twins(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        left, values, right = torch.linalg.svd(tensors[twins].double(), full_matrices=False)
        values[3] = values[2]
        return tensors | {twins: ((left * values) @ right).float()}

    files.edit_tensors(base / "model.safetensors", make_twins)
    adapter = models.save_adapter("llama", base, tmp_path / "adapter")
    report = psoft_export.record(base, adapter, kind="signs", device="cpu")
    by_module = {module.module: module for module in report.modules}
    assert by_module[twins.removesuffix(".weight")].held >= 2
    tensors = load_file(adapter / FILENAME)
    assert {2, 3} <= set(tensors[f"{twins.removesuffix('.weight')}.cluster"].tolist())

    out = {}
    for machine in ("here", *MACHINES):
        if machine in MACHINES:
            pretend(MACHINES[machine], monkeypatch)
        report = psoft_export.merge(base, adapter, tmp_path / machine, cache=False, device="cpu")
        out[machine] = load_file(tmp_path / machine / "model.safetensors")[twins].double()
    delta = out["here"] - load_file(base / "model.safetensors")[twins].double()
    (figures,) = (module for module in report.modules if module.tensor == twins)
    for machine in MACHINES:
        apart = float((out[machine] - out["here"]).norm() / delta.norm())
        assert figures.basis_uncertainty is not None
        assert apart <= figures.basis_uncertainty + 2 * figures.relative_rounding, machine


def test_auto_records_whole_and_signs_advises_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "ADVISED_LIMIT", 1e-9)
    adapter = bundled(BUNDLED[1], tmp_path / "adapter", recorded=False)
    (advice,) = psoft_export.record(BASE, adapter, kind="signs", device="cpu").warnings
    assert "kind 'full' leaves nothing open" in advice
    assert psoft_export.record(BASE, adapter, overwrite=True, device="cpu").kind == "full"


def test_what_a_coarse_svd_missed_is_measured_and_recorded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = bundled(BUNDLED[1], tmp_path / "adapter", recorded=False)
    pretend_training(numpy_svd, monkeypatch)
    report = psoft_export.record(BASE, adapter, device="cpu", cache=False)
    assert report.kind == "signs" and all((m.uncertainty or 0) < 5e-3 for m in report.modules)
    pretend_training(coarse_svd, monkeypatch)
    settings: dict[str, Any] = {"device": "cpu", "cache": False, "overwrite": True}
    assert psoft_export.record(BASE, adapter, **settings).kind == "full"
    _, truth = merged(adapter, tmp_path / "full")
    report = psoft_export.record(BASE, adapter, kind="signs", **settings)
    (advice,) = report.warnings
    assert "kind 'full' leaves nothing open" in advice
    figures, found = merged(adapter, tmp_path / "signs")
    for module, (apart, figure) in deviations(figures, found, truth).items():
        assert figure.basis_uncertainty == pytest.approx(apart, rel=0.05), module
        assert apart > 1e-2
    other = tmp_path / "converted"
    psoft_export.convert(BASE, adapter, other, to="full", device="cpu", cache=False)
    assert load_file(other / FILENAME)  # what the signs gave back, and no more

    def far(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = numpy_svd(weight)
        return left, values * (1 + 1e-3), right

    pretend_training(far, monkeypatch)
    with pytest.raises(UnsupportedError, match=r"module 'model.*use kind 'full'"):
        psoft_export.record(BASE, adapter, kind="signs", **settings)
    assert merged(adapter, tmp_path / "kept")[0].manifest["basis"] == figures.manifest["basis"]
    assert psoft_export.record(BASE, adapter, **settings).kind == "full"


def test_lowrank_needs_full(llama: Path, tmp_path: Path) -> None:
    adapter = models.save_adapter("llama", llama, tmp_path / "adapter", psoft_svd="lowrank")
    with pytest.raises(UnsupportedError, match="kind 'full'"):
        psoft_export.record(llama, adapter, kind="signs", device="cpu")
    plain = psoft_export.merge(llama, adapter, tmp_path / "plain", device="cpu")
    assert psoft_export.record(llama, adapter, device="cpu").kind == "full"
    report = psoft_export.merge(llama, adapter, tmp_path / "recorded", device="cpu")
    assert plain.manifest["warnings"] and not report.manifest["warnings"]
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "recorded"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(UnsupportedError, match="kind 'full'"):
        psoft_export.convert(llama, adapter, tmp_path / "signs", to="signs", device="cpu")
    (adapter / FILENAME).unlink()
    files.edit_json(adapter / "adapter_config.json", random_seed=None)
    with pytest.raises(UnsupportedError, match="record_basis"):
        psoft_export.record(llama, adapter, device="cpu")


# Converting


def test_signs_to_full_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = EXAMPLES / "adapters" / BUNDLED[0]
    line = ["convert", "--base", str(BASE), "--device", "cpu", "--quiet", "--adapter"]
    full, signs = tmp_path / "full", tmp_path / "signs"
    assert run([*line, str(adapter), "--to", "full", "--output", str(full)]) == 0
    assert run([*line, str(full), "--to", "signs", "--output", str(signs)]) == 0
    assert capsys.readouterr() == ("", "")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (full / name).read_bytes() == (signs / name).read_bytes()
        assert (full / name).read_bytes() == (adapter / name).read_bytes()
    report, wanted = merged(adapter, tmp_path / "a")
    _, by_full = merged(full, tmp_path / "b")
    # A merge runs a thread a weight, the conversion all on one: the same to float32's rounding.
    for deviation, _ in deviations(report, wanted, by_full).values():
        assert deviation < 1e-6
    _, again = merged(signs, tmp_path / "c")
    for deviation, figures in deviations(report, wanted, again).values():
        assert deviation <= figures.basis_uncertainty + 2 * figures.relative_rounding


def test_this_machine_lets_plain_peft_compute_the_recorded_model(tmp_path: Path) -> None:
    adapter = trained_elsewhere(tmp_path / "adapter")
    report, wanted = merged(adapter, tmp_path / "wanted")

    def peft_weights(folder: Path) -> dict[str, Tensor]:
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        exact = models.exact_weights(PeftModel.from_pretrained(base, folder))
        return {f"{module}.weight": weight for module, weight in exact.items()}

    wrong = deviations(report, wanted, peft_weights(adapter))
    assert min(deviation for deviation, _ in wrong.values()) > 0.1
    converted = psoft_export.convert(
        BASE, adapter, tmp_path / "local", to="this-machine", device="cpu"
    )
    (warning,) = converted.warnings
    assert "on this machine" in warning and "only" in warning
    right = deviations(report, wanted, peft_weights(tmp_path / "local"))
    for deviation, figures in right.values():
        assert deviation <= figures.basis_uncertainty + 2 * figures.relative_rounding
    _, still = merged(tmp_path / "local", tmp_path / "still")
    for deviation, figures in deviations(report, wanted, still).values():
        assert deviation <= figures.basis_uncertainty + 2 * figures.relative_rounding


def test_convert_needs_a_record_and_another_folder(tmp_path: Path) -> None:
    bare = bundled(BUNDLED[1], tmp_path / "bare", recorded=False)
    with pytest.raises(RecordMissingError, match="psoft-export record"):
        psoft_export.convert(BASE, bare, tmp_path / "out", to="full", device="cpu")
    own = bundled(BUNDLED[1], tmp_path / "own")
    with pytest.raises(OutputError, match="is the adapter itself"):
        psoft_export.convert(BASE, own, own, to="full", device="cpu", overwrite=True)
    assert not (tmp_path / "out").exists()


# Bad input


def test_another_base_is_refused_by_the_names_of_its_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = files.copy_of(BASE, tmp_path / "base")
    changed = [f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (1, 3)]

    def nudge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in changed:
            tensors[name][0, 0] += 1
        return tensors

    files.edit_tensors(base / "model.safetensors", nudge)
    adapter = str(EXAMPLES / "adapters" / BUNDLED[0])
    line = ["--base", str(base), "--adapter", adapter, "--device", "cpu", "--quiet"]
    for command in (
        ["merge", *line, "--output", str(tmp_path / "out")],
        ["record", *line, "--check"],
        ["convert", *line, "--to", "full", "--output", str(tmp_path / "out")],
    ):
        assert run(command) == MISMATCH
        said = capsys.readouterr().err
        assert all(name in said for name in changed) and said.count("\n") == 1
        assert not (tmp_path / "out").exists()


def version_two(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["version"] = "2"


def other_format(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["format"] = "something-else"


def without_a_module(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    gone = "model.layers.3.mlp.down_proj"
    for key in [key for key in tensors if key.startswith(f"{gone}.")]:
        del tensors[key]
    origins = json.loads(metadata["base"])
    del origins[gone]
    metadata["base"] = json.dumps(origins)


def without_a_tensor(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    del tensors["model.layers.0.mlp.up_proj.anchor"]


def other_scaling(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["svd"] = json.dumps(json.loads(metadata["svd"]) | {"scaling": 3.0})


def other_values(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["model.layers.0.mlp.up_proj.singular_values"] *= 1.01


def anchor_outside(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["model.layers.0.mlp.up_proj.anchor"][0] = 10**6


def sign_of_nothing(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["model.layers.0.mlp.up_proj.sign"][0] = 0


def recovered_somehow(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    mark = {"data": "text", "data_sha256": "0", "base_loss": 3.0, "start_loss": None, "loss": 1.0}
    metadata["recovered"] = json.dumps(mark | {"settled": "most", "seed": 0})


def infinite(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["model.layers.0.mlp.up_proj.singular_values"][0] = torch.inf


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (version_two, RECORD, "version '2'"),
        (other_format, RECORD, "not a basis record"),
        (without_a_module, RECORD, "lacks module 'model.layers.3.mlp.down_proj'"),
        (without_a_tensor, RECORD, "lacks tensor 'model.layers.0.mlp.up_proj.anchor'"),
        (other_scaling, RECORD, "scaling"),
        (other_values, MISMATCH, "singular values differ"),
        (anchor_outside, RECORD, "'model.layers.0.mlp.up_proj' are out of range"),
        (sign_of_nothing, RECORD, "'model.layers.0.mlp.up_proj' are out of range"),
        (infinite, RECORD, "NaN or infinity"),
        (recovered_somehow, RECORD, "its metadata is not that of a basis record"),
    ],
)
def test_a_record_that_cannot_be_used(
    change: Any, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = bundled(BUNDLED[0], tmp_path / "adapter")
    files.edit_record(adapter, change)
    before = files.tree(adapter)
    line = ["--base", str(BASE), "--adapter", str(adapter), "--device", "cpu", "--quiet"]
    assert run(["merge", *line, "--output", str(tmp_path / "out")]) == code
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1 and str(adapter / FILENAME) in message
    assert not (tmp_path / "out").exists() and files.tree(adapter) == before


def test_a_truncated_record_and_one_of_another_rank(tmp_path: Path) -> None:
    cut = bundled(BUNDLED[0], tmp_path / "cut")
    files.truncate(cut / FILENAME)
    with pytest.raises(RecordError, match=FILENAME):
        merged(cut, tmp_path / "out")
    other = bundled(BUNDLED[0], tmp_path / "other")
    stranger = EXAMPLES / "adapters" / BUNDLED[1] / FILENAME
    (other / FILENAME).write_bytes(stranger.read_bytes())
    with pytest.raises(RecordError, match="rank 32, the adapter has 64"):
        merged(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_record_replaces_nothing_unasked(tmp_path: Path) -> None:
    adapter = bundled(BUNDLED[1], tmp_path / "adapter")
    before = files.tree(adapter)
    with pytest.raises(OutputError, match="--overwrite"):
        psoft_export.record(BASE, adapter, device="cpu")
    with pytest.raises(UsageError, match="download it first"):
        psoft_export.record(BASE, "someone/adapter", device="cpu")
    with pytest.raises(UsageError, match="kind"):
        psoft_export.record(BASE, adapter, kind="half", overwrite=True)  # type: ignore[arg-type]
    assert files.tree(adapter) == before


def test_a_record_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = bundled(BUNDLED[1], tmp_path / "adapter")
    before = files.tree(adapter)
    for error in (OSError(28, "No space left on device"), OSError(30, "Read-only file system")):

        def fail(*_: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr(ShardWriter, "append", fail)
        line = ["record", "--base", str(BASE), "--adapter", str(adapter), "--overwrite"]
        code = run([*line, "--device", "cpu", "--no-cache", "--quiet"])
        said = capsys.readouterr().err
        assert code in (OUTPUT, OUTPUT + 1) and said.count("\n") == 1
        assert error.strerror in said or "full" in said
        assert files.tree(adapter) == before


def test_an_adapter_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = bundled(BUNDLED[1], tmp_path / "adapter", recorded=False)
    before = files.tree(adapter)
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        if path.parent == adapter and set(mode) & set("wxa"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, *more, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OutputError, match=r"Permission denied"):
        psoft_export.record(BASE, adapter, device="cpu")
    monkeypatch.undo()
    assert files.tree(adapter) == before


@pytest.mark.parametrize("problem", ["a file is in the way", "full"])
def test_a_cache_that_cannot_be_written_costs_only_time(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = EXAMPLES / "adapters" / BUNDLED[1]
    folder = tmp_path / "file" / "cache"
    _, wanted = merged(adapter, tmp_path / "wanted")
    if problem == "full":
        append = ShardWriter.append

        def fail(self: ShardWriter, data: Tensor) -> None:
            if folder in self.path.parents:
                raise OSError(28, "No space left on device")
            append(self, data)

        monkeypatch.setattr(ShardWriter, "append", fail)
    else:
        (tmp_path / "file").write_text("")
    report, got = merged(adapter, tmp_path / "out", cache=True, cache_dir=folder)
    (warning,) = report.manifest["warnings"]
    assert "basis cache" in warning and "--cache-dir" in warning
    assert str(folder) not in warning, "psoft_export.json holds no path of this machine"
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
