"""The pipeline of `examples/ci` as a job runs it, and every command that the documents show."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml  # type: ignore[import-untyped]

from psoft_export.cli.main import app
from tests import files
from tests.conftest import BUNDLED, EXAMPLES
from tests.test_push import TOKEN, environment
from tests.writable_hub import WritableHub

ROOT = Path(__file__).parent.parent
CI = ROOT / "examples" / "ci"
BASE, PROSE = EXAMPLES / "base", EXAMPLES / "adapters" / BUNDLED[0]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(CI.iterdir())]


def shown_commands() -> Iterator[tuple[str, str]]:
    """Every line that starts with the program's name, continued lines joined, by document."""
    for path in DOCUMENTS:
        text = path.read_text("utf-8").replace("\\\n", " ")
        for line in re.findall(r"^\s*(?:- run: |run: )?(psoft-export [a-z].*)$", text, re.M):
            yield path.name, line


@pytest.mark.parametrize(("document", "line"), sorted(set(shown_commands())))
def test_documented_options_exist(document: str, line: str) -> None:
    command: Any = typer.main.get_command(app)
    words = line.partition(" #")[0].partition(" | ")[0].split()[1:]
    for word in words:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
    known = {option for parameter in command.params for option in parameter.opts}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(words)))
    assert words[0] in typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert used <= known, f"{document}: {line}"


def test_commands_are_found_in_the_documents() -> None:
    documents = {document for document, _ in shown_commands()}
    assert {"README.md", "verification.md", "ci.md", "publish.sh"} <= documents


class Job:
    """Runs the script in an empty folder, as a job does."""

    def __init__(self, hub: WritableHub, folder: Path) -> None:
        self.hub = hub
        self.folder = folder / "job"
        self.folder.mkdir()

    def run(self, base: Path, adapter: Path, *more: str) -> "subprocess.CompletedProcess[str]":
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        settings = environment(self.hub, self.folder.parent / "home") | {"PATH": programs}
        ended = subprocess.run(
            [CI / "publish.sh", base, adapter, "me/model", *more],
            cwd=self.folder,
            env=settings,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert TOKEN not in ended.stdout + ended.stderr
        return ended


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    hub = WritableHub(TOKEN)
    with hub.running():
        yield Job(hub, tmp_path)


def test_a_good_adapter_is_published_with_its_proof(job: Job, tmp_path: Path) -> None:
    text = tmp_path / "task.txt"
    text.write_text("This licence grants you the right to use and copy the software. " * 20)
    ended = job.run(BASE, PROSE, str(text))
    assert ended.returncode == 0, ended.stderr
    result = json.loads((job.folder / "merge.json").read_text("utf-8"))
    levels = result["verification"]
    assert all(levels[name]["equivalent"] for name in ("weights", "geometry", "outputs"))
    assert set(levels["outputs"]["losses"]) == {"truth", "unmerged", "merged"}
    assert "EQUIVALENT" in (job.folder / "summary.md").read_text("utf-8")
    assert "<html" in (job.folder / "report.html").read_text("utf-8")
    pushed = job.hub.files("me/model", "refs/pr/1")
    assert pushed["model.safetensors"] == (job.folder / "merged/model.safetensors").read_bytes()
    assert b"off by 0.5 units in the last place at most" in pushed["README.md"]


def test_an_adapter_without_a_record_is_not_published(job: Job, tmp_path: Path) -> None:
    adapter = files.copy_of(PROSE, tmp_path / "adapter")
    (adapter / "psoft_basis.safetensors").unlink()
    ended = job.run(BASE, adapter)
    assert ended.returncode == 13
    assert "has no basis record" in ended.stderr
    assert not (job.folder / "merged").exists() and job.hub.stored == {}


def test_an_adapter_of_another_base_is_not_published(job: Job, tmp_path: Path) -> None:
    base = files.copy_of(BASE, tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj.weight"
    files.edit_tensors(base / "model.safetensors", lambda t: t | {name: -t[name]})
    ended = job.run(base, PROSE)
    assert ended.returncode == 5 and name in ended.stderr
    assert job.hub.stored == {}


def test_the_workflow_runs_the_script_and_keeps_the_report() -> None:
    workflow = yaml.safe_load((CI / "publish.yml").read_text("utf-8"))
    steps = workflow["jobs"]["publish"]["steps"]
    scripts = [step["run"] for step in steps if "publish.sh" in step.get("run", "")]
    assert scripts == ['./publish.sh "$BASE" "$ADAPTER" "$REPOSITORY" heldout.txt']
    kept = next(step for step in steps if "upload-artifact" in step.get("uses", ""))
    assert kept["if"] == "always()" and "report.html" in kept["with"]["path"]
    # What comes from outside reaches the shell as variables only.
    assert not any("${{" in step.get("run", "") for step in steps)


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_json_goes_through_jq(tmp_path: Path) -> None:
    line = (
        f"psoft-export merge --base {BASE} --adapter {PROSE} --output {tmp_path / 'out'} --json "
        "| jq -r .verification.weights.equivalent"
    )
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        env=os.environ | {"PATH": programs},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout) == (0, "true\n"), ended.stderr


def test_local_links_and_pictures_exist() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text("utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
