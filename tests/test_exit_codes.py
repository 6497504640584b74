"""Each exit code, from a command line that a user could type, with one line that says why."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import psoft_export
from psoft_export import errors
from psoft_export.cli.main import run
from psoft_export.recovery import verdict
from psoft_export.recovery.run import LEAST_STEPS
from tests import files
from tests.conftest import BUNDLED, EXAMPLES
from tests.planted import plant

BASE, STRICT = EXAMPLES / "base", EXAMPLES / "adapters" / BUNDLED[1]
WEIGHTS, BASIS = "adapter_model.safetensors", "psoft_basis.safetensors"
TEXT = (Path(__file__).parent.parent / "docs" / "exit-codes.md").read_text("utf-8")


class Case:
    """Copies of base and adapter that a case may damage, and the command that then fails."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.patch = patch
        self.base = files.copy_of(BASE, folder / "base")
        self.adapter = files.copy_of(STRICT, folder / "adapter")
        self.output = folder / "out"
        self.more: list[str] = []

    @property
    def merge(self) -> list[str]:
        inputs = ["--base", str(self.base), "--adapter", str(self.adapter)]
        return ["merge", *inputs, "--output", str(self.output), *self.more]


def internal(case: Case) -> list[str]:
    case.patch.setattr(psoft_export, "merge", lambda *_, **__: 1 / 0)
    return case.merge


def usage(case: Case) -> list[str]:
    return [*case.merge, "--dtype", "int3"]


def adapter(case: Case) -> list[str]:
    (case.adapter / WEIGHTS).unlink()
    return case.merge


def checkpoint(case: Case) -> list[str]:
    files.truncate(case.base / "model.safetensors")
    return case.merge


def mismatch(case: Case) -> list[str]:
    name = "model.layers.0.self_attn.q_proj.weight"
    files.edit_tensors(case.base / "model.safetensors", lambda t: t | {name: -t[name]})
    return case.merge


def unsupported(case: Case) -> list[str]:
    files.edit_json(case.adapter / "adapter_config.json", peft_type="VERA")
    return case.merge


def non_finite(case: Case) -> list[str]:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        next(iter(tensors.values()))[0] = float("nan")
        return tensors

    files.edit_tensors(case.adapter / WEIGHTS, spoil)
    return case.merge


def output(case: Case) -> list[str]:
    case.output.mkdir()
    (case.output / "precious").write_text("mine")
    return case.merge


def disk_space(case: Case) -> list[str]:
    full = SimpleNamespace(total=10**9, used=10**9, free=0)
    case.patch.setattr(shutil, "disk_usage", lambda _: full)
    return case.merge


def hub(case: Case) -> list[str]:
    return ["inspect", "nobody/nothing"]  # tests run with HF_HUB_OFFLINE


def missing_extra(case: Case) -> list[str]:
    for name in {"matplotlib", *(n for n in sys.modules if n.startswith("matplotlib."))}:
        case.patch.setitem(sys.modules, name, None)
    return ["inspect", str(case.adapter), "--plot", str(case.folder / "angles.png")]


def record(case: Case) -> list[str]:
    files.truncate(case.adapter / BASIS)
    return case.merge


def record_missing(case: Case) -> list[str]:
    (case.adapter / BASIS).unlink()
    return [*case.merge, "--require-record"]


def not_equivalent(case: Case) -> list[str]:
    line = ["verify", "--base", str(case.base), "--adapter", str(case.adapter)]
    return [*line, "--merged", str(case.base), "--level", "weights"]


def recover(case: Case) -> list[str]:
    planted = plant(case.folder / "planted")
    (planted.adapter / BASIS).unlink()
    case.adapter = planted.adapter
    inputs = ["--base", str(planted.base), "--adapter", str(planted.adapter)]
    options = {"--text": planted.text, "--window": 64, "--steps": LEAST_STEPS}
    return ["recover", *inputs, *(str(word) for option in options.items() for word in option)]


def partly_recovered(case: Case) -> list[str]:
    case.patch.setattr(verdict, "_LEFT_OPEN", -1.0)  # no doubt at all is too much
    return [*recover(case), "--random-start"]


def not_recovered(case: Case) -> list[str]:
    def still(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    line = recover(case)
    files.edit_tensors(case.adapter / WEIGHTS, still)
    return line


def interrupted(case: Case) -> list[str]:
    def stop(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    case.patch.setattr(psoft_export, "merge", stop)
    return case.merge


CASES: dict[int, Callable[[Case], list[str]]] = {
    1: internal,
    2: usage,
    3: adapter,
    4: checkpoint,
    5: mismatch,
    6: unsupported,
    7: non_finite,
    8: output,
    9: disk_space,
    10: hub,
    11: missing_extra,
    12: record,
    13: record_missing,
    14: not_equivalent,
    15: partly_recovered,
    16: not_recovered,
    130: interrupted,
}


@pytest.mark.parametrize("code", CASES)
def test_the_code_and_one_line_that_says_why(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, monkeypatch)
    line = CASES[code](case)
    before = files.tree(case.output) if case.output.exists() else None
    found = run(line)
    said = capsys.readouterr().err
    assert found == code, said
    assert said.splitlines()[-1].startswith("error: ") and "Traceback" not in said
    assert (files.tree(case.output) if case.output.exists() else None) == before
    assert not list(tmp_path.glob(".out*"))


def test_every_code_is_documented_and_tried() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in kinds:
        assert f"| {kind.exit_code} | `{kind.__name__}`" in TEXT, kind
    assert {kind.exit_code for kind in kinds} | {130} == CASES.keys()
