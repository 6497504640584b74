"""What others run: the serving example, ONNX Runtime alone, onnxruntime-genai, transformers."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import pytest
import torch
from peft import PeftModel, PsoftConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel
from transformers.exporters import ExportedModel

import psoft_export
from tests import files, models
from tests.conftest import EXAMPLES

sys.path.insert(0, str(EXAMPLES.parent))  # the example scripts are run from their folder
import onnx_serving

PROMPT = "The value "  # in each bundled task another token comes next
SENTENCES = (
    "A short one.",
    "The cat sat on the mat and watched the rain.",
    "Quarterly revenue rose by four percent, which surprised nobody who had read the forecast.",
)


def test_serving_example_streams_what_each_task_generates(many_tasks: Path) -> None:
    program = [sys.executable, str(EXAMPLES.parent / "onnx_serving.py"), str(many_tasks)]
    options = ["--prompt", PROMPT, "--tokens", "8"]
    shown = subprocess.run([*program, *options], capture_output=True, text=True, check=True).stdout
    tokenizer = AutoTokenizer.from_pretrained(many_tasks, local_files_only=True)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model = psoft_export.onnx.load(many_tasks, device="cpu")
    first = {}
    for task in (None, *model.tasks):
        new = model.generate(ids, task=task, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert len(new) == 8
        name = task or "base"
        assert f"[{name}]\n{tokenizer.decode(new)}\n" in shown
        first[name] = tokenizer.decode(new[:1])
        (line,) = (line for line in shown.splitlines() if line.startswith(f"  {name} "))
        assert line == f"  {name:<30} {first[name]!r}"
    assert len(set(first.values())) == 4


def test_serving_example_serves_the_tasks_asked_for_and_refuses_others(
    many_tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = ["onnx_serving.py", str(many_tasks), "--tokens", "2", "--task"]
    monkeypatch.setattr(sys, "argv", [*program, "prose"])
    onnx_serving.main()
    shown = capsys.readouterr().out
    assert "[base]" in shown and "[prose]" in shown and "records" not in shown
    monkeypatch.setattr(sys, "argv", [*program, "law"])
    with pytest.raises(SystemExit) as refused:
        onnx_serving.main()
    assert refused.value.code == 2
    assert "has the tasks arithmetic, prose, records" in capsys.readouterr().err


def test_onnxruntime_genai_builds_and_runs_a_merged_checkpoint(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="extra 'genai' is not installed")
    merged, built, new = tmp_path / "merged", tmp_path / "genai", 32
    adapter = EXAMPLES / "adapters" / "prose-relaxed-r64"
    psoft_export.merge(EXAMPLES / "base", adapter, merged, dtype="fp32", device="cpu")
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    folders = ["-i", str(merged), "-o", str(built), "-c", str(tmp_path / "cache")]
    done = subprocess.run([*builder, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    ids = AutoTokenizer.from_pretrained(merged)(PROMPT, return_tensors="pt").input_ids
    length = ids.shape[1] + new
    reference = AutoModelForCausalLM.from_pretrained(merged)
    expected = reference.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :]
    model = genai.Model(str(built))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids.numpy())
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    assert len(expected) == new  # the end token did not come
    assert tokens == expected.tolist()


@dataclass(frozen=True)
class Embedder:
    """A sentence encoder with its adapter, exported, and as PEFT runs it."""

    exported: Path
    unmerged: PeftModel


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    folder = tmp_path_factory.mktemp("sentences")
    adapter, exported = folder / "adapter", folder / "onnx"
    base = files.copy_of(models.MINILM, folder / "base")
    config = PsoftConfig(
        r=8, task_type="FEATURE_EXTRACTION", target_modules=["query", "value", "dense"]
    )
    unmerged = get_peft_model(BertModel.from_pretrained(base), config)
    models.perturb(unmerged, seed=3)
    unmerged.save_pretrained(adapter)
    report = psoft_export.onnx.export(
        exported, base=base, adapter=adapter, device="cpu", cache=False
    )
    assert report.task == "feature-extraction"
    assert (exported / "1_Pooling" / "config.json").is_file()  # of sentence-transformers
    return Embedder(exported, unmerged.eval())


def _by_onnxruntime(folder: Path, batch: Mapping[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    feeds = {name: tensor.numpy() for name, tensor in batch.items()}
    (states,) = session.run(["last_hidden_state"], feeds)
    return torch.from_numpy(states)


def _by_transformers(folder: Path, batch: Mapping[str, Tensor]) -> Tensor:
    return ExportedModel.from_pretrained(folder)(**batch).last_hidden_state


@pytest.mark.parametrize("client", [_by_onnxruntime, _by_transformers])
def test_sentence_embeddings_of_any_client_are_those_of_peft(
    embedder: Embedder, client: Callable[[Path, Mapping[str, Tensor]], Tensor]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedder.exported, local_files_only=True)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all()
    found = _pooled(client(embedder.exported, batch), batch)
    with torch.inference_mode():
        adapted = _pooled(embedder.unmerged(**batch).last_hidden_state, batch)
        with embedder.unmerged.disable_adapter():
            base = _pooled(embedder.unmerged(**batch).last_hidden_state, batch)
    assert float((found * adapted).sum(1).min()) > 1 - 1e-6
    assert float((found - adapted).abs().max()) < 1e-4
    assert float((found * base).sum(1).max()) < 0.99


def _pooled(states: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """One vector of length 1 a sentence: the mean over its tokens."""
    mask = batch["attention_mask"][..., None].double()
    mean = (states.double() * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean)
