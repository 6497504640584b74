"""Bases found once: kept on disk, shared by adapters and processes, never trusted when damaged."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import psoft_export
from psoft_export import bases
from psoft_export.basis.svd import Triplets
from psoft_export.cache import BasisCache, CachedTriplets, open_cache
from psoft_export.checkpoint.output import replacing_file
from psoft_export.cli.main import run
from psoft_export.errors import UsageError
from tests import files, models
from tests.conftest import BUNDLED, EXAMPLES

BASE = EXAMPLES / "base"
WEIGHT = "ab" * 32


def found(rank: int, seed: int = 0) -> CachedTriplets:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(20, rank, generator=generator)
    values = torch.rand(rank, generator=generator).sort(descending=True).values
    return CachedTriplets(Triplets(left, values, torch.randn(rank, 30, generator=generator)), 0.25)


def same(one: CachedTriplets | None, other: CachedTriplets) -> bool:
    return one is not None and all(
        torch.equal(getattr(one.triplets, name), getattr(other.triplets, name))
        for name in ("left", "values", "right")
    )


def forbid_search(patch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Any:
        raise AssertionError("a basis was searched for")

    patch.setattr(bases, "training_svd", never)
    patch.setattr(bases, "leading_triplets", never)


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    cache = BasisCache(tmp_path / "cache")
    assert cache.get(WEIGHT, "solver", 4) is None and not (tmp_path / "cache").exists()
    kept = found(8)
    cache.put(WEIGHT, "solver", kept)
    again = BasisCache(tmp_path / "cache").get(WEIGHT, "solver", 8)
    assert same(again, kept) and again is not None and again.next_value == 0.25
    assert cache.get(WEIGHT, "another solver", 8) is None
    assert cache.get("cd" * 32, "solver", 8) is None
    assert cache.problem is None


def test_a_higher_rank_serves_lower_ones(tmp_path: Path) -> None:
    cache = BasisCache(tmp_path)
    kept = found(8)
    cache.put(WEIGHT, "solver", kept)
    lower = cache.get(WEIGHT, "solver", 5)
    assert lower is not None and same(lower, CachedTriplets(kept.triplets.truncated(5), None))
    assert lower.next_value == float(kept.triplets.values[5])
    assert cache.get(WEIGHT, "solver", 9) is None
    cache.put(WEIGHT, "solver", found(3, seed=1))
    assert same(cache.get(WEIGHT, "solver", 8), kept), "a lower rank does not replace it"
    more = found(12, seed=2)
    cache.put(WEIGHT, "solver", more)
    assert same(cache.get(WEIGHT, "solver", 12), more)
    assert len(cache.entries()) == 1


@pytest.mark.parametrize("damage", ["cut", "bit", "metadata", "empty", "moved"])
def test_a_damaged_entry_is_noticed_and_removed(damage: str, tmp_path: Path) -> None:
    cache = BasisCache(tmp_path)
    cache.put(WEIGHT, "solver", found(8))
    (path,) = [entry.path for entry in cache.entries()]
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-5])
    elif damage == "bit":
        data[-7] ^= 4
        path.write_bytes(data)
    elif damage == "metadata":
        path.write_bytes(data.replace(b'"next_value":"0.25"', b'"next_value":"0.26"'))
    elif damage == "empty":
        path.write_bytes(b"")
    else:  # the entry of another weight under this name
        other = BasisCache(tmp_path / "other")
        other.put("cd" * 32, "solver", found(8))
        path.write_bytes(other.entries()[0].path.read_bytes())
    assert cache.get(WEIGHT, "solver", 8) is None
    assert not path.exists()
    cache.put(WEIGHT, "solver", found(8))
    assert same(cache.get(WEIGHT, "solver", 8), found(8))


def test_room_is_made_by_the_least_recently_used(tmp_path: Path) -> None:
    names = [f"{number:02d}" * 32 for number in range(4)]
    cache = BasisCache(tmp_path)
    for age, name in enumerate(names[:3]):
        cache.put(name, "solver", found(8))
        stamp = time.time() - 100 + age
        os.utime(next(tmp_path.glob(f"{name}*")), (stamp, stamp))
    assert cache.get(names[0], "solver", 8) is not None, "and is the most recent now"
    limit = sum(entry.nbytes for entry in cache.entries())
    small = BasisCache(tmp_path, limit_bytes=limit)
    small.put(names[3], "solver", found(8))
    kept = {entry.weight for entry in small.entries()}
    assert kept == {names[0], names[2], names[3]}
    assert sum(entry.nbytes for entry in small.entries()) <= limit


def test_processes_share_a_folder(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from psoft_export.cache import BasisCache\n"
        "from tests.test_cache import WEIGHT, found, same\n"
        "cache = BasisCache(Path(sys.argv[1]))\n"
        "for turn in range(60):\n"
        "    rank = 4 + turn % 9\n"
        "    got = cache.get(WEIGHT, 'solver', rank)\n"
        "    whole = found(12)\n"
        "    assert got is None or same(got, type(got)(whole.triplets.truncated(rank), None))\n"
        "    cache.put(WEIGHT, 'solver', type(whole)(whole.triplets.truncated(rank), 0.5))\n"
        "    if turn % 20 == 19: cache.clear()\n"
        "assert cache.problem is None, cache.problem\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_unfinished_entry_is_never_seen(tmp_path: Path) -> None:
    cache = BasisCache(tmp_path)
    cache.put(WEIGHT, "solver", found(4))
    (path,) = [entry.path for entry in cache.entries()]
    with pytest.raises(KeyboardInterrupt), replacing_file(path) as scratch:
        scratch.write_bytes(b"half")
        assert same(cache.get(WEIGHT, "solver", 4), found(4))
        raise KeyboardInterrupt
    assert [entry.path for entry in cache.entries()] == [path]
    assert same(cache.get(WEIGHT, "solver", 4), found(4))


def test_a_second_adapter_of_a_base_needs_no_svd(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = files.copy_of(EXAMPLES / "adapters" / BUNDLED[0], tmp_path / "bare")
    (bare / "psoft_basis.safetensors").unlink()
    psoft_export.merge(BASE, bare, tmp_path / "first", device="cpu")
    assert len(open_cache(None).entries()) == 28 and cache_folder.is_dir()
    second = files.copy_of(EXAMPLES / "adapters" / BUNDLED[1], tmp_path / "second")
    (second / "psoft_basis.safetensors").unlink()
    psoft_export.merge(BASE, second, tmp_path / "wanted", device="cpu", cache=False)
    forbid_search(monkeypatch)
    psoft_export.merge(BASE, second, tmp_path / "got", device="cpu")
    with pytest.raises(AssertionError, match="searched"):
        psoft_export.merge(BASE, second, tmp_path / "none", device="cpu", cache=False)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("wanted", "got"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_recorded_adapters_share_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    settings: dict[str, Any] = {"device": "cpu", "cache_dir": folder}
    first, second = (EXAMPLES / "adapters" / name for name in (BUNDLED[0], BUNDLED[2]))
    psoft_export.merge(BASE, first, tmp_path / "first", **settings)
    psoft_export.merge(BASE, second, tmp_path / "wanted", device="cpu", cache=False)
    forbid_search(monkeypatch)
    psoft_export.merge(BASE, second, tmp_path / "got", **settings)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("wanted", "got"))
    for name in one:
        apart = (one[name].double() - other[name].double()).norm()
        assert float(apart / one[name].double().norm()) < 1e-4, "another rank was asked for first"


def test_list_and_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = str(EXAMPLES / "adapters" / BUNDLED[1])
    folder = str(tmp_path / "cache")
    line = ["merge", "--base", str(BASE), "--adapter", adapter, "--device", "cpu", "--quiet"]
    assert run([*line, "--output", str(tmp_path / "out"), "--cache-dir", folder]) == 0
    assert run(["cache", "list", "--cache-dir", folder]) == 0
    said = capsys.readouterr().out
    assert "28 bases" in said and "768 × 256" in said and folder in said
    assert run(["cache", "list", "--cache-dir", folder, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed["entries"]) == 28 and {e["rank"] for e in listed["entries"]} == {32}
    assert listed["bytes"] == sum(e["bytes"] for e in listed["entries"])
    assert run(["cache", "clear", "--cache-dir", folder]) == 0
    assert "freed" in capsys.readouterr().out and not list(Path(folder).iterdir())
    assert run(["cache", "list", "--cache-dir", folder]) == 0
    assert "0 bases" in capsys.readouterr().out


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSOFT_EXPORT_CACHE", str(tmp_path / "named"))
    assert open_cache(None).folder == tmp_path / "named"
    assert open_cache(tmp_path / "given").folder == tmp_path / "given"
    monkeypatch.delenv("PSOFT_EXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_cache(None).folder == tmp_path / "xdg" / "psoft-export"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        open_cache(tmp_path / "file")


def test_no_cache_writes_none(llama: Path, tmp_path: Path, cache_folder: Path) -> None:
    adapter = models.save_adapter("llama", llama, tmp_path / "adapter")
    psoft_export.merge(llama, adapter, tmp_path / "out", device="cpu", cache=False)
    assert not cache_folder.exists()


def test_a_cache_with_holes_gives_the_same_model(tmp_path: Path) -> None:
    bare = files.copy_of(EXAMPLES / "adapters" / BUNDLED[1], tmp_path / "bare")
    (bare / "psoft_basis.safetensors").unlink()
    settings: dict[str, Any] = {"device": "cpu", "cache_dir": tmp_path / "cache"}
    threads = torch.get_num_threads()
    psoft_export.merge(BASE, bare, tmp_path / "wanted", **settings)
    entries = sorted(entry.path for entry in open_cache(tmp_path / "cache").entries())
    for path in entries[::3]:  # found again by all threads, between others merged beside each other
        path.unlink()
    psoft_export.merge(BASE, bare, tmp_path / "got", **settings)
    assert torch.get_num_threads() == threads
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("wanted", "got"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(entry.path for entry in open_cache(tmp_path / "cache").entries()) == entries
