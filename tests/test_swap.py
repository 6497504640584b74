"""A merged checkpoint turned into another task's, in place and in one step."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import psoft_export
from psoft_export import errors, execution
from psoft_export.checkpoint import cloning
from psoft_export.checkpoint.output import OutputFolder
from psoft_export.cli.main import run
from tests import files, models
from tests.conftest import BUNDLED, EXAMPLES
from tests.test_combine import adapter
from tests.test_hub import command, hub

__all__ = ["hub"]

BASE = EXAMPLES / "base"
PROSE, SUMS, RECORDS = (EXAMPLES / "adapters" / name for name in BUNDLED)


@pytest.fixture
def sharded(llama: Path, tmp_path: Path) -> Path:
    base = files.copy_of(llama, tmp_path / "sharded")
    files.as_shards(base, 3)
    return base


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_it_is_the_merge_of_the_other_adapter(
    dtype: str | None, sharded: Path, tmp_path: Path
) -> None:
    """Also where the first adapter changed what the second does not, and back again."""
    one = adapter(sharded, tmp_path / "one", 1)
    other = adapter(sharded, tmp_path / "other", 2, r=4, target_modules=["q_proj", "up_proj"])
    expected = {}
    for name, folder in (("one", one), ("other", other)):
        psoft_export.merge(sharded, folder, tmp_path / name / "merged", dtype=dtype, device="cpu")
        expected[name] = files.tree(tmp_path / name / "merged")
    merged = files.copy_of(tmp_path / "one" / "merged", tmp_path / "served")
    report = psoft_export.swap(merged, other, base=sharded, device="cpu")
    assert files.tree(merged) == expected["other"] and len(report.modules) == 4
    assert json.loads((merged / "psoft_export.json").read_text())["adapter"]["name"] == "other"
    verdict = psoft_export.verify(sharded, other, merged, level="weights", device="cpu")
    assert verdict.equivalent
    psoft_export.swap(merged, one, base=sharded, device="cpu")
    assert files.tree(merged) == expected["one"]


def test_files_without_a_change_are_not_written(sharded: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    one = adapter(sharded, tmp_path / "one", 1, **options)
    other = adapter(sharded, tmp_path / "other", 2, **options)
    merged = tmp_path / "merged"
    psoft_export.merge(sharded, one, merged, device="cpu")
    (merged / "README.md").write_text("about one")
    (merged / "notes").mkdir()
    (merged / "notes" / "mine.txt").write_text("kept")
    before = {path.name: path.stat().st_ino for path in merged.glob("*.safetensors")}
    tree = files.tree(merged)
    report = psoft_export.swap(merged, other, base=sharded, device="cpu")
    after = {path.name: path.stat().st_ino for path in merged.glob("*.safetensors")}
    assert len(before) == 3 and sum(after[name] != before[name] for name in before) == 1
    changed = {name for name, data in files.tree(merged).items() if tree[name] != data}
    assert len(changed) == 2 and "psoft_export.json" in changed
    assert (merged / "notes" / "mine.txt").read_text() == "kept"
    assert any("README.md still speaks" in text for text in report.manifest["warnings"])


def test_nothing_of_the_adapter_before_stays(llama: Path, tmp_path: Path) -> None:
    one, other = adapter(llama, tmp_path / "one", 1), adapter(llama, tmp_path / "other", 2)
    (one / "chat_template.jinja").write_text("{{ one }}")
    merged, wanted = tmp_path / "merged", tmp_path / "wanted"
    psoft_export.merge(llama, one, merged, device="cpu")
    (merged / "onnx").mkdir()
    (merged / "onnx" / "psoft_export.json").write_text("{}")
    psoft_export.swap(merged, other, base=llama, device="cpu")
    psoft_export.merge(llama, other, wanted, device="cpu")
    assert files.tree(merged) == files.tree(wanted) | {"onnx/psoft_export.json": b"{}"}


@pytest.mark.parametrize("stage", ["merging", "writing", "reading back", "commit"])
def test_cut_short_it_is_still_the_checkpoint_before(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = tmp_path / "merged"
    psoft_export.merge(BASE, PROSE, merged, device="cpu")
    before = files.tree(merged)
    calls: list[int] = []

    def cut(method: Any, after: int) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return method(*args, **named)

        return call

    place, name, after = {
        "merging": (execution.Run, "_merged", 9),
        "writing": (execution._PatchSink, "write", 9),
        "reading back": (execution, "_bytes_sha256", 3),
        "commit": (OutputFolder, "commit", 0),
    }[stage]
    monkeypatch.setattr(place, name, cut(getattr(place, name), after))
    with pytest.raises(KeyboardInterrupt):
        psoft_export.swap(merged, SUMS, base=BASE, device="cpu")
    assert files.tree(merged) == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    monkeypatch.undo()
    psoft_export.swap(merged, SUMS, base=BASE, device="cpu")
    assert psoft_export.verify(BASE, SUMS, merged, level="weights", device="cpu").equivalent


def test_a_combination_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged, wanted = tmp_path / "merged", tmp_path / "wanted"
    psoft_export.merge(BASE, RECORDS, merged, device="cpu")
    several = ["--adapter", f"prose={PROSE}:0.5", "--adapter", f"sums={SUMS}:0.5"]
    line = [*several, "--method", "lie", "--base", str(BASE), "--device", "cpu"]
    assert run(["swap", str(merged), *line, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["adapter"]["name"] == "prose:0.5 + sums:0.5, lie"
    assert run(["merge", "--output", str(wanted), *line, "--quiet"]) == 0
    assert files.tree(merged) == files.tree(wanted)
    assert run(["swap", str(merged), "--adapter", str(SUMS), "--base", str(BASE)]) == 0
    assert "PSOFT-SO (strict)" in capsys.readouterr().out


def test_where_blocks_cannot_be_shared_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 10_000)

    def refused(*_: object) -> int:
        raise OSError(95, "not supported")

    monkeypatch.setattr(cloning.fcntl, "ioctl", refused)
    cloning.clone_file(source, tmp_path / "kernel")
    monkeypatch.setattr(os, "copy_file_range", refused)
    cloning.clone_file(source, tmp_path / "plain")
    monkeypatch.setattr(os, "link", refused)
    cloning.link_file(source, tmp_path / "linked")
    for name in ("kernel", "plain", "linked"):
        assert (tmp_path / name).read_bytes() == source.read_bytes()


def test_what_is_no_merge_of_this_base_is_left_alone(
    llama: Path, base_folder: Any, tmp_path: Path
) -> None:
    one = adapter(llama, tmp_path / "one", 1)
    other = adapter(llama, tmp_path / "other", 2, target_modules=["q_proj"])
    merged = tmp_path / "merged"
    psoft_export.merge(llama, one, merged, device="cpu")
    before = files.tree(merged)

    def refused(error: type[Exception], words: str, folder: Path, **named: Any) -> None:
        content = files.tree(folder)
        with pytest.raises(error, match=words):
            psoft_export.swap(folder, **({"adapter": other, "base": llama} | named))
        assert files.tree(folder) == content

    refused(errors.CheckpointError, "no such file; swap changes folders that", llama)
    refused(errors.UsageError, "merged from a local base .*pass --base", merged, base=None)
    refused(errors.MismatchError, "was the adapter trained on another base", merged, adapter=PROSE)
    stranger = files.copy_of(llama, tmp_path / "stranger")
    name = "model.layers.0.mlp.up_proj.weight"
    files.edit_tensors(stranger / "model.safetensors", lambda t: t | {name: t[name] * 2})
    words = "stranger: its model.safetensors is not the one that the folder was merged from"
    refused(errors.MismatchError, words, merged, base=stranger)
    theirs = adapter(stranger, tmp_path / "theirs", 3)
    refused(errors.MismatchError, words, merged, base=stranger, adapter=theirs)
    linked = files.copy_of(merged, tmp_path / "linked")
    (linked / "more").symlink_to(tmp_path)
    refused(errors.CheckpointError, "more: is a symbolic link", linked)
    outside = files.copy_of(merged, tmp_path / "outside")
    manifest = json.loads((outside / "psoft_export.json").read_text())
    manifest["files"]["../merged/model.safetensors"] = "0" * 64
    (outside / "psoft_export.json").write_text(json.dumps(manifest))
    refused(errors.CheckpointError, "a path outside its folder", outside)
    edited = files.copy_of(merged, tmp_path / "edited")
    files.edit_tensors(edited / "model.safetensors", lambda t: t | {name: t[name] * 2})
    refused(errors.CheckpointError, "has been changed since it was merged", edited)
    half = files.copy_of(merged, tmp_path / "half")
    (half / "psoft_export.json").write_text('{"format": "psoft-export"}')
    refused(errors.CheckpointError, "is not of a merge", half)
    minilm = base_folder("minilm")
    head = models.save_adapter("minilm", minilm, tmp_path / "head")
    classifier = tmp_path / "classifier"
    psoft_export.merge(minilm, head, classifier, device="cpu")
    words = "its adapter brought 2 tensor"
    refused(errors.UnsupportedError, words, classifier, base=minilm, adapter=head)
    bare = models.save_adapter(
        "minilm", minilm, tmp_path / "bare", task_type=None, modules_to_save=None
    )
    psoft_export.merge(minilm, bare, tmp_path / "embedding", device="cpu")
    words = "head: brings tensors of its own"
    refused(errors.UnsupportedError, words, tmp_path / "embedding", base=minilm, adapter=head)
    assert files.tree(merged) == before


def test_a_base_on_the_hub_is_found_again(
    hub: Any, llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    cache = tmp_path / "cache"
    line = ["--base", "me/base@v2", "--adapter", "me/adapter", "--output", str(merged)]
    assert command(hub.url, cache, "merge", *line, "--device", "cpu").returncode == 0
    other = adapter(llama, tmp_path / "other", 7)
    done = command(hub.url, cache, "swap", str(merged), "--adapter", str(other), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    psoft_export.merge(llama, other, tmp_path / "local", device="cpu")
    weights = "model.safetensors"
    assert (merged / weights).read_bytes() == (tmp_path / "local" / weights).read_bytes()


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    for name, device in (("gpu", "cuda"), ("cpu", "cpu")):
        merged = tmp_path / name
        psoft_export.merge(BASE, PROSE, merged, device=device)
        psoft_export.swap(merged, SUMS, base=BASE, device=device)
    verdict = psoft_export.verify(BASE, SUMS, tmp_path / "gpu", level="weights")
    assert verdict.equivalent and torch.cuda.is_available()
