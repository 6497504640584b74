"""Layouts made once: kept on disk, shared by adapters of the same shapes and no others."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from psoft_export import layouts, load_adapter, merge, plan_merge
from psoft_export.checkpoint import kept_json
from psoft_export.checkpoint.reader import open_checkpoint
from psoft_export.cli.main import run
from psoft_export.layouts import LayoutCache, layout_key
from psoft_export.plan import OutputOptions
from psoft_export.planner import Planner
from tests import files, models


def forbid_planning(patch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Any:
        raise AssertionError("a layout was made")

    patch.setattr("psoft_export.planning.make_layout", never)


def entries(cache: Path) -> list[Path]:
    return list((cache / "layouts").glob("*.json"))


@pytest.mark.parametrize("family", ["llama", "minilm", "t5"])
@pytest.mark.parametrize("options", [{}, {"dtype": "bf16", "max_shard_size": "50KB"}])
def test_what_was_kept_comes_back(
    family: str,
    options: dict[str, Any],
    base_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache_folder: Path,
) -> None:
    base = base_folder(family)
    adapter = models.save_adapter(family, base, tmp_path / "adapter")
    made = plan_merge(base, adapter, **options).layout
    assert plan_merge(base, adapter, cache=False, **options).layout == made
    assert len(entries(cache_folder)) == 1
    forbid_planning(monkeypatch)
    assert plan_merge(base, adapter, **options).layout == made


def test_another_adapter_of_the_same_shapes_needs_no_transformers(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    merge(llama, llama_adapter, tmp_path / "first")
    other = files.copy_of(llama_adapter, tmp_path / "other")
    files.edit_tensors(
        other / "adapter_model.safetensors", lambda t: {n: 0.5 * v for n, v in t.items()}
    )
    code = (
        "import sys, psoft_export\n"
        f"psoft_export.merge({str(llama)!r}, {str(other)!r}, {str(tmp_path / 'second')!r})\n"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    merge(llama, other, tmp_path / "here", cache=False)
    there, here = files.tree(tmp_path / "second"), files.tree(tmp_path / "here")
    assert there["model.safetensors"] == here["model.safetensors"]
    assert there.keys() == here.keys()


def test_everything_that_decides_is_in_the_key(
    llama: Path, llama_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(base: Path = llama, adapter: Path = llama_adapter, **options: Any) -> str | None:
        return layout_key(open_checkpoint(base), load_adapter(adapter), OutputOptions(**options))

    def changed_base(**fields: Any) -> Path:
        base = files.copy_of(llama, tmp_path / "-".join(fields))
        files.edit_json(base / "config.json", **fields)
        return base

    def changed_adapter(**fields: Any) -> Path:
        adapter = files.copy_of(llama_adapter, tmp_path / "-".join(fields))
        files.edit_json(adapter / "adapter_config.json", **fields)
        return adapter

    sharded = files.copy_of(llama, tmp_path / "sharded")
    files.as_shards(sharded, 2)
    fewer = files.copy_of(llama_adapter, tmp_path / "fewer")
    files.edit_tensors(
        fewer / "adapter_model.safetensors",
        lambda t: {n: v for n, v in t.items() if "layers.0" in n},
    )
    keys = [
        key(),
        key(dtype="BF16"),
        key(max_shard_size="1MB"),
        key(labels=("a", "b")),
        key(changed_base(tie_word_embeddings=True)),
        key(sharded),
        key(adapter=changed_adapter(task_type="FEATURE_EXTRACTION")),
        key(adapter=fewer),
    ]
    assert key() == keys[0] is not None and len(set(keys)) == len(keys)
    monkeypatch.setattr(layouts, "version", lambda _: "another")
    assert key() not in keys
    monkeypatch.undo()
    monkeypatch.setattr(layouts, "_PACKAGE", tmp_path)  # other code
    assert key() not in keys
    assert key(changed_base(configuration_files=["config.5.json"])) is None


def test_pickle_files_are_laid_out_anew(
    llama: Path, llama_adapter: Path, tmp_path: Path, cache_folder: Path
) -> None:
    base = files.copy_of(llama, tmp_path / "base")
    files.as_pickle(base)
    plan_merge(base, llama_adapter)
    assert entries(cache_folder) == []


@pytest.mark.parametrize("damage", ["cut", "other", "not-json", "empty"])
def test_a_damaged_entry_is_made_anew(
    damage: str, llama: Path, llama_adapter: Path, cache_folder: Path
) -> None:
    made = plan_merge(llama, llama_adapter).layout
    (path,) = entries(cache_folder)
    text = path.read_text()
    spoilt = {
        "cut": text[: len(text) // 2],
        "other": text.replace('"LlamaForCausalLM"', '"LlamaModel"'),
        "not-json": "[1, 2]",
        "empty": "",
    }
    assert spoilt[damage] != text
    path.write_text(spoilt[damage])
    assert plan_merge(llama, llama_adapter).layout == made
    assert path.read_text() == text, "and kept again"


@pytest.mark.parametrize("fault", ["another key", "a path", "a module left out", "a shape"])
def test_a_layout_of_something_else_is_not_taken(
    fault: str, llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    checkpoint, adapter = open_checkpoint(llama), load_adapter(llama_adapter)
    made = plan_merge(llama, llama_adapter, cache=False).layout
    cache, key = LayoutCache(tmp_path), "ab" * 32
    cache.put(key, made)
    assert cache.get(key, checkpoint, adapter) == made
    (shard,) = made.shards
    if fault == "another key":
        (path,) = entries(tmp_path)
        path.rename(path.with_name("cd" * 32 + ".json"))
        key = "cd" * 32
    elif fault == "a path":
        cache.put(key, replace(made, shards=(replace(shard, filename="../model.safetensors"),)))
    elif fault == "a shape":
        specs = [replace(t.spec, shape=(*t.spec.shape, 1)) for t in shard.tensors]
        tensors = [replace(t, spec=s) for t, s in zip(shard.tensors, specs, strict=True)]
        cache.put(key, replace(made, shards=(replace(shard, tensors=tuple(tensors)),)))
    else:
        tensors = [replace(t, module=None) for t in shard.tensors]
        cache.put(key, replace(made, shards=(replace(shard, tensors=tuple(tensors)),)))
    assert cache.get(key, checkpoint, adapter) is None


def test_the_least_recently_used_goes(
    llama: Path, llama_adapter: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_json, "_KEPT", 2)
    plan_merge(llama, llama_adapter)
    (first,) = entries(cache_folder)
    plan_merge(llama, llama_adapter, dtype="bf16")
    plan_merge(llama, llama_adapter)  # used again
    plan_merge(llama, llama_adapter, dtype="fp16")
    kept = entries(cache_folder)
    assert len(kept) == 2 and first in kept


def test_a_folder_that_cannot_be_written_stops_nothing(
    llama: Path, llama_adapter: Path, cache_folder: Path
) -> None:
    cache_folder.mkdir()
    (cache_folder / "layouts").write_text("in the way")
    made = plan_merge(llama, llama_adapter).layout
    assert plan_merge(llama, llama_adapter).layout == made


def test_clear_removes_layouts(
    llama: Path, llama_adapter: Path, cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_merge(llama, llama_adapter)
    assert entries(cache_folder) and run(["cache", "clear"]) == 0
    assert entries(cache_folder) == [] and "freed" in capsys.readouterr().out


def test_a_planner_that_waits_starts_only_where_no_layout_is_kept(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    asked = Planner(at_once=False)
    made = plan_merge(llama, llama_adapter, planner=asked).layout
    assert asked._process.exitcode == 0
    spared = Planner(at_once=False)
    assert plan_merge(llama, llama_adapter, planner=spared).layout == made
    assert spared._process.pid is None


def test_the_process_of_a_command_waits_where_layouts_are_kept(
    llama: Path, llama_adapter: Path, cache_folder: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from psoft_export.planner import start_planner\n"
        "if __name__ == '__main__':\n"
        "    kept, none, unused = (start_planner(folder, cache=cache) for folder, cache in\n"
        "        ((sys.argv[1], True), (sys.argv[2], True), (sys.argv[1], False)))\n"
        "    print(*(p._process.pid is not None for p in (kept, none, unused)))\n"
        "    for planner in (kept, none, unused):\n"
        "        planner.stop()\n"
        "    assert 'torch' not in sys.modules\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code, "utf-8")
    plan_merge(llama, llama_adapter)
    line = [sys.executable, str(script), str(cache_folder), str(tmp_path / "none")]
    said = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    assert said == "False True True\n"


def test_a_cache_that_cannot_be_looked_at_does_not_stop_a_planner(tmp_path: Path) -> None:
    a_file = tmp_path / "file"
    a_file.touch()
    code = (
        "import sys\n"
        "from psoft_export.planner import start_planner\n"
        "if __name__ == '__main__':\n"
        "    planner = start_planner(sys.argv[1])\n"
        "    assert planner._process.pid is not None\n"
        "    planner.stop()\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code, "utf-8")
    for folder in ("x" * 300, str(a_file), "~nobody-of-that-name/cache"):
        subprocess.run([sys.executable, str(script), folder], check=True)


def test_a_planner_that_is_not_needed_ends(llama: Path, llama_adapter: Path) -> None:
    plan_merge(llama, llama_adapter)
    planner = Planner()
    plan_merge(llama, llama_adapter, planner=planner)
    assert planner._process.exitcode is not None
