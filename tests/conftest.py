"""Shared fixtures: small models of several families, and adapters that PEFT made for them."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

import psoft_export
from tests import models

EXAMPLES = Path(__file__).parent.parent / "examples" / "byte_llama"
BUNDLED = ("prose-relaxed-r64", "arithmetic-strict-r32", "records-neumann-r48")


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of bases of the test's own, in place of the user's."""
    folder = tmp_path_factory.mktemp("cache") / "bases"
    monkeypatch.setenv("PSOFT_EXPORT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a small base model, by family name and dtype; made once a session."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(family: str, dtype: torch.dtype = torch.float32) -> Path:
        key = (family, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"base-{family}")
            models.save_base(family, folder, dtype)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama(base_folder: Callable[..., Path]) -> Path:
    """A small float32 Llama with untied embeddings."""
    return base_folder("llama")


@pytest.fixture
def llama_adapter(llama: Path, tmp_path: Path) -> Path:
    """A relaxed adapter (r = 8) of `llama`, in a folder of the test's own."""
    return models.save_adapter("llama", llama, tmp_path / "adapter")


@pytest.fixture(scope="session")
def many_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three bundled adapters as one ONNX graph (`prose`, `arithmetic`, `records`)."""
    folder = tmp_path_factory.mktemp("many-tasks") / "onnx"
    adapters = {name.split("-")[0]: EXAMPLES / "adapters" / name for name in BUNDLED}
    psoft_export.onnx.export(folder, base=EXAMPLES / "base", adapters=adapters, cache=False)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, and say so, what needs a GPU on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
