"""Bases and adapters from the Hub, against a server on loopback."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import psoft_export
from tests import files
from tests.hub_server import COMMIT, HubServer

HUB_ERROR = 10
TOKEN = "hf_" + "secretsecretsecret"


@pytest.fixture
def hub(llama: Path, llama_adapter: Path, tmp_path: Path) -> Iterator[HubServer]:
    base = files.copy_of(llama, tmp_path / "hub-base")
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"must not be fetched")
    (base / "README.md").write_text("must not be fetched")
    (base / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    (base / "2_Dense").mkdir()
    (base / "2_Dense" / "model.safetensors").write_bytes(b"part of the pipeline")
    psoft_export.record(llama, llama_adapter, device="cpu")
    server = HubServer({"me/base": base, "me/adapter": llama_adapter}, ("main", "v2"))
    with server.running():
        yield server


def command(
    url: str, cache: Path, *arguments: str, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    line = [sys.executable, "-m", "psoft_export.cli.main", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)


def test_base_and_adapter_by_id_and_revision(
    hub: HubServer, llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = command(
        hub.url, tmp_path / "cache", "merge", "--base", "me/base@v2",
        "--adapter", "me/adapter", "--output", str(out), "--device", "cpu", "--quiet",
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    manifest = json.loads((out / "psoft_export.json").read_text())
    assert manifest["base"]["kind"] == "hub" and manifest["base"]["name"] == "me/base"
    assert manifest["basis"]["record"]["kind"] == "signs", "it came with the adapter"
    assert manifest["base"]["revision"] == manifest["adapter"]["revision"] == COMMIT
    psoft_export.merge(llama, llama_adapter, tmp_path / "local", device="cpu")
    local = (tmp_path / "local" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == local
    assert (out / "tokenizer.json").exists()
    assert (out / "2_Dense" / "model.safetensors").read_bytes() == b"part of the pipeline"
    fetched = " ".join(hub.requests)
    assert "pytorch_model.bin" not in fetched and "README.md" not in fetched
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr + json.dumps(manifest)

    asked = len(hub.requests)
    again = command(
        hub.url, tmp_path / "cache", "inspect", "me/adapter", "--base", "me/base@v2", offline=True
    )
    assert again.returncode == 0, "from the cache"
    missing = command(hub.url, tmp_path / "cache", "inspect", "me/other", offline=True)
    assert missing.returncode == HUB_ERROR and "HF_HUB_OFFLINE" in missing.stderr
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("adapter", "words"),
    [("me/nothing", "no such Hub repository"), ("me/adapter@v9", "no such revision")],
)
def test_what_the_hub_does_not_have(
    adapter: str, words: str, hub: HubServer, llama: Path, tmp_path: Path
) -> None:
    done = command(
        hub.url, tmp_path / "cache", "merge", "--base", str(llama),
        "--adapter", adapter, "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == HUB_ERROR
    assert done.stderr.count("\n") == 1 and words in done.stderr and adapter in done.stderr
    assert TOKEN not in done.stderr and not (tmp_path / "out").exists()


def test_network_that_is_down(llama: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound, not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = command(
            url, tmp_path / "cache", "merge", "--base", str(llama),
            "--adapter", "me/adapter", "--output", str(tmp_path / "out"),
        )  # fmt: skip
    assert done.returncode == HUB_ERROR
    assert done.stderr.count("\n") == 1 and "cannot be reached" in done.stderr
    assert not (tmp_path / "out").exists()
