"""What a user sees: plain results, one JSON object, quiet, progress, help."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import psoft_export
from psoft_export.cli.main import run
from tests.conftest import BUNDLED, EXAMPLES

ROOT = Path(__file__).parent.parent
BASE, PROSE = str(EXAMPLES / "base"), str(EXAMPLES / "adapters" / BUNDLED[0])
STRICT = str(EXAMPLES / "adapters" / BUNDLED[1])


def merge_line(output: Path, *more: str) -> list[str]:
    return ["merge", "--base", BASE, "--adapter", STRICT, "--output", str(output), *more]


def test_merge_reports_on_stdout_and_progress_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(merge_line(tmp_path / "out")) == 0
    said = capsys.readouterr()
    assert "28 modules, rank 32" in said.out and str(tmp_path / "out") in said.out
    assert "merging: 100 %, 28 of 28 targets" in said.err


def test_json_is_one_object_and_quiet_is_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(merge_line(tmp_path / "out", "--json")) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["output"] == str(tmp_path / "out") and len(result["modules"]) == 28
    assert run(merge_line(tmp_path / "other", "--quiet")) == 0
    assert capsys.readouterr() == ("", "")


def test_dry_run_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(merge_line(tmp_path / "out", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "model.layers.3.mlp.down_proj.weight" in said and "256 × 768" in said
    assert "28 of 39 tensors" in said and "memory for tensors" in said
    assert "basis recorded (signs; full SVD, cpu" in said
    assert run(merge_line(tmp_path / "out", "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["targets"]) == 28 and plan["disk_bytes"] == 6_561_280
    assert plan["basis_record"] == "signs"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "method", "parameters"),
    [
        (BUNDLED[0], "PSOFT-RO (relaxed: vector_a and vector_b), Cayley transform", 60_032),
        (BUNDLED[1], "PSOFT-SO (strict), Cayley transform", 13_888),
        (BUNDLED[2], "Cayley–Neumann series, 5 terms", 34_272),
    ],
)
def test_inspect(
    name: str, method: str, parameters: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(EXAMPLES / "adapters" / name)
    assert run(["inspect", folder]) == 0
    said = capsys.readouterr().out
    assert method in said and f"{parameters:,} in 28 modules" in said
    assert run(["inspect", folder, "--base", BASE, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["parameters"] == parameters
    assert summary["model_class"] == "LlamaForCausalLM"
    assert {tuple(layer["shape"]) for layer in summary["layers"]} == {
        (256, 256), (128, 256), (768, 256), (256, 768),
    }  # fmt: skip


def test_inspect_tells_strict_from_relaxed_from_truncated() -> None:
    relaxed, strict, series = (psoft_export.inspect(EXAMPLES / "adapters" / n) for n in BUNDLED)
    assert max(layer.orthogonality_error for layer in strict.layers) < 1e-13
    assert max(layer.orthogonality_error for layer in relaxed.layers) < 1e-13
    assert max(layer.orthogonality_error for layer in series.layers) > 1e-3
    assert all(layer.vector_a == layer.vector_b == 0 for layer in strict.layers)
    assert min(layer.vector_a for layer in relaxed.layers) > 0.01
    assert all(5 < layer.angles[0] < 180 for layer in (*relaxed.layers, *strict.layers))
    assert {layer.layer for layer in strict.layers} == {0, 1, 2, 3}


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot(
    suffix: str, start: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / f"angles.{suffix}"
    assert run(["inspect", PROSE, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(start) and picture.stat().st_size > 10_000
    assert run(["inspect", PROSE, "--plot", str(tmp_path / "angles.nonsense")]) == 8
    assert "angles.nonsense" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("merge", "inspect"):
        assert run([command, "--help"]) == 0
        assert f"psoft-export {command}" in capsys.readouterr().out


def test_importing_the_package_does_not_load_torch() -> None:
    code = "import sys, psoft_export.cli.main; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_wheel_brings_one_package(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {n.partition("/")[0] for n in names} == {
        "psoft_export", f"psoft_export-{version}.dist-info"
    }  # fmt: skip
    assert "psoft_export/cli/main.py" in names and "psoft_export/py.typed" in names
    assert "psoft_export/reports/page.html" in names
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "psoft_export").rglob("*.py")}
    assert sources <= set(names), "a subpackage is missing from the wheel"


@pytest.mark.parametrize(("output", "code"), [("full", 8), ("closed", 0)])
def test_output_that_cannot_be_written(output: str, code: int) -> None:
    """The process ends at once, but not before what it has said is out."""
    line = [Path(sys.executable).with_name("psoft-export"), "cache", "list", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    with Path("/dev/full").open("w") if output == "full" else os.fdopen(writer, "w") as stdout:
        ended = subprocess.run(
            line, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert ended.returncode == code
    said = "error: the output cannot be written (No space left on device)\n"
    assert ended.stderr == (said if code else "")
