"""Hashes found while torch loads: they count for unchanged files only, and never decide alone."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from psoft_export import merge, record
from psoft_export.checkpoint import hashed_ahead
from psoft_export.checkpoint.hashed_ahead import Identity, digest_ahead, identity, start_hashing
from psoft_export.checkpoint.kept_json import KeptJson
from psoft_export.checkpoint.reader import FileReader, file_sha256, open_checkpoint
from psoft_export.checkpoint.safetensors_file import TensorEntry
from psoft_export.errors import CheckpointError, MismatchError
from tests import files

WEIGHTS = "model.safetensors"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Found:
    """In place of a process that has hashed files."""

    def __init__(self, *paths: Path) -> None:
        self.digests: dict[Identity, str] = {}
        for path in paths:
            with path.open("rb") as file:
                seen = identity(file.fileno())
                assert seen is not None
                self.digests[seen] = sha256(path)

    def listen(self) -> None:
        """It has said all."""


Ahead = Callable[..., Found]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Ahead:
    """Makes the digests of files known; those of tests were written just now."""
    monkeypatch.setattr(hashed_ahead, "_TICK_SECONDS", 0.0)

    def know(*paths: Path) -> Found:
        found = Found(*paths)
        monkeypatch.setattr(hashed_ahead, "_processes", [found])
        return found

    return know


def known(path: Path) -> str | None:
    with path.open("rb") as file:
        return digest_ahead(file.fileno())


@pytest.fixture
def base(llama: Path, tmp_path: Path) -> Path:
    return files.copy_of(llama, tmp_path / "base")


@pytest.fixture
def adapter(base: Path, llama_adapter: Path) -> Path:
    """With a full record, which names the SHA-256 of each weight."""
    record(base, llama_adapter, kind="full")
    return llama_adapter


def test_a_process_hashes_the_files_that_a_merge_reads(
    base: Path, llama_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "other.safetensors").write_bytes(b"of no checkpoint")
    monkeypatch.setattr(hashed_ahead, "_processes", [])
    start_hashing(base)
    assert hashed_ahead._processes == [], "torch is loaded: nothing to be gained"
    time.sleep(hashed_ahead._TICK_SECONDS + 0.1)
    new = llama_adapter / "new.safetensors"
    new.write_bytes(b"of just now")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        start_hashing(llama_adapter, base, tmp_path / "missing", "owner/name", "~nobody/base")
    (process,) = hashed_ahead._processes
    assert process._process.wait(60) == 0
    found = [llama_adapter / "adapter_model.safetensors", base / WEIGHTS]
    assert [known(path) for path in found] == [sha256(path) for path in found]
    assert len(process.digests) == 2 and known(new) is None
    with (base / WEIGHTS).open("r+b") as file:
        file.write(b"\0")
    assert known(base / WEIGHTS) is None, "written to since"


def test_what_the_first_seconds_do_not_hash_is_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(bytes(1000))
    monkeypatch.setattr(hashed_ahead, "_TICK_SECONDS", 0.0)
    paths[1].write_bytes(bytes(3000))
    monkeypatch.setattr(hashed_ahead, "_MOST_BYTES", 2500)
    hashed_ahead._hash([str(tmp_path / "missing"), *map(str, paths)], os.getppid())
    said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [digest for _, digest in said] == [sha256(path) for path in (paths[0], paths[2])]
    with monkeypatch.context() as patch:
        patch.setattr(hashed_ahead, "_MOST_SECONDS", -1.0)
        hashed_ahead._hash([str(paths[0])], os.getppid())
        assert capfd.readouterr().out == "", "it has taken long enough"
    hashed_ahead._hash([str(paths[0])], os.getppid() + 1)
    assert capfd.readouterr().out == "", "it ends with the process that asked"


def test_what_is_hashed_ahead_is_not_hashed_again(base: Path, ahead: Ahead) -> None:
    (file,) = open_checkpoint(base).files
    found = ahead(file.path)
    (seen,) = found.digests
    found.digests[seen] = "ab" * 32  # shows that it was taken
    with FileReader(file) as reader:
        entry = file.entries[-1]
        assert torch.equal(reader.values(entry), load_file(file.path)[entry.name])
        assert reader.sha256() == "ab" * 32
    assert file_sha256(file.path, CheckpointError) == "ab" * 32


def test_a_file_that_changes_while_it_is_read_is_noticed(base: Path, ahead: Ahead) -> None:
    (file,) = open_checkpoint(base).files
    ahead(file.path)
    right = sha256(file.path)
    with FileReader(file) as reader:
        file.path.chmod(0o600)  # another time of change, the same bytes
        assert reader.sha256() == right
        with file.path.open("r+b") as handle:
            handle.seek(file.entries[-1].offset)
            handle.write(b"\1\2")
        with pytest.raises(CheckpointError, match=f"{WEIGHTS}: was changed meanwhile; run again"):
            reader.sha256()


def test_a_digest_of_a_later_state_is_not_taken(base: Path, ahead: Ahead) -> None:
    (file,) = open_checkpoint(base).files
    ahead()
    with FileReader(file) as reader:
        before = sha256(file.path)
        entry = file.entries[-1]
        reader.values(entry)  # hashed as it is read
        with file.path.open("r+b") as handle:
            handle.seek(entry.offset)
            handle.write(b"\1\2")
        ahead(file.path)
        assert reader.digest_ahead() is None
        assert reader.sha256() == before, "of the bytes that were read"
    with FileReader(file) as reader:  # of a header that was read before the change
        assert reader.digest_ahead() is None


def test_what_else_the_process_says_is_passed_over(tmp_path: Path) -> None:
    process = hashed_ahead._Hashing([])
    process._process.wait(60)
    assert process._process.stdout is not None
    process._process.stdout.close()
    process._process.stdout = (tmp_path / "said").open("w+b", buffering=0)
    process._process.stdout.write(b'hello\n[1]\n[[1, 2], "ab"]\n{}\n[[3')
    process._process.stdout.seek(0)
    process.listen()
    assert process.digests == {(1, 2): "ab"}


def test_hashes_of_tensors_are_kept_under_that_of_their_file(
    base: Path, adapter: Path, tmp_path: Path, cache_folder: Path, ahead: Ahead
) -> None:
    ahead()
    merge(base, adapter, tmp_path / "first")
    (path,) = (cache_folder / "hashes").iterdir()
    assert path.stem == sha256(base / WEIGHTS)
    kept = KeptJson(path.parent)
    hashes = kept.get(path.stem)
    assert hashes is not None and len(hashes) > 1

    ahead(base / WEIGHTS)
    merge(base, adapter, tmp_path / "second")
    assert files.tree(tmp_path / "first") == files.tree(tmp_path / "second")

    name = max(hashes)
    kept.put(path.stem, hashes | {name: "ab" * 32})  # shows that it is taken
    with pytest.raises(MismatchError, match=name):
        merge(base, adapter, tmp_path / "third")
    merge(base, adapter, tmp_path / "third", cache=False)
    ahead()  # the file's own hash is not known before it is read: no tensor's is taken for known
    merge(base, adapter, tmp_path / "fourth")


def test_kept_hashes_do_not_hide_another_base(
    base: Path, adapter: Path, tmp_path: Path, ahead: Ahead
) -> None:
    ahead()
    merge(base, adapter, tmp_path / "first")
    found = ahead(base / WEIGHTS)
    files.edit_tensors(base / WEIGHTS, lambda t: {name: 2 * v for name, v in t.items()})
    assert known(base / WEIGHTS) is None
    ahead(base / WEIGHTS).digests.update(found.digests)
    with pytest.raises(MismatchError, match="not the base"):
        merge(base, adapter, tmp_path / "second")


def test_a_weight_that_changes_as_it_is_read_is_not_the_kept_one(
    base: Path, adapter: Path, tmp_path: Path, ahead: Ahead, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead()
    merge(base, adapter, tmp_path / "first")
    ahead(base / WEIGHTS)
    values = FileReader.values

    def changed_values(reader: FileReader, entry: TensorEntry) -> torch.Tensor:
        with (base / WEIGHTS).open("r+b") as handle:
            handle.seek(entry.offset)
            handle.write(b"\1\2")
        return values(reader, entry)

    monkeypatch.setattr(FileReader, "values", changed_values)
    with pytest.raises(MismatchError, match="not the base"):
        merge(base, adapter, tmp_path / "second")


def test_the_command_hashes_ahead(
    base: Path, adapter: Path, tmp_path: Path, cache_folder: Path
) -> None:
    line = ["--base", str(base), "--adapter", str(adapter), "--quiet"]
    code = (
        "import sys\n"
        "from psoft_export.cli.main import run\n"
        f"assert run(['merge', *{line}, '--output', sys.argv[1]]) == 0\n"
        "from psoft_export.checkpoint import hashed_ahead\n"
        "assert len(hashed_ahead._processes) == 1\n"
    )
    time.sleep(hashed_ahead._TICK_SECONDS)
    for name in ("first", "second"):  # where the first has kept hashes
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    (path,) = (cache_folder / "hashes").iterdir()
    assert path.stem == sha256(base / WEIGHTS)
    merge(base, adapter, tmp_path / "here", cache=False)
    assert files.tree(tmp_path / "here") == files.tree(tmp_path / "second")

    kept = KeptJson(path.parent)
    hashes = kept.get(path.stem)
    assert hashes is not None
    kept.put(path.stem, dict.fromkeys(hashes, "ab" * 32))  # shows that they are taken
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "third")], capture_output=True, text=True
    )
    assert "not the base" in ended.stderr
