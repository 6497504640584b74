"""Planning in a process of its own: the same plan, the same errors, and no transformers here."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from psoft_export import Planner, load_adapter, merge, plan_merge, start_planner
from psoft_export.adapters.adapter import Reading
from psoft_export.checkpoint.source import Source
from psoft_export.errors import MismatchError, PsoftExportError, UsageError
from psoft_export.plan import OutputOptions
from tests import files, models
from tests.conftest import BUNDLED, EXAMPLES


@pytest.fixture
def planner() -> Planner:
    return Planner()


def test_a_plan_from_another_process_merges_to_the_same_files(
    planner: Planner, llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    named: dict[str, Any] = {"max_shard_size": "50KB", "dtype": "bf16", "cache": False}
    merge(llama, llama_adapter, tmp_path / "here", **named)
    merge(llama, llama_adapter, tmp_path / "there", **named, planner=planner)
    assert len(list((tmp_path / "here").glob("*.safetensors"))) > 1
    assert files.tree(tmp_path / "here") == files.tree(tmp_path / "there")


def test_a_new_head_and_its_labels_come_back(planner: Planner, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    models.save_base("minilm", base)
    models.save_adapter("minilm", base, adapter)
    plan = plan_merge(base, adapter, planner=planner)
    assert plan.layout == plan_merge(base, adapter, cache=False).layout
    assert any(tensor.saved for shard in plan.layout.shards for tensor in shard.tensors)


def test_the_command_never_loads_transformers(tmp_path: Path) -> None:
    base, adapter = EXAMPLES / "base", EXAMPLES / "adapters" / BUNDLED[1]
    line = ["merge", "--base", str(base), "--adapter", str(adapter), "--quiet"]
    code = (
        "import sys\n"
        "from psoft_export.cli.main import run\n"
        f"assert run({[*line, '--output', str(tmp_path / 'out')]}) == 0\n"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules\n"
        "assert 'huggingface_hub' not in sys.modules, 'for local folders'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    merge(base, adapter, tmp_path / "here")
    assert files.tree(tmp_path / "here") == files.tree(tmp_path / "out")


def test_no_planner_where_transformers_is_loaded() -> None:
    assert "transformers" in sys.modules and start_planner() is None


def test_errors_of_the_plan_come_back(
    planner: Planner, llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    other = files.copy_of(llama_adapter, tmp_path / "other")
    files.edit_tensors(
        other / "adapter_model.safetensors",
        lambda tensors: {name.replace("q_proj", "z_proj"): t for name, t in tensors.items()},
    )
    with pytest.raises(MismatchError) as here:
        plan_merge(llama, other)
    with pytest.raises(MismatchError) as there:
        plan_merge(llama, other, planner=planner)
    assert str(there.value) == str(here.value) and "z_proj" in str(here.value)


def test_a_command_whose_plan_fails_says_so_in_one_line(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    base = files.copy_of(llama, tmp_path / "base")
    files.edit_json(base / "config.json", model_type="unheard-of")
    line = ["merge", "--base", str(base), "--adapter", str(llama_adapter)]
    script = Path(sys.executable).parent / "psoft-export"
    done = subprocess.run(
        [script, *line, "--output", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 6 and done.stdout == ""
    assert "'unheard-of'" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_planner_that_dies_is_an_error(
    planner: Planner, llama: Path, llama_adapter: Path
) -> None:
    planner._process.kill()
    planner._process.join()
    with pytest.raises(PsoftExportError, match="ended with code -9"):
        plan_merge(llama, llama_adapter, planner=planner)


def test_a_planner_plans_once(planner: Planner, llama: Path, llama_adapter: Path) -> None:
    plan_merge(llama, llama_adapter, planner=planner, cache=False)
    with pytest.raises(UsageError, match="one merge only"):
        plan_merge(llama, llama_adapter, planner=planner, cache=False)


def test_an_unforeseen_error_names_its_kind(
    planner: Planner, llama_adapter: Path, tmp_path: Path
) -> None:
    source = load_adapter(llama_adapter).source
    missing: Any = None
    with pytest.raises(RuntimeError, match="TypeError"):
        planner.layout(Source(missing, "base"), source, Reading(), OutputOptions())
