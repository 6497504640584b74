"""Bad input: one clear line, its exit code, and no output folder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import psoft_export
from psoft_export.checkpoint.writer import ShardWriter
from psoft_export.cli.main import run
from tests import files, models

ADAPTER_ERROR, CHECKPOINT_ERROR, MISMATCH, UNSUPPORTED, NON_FINITE = 3, 4, 5, 6, 7
USAGE, OUTPUT_ERROR, DISK_SPACE, HUB_ERROR = 2, 8, 9, 10

Damage = Callable[[Path, Path], None]


@pytest.fixture
def pair(llama: Path, llama_adapter: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of a base and its adapter that a test may damage."""
    return files.copy_of(llama, tmp_path / "base"), llama_adapter


def config(**fields: Any) -> Damage:
    return lambda base, adapter: files.edit_json(adapter / "adapter_config.json", **fields)


def base_config(**fields: Any) -> Damage:
    return lambda base, adapter: files.edit_json(base / "config.json", **fields)


def write(name: str, content: str) -> Damage:
    def damage(base: Path, adapter: Path) -> None:
        folder = adapter if name.startswith("adapter") else base
        (folder / name).write_text(content)

    return damage


def remove(name: str) -> Damage:
    def damage(base: Path, adapter: Path) -> None:
        ((adapter if name.startswith("adapter") else base) / name).unlink()

    return damage


def truncate(name: str) -> Damage:
    def damage(base: Path, adapter: Path) -> None:
        files.truncate((adapter if name.startswith("adapter") else base) / name)

    return damage


def corrupt_header(base: Path, adapter: Path) -> None:
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(data)


def folder_instead(base: Path, adapter: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").mkdir()


def index_with(shard: str) -> Damage:
    def damage(base: Path, adapter: Path) -> None:
        files.as_shards(base, 2)
        content = json.loads((base / files.INDEX).read_text())
        content["weight_map"]["model.norm.weight"] = shard
        (base / files.INDEX).write_text(json.dumps(content))

    return damage


def shard_gone(base: Path, adapter: Path) -> None:
    files.as_shards(base, 2)
    (base / "model-00002-of-00002.safetensors").unlink()


def in_adapter(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    return lambda base, adapter: files.edit_tensors(adapter / "adapter_model.safetensors", change)


def in_base(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    return lambda base, adapter: files.edit_tensors(base / "model.safetensors", change)


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.psoft_R"


def wrong_length(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {f"{Q_PROJ}.weight": torch.zeros(27)}


def spoil(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[-1] = value
        return tensors

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


def pickle_with_code(base: Path, adapter: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({"model.norm.weight": SimpleNamespace(run=os.system)}, base / "pytorch_model.bin")


def code_in_adapter(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": SimpleNamespace(run=os.system)}, adapter / "adapter_model.bin")


NORM = "model.norm.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
CASES: dict[str, tuple[Damage, int, str]] = {
    "no adapter config": (remove("adapter_config.json"), ADAPTER_ERROR, "adapter_config.json"),
    "malformed adapter config": (
        write("adapter_config.json", "{"),
        ADAPTER_ERROR,
        "adapter_config.json",
    ),
    "config is a list": (write("adapter_config.json", "[]"), ADAPTER_ERROR, "JSON object"),
    "no peft_type": (config(peft_type=None), ADAPTER_ERROR, "'peft_type' is missing"),
    "another peft_type": (config(peft_type="VERA"), UNSUPPORTED, "'VERA'"),
    "rank zero": (config(r=0), ADAPTER_ERROR, "'r' is 0"),
    "rank is text": (config(r="8"), ADAPTER_ERROR, "'r' is '8'"),
    "alpha zero": (config(psoft_alpha=0), ADAPTER_ERROR, "'psoft_alpha'"),
    "unknown solver": (config(psoft_svd="quick"), ADAPTER_ERROR, "'psoft_svd'"),
    "unknown initialisation": (config(ab_svd_init="zero"), ADAPTER_ERROR, "'ab_svd_init'"),
    "bad eps": (
        config(use_cayley_neumann=True, cayley_neumann_eps=-1),
        ADAPTER_ERROR,
        "'cayley_neumann_eps'",
    ),
    "eps is text": (
        config(use_cayley_neumann=True, cayley_neumann_eps="small"),
        ADAPTER_ERROR,
        "'cayley_neumann_eps'",
    ),
    "no adapter weights": (
        remove("adapter_model.safetensors"),
        ADAPTER_ERROR,
        "adapter_model.safetensors",
    ),
    "truncated adapter": (
        truncate("adapter_model.safetensors"),
        ADAPTER_ERROR,
        "adapter_model.safetensors",
    ),
    "pickle that runs code": (code_in_adapter, ADAPTER_ERROR, "adapter_model.bin"),
    "wrong length for the rank": (in_adapter(wrong_length), ADAPTER_ERROR, f"{Q_PROJ}.weight"),
    "config says another rank": (config(r=16), ADAPTER_ERROR, "rank 16 needs"),
    "vector missing": (
        in_adapter(lambda t: {k: v for k, v in t.items() if k != f"{Q_PROJ}.vector_a"}),
        ADAPTER_ERROR,
        f"{Q_PROJ}.vector_a",
    ),
    "vector not announced": (config(psoft_mag_a=False), ADAPTER_ERROR, "says the adapter has none"),
    "unknown tensor": (
        in_adapter(lambda t: t | {f"{Q_PROJ}.other": torch.zeros(1)}),
        ADAPTER_ERROR,
        f"{Q_PROJ}.other",
    ),
    "integer parameters": (
        in_adapter(lambda t: t | {f"{Q_PROJ}.vector_a": torch.ones(8, dtype=torch.int64)}),
        ADAPTER_ERROR,
        "torch.int64",
    ),
    "foreign key": (
        in_adapter(lambda t: t | {"transformer.h.0": torch.zeros(1)}),
        ADAPTER_ERROR,
        "transformer.h.0",
    ),
    "NaN in the adapter": (
        in_adapter(spoil(f"{Q_PROJ}.weight", float("nan"))),
        NON_FINITE,
        f"{Q_PROJ}.weight",
    ),
    "infinity in the adapter": (
        in_adapter(spoil(f"{Q_PROJ}.vector_b", float("inf"))),
        NON_FINITE,
        f"{Q_PROJ}.vector_b",
    ),
    "NaN in a target of the base": (in_base(spoil(O_PROJ, float("nan"))), NON_FINITE, O_PROJ),
    "infinity beside the targets": (in_base(spoil(NORM, float("inf"))), NON_FINITE, NORM),
    "no base config": (remove("config.json"), CHECKPOINT_ERROR, "config.json"),
    "malformed base config": (write("config.json", "{"), CHECKPOINT_ERROR, "config.json"),
    "no model type": (base_config(model_type=None), CHECKPOINT_ERROR, "'model_type'"),
    "unknown model type": (base_config(model_type="nobody"), UNSUPPORTED, "'nobody'"),
    "config of the wrong type": (
        base_config(hidden_size="wide"),
        CHECKPOINT_ERROR,
        "hidden_size",
    ),
    "heads that do not divide": (base_config(num_attention_heads=7), CHECKPOINT_ERROR, "config"),
    "quantized base": (
        base_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        UNSUPPORTED,
        "gptq",
    ),
    "truncated base": (truncate("model.safetensors"), CHECKPOINT_ERROR, "model.safetensors"),
    "corrupt header": (corrupt_header, CHECKPOINT_ERROR, "model.safetensors"),
    "empty file": (write("model.safetensors", ""), CHECKPOINT_ERROR, "model.safetensors"),
    "unreadable file": (folder_instead, CHECKPOINT_ERROR, "model.safetensors"),
    "no weights": (remove("model.safetensors"), CHECKPOINT_ERROR, "no weights"),
    "missing shard": (shard_gone, CHECKPOINT_ERROR, "model-00002-of-00002.safetensors"),
    "index lists a tensor elsewhere": (
        index_with("model-00002-of-00002.safetensors"),
        CHECKPOINT_ERROR,
        NORM,
    ),
    "index path leads outside": (
        index_with("../other/model.safetensors"),
        CHECKPOINT_ERROR,
        "../other/model.safetensors",
    ),
    "index path is absolute": (index_with("/etc/passwd"), CHECKPOINT_ERROR, "/etc/passwd"),
    "base pickle that runs code": (pickle_with_code, CHECKPOINT_ERROR, "pytorch_model.bin"),
    "target the base lacks": (
        in_adapter(renamed("layers.1.", "layers.7.")),
        MISMATCH,
        "model.layers.7",
    ),
    "base deeper than the adapter": (
        in_adapter(lambda t: {k: v for k, v in t.items() if "layers.1." not in k}),
        MISMATCH,
        "model.layers.1",
    ),
    "rank larger than the matrix": (
        lambda base, adapter: models.save_base("llama", base) or _narrow(base),
        MISMATCH,
        "rank 8 is larger",
    ),
    "base of other shapes than its config": (
        base_config(intermediate_size=96),
        MISMATCH,
        "has shape",
    ),
    "layer that is not linear": (
        in_adapter(renamed("layers.0.self_attn.q_proj.", "norm.")),
        UNSUPPORTED,
        "LlamaRMSNorm",
    ),
    "target without its tensor": (
        in_base(lambda t: {k: v for k, v in t.items() if k != O_PROJ}),
        MISMATCH,
        O_PROJ,
    ),
    "integer weights": (
        in_base(lambda t: t | {O_PROJ: torch.zeros(64, 64, dtype=torch.int8)}),
        UNSUPPORTED,
        O_PROJ,
    ),
}


def _narrow(base: Path) -> None:
    """Give the base heads so small that k_proj has 4 rows."""
    config = models.LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=1,
        vocab_size=100,
        tie_word_embeddings=False,
    )
    models.LlamaForCausalLM(config).save_pretrained(base)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(
    name: str, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = pair
    damage, code, words = CASES[name]
    damage(base, adapter)
    before = sorted(tmp_path.iterdir())
    output = tmp_path / "out"
    capsys.readouterr()

    arguments = ["merge", "--base", str(base), "--adapter", str(adapter), "--output", str(output)]
    assert run([*arguments, "--quiet"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("error: ")
    assert words in said.err
    assert sorted(tmp_path.iterdir()) == before, "no output and no scratch folder"


def test_tied_target_is_refused(base_folder: Any, tmp_path: Path) -> None:
    base = base_folder("llama-tied")
    adapter = models.save_adapter("llama-tied", base, tmp_path / "adapter")
    files.edit_tensors(
        adapter / "adapter_model.safetensors", renamed("model.layers.0.self_attn.q_proj", "lm_head")
    )
    with pytest.raises(
        psoft_export.PsoftExportError, match=r"tied to 'model\.embed_tokens"
    ) as info:
        psoft_export.merge(base, adapter, tmp_path / "out")
    assert info.value.exit_code == UNSUPPORTED


def test_target_that_shares_its_storage_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    tensors = load_file(base / "model.safetensors")
    tensors[O_PROJ] = tensors[O_PROJ.replace("layers.1", "layers.0")]
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    with pytest.raises(psoft_export.PsoftExportError, match="shares its storage") as info:
        psoft_export.merge(base, adapter, tmp_path / "out")
    assert info.value.exit_code == UNSUPPORTED


def test_saved_module_of_another_shape_is_refused(base_folder: Any, tmp_path: Path) -> None:
    base = base_folder("minilm")
    adapter = models.save_adapter("minilm", base, tmp_path / "adapter")
    files.edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda t: t | {"base_model.model.classifier.weight": torch.zeros(3, 200)},
    )
    with pytest.raises(psoft_export.PsoftExportError, match=r"\[3, 200\].*\[3, 384\]") as info:
        psoft_export.merge(base, adapter, tmp_path / "out")
    assert info.value.exit_code == MISMATCH


def test_result_that_does_not_fit_the_dtype(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    files.edit_tensors(base / "model.safetensors", lambda t: t | {O_PROJ: t[O_PROJ] * 1e7})
    with pytest.raises(psoft_export.PsoftExportError, match="bf16 or fp32") as info:
        psoft_export.merge(base, adapter, tmp_path / "out", dtype="fp16")
    assert info.value.exit_code == NON_FINITE
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--dtype", "int4"], USAGE, "int4"),
        (["--device", "tpu"], USAGE, "tpu"),
        (["--device", "cuda:99"], USAGE, "cuda:99"),
        (["--max-shard-size", "large"], USAGE, "large"),
        (["--labels", "yes,no"], USAGE, "labels"),
        (["--base", "no/such/folder/here"], USAGE, "no/such/folder/here"),
        (["--output", "missing-parent/out"], OUTPUT_ERROR, "missing-parent"),
        (["--frobnicate"], USAGE, "--frobnicate"),
    ],
)
def test_bad_options(
    arguments: list[str],
    code: int,
    words: str,
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter = pair
    capsys.readouterr()
    given = ["merge", "--base", str(base), "--adapter", str(adapter)]
    assert run([*given, "--output", str(tmp_path / "out"), *arguments]) == code
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_full_disk_is_found_before_anything_is_written(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(psoft_export.PsoftExportError, match="GB needed") as info:
        psoft_export.merge(*pair, tmp_path / "out")
    assert info.value.exit_code == DISK_SPACE
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 512 kB; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_fills_up_while_writing(
    pair: tuple[Path, Path],
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plenty = SimpleNamespace(total=10**12, used=0, free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plenty)  # another process fills it later
    (small_disk / "filler").write_bytes(bytes(400_000))
    with pytest.raises(psoft_export.PsoftExportError, match="disk is full") as info:
        psoft_export.merge(*pair, small_disk / "out")
    assert info.value.exit_code == DISK_SPACE
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("side", ["base", "adapter"])
def test_unreadable_companion_file_is_named(
    side: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = dict(zip(("base", "adapter"), pair, strict=True))[side]
    (folder / "tokenizer_config.json").symlink_to("/proc/self/mem")  # fails when read
    code = {"base": CHECKPOINT_ERROR, "adapter": ADAPTER_ERROR}[side]
    with pytest.raises(psoft_export.PsoftExportError, match=r"tokenizer_config\.json") as info:
        psoft_export.merge(*pair, tmp_path / "out")
    assert info.value.exit_code == code
    assert not (tmp_path / "out").exists()


def test_failure_while_writing_leaves_the_old_output(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    psoft_export.merge(*pair, output)
    before = files.tree(output)

    def fail(self: ShardWriter, data: torch.Tensor) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ShardWriter, "append", fail)
    with pytest.raises(psoft_export.PsoftExportError, match="Input/output error"):
        psoft_export.merge(*pair, output, overwrite=True, dtype="bf16")
    assert files.tree(output) == before
    assert not list(tmp_path.glob(".out*"))


def test_outputs_that_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = pair
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("keep me")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    cases = {
        tmp_path / "file": "is a file",
        tmp_path / "full": "--overwrite",
        base: "--overwrite",
    }
    for output, words in cases.items():
        with pytest.raises(psoft_export.PsoftExportError, match=words) as info:
            psoft_export.merge(base, adapter, output)
        assert info.value.exit_code == OUTPUT_ERROR
    monkeypatch.setenv("HOME", str(tmp_path / "full"))
    for output in (base, adapter, tmp_path, tmp_path / "link", tmp_path / "full"):
        with pytest.raises(psoft_export.PsoftExportError) as info:
            psoft_export.merge(base, adapter, output, overwrite=True)
        assert info.value.exit_code == OUTPUT_ERROR
    assert (tmp_path / "full" / "note").read_text() == "keep me"
    assert (base / "model.safetensors").exists()


def test_debug_switch_shows_the_traceback(tmp_path: Path) -> None:
    environment = os.environ | {"PSOFT_EXPORT_DEBUG": "1"}
    command = [sys.executable, "-m", "psoft_export.cli.main", "inspect", str(tmp_path)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shown.returncode == ADAPTER_ERROR and "Traceback" in shown.stderr
