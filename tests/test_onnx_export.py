"""ONNX exports of one model: they compute what the merged model does, or do not appear."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DebertaV2ForMaskedLM,
    DebertaV2ForTokenClassification,
)
from transformers.exporters import ExportedModel

import psoft_export
from psoft_export import errors
from psoft_export.onnx import subjects, tasks, tracing
from psoft_export.verification import outputs
from tests import files, models
from tests.conftest import BUNDLED, EXAMPLES

BASE, PROSE = EXAMPLES / "base", EXAMPLES / "adapters" / BUNDLED[0]
TEXT = EXAMPLES.parent.parent / "README.md"
IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 119]])
SHOWN = {
    "qwen3": "text-generation",
    "minilm": "text-classification",
    "deberta": "text-classification",
    "vit": "image-classification",
    "t5": "text2text-generation",
}


def session(folder: Path, name: str = "model") -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of the small Llama."""
    return models.save_first_layer("llama", llama, tmp_path_factory.mktemp("one-layer"))


@pytest.fixture(scope="module")
def prose(made_once: Callable[..., Path]) -> Path:
    """The bundled prose adapter, exported with its merged checkpoint kept beside."""

    def make(folder: Path) -> None:
        psoft_export.onnx.export(
            folder / "onnx", base=BASE, adapter=PROSE, keep_merged=folder / "merged", cache=False
        )

    return made_once("prose", make)


@pytest.mark.parametrize("family", SHOWN)
@pytest.mark.slow
def test_families(family: str, base_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = models.save_first_layer(family, base_folder(family), tmp_path / "base")
    adapter = models.save_adapter(family, base, tmp_path / "adapter")
    output = tmp_path / "onnx"
    report = psoft_export.onnx.export(output, base=base, adapter=adapter, cache=False)
    assert report.task == SHOWN[family]
    level = report.verification[""]
    assert level.skipped is None and level.equivalent
    assert level.merged is not None and level.merged.rms < 1e-4
    assert (level.generation is not None) == (family in ("qwen3", "t5"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "onnx"]

    # PEFT's own model, which this program has no part in, says what is right.
    inputs = models.FAMILIES[family].inputs()
    with torch.no_grad():
        expected = models.load_with_peft(family, base, adapter)(**inputs).logits
    loaded = psoft_export.onnx.load(output)
    torch.testing.assert_close(loaded(**inputs).logits, expected, atol=2e-4, rtol=2e-4)
    if family == "t5":  # of three graphs
        return
    exported = ExportedModel.from_pretrained(output, device="cpu")
    names = {value.name: value for value in session(output).get_inputs()}
    filled = loaded.graph_inputs(**inputs)
    assert filled.keys() == names.keys()
    (logits, *_) = session(output).run(None, {n: t.numpy() for n, t in filled.items()})
    np.testing.assert_allclose(logits, expected.numpy(), atol=2e-4, rtol=2e-4)
    if family != "qwen3":  # whose cache is an object
        torch.testing.assert_close(exported(**filled).logits, expected, atol=2e-4, rtol=2e-4)


def test_graph_has_the_ecosystems_names_and_free_extents(prose: Path) -> None:
    graph = session(prose / "onnx")
    inputs = {value.name: value.shape for value in graph.get_inputs()}
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["position_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    cache = ["batch_size", 4, "past_sequence_length", 32]
    assert inputs["past_key_values.layers.3.values"] == cache
    outputs = {value.name: value.shape for value in graph.get_outputs()}
    assert outputs["logits"] == ["batch_size", "sequence_length", 259]
    assert outputs["present.layers.0.keys"][2] == "past_sequence_length + sequence_length"


def test_folder_is_complete_and_tells_nothing_of_this_machine(prose: Path) -> None:
    folder = prose / "onnx"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "export.json",
        "generation_config.json",
        "model.onnx",
        "model.onnx.data",
        "psoft_export.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    manifest = json.loads((folder / "psoft_export.json").read_text())
    assert manifest["files"].keys() == {"model.onnx", "model.onnx.data"}
    assert manifest["verification"][""]["equivalent"] is True
    assert manifest["adapter"]["name"] == BUNDLED[0] and manifest["dtype"] == "F32"
    for path in folder.iterdir():
        data = path.read_bytes()
        assert str(Path.home()).encode() not in data
        assert str(Path(__file__).parent.parent).encode() not in data


def test_generates_what_the_merged_model_does(prose: Path) -> None:
    model = psoft_export.onnx.load(prose / "onnx", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(prose / "merged", dtype=torch.float32)
    ways: list[dict[str, Any]] = [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 8},
    ]
    ids = IDS.repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for way in ways:
        options = {"max_new_tokens": 12, "pad_token_id": 258, **way}
        torch.manual_seed(1)
        expected = merged.generate(ids, attention_mask=mask, **options)
        torch.manual_seed(1)
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
    with torch.no_grad():
        expected = merged(ids, attention_mask=mask).logits
    found = model(input_ids=ids.int(), attention_mask=mask.bool()).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


def test_transformers_runs_the_folder(prose: Path) -> None:
    exported = ExportedModel.from_pretrained(prose / "onnx", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(prose / "merged", dtype=torch.float32)
    with torch.no_grad():
        first = merged(IDS[:, :4], use_cache=True)
        cache = copy.deepcopy(first.past_key_values)
        expected = merged(IDS[:, 4:], past_key_values=first.past_key_values)
    positions = torch.arange(4, 7)[None]
    mask = torch.ones_like(IDS)
    found = exported(
        input_ids=IDS[:, 4:], attention_mask=mask, position_ids=positions, past_key_values=cache
    )
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert found.past_key_values.get_seq_length() == 7


def test_verify_takes_the_folder(prose: Path, tmp_path: Path) -> None:
    report = psoft_export.verify(BASE, PROSE, prose / "onnx", cache=False)
    assert report.equivalent and report.weights is None
    assert report.outputs is not None and report.outputs.merged is not None

    other = psoft_export.verify(BASE, EXAMPLES / "adapters" / BUNDLED[1], prose / "onnx")
    assert not other.equivalent
    assert "made from another adapter" in other.problems[0]
    assert any("from the F64 truth" in problem for problem in other.problems)

    with pytest.raises(errors.UsageError, match="--level outputs"):
        psoft_export.verify(BASE, PROSE, prose / "onnx", level="weights")


def test_verify_finds_a_changed_weight(prose: Path, tmp_path: Path) -> None:
    folder = files.copy_of(prose / "onnx", tmp_path / "onnx")
    program = onnx_ir.load(folder / "model.onnx")
    onnx_ir.external_data.load_to_model(program)
    values = program.graph.initializers.values()
    largest = max(values, key=lambda value: value.const_value.size)
    changed = largest.const_value.numpy() * np.float32(1.001)
    largest.const_value = onnx_ir.tensor(changed, name=largest.name)
    onnx_ir.save(program, folder / "model.onnx", external_data="model.onnx.data")
    report = psoft_export.verify(BASE, PROSE, folder)
    assert not report.equivalent
    assert any("has been changed since it was exported" in text for text in report.problems)
    assert any("from the F64 truth" in text for text in report.problems)


@pytest.mark.parametrize("fault", ["mask", "length"])
@pytest.mark.slow
def test_a_graph_that_tracing_narrowed_is_refused(
    fault: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tracing with an unfit sample leaves out without a word, the check finds."""
    sample = tasks.TASKS["text-generation"].samples

    def narrowed(model: Any) -> dict[str, tasks.Sample]:
        found = sample(model)["model"]
        arguments = dict(found.arguments)
        if fault == "mask":
            arguments["attention_mask"] = None
        else:
            arguments["input_ids"] = arguments["input_ids"][:, :1]
            arguments["position_ids"] = arguments["position_ids"][:, :1]
            arguments["attention_mask"] = arguments["attention_mask"][:, :6]
        return {"model": tasks.Sample(arguments, {})}

    task = tasks.TASKS["text-generation"]
    monkeypatch.setitem(tasks.TASKS, task.name, tasks.Task(task.name, task.classes, narrowed))
    with pytest.raises(errors.NotEquivalentError, match="nothing was written") as caught:
        psoft_export.onnx.export(tmp_path / "onnx", model=llama)
    assert caught.value.exit_code == 14
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_half_precision(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    for dtype, code in (("fp16", "F16"), ("bf16", "BF16")):
        output = tmp_path / dtype
        fuse = "cuda" if dtype == "fp16" else None
        what: dict[str, Any] = {"adapter": llama_adapter}
        if dtype == "bf16":
            what = {"adapters": {"one": llama_adapter}}
        report = psoft_export.onnx.export(output, base=llama, **what, dtype=dtype, fuse=fuse)
        level = list(report.verification.values())[-1]
        assert level.equivalent and level.dtype == code and level.truth == "F32"
        assert level.merged is not None and level.merged.rms > 0
        assert ("in float32" in level.inputs) == (dtype == "bf16")
        weights = (output / "model.onnx.data").stat().st_size
        assert weights < 3 * sum(p.numel() for p in _model(llama).parameters())
    domains = {node.domain for node in onnx_ir.load(tmp_path / "fp16" / "model.onnx").graph}
    assert "com.microsoft" in domains


@pytest.mark.slow
def test_int8_with_text(prose: Path, tmp_path: Path) -> None:
    merged = prose / "merged"
    report = psoft_export.onnx.export(
        tmp_path / "static",
        model=merged,
        quantize="int8",
        calibration=TEXT,
        text=TEXT,
        max_loss_increase=0.1,
        opset=21,
    )
    level = report.quantized[""]
    assert level.equivalent and level.losses is not None
    assert 0 < abs(level.losses["merged"] - level.losses["truth"]) < 0.1
    assert report.manifest["quantization"] == "int8, static" and report.manifest["opset"] == 21
    assert report.manifest["adapter"]["name"] == BUNDLED[0]  # the merged folder says so
    assert report.files["model.onnx.data"] < 0.4 * (prose / "onnx/model.onnx.data").stat().st_size


@pytest.mark.slow
def test_int8_that_costs_more_than_allowed_is_not_written(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    layers = model.model.layers
    with torch.no_grad():  # the same function, but one value in 256 takes most of an int8
        for layer in layers:
            layer.post_attention_layernorm.weight[0] *= 150
            layer.mlp.gate_proj.weight[:, 0] /= 150
            layer.mlp.up_proj.weight[:, 0] /= 150
    model.save_pretrained(tmp_path / "outlier")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "outlier")
    with pytest.raises(errors.NotEquivalentError, match=r"loss grows by .* 0\.01 are allowed"):
        psoft_export.onnx.export(
            tmp_path / "dynamic",
            model=tmp_path / "outlier",
            quantize="int8",
            text=TEXT,
            max_loss_increase=0.01,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["outlier"]


def test_what_cannot_be_traced_says_which_class(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("data-dependent\nmore")

    monkeypatch.setattr(tracing.OnnxExporter, "export", fail)
    with pytest.raises(errors.UnsupportedError, match=r"LlamaForCausalLM: .*\(data-dependent\)$"):
        psoft_export.onnx.export(tmp_path / "onnx", model=llama)
    assert list(tmp_path.iterdir()) == []


BAD: dict[str, tuple[dict[str, Any], type[errors.PsoftExportError], str]] = {
    "nothing": ({}, errors.UsageError, "pass --model, or --base and --adapter"),
    "both": ({"model": BASE, "base": BASE}, errors.UsageError, "as it stands"),
    "no adapter": ({"base": BASE}, errors.UsageError, "nothing to export"),
    "task": ({"model": BASE, "task": "chess"}, errors.UsageError, "text-generation, text2text"),
    "class": (
        {"model": BASE, "task": "image-classification"},
        errors.UnsupportedError,
        "no such class for model type 'llama'; it has text-generation",
    ),
    "head": (
        {"model": BASE, "task": "text-classification"},
        errors.UnsupportedError,
        "has no weight 'score.weight'",
    ),
    "dtype": ({"model": BASE, "dtype": "int4"}, errors.UsageError, "int4"),
    "opset": ({"model": BASE, "opset": 17}, errors.UsageError, "opset 17: must be from 18"),
    "new opset": ({"model": BASE, "opset": 99}, errors.UsageError, "opset 99"),
    "fuse": ({"model": BASE, "fuse": "tpu"}, errors.UsageError, "fuse 'tpu'"),
    "fused static": (
        {"model": BASE, "fuse": "cpu", "quantize": "int8", "calibration": TEXT},
        errors.UsageError,
        "does not take fused operators",
    ),
    "int4": ({"model": BASE, "quantize": "int4"}, errors.UsageError, "is not int8"),
    "int8 in half": (
        {"model": BASE, "quantize": "int8", "dtype": "fp16"},
        errors.UsageError,
        "int8 stands beside fp32",
    ),
    "calibration": ({"model": BASE, "calibration": TEXT}, errors.UsageError, "--quantize"),
    "no text": (
        {"model": BASE, "quantize": "int8", "max_loss_increase": 0.1},
        errors.UsageError,
        "pass --text",
    ),
    "text": ({"model": BASE, "text": "nowhere"}, errors.UsageError, "nowhere"),
    "keep": ({"model": BASE, "keep_merged": "kept"}, errors.UsageError, "only with --adapter"),
    "mixed": ({"base": BASE, "adapter": PROSE, "mixed_batch": True}, errors.UsageError, "named"),
    "no folder": ({"model": "/nowhere"}, errors.UsageError, "no such folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str, tmp_path: Path) -> None:
    arguments, kind, words = BAD[case]
    with pytest.raises(kind, match=words) as caught:
        psoft_export.onnx.export(tmp_path / "onnx", **arguments)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", ["onnx", "onnx/merged", "."])
def test_kept_folder_is_another(kept: str, tmp_path: Path) -> None:
    output = tmp_path / "in" / "onnx"
    output.mkdir(parents=True)
    with pytest.raises(errors.OutputError, match="the folder of the merged checkpoint"):
        psoft_export.onnx.export(
            output, base=BASE, adapter=PROSE, keep_merged=tmp_path / "in" / kept, overwrite=True
        )


@pytest.mark.slow
def test_what_cannot_be_compared_is_written_only_if_asked(
    llama: Path, llama_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "onnx"
    monkeypatch.setattr(outputs, "available_bytes", lambda _: 0)
    options: dict[str, Any] = {"model": llama, "task": "feature-extraction"}
    with pytest.raises(errors.NotEquivalentError, match=r"cannot be compared.*pass --unchecked"):
        psoft_export.onnx.export(output, **options)
    assert not output.exists()
    report = psoft_export.onnx.export(output, **options, unchecked=True)
    assert "was not compared" in report.manifest["warnings"][0]
    assert report.manifest["model_class"] == "LlamaModel"
    assert psoft_export.onnx.load(output)(input_ids=IDS % 100).last_hidden_state.shape == (1, 7, 64)
    with pytest.raises(errors.UnsupportedError, match="an export of LlamaModel, the adapter is of"):
        psoft_export.verify(llama, llama_adapter, output)


@pytest.mark.parametrize("task", ["token-classification", "fill-mask"])
@pytest.mark.slow
def test_other_tasks_of_an_encoder(task: str, tmp_path: Path) -> None:
    family = models.FAMILIES["deberta"]
    assert family.config is not None
    classes = {
        "token-classification": DebertaV2ForTokenClassification,
        "fill-mask": DebertaV2ForMaskedLM,
    }
    torch.manual_seed(0)
    config = family.config()
    config.num_hidden_layers = 1
    model = classes[task](config).eval()
    model.save_pretrained(tmp_path / "model")
    report = psoft_export.onnx.export(tmp_path / "onnx", model=tmp_path / "model")
    assert report.task == task and report.verification[""].output == "logits"
    inputs = family.inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
    found = psoft_export.onnx.load(tmp_path / "onnx")(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_features_of_images(base_folder: Callable[..., Path], tmp_path: Path) -> None:
    base, output = base_folder("vit"), tmp_path / "onnx"
    report = psoft_export.onnx.export(output, model=base)
    assert report.task == "feature-extraction"
    assert report.verification[""].output == "last_hidden_state"


def test_class_of_no_task(llama: Path, tmp_path: Path) -> None:
    folder = files.copy_of(llama, tmp_path / "model")
    files.edit_json(folder / "config.json", architectures=["LlamaForChess"])
    with pytest.raises(errors.UnsupportedError, match=r"'LlamaForChess' is of no task.*--task"):
        psoft_export.onnx.export(tmp_path / "onnx", model=folder)


def test_loss_of_a_model_that_has_none(base_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="'feature-extraction' has no loss on a text"):
        psoft_export.onnx.export(
            tmp_path / "onnx",
            model=base_folder("minilm"),
            quantize="int8",
            text=TEXT,
            max_loss_increase=0.1,
        )
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects.PlainSubject, "numbers", 10**15)
    with pytest.raises(errors.DiskSpaceError, match="GB needed"):
        psoft_export.onnx.export(tmp_path / "onnx", model=BASE)
    assert list(tmp_path.iterdir()) == []


def test_output_is_the_model(tmp_path: Path) -> None:
    folder = files.copy_of(BASE, tmp_path / "model")
    with pytest.raises(errors.OutputError, match="own folder"):
        psoft_export.onnx.export(folder, model=folder, overwrite=True)
    with pytest.raises(errors.OutputError, match="own folder"):
        psoft_export.onnx.export(tmp_path, model=folder, overwrite=True)
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from psoft_export.onnx import requirements

    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == package else 1)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'psoft-export\[onnx\]'"):
        requirements.require_onnx()


def test_no_cuda(prose: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has it")
    with pytest.raises(errors.UsageError, match=r"psoft-export\[onnx-gpu\]"):
        psoft_export.onnx.load(prose / "onnx", device="cuda")
    with pytest.raises(errors.UsageError, match="'tpu'"):
        psoft_export.onnx.load(prose / "onnx", device="tpu")


@pytest.mark.gpu
def test_graph_on_cuda(prose: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    ids = IDS.repeat(2, 1)
    on_cpu = psoft_export.onnx.load(prose / "onnx", device="cpu")(input_ids=ids)
    on_cuda = psoft_export.onnx.load(prose / "onnx", device="cuda")(input_ids=ids)
    assert on_cuda.logits.device.type == "cuda"
    torch.testing.assert_close(on_cuda.logits.cpu(), on_cpu.logits, atol=1e-3, rtol=1e-3)


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (lambda f: (f / "psoft_export.json").unlink(), "no such file"),
    "version": (lambda f: files.edit_json(f / "psoft_export.json", format_version=9), "version 9"),
    "format": (lambda f: files.edit_json(f / "psoft_export.json", format="x"), "ONNX export"),
    "fields": (lambda f: files.edit_json(f / "psoft_export.json", tasks=None), "manifests"),
    "components": (lambda f: files.edit_json(f / "export.json", components={}), "names no graph"),
    "dtype": (lambda f: files.edit_json(f / "psoft_export.json", dtype="F8"), "manifests"),
    "file": (
        lambda f: files.edit_json(f / "psoft_export.json", files={"../../secret": ""}),
        r"psoft_export\.json: names '\.\./\.\./secret', a path outside",
    ),
    "outside": (
        lambda f: files.edit_json(
            f / "export.json", components={"model": {"file": "../model.onnx", "metadata": {}}}
        ),
        "outside its folder",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_folder(damage: str, prose: Path, tmp_path: Path) -> None:
    folder = files.copy_of(prose / "onnx", tmp_path / "onnx")
    change, words = DAMAGED[damage]
    change(folder)
    with pytest.raises(errors.CheckpointError, match=words):
        psoft_export.onnx.load(folder)


def test_damaged_graph(prose: Path, tmp_path: Path) -> None:
    folder = files.copy_of(prose / "onnx", tmp_path / "onnx")
    (folder / "model.onnx.data").unlink()
    with pytest.raises(errors.UnsupportedError, match=r"model\.onnx: ONNX Runtime cannot run it"):
        psoft_export.onnx.load(folder)


def _model(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    return model
