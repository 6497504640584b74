"""Publishing on the Hub, with the real client, against a server on loopback."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import psoft_export
from tests import files, models
from tests.conftest import BUNDLED, EXAMPLES
from tests.writable_hub import WritableHub

HUB_ERROR, NOT_EQUIVALENT, USAGE = 10, 14, 2
TOKEN = "hf_" + "secretsecretsecret"
BASE, PROSE = EXAMPLES / "base", EXAMPLES / "adapters" / BUNDLED[0]


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    server = WritableHub(TOKEN, {"me/base": BASE})
    with server.running():
        yield server


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "merged"
    psoft_export.merge(BASE, PROSE, folder, max_shard_size="3MB", cache=False)
    return folder


def environment(hub: WritableHub, home: Path, token: str = TOKEN) -> dict[str, str]:
    """That of a client of `hub`, which speaks plain LFS: `hub` has no Xet storage behind it."""
    return os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_EXPERIMENTAL_WARNING": "1",
    }


class Client:
    """Runs psoft-export and huggingface_hub in processes of their own."""

    def __init__(self, hub: WritableHub, folder: Path) -> None:
        self.hub = hub
        self.folder = folder
        self.token = TOKEN
        self.more: dict[str, str] = {}

    def start(self, *arguments: str | Path) -> "subprocess.Popen[str]":
        line = [sys.executable, "-m", "psoft_export.cli.main", *map(str, arguments)]
        settings = environment(self.hub, self.folder / "home", self.token) | self.more
        return subprocess.Popen(
            line, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __call__(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert self.token not in out + err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def done(self, *arguments: str | Path) -> dict[str, Any]:
        """The JSON result of a command that must succeed."""
        ended = self(*arguments, "--json")
        assert ended.returncode == 0, ended.stderr
        result: dict[str, Any] = json.loads(ended.stdout)
        return result

    def download(self, repo_id: str, revision: str) -> dict[str, bytes]:
        target = self.folder / f"download-{revision[:12].replace('/', '-')}"
        code = f"""
from huggingface_hub import snapshot_download
snapshot_download({repo_id!r}, revision={revision!r}, local_dir={str(target)!r})
"""
        settings = environment(self.hub, self.folder / "home")
        subprocess.run([sys.executable, "-c", code], env=settings, check=True, timeout=60)
        found = files.tree(target)
        return {name: data for name, data in found.items() if not name.startswith(".")}


@pytest.fixture
def client(hub: WritableHub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_goes_up_comes_back(
    client: Client, hub: WritableHub, merged: Path, tmp_path: Path
) -> None:
    folder = files.copy_of(merged, tmp_path / "merged")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "half.lock").write_text("scratch")
    (folder / ".model.safetensors.1a2b").write_text("scratch")
    (folder / "merged.lock").write_text("scratch")
    report = client.done("push", folder, "me/merged", "--private")
    local = files.tree(merged)
    assert report["repo_id"] == "me/merged" and report["card"] == "written"
    assert set(report["files"]) == {*local, "README.md"}
    assert hub.created[0]["visibility"] == "private"
    assert hub.stored["me/merged"].private
    for revision in ("main", report["commit"]):
        there = client.download("me/merged", revision)
        assert there.pop("README.md").startswith(b"---\n")
        assert there == local, "byte for byte, and nothing else"
    shards = sorted(merged.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {sha256(path) for path in shards} == set(hub.objects), "as LFS objects, hashes checked"
    assert not (folder / "README.md").exists(), "the folder is as it was"

    sent = dict(hub.received)
    again = client.done("push", folder, "me/merged")
    assert again["commit"] == report["commit"], "nothing changed, nothing to commit"
    assert hub.received == sent


def test_branch_pull_request_and_message_reach_the_hub(
    client: Client, hub: WritableHub, merged: Path
) -> None:
    client.done("push", merged, "me/merged", "--revision", "v2", "--commit-message", "Second try")
    repository = hub.stored["me/merged"]
    assert set(hub.files("me/merged", "main")) == {".gitattributes"}
    assert "model.safetensors.index.json" in hub.files("me/merged", "v2")
    assert repository.messages[-1] == "Second try"
    report = client.done("push", merged, "me/merged", "--create-pr")
    assert report["pull_request"] == f"{hub.url}/me/merged/discussions/1" == report["url"]
    assert set(hub.files("me/merged", "main")) == {".gitattributes"}
    assert "model.safetensors.index.json" in hub.files("me/merged", "refs/pr/1")
    unknown = client("push", merged, "me/merged", "--revision", "0" * 40)
    assert unknown.returncode == HUB_ERROR and "no such revision" in unknown.stderr


def test_a_push_cut_short_goes_on_where_it_was(
    client: Client, hub: WritableHub, merged: Path
) -> None:
    first, *rest = sorted(merged.glob("model-*.safetensors"))
    hub.cut_objects, hub.cut_after = {sha256(first)}, 100_000
    process = client.start("push", merged, "me/merged")
    others = {sha256(path) for path in rest}
    deadline = time.monotonic() + 60
    while not (others <= set(hub.objects) and sha256(first) in hub.received):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert set(hub.files("me/merged")) == {".gitattributes"}, "whole or not at all"

    sent = {oid: hub.received[oid] for oid in others}
    hub.cut_objects = set()
    client.done("push", merged, "me/merged")
    assert {oid: hub.received[oid] for oid in others} == sent, "what was up is not sent again"
    assert sha256(first) in hub.objects
    assert hub.files("me/merged")[first.name] == first.read_bytes()


@pytest.mark.slow
def test_a_network_that_stays_away_is_one_error(
    client: Client, hub: WritableHub, merged: Path
) -> None:
    hub.cut_objects, hub.cut_after = {sha256(p) for p in merged.glob("*.safetensors")}, 1000
    ended = client("push", merged, "me/merged", "--quiet")
    assert ended.returncode == HUB_ERROR
    assert "me/merged: the Hub cannot be reached" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("token", "debug"),
    [("hf_" + "wrongwrongwrong", ""), ("hf_" + "wrongwrongwrong", "1"), ("hf_broken\nbroken", "1")],
)
def test_a_refused_token_is_one_line_and_appears_nowhere(
    token: str, debug: str, client: Client, merged: Path, tmp_path: Path
) -> None:
    client.token = token
    client.more = {"PSOFT_EXPORT_DEBUG": debug, "HF_TOKEN": ""}
    out = tmp_path / "out"
    for line in (
        ["push", str(merged), "me/merged"],
        ["merge", "--base", str(BASE), "--adapter", str(PROSE), "--output", str(out),
         "--push-to", "me/merged"],
        ["inspect", "me/base"],
    ):  # fmt: skip
        ended = client(*line, "--token", token)
        assert ended.returncode == (USAGE if "\n" in token else HUB_ERROR)
        error = ended.stderr.splitlines()[-1]
        assert "token" in error
        if not debug:
            shown = [text for text in ended.stderr.splitlines() if not text.startswith("pushing")]
            assert len(shown) == 1
        assert token not in ended.stderr and "broken" not in ended.stderr
    assert not out.exists(), "the Hub refused before the work"


def test_a_namespace_that_is_not_yours(client: Client, merged: Path) -> None:
    ended = client("push", merged, "closed/merged", "--quiet")
    assert ended.returncode == HUB_ERROR and ended.stderr.count("\n") == 1
    assert "namespace 'closed'" in ended.stderr


def test_private_is_never_public(client: Client, hub: WritableHub, merged: Path) -> None:
    client.done("push", merged, "me/open")
    ended = client("push", merged, "me/open", "--private")
    assert ended.returncode == HUB_ERROR and "exists and is public" in ended.stderr


def test_commits_of_base_and_adapter_go_through_to_the_card(
    client: Client, hub: WritableHub, tmp_path: Path
) -> None:
    pushed = client.done("push", PROSE, "me/adapter")
    assert set(pushed["files"]) == {*files.tree(PROSE), "README.md"}
    assert (
        client.download("me/adapter", "main")["psoft_basis.safetensors"]
        == (PROSE / "psoft_basis.safetensors").read_bytes()
    )
    out = tmp_path / "out"
    result = client.done(
        "merge", "--base", "me/base@main", "--adapter", "me/adapter", "--output", out,
        "--require-record", "--push-to", "me/merged",
    )  # fmt: skip
    manifest = json.loads((out / "psoft_export.json").read_text())
    base_commit = "c0ffee" + "0" * 34
    assert manifest["base"]["revision"] == base_commit
    assert manifest["adapter"]["revision"] == pushed["commit"]
    assert result["push"]["repo_id"] == "me/merged" and result["base"] == manifest["base"]
    there = hub.files("me/merged")
    assert there["psoft_export.json"] == (out / "psoft_export.json").read_bytes()
    card = there["README.md"].decode()
    assert files.card_metadata(card) == {
        "base_model": "me/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["psoft", "psoft-export"],
    }
    assert f"me/base/tree/{base_commit}" in card
    assert f"me/adapter/tree/{pushed['commit']}" in card
    assert "POST /api/validate-yaml" in hub.requests, "the Hub's own check of the metadata"
    everything = b"".join(there.values()) + (out / "psoft_export.json").read_bytes()
    assert TOKEN.encode() not in everything and str(tmp_path).encode() not in everything

    local = tmp_path / "local"
    psoft_export.merge(BASE, PROSE, local)
    assert (out / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()


def test_lora_and_convert_push_what_they_write(
    client: Client, hub: WritableHub, tmp_path: Path
) -> None:
    client.done(
        "lora", "--base", "me/base", "--adapter", PROSE, "--output", tmp_path / "lora",
        "--push-to", "me/lora",
    )  # fmt: skip
    there = hub.files("me/lora")
    assert (
        there["adapter_model.safetensors"]
        == (tmp_path / "lora" / "adapter_model.safetensors").read_bytes()
    )
    card = files.card_metadata(there["README.md"])
    assert (card["base_model"], card["library_name"]) == ("me/base", "peft")
    assert card["base_model_relation"] == "adapter"
    ended = client(
        "convert", "--base", BASE, "--adapter", PROSE, "--to", "full",
        "--output", tmp_path / "full", "--push-to", "me/full",
    )  # fmt: skip
    assert ended.returncode == 0 and f"{hub.url}/me/full" in ended.stdout
    assert "'../../base', which is published" in ended.stderr
    there = hub.files("me/full")
    record = (tmp_path / "full" / "psoft_basis.safetensors").read_bytes()
    assert there["psoft_basis.safetensors"] == record
    assert b"inside: full;" in there["README.md"] and b"../../base" not in there["README.md"]


def test_somebodys_card_stays_until_asked(
    client: Client, hub: WritableHub, merged: Path, tmp_path: Path
) -> None:
    client.done("push", merged, "me/merged")
    made = hub.files("me/merged")["README.md"]
    edited = made.replace(b"## Use", b"Trained with care.\n\n## Use")
    hub.files("me/merged")["README.md"] = edited
    kept = client.done("push", merged, "me/merged")
    assert kept["card"] == "kept" and "--overwrite-card" in kept["warnings"][0]
    assert hub.files("me/merged")["README.md"] == edited
    replaced = client.done("push", merged, "me/merged", "--overwrite-card")
    assert replaced["card"] == "written" and hub.files("me/merged")["README.md"] == made

    folder = files.copy_of(merged, tmp_path / "own")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert client.done("push", folder, "me/own")["card"] == "kept"
    assert hub.files("me/own")["README.md"] == (folder / "README.md").read_bytes()
    client.done("push", folder, "me/own", "--overwrite-card")
    assert b"psoft-export card" in hub.files("me/own")["README.md"]
    (folder / "README.md").write_text(f"---\nbase_model: {tmp_path}\n---\n# Mine\n")
    ended = client("push", folder, "me/own")
    assert ended.returncode == USAGE and "is not a Hub id" in ended.stderr


def test_a_card_nobody_touched_follows_the_figures(
    client: Client, hub: WritableHub, merged: Path, tmp_path: Path
) -> None:
    client.done("push", merged, "me/merged")
    folder = files.copy_of(merged, tmp_path / "verified")
    weights = {
        "equivalent": True, "merged_tensors": 28, "copied_tensors": 11, "saved_tensors": 0,
        "largest_error_ulp": 0.5, "not_nearest": 0, "largest_relative_error": 1.7e-3,
    }  # fmt: skip
    files.edit_json(folder / "psoft_export.json", verification={"weights": weights})
    assert client.done("push", folder, "me/merged")["card"] == "written"
    assert b"Weights: **equivalent**" in hub.files("me/merged")["README.md"]


def test_files_that_would_be_loaded_instead_are_removed(
    client: Client, hub: WritableHub, merged: Path
) -> None:
    client.done("push", merged, "me/merged")
    old = (
        "model.safetensors",
        "pytorch_model.bin",
        "adapter_config.json",
        "psoft_basis.safetensors",
    )
    there = hub.files("me/merged")
    there.update(dict.fromkeys(old, b"old"), **{"notes.txt": b"mine"})
    ended = client("push", merged, "me/merged")
    assert ended.returncode == 0 and "removed model.safetensors" in ended.stdout
    assert set(hub.files("me/merged")) == {
        *files.tree(merged), "README.md", ".gitattributes", "notes.txt",
    }  # fmt: skip


def test_what_is_not_published(
    client: Client, hub: WritableHub, merged: Path, tmp_path: Path
) -> None:
    plain = client("push", BASE, "me/x", "--quiet")
    assert plain.returncode == USAGE and "psoft-export did not write it" in plain.stderr
    folder = files.copy_of(merged, tmp_path / "bad")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("of this machine")
    link = client("push", folder, "me/x", "--quiet")
    assert link.returncode == USAGE and "leads out of the folder" in link.stderr
    (folder / "notes.txt").unlink()
    files.edit_json(folder / "psoft_export.json", verification={"outputs": {"equivalent": False}})
    wrong = client("push", folder, "me/x", "--quiet")
    assert wrong.returncode == NOT_EQUIVALENT and wrong.stderr.count("\n") == 1
    files.edit_json(folder / "psoft_export.json", verification=None)
    next(folder.glob("model-*.safetensors")).unlink()
    partial = client("push", folder, "me/x", "--quiet")
    assert partial.returncode == 4 and "model-0" in partial.stderr
    name = client("push", merged, "me/x@v2", "--quiet")
    assert name.returncode == USAGE and "--revision" in name.stderr
    alone = client("lora", "--base", BASE, "--adapter", PROSE, "--output", folder, "--private")
    assert alone.returncode == USAGE and "--private: only with --push-to" in alone.stderr
    assert not hub.requests, "all of it was seen before the Hub was asked"


def test_a_failed_push_leaves_the_folder_and_says_how_to_go_on(
    client: Client, hub: WritableHub, tmp_path: Path
) -> None:
    hub.refuse_commits = 507
    out = tmp_path / "out"
    ended = client(
        "merge", "--base", BASE, "--adapter", PROSE, "--output", out, "--quiet",
        "--push-to", "me/merged",
    )  # fmt: skip
    assert ended.returncode == HUB_ERROR
    error = ended.stderr.splitlines()[-1]
    assert "the Hub answered 507" in error
    assert f"push it with: psoft-export push {out} me/merged" in error
    hub.refuse_commits = None
    client.done("push", out, "me/merged")
    assert hub.files("me/merged")["model.safetensors"] == (out / "model.safetensors").read_bytes()


def test_a_base_that_the_hub_does_not_have_gets_no_link(
    client: Client, hub: WritableHub, llama: Path, tmp_path: Path
) -> None:
    adapter = models.save_adapter("llama", llama, tmp_path / "adapter")
    assert "Model Card for Model ID" in (adapter / "README.md").read_text(), "PEFT's empty form"
    files.edit_json(adapter / "adapter_config.json", base_model_name_or_path="models/llama")
    report = client.done("push", adapter, "me/adapter")
    assert report["card"] == "written"
    assert any("no basis record" in warning for warning in report["warnings"])
    card = hub.files("me/adapter")["README.md"].decode()
    assert "base_model" not in files.card_metadata(card) and "models/llama" not in card
    assert "No basis record is inside" in card and str(llama) not in card
    files.edit_json(adapter / "adapter_config.json", base_model_name_or_path="me/base")
    client.done("push", adapter, "me/adapter")
    card = hub.files("me/adapter")["README.md"].decode()
    assert files.card_metadata(card)["base_model"] == "me/base"


def test_dry_run_asks_nothing(client: Client, hub: WritableHub, merged: Path) -> None:
    shown = client.done("push", merged, "me/merged", "--dry-run")
    assert shown["kind"] == "merged" and set(shown["files"]) == set(files.tree(merged))
    assert shown["card"].startswith("---\n") and not hub.requests


def test_weights_changed_since_their_check_are_not_published(
    client: Client, hub: WritableHub, merged: Path, tmp_path: Path
) -> None:
    folder = files.copy_of(merged, tmp_path / "merged")
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    ended = client("push", folder, "me/merged")
    assert ended.returncode == NOT_EQUIVALENT
    assert f"{path.name}: has been changed since psoft-export wrote it" in ended.stderr
    assert hub.requests == []


def test_real_weights_are_merged_proven_reported_and_published(
    client: Client, hub: WritableHub, tmp_path: Path
) -> None:
    adapter = models.save_adapter("minilm", models.MINILM, tmp_path / "adapter")
    merged, page = tmp_path / "merged", tmp_path / "report.html"
    client.more = {"OMP_NUM_THREADS": "1"}  # threads that wait for a busy core take far longer
    inputs = ("--base", models.MINILM, "--adapter", adapter)
    labels = ("--labels", "bad,fair,good")
    result = client.done("merge", *inputs, "--output", merged, "--verify", *labels)
    levels = result["verification"]
    assert all(levels[name]["equivalent"] for name in ("weights", "geometry", "outputs"))
    proven = client.done("verify", *inputs, "--merged", merged, "--report", page)
    assert proven["equivalent"] and proven["weights"]["saved"] == 2
    text = page.read_text("utf-8")
    assert "EQUIVALENT" in text and "encoder.layer.5.output.dense" in text
    client.done("push", merged, "me/minilm")
    there = client.download("me/minilm", "main")
    assert there["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    card = there["README.md"].decode()
    assert "BertForSequenceClassification.from_pretrained" in card
    assert "Weights: **equivalent**" in card and "Outputs: **equivalent**" in card
