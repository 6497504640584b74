"""The trained example adapters: merged, they are the model that PEFT runs, on real text."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import psoft_export
from psoft_export.verification.tiles import unit_in_last_place
from tests import files, models
from tests.conftest import BUNDLED, EXAMPLES
from tests.machines import pretend, random_signs

sys.path.insert(0, str(EXAMPLES.parent))  # the example scripts are run from their folder
from corpora import CORPORA
from evaluate import held_out_loss, load_base, load_with_peft
from transformers import AutoTokenizer

BASE = EXAMPLES / "base"
WINDOWS = 24


@pytest.mark.parametrize("name", BUNDLED)
def test_merged_loss_is_the_adapters_and_below_the_bases(name: str, tmp_path: Path) -> None:
    adapter = EXAMPLES / "adapters" / name
    psoft_export.merge(BASE, adapter, tmp_path / "out", device="cpu")
    text = CORPORA[name]().held_out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    base, unmerged, merged = (
        held_out_loss(model, tokenizer, text, windows=WINDOWS)
        for model in (load_base(BASE), load_with_peft(BASE, adapter), load_base(tmp_path / "out"))
    )
    assert abs(merged - unmerged) < 1e-4
    assert merged < base - 0.3


@pytest.mark.parametrize("name", BUNDLED)
def test_every_weight_is_the_nearest_bfloat16_number(name: str, tmp_path: Path) -> None:
    adapter = EXAMPLES / "adapters" / name
    report = psoft_export.merge(BASE, adapter, tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    exact = models.exact_weights(load_with_peft(BASE, adapter))
    assert len(exact) == len(report.modules) == 28
    for path, weight in exact.items():
        error = (merged[f"{path}.weight"].double() - weight).abs()
        ulp = unit_in_last_place(weight, torch.bfloat16)
        assert float((error / ulp).max()) < 0.5 + 1e-6


@pytest.mark.parametrize("name", BUNDLED)
def test_wrong_signs_cost_more_than_the_adapter_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = EXAMPLES / "adapters" / name
    bare = files.copy_of(recorded, tmp_path / "bare")
    (bare / "psoft_basis.safetensors").unlink()
    pretend(random_signs, monkeypatch)
    for adapter, output in ((recorded, "with"), (bare, "without")):
        psoft_export.merge(BASE, adapter, tmp_path / output, device="cpu", cache=False)
    text = CORPORA[name]().held_out
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base, right, wrong = (
        held_out_loss(load_base(folder), tokenizer, text, windows=WINDOWS)
        for folder in (BASE, tmp_path / "with", tmp_path / "without")
    )
    assert right < base - 0.3 and wrong > base + 0.1


def test_demo_shows_what_the_readme_says() -> None:
    demo = [sys.executable, str(EXAMPLES.parent / "demo.py")]
    shown = subprocess.run(demo, capture_output=True, text=True, check=True).stdout
    assert "psoft-export merge --base" in shown
    assert "merged and adapter agree to the 4th decimal" in shown
    readme = (EXAMPLES.parent.parent / "README.md").read_text()
    for label in ("base", "base + adapter, run by PEFT", "merged checkpoint"):
        (line,) = (line for line in shown.splitlines() if line.startswith(f"  {label:<30} "))
        if sys.version_info[:2] == (3, 11):  # the held-out text is Python's own
            assert line in readme


def test_committed_files_are_small_and_hold_no_pickle() -> None:
    weights = list(EXAMPLES.rglob("*.safetensors"))
    assert len(weights) == 7 and not list(EXAMPLES.rglob("*.bin"))
    base = sum(p.stat().st_size for p in BASE.iterdir())
    adapters = sum(p.stat().st_size for p in (EXAMPLES / "adapters").rglob("*") if p.is_file())
    assert base <= 8_000_000 and adapters <= 1_000_000
