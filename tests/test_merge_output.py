"""The output folder: complete, byte-identical where nothing changed, and never half-written."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
)

import psoft_export
from psoft_export.checkpoint.output import OutputFolder
from psoft_export.errors import OutputError
from tests import files, models
from tests.conftest import BUNDLED, EXAMPLES


def manifest_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "psoft_export.json").read_text())


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def test_unchanged_tensors_are_byte_identical_and_targets_change(
    llama: Path, tmp_path: Path
) -> None:
    adapter = models.save_adapter(
        "llama", llama, tmp_path / "adapter", target_modules=["q_proj", "up_proj"]
    )
    report = psoft_export.merge(llama, adapter, tmp_path / "out")
    before, after = all_tensors(llama), all_tensors(tmp_path / "out")
    targets = {module.tensor for module in report.modules}
    assert len(targets) == 4
    assert list(before) == list(after)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in targets), name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as merged:
        assert merged.metadata() == {"format": "pt"}
        with safe_open(llama / "model.safetensors", "pt") as base:
            assert merged.offset_keys() == base.offset_keys()


def test_two_runs_give_the_same_bytes(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        psoft_export.merge(llama, llama_adapter, tmp_path / name)
    assert files.tree(tmp_path / "first") == files.tree(tmp_path / "second")


def test_sharded_base_keeps_its_files(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    base = files.copy_of(llama, tmp_path / "base")
    files.as_shards(base, 3)
    psoft_export.merge(llama, llama_adapter, tmp_path / "whole")
    psoft_export.merge(base, llama_adapter, tmp_path / "sharded")
    names = {path.name for path in (tmp_path / "sharded").glob("model*")}
    assert names == {files.INDEX} | {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    index = json.loads((tmp_path / "sharded" / files.INDEX).read_text())
    assert index["weight_map"] == json.loads((base / files.INDEX).read_text())["weight_map"]
    whole, sharded = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "sharded")
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert len(LlamaForCausalLM.from_pretrained(tmp_path / "sharded").state_dict()) == len(whole)


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_base_becomes_safetensors(
    shards: int, llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    base = files.copy_of(llama, tmp_path / "base")
    files.as_pickle(base, shards)
    psoft_export.merge(llama, llama_adapter, tmp_path / "whole")
    psoft_export.merge(base, llama_adapter, tmp_path / "converted")
    whole, converted = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "converted")
    assert whole.keys() == converted.keys()
    assert all(torch.equal(whole[name], converted[name]) for name in whole)
    assert not list((tmp_path / "converted").glob("*.bin*"))
    LlamaForCausalLM.from_pretrained(tmp_path / "converted")


def test_tied_weight_in_a_pickle_is_written_once(base_folder: Any, tmp_path: Path) -> None:
    tied = base_folder("llama-tied")
    adapter = models.save_adapter("llama-tied", tied, tmp_path / "adapter")
    base = files.copy_of(tied, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    psoft_export.merge(base, adapter, tmp_path / "out")
    assert "lm_head.weight" not in all_tensors(tmp_path / "out")
    assert "model.embed_tokens.weight" in all_tensors(tmp_path / "out")


def test_max_shard_size_splits_the_output(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "whole")
    psoft_export.merge(llama, llama_adapter, tmp_path / "split", max_shard_size="100KB")
    shards = list((tmp_path / "split").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        assert sum(t.nbytes for t in load_file(shard).values()) <= 100_000
    whole, split = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "split")
    assert all(torch.equal(whole[name], split[name]) for name in whole)
    index = json.loads((tmp_path / "split" / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    LlamaForCausalLM.from_pretrained(tmp_path / "split")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16)],
)
def test_output_dtype(
    name: str, dtype: torch.dtype, llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "out", dtype=name)
    tensors = all_tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    base = all_tensors(llama)
    assert torch.equal(tensors["model.norm.weight"], base["model.norm.weight"].to(dtype))
    exact = models.exact_weights(models.load_with_peft("llama", llama, llama_adapter))
    for path, weight in exact.items():
        # Rounded once: no number of this dtype is nearer.
        away = (tensors[f"{path}.weight"].double() - weight).abs()
        other = (weight.to(dtype).double() - weight).abs()
        assert bool((away <= other * (1 + 1e-9)).all())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_mixed_dtypes_start_at_multiples_of_their_size(base_folder: Any, tmp_path: Path) -> None:
    base = base_folder("minilm", torch.bfloat16)
    adapter = models.save_adapter("minilm", base, tmp_path / "adapter")  # a float32 head
    psoft_export.merge(base, adapter, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    del header["__metadata__"]
    sizes = {"F32": 4, "BF16": 2}
    assert {info["dtype"] for info in header.values()} == set(sizes)
    for name, info in header.items():
        assert info["data_offsets"][0] % sizes[info["dtype"]] == 0, name
    assert manifest_of(tmp_path / "out")["base"]["sha256"]["model.safetensors"] == sha256(
        base / "model.safetensors"
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_new_head_joins_the_checkpoint(base_folder: Any, tmp_path: Path) -> None:
    base = base_folder("minilm")
    adapter = models.save_adapter("minilm", base, tmp_path / "adapter")
    names = ["low", "middle", "high"]
    psoft_export.merge(base, adapter, tmp_path / "out", labels=names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "low", "1": "middle", "2": "high"}
    assert config["label2id"] == {"low": 0, "middle": 1, "high": 2}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == dict(enumerate(names))
    tensors = all_tensors(tmp_path / "out")
    saved = load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(tensors["classifier.weight"], saved["base_model.model.classifier.weight"])
    assert all(name.startswith(("bert.", "classifier.")) for name in tensors)


def test_head_replaces_one_of_another_size(base_folder: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    models.load_task_model("minilm", base_folder("minilm")).save_pretrained(base)  # 3 labels
    model = models.BertForSequenceClassification.from_pretrained(
        base, num_labels=5, ignore_mismatched_sizes=True
    )
    peft_model = models.get_peft_model(
        model, models.PsoftConfig(r=8, task_type="SEQ_CLS", target_modules=["query"])
    )
    models.perturb(peft_model, 3)
    peft_model.save_pretrained(tmp_path / "adapter")
    psoft_export.merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert merged.config.num_labels == 5
    inputs = models.FAMILIES["minilm"].inputs()
    with torch.no_grad():
        expected = peft_model.eval()(**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_enlarged_vocabulary_comes_out_with_its_config(llama: Path, tmp_path: Path) -> None:
    model = models.load_task_model("llama", llama)
    model.resize_token_embeddings(108)
    peft_model = models.get_peft_model(
        model,
        models.PsoftConfig(
            r=8,
            task_type="CAUSAL_LM",
            target_modules=["q_proj"],
            modules_to_save=["embed_tokens", "lm_head"],
        ),
    )
    models.perturb(peft_model, 3)
    peft_model.save_pretrained(tmp_path / "adapter")
    psoft_export.merge(llama, tmp_path / "adapter", tmp_path / "out")
    merged, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert merged.config.vocab_size == 108 and not info["mismatched_keys"]
    ids = torch.arange(108).view(4, 27)
    with torch.no_grad():
        expected = peft_model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_adapter_saved_under_the_names_of_an_older_library(
    base_folder: Any, tmp_path: Path
) -> None:
    base = base_folder("vit")
    adapter = models.save_adapter("vit", base, tmp_path / "adapter")
    psoft_export.merge(base, adapter, tmp_path / "new")

    def before_version_5(name: str) -> str:
        # The module names of ViT in transformers 4, from which the adapter keys were made.
        for new, old in (
            ("vit.layers.", "vit.encoder.layer."),
            ("attention.q_proj", "attention.attention.query"),
            ("attention.v_proj", "attention.attention.value"),
            ("mlp.fc1", "intermediate.dense"),
        ):
            name = name.replace(new, old)
        return name

    files.edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda tensors: {before_version_5(name): t for name, t in tensors.items()},
    )
    files.edit_json(
        adapter / "adapter_config.json", target_modules=["query", "value", "intermediate.dense"]
    )
    psoft_export.merge(base, adapter, tmp_path / "old")
    new, old = all_tensors(tmp_path / "new"), all_tensors(tmp_path / "old")
    assert all(torch.equal(new[name], old[name]) for name in new)


def test_linear_layers_inside_a_saved_module_are_not_missed(
    base_folder: Any, tmp_path: Path
) -> None:
    # "dense" is also the name of a layer in the pooler, which is saved whole and so not adapted.
    base = base_folder("deberta")
    adapter = models.save_adapter("deberta", base, tmp_path / "adapter", target_modules=["dense"])
    report = psoft_export.merge(base, adapter, tmp_path / "out")
    assert all("pooler" not in module.module for module in report.modules)
    assert "pooler.dense.weight" in all_tensors(tmp_path / "out")


def test_one_layer_given_as_a_number(llama: Path, tmp_path: Path) -> None:
    adapter = models.save_adapter("llama", llama, tmp_path / "adapter", layers_to_transform=0)
    assert len(psoft_export.merge(llama, adapter, tmp_path / "out").modules) == 7


def test_lowrank_adapter_without_a_seed_warns(llama: Path, tmp_path: Path) -> None:
    adapter = models.save_adapter("llama", llama, tmp_path / "adapter", psoft_svd="lowrank")
    assert not psoft_export.plan_merge(llama, adapter).warnings
    files.edit_json(adapter / "adapter_config.json", random_seed=None)
    seed, record = psoft_export.merge(llama, adapter, tmp_path / "out").manifest["warnings"]
    assert "random_seed" in seed and "no basis record" in record


def test_adapter_without_its_head_warns(base_folder: Any, tmp_path: Path) -> None:
    base = base_folder("minilm")
    adapter = models.save_adapter("minilm", base, tmp_path / "adapter")
    files.edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda t: {name: v for name, v in t.items() if "classifier" not in name},
    )
    report = psoft_export.merge(base, adapter, tmp_path / "out")
    assert "classifier.bias, classifier.weight" in report.manifest["warnings"][0]
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_companion_files_come_along(tmp_path: Path) -> None:
    adapter = models.save_adapter("minilm", models.MINILM, tmp_path / "adapter")
    psoft_export.merge(models.MINILM, adapter, tmp_path / "out")
    brought = set(files.tree(models.MINILM)) - {"README.md", ".gitattributes"}
    assert {"tokenizer_config.json", "sentence_bert_config.json", "1_Pooling/config.json"} < brought
    assert set(files.tree(tmp_path / "out")) == brought | {"psoft_export.json"}
    original = AutoTokenizer.from_pretrained(models.MINILM)("a trained adapter")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a trained adapter") == original


def test_adapters_tokenizer_and_chat_template_take_precedence(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    base = files.copy_of(llama, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (base / name).write_text('{"from": "base"}')
    for name in ("generation_config.json", "preprocessor_config.json"):
        (base / name).write_text("{}")
    (base / "chat_template.jinja").write_text("base template")
    (base / "LICENSE.txt").write_text("terms")
    (llama_adapter / "chat_template.jinja").write_text("adapter template")
    psoft_export.merge(base, llama_adapter, tmp_path / "template")
    out = files.tree(tmp_path / "template")
    assert out["chat_template.jinja"] == b"adapter template"
    assert out["tokenizer.json"] == b'{"from": "base"}' and out["LICENSE.txt"] == b"terms"
    assert {"generation_config.json", "preprocessor_config.json", "tokenizer_config.json"} < set(
        out
    )

    (llama_adapter / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama_adapter / name).write_text('{"from": "adapter"}')
    psoft_export.merge(base, llama_adapter, tmp_path / "tokenizer")
    out = files.tree(tmp_path / "tokenizer")
    assert out["tokenizer.json"] == b'{"from": "adapter"}'
    assert "vocab.txt" not in out and "chat_template.jinja" not in out, "not half of each"


def test_pipeline_path_outside_the_folder_is_refused(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    base = files.copy_of(llama, tmp_path / "base")
    (base / "modules.json").write_text('[{"path": "../secret"}]')
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("x")
    with pytest.raises(psoft_export.PsoftExportError, match="outside its folder"):
        psoft_export.merge(base, llama_adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_manifest_says_what_was_done(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    report = psoft_export.merge(llama, llama_adapter, tmp_path / "out", dtype="bf16", device="cpu")
    content = manifest_of(tmp_path / "out")
    assert content == {k: v for k, v in report.to_dict().items() if k != "output"}
    assert content["base"]["name"] == llama.name and content["base"]["revision"] is None
    for side, folder in (("base", llama), ("adapter", llama_adapter)):
        for name, digest in content[side]["sha256"].items():
            assert digest == sha256(folder / name), name
    assert "model.safetensors" in content["base"]["sha256"]
    assert content["options"]["dtype"] == "BF16"
    assert content["basis"]["record"] is None
    assert content["basis"]["solver"] == "full" and content["basis"]["device"] == "cpu"
    assert str(tmp_path) not in json.dumps(content), "no path of the machine"
    exact = models.exact_weights(models.load_with_peft("llama", llama, llama_adapter))
    base, merged = all_tensors(llama), all_tensors(tmp_path / "out")
    for module in content["modules"]:
        weight = base[module["tensor"]].double()
        delta = exact[module["module"]] - weight
        assert module["relative_delta"] == pytest.approx(float(delta.norm() / weight.norm()))
        assert module["shape"] == list(weight.shape) and module["rank"] == 8
        assert 0 < module["largest_angle"] < 180
        assert module["orthogonality_error"] < 1e-13
        lost = (merged[module["tensor"]].double() - exact[module["module"]]).norm() / delta.norm()
        assert module["relative_rounding"] == pytest.approx(float(lost), rel=1e-3)
        assert 0 < module["basis_uncertainty"] < 1e-2


def test_bundled_example_comes_out_whole(tmp_path: Path) -> None:
    psoft_export.merge(EXAMPLES / "base", EXAMPLES / "adapters" / BUNDLED[1], tmp_path / "out")
    base = files.tree(EXAMPLES / "base")
    out = files.tree(tmp_path / "out")
    assert set(out) == {*base, "psoft_export.json"}
    assert [name for name in base if out[name] != base[name]] == ["model.safetensors"]
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 128


def test_dry_run_reads_no_weights_and_writes_nothing(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    base = files.copy_of(llama, tmp_path / "base")
    path = base / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    content = path.read_bytes()
    path.write_bytes(content[:header] + b"\xff" * (len(content) - header))  # all NaN
    plan = psoft_export.plan_merge(base, llama_adapter)
    assert len(plan.targets) == 14 and plan.output_bytes == len(content) - header
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_the_whole_folder(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    psoft_export.merge(llama, llama_adapter, out)  # an empty folder is no obstacle
    (out / "stale").write_text("x")
    psoft_export.merge(llama, llama_adapter, out, overwrite=True)
    assert not (out / "stale").exists() and (out / "model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]


def test_killed_run_leaves_the_target_and_the_next_run_clears_up(tmp_path: Path) -> None:
    config = models.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
        vocab_size=200, tie_word_embeddings=False,
    )  # fmt: skip
    models.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = models.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    # A low-rank basis keeps this test short; a full one would be the same.
    adapter = models.get_peft_model(
        model,
        models.PsoftConfig(
            r=8, psoft_svd="lowrank", task_type="CAUSAL_LM", target_modules="all-linear"
        ),
    )
    adapter.save_pretrained(tmp_path / "adapter")
    files.edit_json(tmp_path / "adapter" / "adapter_config.json", psoft_svd="full")
    out, scratch = tmp_path / "out", tmp_path / ".out.psoft-export"
    out.mkdir()
    (out / "mine").write_text("as it was")
    command = [
        sys.executable, "-m", "psoft_export.cli.main", "merge", "--overwrite", "--quiet",
        "--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"),
        "--output", str(out),
    ]  # fmt: skip
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not list(scratch.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was still at work"
    assert scratch.exists() and files.tree(out) == {"mine": b"as it was"}

    subprocess.run(command, check=True)
    assert (out / "psoft_export.json").exists() and not (out / "mine").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_interrupt_exits_with_130_and_leaves_nothing(
    llama: Path, llama_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psoft_export import execution
    from psoft_export.cli.main import run

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(execution.BasisFinder, "find_by_training_svd", interrupt)
    arguments = ["merge", "--base", str(llama), "--adapter", str(llama_adapter)]
    assert run([*arguments, "--output", str(tmp_path / "out"), "--quiet"]) == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_a_second_run_on_the_same_output_waits_its_turn(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as first:
        with pytest.raises(OutputError, match="another run"), OutputFolder(tmp_path / "out"):
            pass
        (first.path / "file").write_text("x")
        first.commit()
    assert files.tree(tmp_path / "out") == {"file": b"x"}


def test_a_target_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.psoft-export.old"
    aside.mkdir()
    (aside / "file").write_text("the old one")
    with pytest.raises(RuntimeError), OutputFolder(tmp_path / "out", overwrite=True):
        raise RuntimeError("this run fails as well")
    assert files.tree(tmp_path / "out") == {"file": b"the old one"}
