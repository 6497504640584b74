"""One graph for many tasks: each task is its own merged model, and more can be added."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import psoft_export
from psoft_export import errors
from psoft_export.adapters.basis_record import Recovery
from psoft_export.algebra.parameters import RotationParameters
from psoft_export.basis.svd import Basis, BasisOptions
from psoft_export.changes.shared_subspace import Subspace
from psoft_export.changes.subspace import SubspaceRotation
from psoft_export.cli.main import run
from psoft_export.onnx import adapter_file
from psoft_export.onnx.folder import read_folder
from tests import files, machines, models
from tests.conftest import BUNDLED, EXAMPLES

BASE = EXAMPLES / "base"
TASKS = {name.split("-")[0]: EXAMPLES / "adapters" / name for name in BUNDLED}
IDS = torch.tensor([list(b"The answer to"), list(b"12 + 30 = 42;")])


@pytest.fixture(scope="module")
def llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of the small Llama."""
    return models.save_first_layer("llama", llama, tmp_path_factory.mktemp("one-layer"))


@pytest.fixture(scope="module")
def merged_logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Tensor]:
    """Logits of the base and of each task's own merged checkpoint, by transformers."""
    found: dict[str | None, Tensor] = {None: _logits(BASE)}
    for task, adapter in TASKS.items():
        folder = tmp_path_factory.mktemp("merged") / task
        psoft_export.merge(BASE, adapter, folder, dtype="fp32", cache=False)
        found[task] = _logits(folder)
    return found


@pytest.fixture(scope="module")
def mixed(made_once: Callable[..., Path]) -> Path:
    """The three bundled adapters in a graph in which each row has its own task."""

    def make(folder: Path) -> None:
        psoft_export.onnx.export(folder / "onnx", base=BASE, adapters=TASKS, mixed_batch=True)

    return made_once("mixed", make) / "onnx"


def test_each_task_is_its_own_merged_model(
    many_tasks: Path, merged_logits: dict[str | None, Tensor]
) -> None:
    model = psoft_export.onnx.load(many_tasks, device="cpu")
    assert model.tasks == tuple(TASKS)
    for task, expected in merged_logits.items():
        found = model(input_ids=IDS, task=task).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    differences = [(merged_logits[None] - merged_logits[task]).abs().max() for task in TASKS]
    assert min(differences) > 1


def test_onnxruntime_alone_switches_tasks(
    many_tasks: Path, merged_logits: dict[str | None, Tensor]
) -> None:
    session = onnxruntime.InferenceSession(
        many_tasks / "model.onnx", providers=["CPUExecutionProvider"]
    )
    inputs = psoft_export.onnx.load(many_tasks, device="cpu").graph_inputs(input_ids=IDS)
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    for task, expected in merged_logits.items():
        options = onnxruntime.RunOptions()
        if task is not None:
            adapter = onnxruntime.LoraAdapter()
            adapter.Load(str(many_tasks / f"{task}.onnx_adapter"))
            options.add_active_adapter(adapter)
        (logits,) = session.run(["logits"], feed, options)
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4, rtol=1e-4)


def test_a_task_is_r_squared_numbers_a_layer(many_tasks: Path) -> None:
    manifest = read_folder(many_tasks).manifest
    ranks = [subspace["rank"] for subspace in manifest["subspaces"].values()]
    assert len(ranks) == 28 and set(ranks) == {64}
    for task in TASKS:
        size = (many_tasks / f"{task}.onnx_adapter").stat().st_size
        assert size < 4 * sum(rank**2 for rank in ranks) + 8000
    rotations = adapter_file.read(many_tasks / "arithmetic.onnx_adapter")
    for name, rotation in rotations.items():
        assert name.endswith(".rotation")
        # Strict and of rank 32, padded: (R − I)ᵀ is zero outside, and R is orthogonal within.
        assert rotation[32:].abs().max() < 1e-4 and rotation[:, 32:].abs().max() < 1e-4
    values = onnx_ir.load(many_tasks / "model.onnx").graph.initializers
    assert not any(np.any(values[name].const_value.numpy()) for name in rotations)


def test_generates_and_switches_back(many_tasks: Path) -> None:
    model = psoft_export.onnx.load(many_tasks, device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 258}
    base = model.generate(IDS, **options)
    tasks = {task: model.generate(IDS, task=task, **options) for task in TASKS}
    with model.using("records"):
        assert torch.equal(model.generate(IDS, **options), tasks["records"])
    assert torch.equal(model.generate(IDS, **options), base)
    assert not torch.equal(tasks["records"], base)


def test_each_row_has_its_own_task(
    mixed: Path, many_tasks: Path, merged_logits: dict[str | None, Tensor]
) -> None:
    model = psoft_export.onnx.load(mixed, device="cpu")
    chosen = ["records", None, "arithmetic", "prose"]
    ids = IDS[:1].repeat(4, 1)
    found = model(input_ids=ids, tasks=chosen).logits
    for row, task in enumerate(chosen):
        torch.testing.assert_close(found[row], merged_logits[task][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        model(input_ids=IDS, task="prose").logits, merged_logits["prose"], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        model(input_ids=IDS).logits, merged_logits[None], atol=1e-4, rtol=1e-4
    )
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 258}
    rows = model.generate(ids, tasks=chosen, **options)
    beams = model.generate(ids, tasks=chosen, num_beams=2, **options)
    switched = psoft_export.onnx.load(many_tasks, device="cpu")
    for row, task in enumerate(chosen):
        alone = switched.generate(ids[:1], task=task, **options)
        assert torch.equal(rows[row], alone[0])
        alone = switched.generate(ids[:1], task=task, num_beams=2, **options)
        assert torch.equal(beams[row], alone[0])
    for count in (1, 2, 3):
        words = f"{count} are given for a batch of 4 rows"
        with pytest.raises(errors.UsageError, match=words):
            model(input_ids=ids, tasks=chosen[:count])
        with pytest.raises(errors.UsageError, match=words):
            model.generate(ids, tasks=chosen[:count], **options)
    with pytest.raises(errors.UnsupportedError, match="whose tasks are within"):
        psoft_export.onnx.add_task(mixed, TASKS["prose"], "more")


def test_verify_finds_the_task_of_an_adapter(many_tasks: Path, llama_adapter: Path) -> None:
    report = psoft_export.verify(BASE, TASKS["arithmetic"], many_tasks, cache=False)
    assert report.equivalent and report.outputs is not None
    assert report.outputs.generation is not None and report.outputs.generation.merged == 1
    path = TASKS["prose"]
    with pytest.raises(errors.MismatchError, match=r"none of its tasks \(prose, arithmetic"):
        read_folder(many_tasks).task_of({"adapter_model.safetensors": path.name})


def test_added_task_equals_the_exported_one(
    many_tasks: Path, tmp_path: Path, merged_logits: dict[str | None, Tensor]
) -> None:
    folder = _without(many_tasks, "records", tmp_path)
    before = files.tree(folder)
    added = psoft_export.onnx.add_task(folder, TASKS["records"], "law")
    assert added.file == folder / "law.onnx_adapter" and added.modules == 28
    after = files.tree(folder)
    assert after.keys() - before.keys() == {"law.onnx_adapter"}
    assert {n for n in before if before[n] != after[n]} == {"psoft_export.json"}
    model = psoft_export.onnx.load(folder, device="cpu")
    assert model.tasks == ("prose", "arithmetic", "law")
    found = model(input_ids=IDS, task="law").logits
    torch.testing.assert_close(found, merged_logits["records"], atol=1e-4, rtol=1e-4)
    exported = adapter_file.read(many_tasks / "records.onnx_adapter")
    for name, rotation in adapter_file.read(added.file).items():
        torch.testing.assert_close(rotation, exported[name], atol=2e-4, rtol=1e-3)
    with pytest.raises(errors.UsageError, match="--overwrite"):
        psoft_export.onnx.add_task(folder, TASKS["prose"], "law")
    prose = shutil.copytree(TASKS["prose"], tmp_path / "prose")
    mark = Recovery("text", "0", base_loss=3.0, start_loss=None, loss=1.0, settled=0.9, seed=0)
    marked = {"recovered": json.dumps(asdict(mark))}
    files.edit_record(prose, lambda _, metadata: metadata.update(marked))
    psoft_export.onnx.add_task(folder, prose, "law", overwrite=True)
    assert mark.words in read_folder(folder).manifest["tasks"]["law"]["basis"]
    model = psoft_export.onnx.load(folder, device="cpu")
    found = model(input_ids=IDS, task="law").logits
    torch.testing.assert_close(found, merged_logits["prose"], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_signs_of_other_machines_are_reconciled(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three adapters recorded with three SVDs, two ranks, two scalings and initialisations."""
    adapters, merged = {}, {}
    options: dict[str, dict[str, Any]] = {
        "here": {},
        "numpy": {"r": 6, "psoft_alpha": 3},
        "random signs": {"ab_svd_init": "pissa_init", "psoft_mag_a": False},
    }
    for seed, (name, more) in enumerate(options.items()):
        folder = models.save_adapter("llama", llama, tmp_path / name, seed=seed, **more)
        with monkeypatch.context() as patch:
            if name != "here":
                machines.pretend(machines.MACHINES[name], patch)
            kind: Any = "full" if name == "numpy" else "signs"
            psoft_export.record(llama, folder, kind=kind, cache=False)
        adapters[name.replace(" ", "-")] = folder
        psoft_export.merge(llama, folder, tmp_path / f"{name} merged", cache=False)
        merged[name.replace(" ", "-")] = _logits(tmp_path / f"{name} merged")
    last = list(adapters)[-1]
    first = {name: folder for name, folder in adapters.items() if name != last}
    graph = tmp_path / "onnx"
    psoft_export.onnx.export(graph, base=llama, adapters=first, cache=False)
    psoft_export.onnx.add_task(graph, adapters[last], last)
    model = psoft_export.onnx.load(graph, device="cpu")
    for name, expected in merged.items():
        found = model(input_ids=IDS % 100, task=name).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert read_folder(graph).outside[name] < 1e-5


def test_core_says_what_lies_outside() -> None:
    """A basis whose last vector leans out of the subspace, as another SVD's may, or by far."""
    generator = torch.Generator().manual_seed(4)
    left, values, right = torch.linalg.svd(torch.randn(20, 16, generator=generator).double())
    scaled = left[:, :16] * values
    options = BasisOptions(4, 1.0)
    subspace = Subspace.of(Basis(right[:4], scaled[:, :4]), options)
    turn = (torch.eye(4) + 0.3 * torch.randn(4, 4, generator=generator)).double()
    weight = turn - torch.eye(4)
    parameters = RotationParameters(4, turn, orthogonal=False)
    same = SubspaceRotation(parameters, Basis(right[:4], scaled[:, :4]), options)
    core, outside = subspace.core(same, "same")
    torch.testing.assert_close(core, weight.double(), atol=1e-12, rtol=1e-12)
    assert outside < 1e-12
    for lean in (1e-3, 0.5):
        a = right[:4].clone()
        a[3] += lean * right[4]
        change = SubspaceRotation(parameters, Basis(a, scaled[:, :4]), options)
        if lean == 0.5:
            with pytest.raises(errors.MismatchError, match=r"leaning: .*% of its ΔW lies outside"):
                subspace.core(change, "leaning")
            continue
        core, outside = subspace.core(change, "leaning")
        delta = scaled[:, :4] @ weight.double() @ a
        rest = delta - subspace.left @ core @ subspace.right
        assert outside == pytest.approx(float(rest.norm() / delta.norm()), rel=1e-6)
        assert 1e-4 < outside < 1e-3


@pytest.mark.slow
def test_int8_keeps_rotations_in_float(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    second = models.save_adapter("llama", llama, tmp_path / "second", seed=5)
    graph = tmp_path / "onnx"
    report = psoft_export.onnx.export(
        graph, base=llama, adapters={"one": llama_adapter, "two": second}, quantize="int8"
    )
    assert report.manifest["quantization"] == "int8, dynamic"
    assert report.quantized.keys() == {"", "one", "two"}
    program = onnx_ir.load(graph / "model.onnx")
    beside = [n for n in program.graph if any("subspace" in (v.name or "") for v in n.inputs if v)]
    assert {node.op_type for node in beside} == {"MatMul"} and len(beside) == 14
    assert any(node.op_type == "MatMulInteger" for node in program.graph)
    rotations = [name for name in program.graph.initializers if name.endswith(".rotation")]
    inputs = {value.name for value in program.graph.inputs}
    assert len(rotations) == 7 and inputs.issuperset(rotations)
    model = psoft_export.onnx.load(graph, device="cpu")
    one, two = (model(input_ids=IDS % 100, task=task).logits for task in ("one", "two"))
    assert (one - two).abs().max() > 0.1


def test_a_task_that_the_check_finds_wrong(
    llama: Path, llama_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = adapter_file.write

    def transposed(path: Path, rotations: dict[str, Tensor]) -> None:
        write(path, {name: tensor.T for name, tensor in rotations.items()})

    monkeypatch.setattr(adapter_file, "write", transposed)
    with pytest.raises(errors.NotEquivalentError, match="task 'one': outputs: the ONNX graph of"):
        psoft_export.onnx.export(tmp_path / "onnx", base=llama, adapters={"one": llama_adapter})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_task_unknown(many_tasks: Path) -> None:
    model = psoft_export.onnx.load(many_tasks, device="cpu")
    with pytest.raises(errors.UsageError, match=r"task 'law': is not one .*\(prose, arithmetic"):
        model(input_ids=IDS, task="law")
    with pytest.raises(errors.UsageError, match="--mixed-batch"):
        model(input_ids=IDS, tasks=["prose", None])
    with pytest.raises(errors.UsageError, match="one task for the batch, or"):
        model(input_ids=IDS, task="prose", tasks=["prose"])
    with pytest.raises(errors.UsageError, match="'input_ids'"):
        model(attention_mask=torch.ones(1, 3))


def test_adapter_file_that_does_not_fit(many_tasks: Path, tmp_path: Path) -> None:
    folder = files.copy_of(many_tasks, tmp_path / "onnx")
    path = folder / "prose.onnx_adapter"
    rotations = adapter_file.read(path)
    name = next(iter(rotations))
    adapter_file.write(path, rotations | {name: torch.zeros(3, 3)})
    with pytest.raises(errors.MismatchError, match=r"does not fit the graph .* is \[3, 3\]"):
        psoft_export.onnx.load(folder)(input_ids=IDS, task="prose")
    adapter_file.write(path, {name: rotations[name]})
    with pytest.raises(errors.MismatchError, match="missing"):
        psoft_export.onnx.load(folder)(input_ids=IDS, task="prose")
    path.write_bytes(b"not an adapter")
    with pytest.raises(errors.CheckpointError, match=r"prose\.onnx_adapter: not an .onnx_adapter"):
        psoft_export.onnx.load(folder)(input_ids=IDS, task="prose")
    path.unlink()
    with pytest.raises(errors.CheckpointError, match="no such file"):
        psoft_export.onnx.load(folder)(input_ids=IDS, task="prose")


def test_tasks_that_cannot_share_a_graph(
    base_folder: Callable[..., Path], llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    deberta = base_folder("deberta")
    head = models.save_adapter("deberta", deberta, tmp_path / "head")
    t5 = models.save_adapter("t5", base_folder("t5"), tmp_path / "t5")
    cases: list[tuple[Path, dict[str, Path], type[Exception], str]] = [
        (deberta, {"one": head}, errors.UnsupportedError, "brings whole tensors"),
        (base_folder("t5"), {"one": t5}, errors.UnsupportedError, "an encoder-decoder has three"),
        (llama, {"../one": llama_adapter}, errors.UsageError, "names a file"),
        (llama, {}, errors.UsageError, "at least one task"),
    ]
    for base, adapters, kind, words in cases:
        with pytest.raises(kind, match=words):
            psoft_export.onnx.export(tmp_path / "onnx", base=base, adapters=adapters, cache=False)
        assert not (tmp_path / "onnx").exists()


def test_another_bases_record(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    other = files.copy_of(llama, tmp_path / "other")
    files.edit_tensors(other / "model.safetensors", lambda t: {n: v.flip(0) for n, v in t.items()})
    psoft_export.record(other, llama_adapter, kind="full", cache=False)
    with pytest.raises(errors.MismatchError):
        psoft_export.onnx.export(tmp_path / "onnx", base=llama, adapters={"one": llama_adapter})


ADDING: dict[str, tuple[Callable[[Path, Path], None], type[Exception], str]] = {
    "no record": (
        lambda _, adapter: (adapter / "psoft_basis.safetensors").unlink(),
        errors.RecordMissingError,
        "has no basis record",
    ),
    "another base": (
        lambda graph, _: _edit_subspaces(graph, sha256={"BF16": "0" * 64}),
        errors.MismatchError,
        "recorded with another base than the graph's",
    ),
    "another shape": (
        lambda graph, _: _edit_subspaces(graph, shape=[3, 3]),
        errors.MismatchError,
        r"is of a weight \[256, 768\], the graph's is \[3, 3\]",
    ),
    "another graph": (
        lambda graph, _: files.edit_json(
            graph / "psoft_export.json", subspaces={"model.x": {"rank": 3}}
        ),
        errors.CheckpointError,
        "not the graph that psoft_export.json beside it speaks of",
    ),
    "fewer targets": (
        lambda graph, _: _edit_subspaces(graph, only="down_proj"),
        errors.MismatchError,
        "the graph has no subspace for it",
    ),
    "one model": (
        lambda graph, _: files.edit_json(graph / "psoft_export.json", subspaces=None),
        errors.UnsupportedError,
        "one merged model, with nothing to switch",
    ),
    "no graph": (
        lambda graph, _: (graph / "model.onnx").unlink(),
        errors.CheckpointError,
        "export again",
    ),
}


@pytest.mark.parametrize("case", ADDING)
def test_adding_what_does_not_fit(case: str, many_tasks: Path, tmp_path: Path) -> None:
    graph = files.copy_of(many_tasks, tmp_path / "onnx")
    adapter = files.copy_of(TASKS["prose"], tmp_path / "adapter")
    change, kind, words = ADDING[case]
    change(graph, adapter)
    before = files.tree(graph)
    with pytest.raises(kind, match=words):
        psoft_export.onnx.add_task(graph, adapter, "law")
    assert files.tree(graph) == before


def test_adding_a_higher_rank(many_tasks: Path, tmp_path: Path) -> None:
    high = models.save_adapter("llama", BASE, tmp_path / "high", r=80, target_modules=["q_proj"])
    psoft_export.record(BASE, high)
    with pytest.raises(errors.MismatchError, match="has rank 80, the graph's subspace 64"):
        psoft_export.onnx.add_task(many_tasks, high, "two")


def test_adding_another_kind(many_tasks: Path, tmp_path: Path) -> None:
    saved = models.save_adapter("minilm", _minilm(tmp_path), tmp_path / "adapter")
    with pytest.raises(errors.UnsupportedError, match="is not an adapter that rotates"):
        psoft_export.onnx.add_task(many_tasks, saved, "law")


def test_command_line(many_tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _without(many_tasks, "records", tmp_path)
    adapter = str(TASKS["records"])
    assert run(["onnx-adapter", "--graph", str(folder), "--adapter", adapter, "--name", "law"]) == 0
    assert "law.onnx_adapter" in capsys.readouterr().out.replace("\n", "")
    verify = ["verify", "--base", str(BASE), "--adapter", adapter, "--merged", str(folder)]
    assert run([*verify, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equivalent"] is True and found["weights"] is None
    target = ["onnx", "--base", str(BASE), "--output", str(tmp_path / "out")]
    wrong = {
        f"--adapter {adapter}: several adapters are tasks": ["--adapter", adapter] * 2,
        "is not NAME=ADAPTER": ["--adapter", f"a={adapter}", "--adapter", adapter],
        "task 'a' is named twice": ["--adapter", f"a={adapter}"] * 2,
    }
    for words, more in wrong.items():
        assert run([*target, *more]) == 2
        assert words in capsys.readouterr().err.replace("\n", "")
    again = ["--graph", str(folder), "--adapter", adapter, "--name", "a/b"]
    assert run(["onnx-adapter", *again]) == 2


def _logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(IDS % model.config.vocab_size).logits
    return logits


def _without(folder: Path, task: str, parent: Path) -> Path:
    """A copy of a graph's folder that never had a task."""
    copy = Path(shutil.copytree(folder, parent / "onnx"))
    (copy / f"{task}.onnx_adapter").unlink()
    manifest = json.loads((copy / "psoft_export.json").read_text())
    del manifest["tasks"][task], manifest["files"][f"{task}.onnx_adapter"]
    (copy / "psoft_export.json").write_text(json.dumps(manifest))
    return copy


def _edit_subspaces(folder: Path, only: str = "", **fields: Any) -> None:
    path = folder / "psoft_export.json"
    subspaces = json.loads(path.read_text())["subspaces"]
    kept = {name: {**found, **fields} for name, found in subspaces.items() if only in name}
    files.edit_json(path, subspaces=kept)


def _minilm(folder: Path) -> Path:
    models.save_base("minilm", folder / "base")
    return folder / "base"
