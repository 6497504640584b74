"""Shared fixtures: small models of several families, and adapters that PEFT made for them."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from filelock import FileLock

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
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder by its name, which the first of the processes to ask for it makes, for all."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        target = folder / name
        with FileLock(folder / f"{name}.lock"):
            if not target.exists():
                unfinished = Path(tempfile.mkdtemp(dir=folder))
                make(unfinished)
                unfinished.rename(target)
        return target

    return made


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
def many_tasks(made_once: Callable[..., Path]) -> Path:
    """The three bundled adapters as one ONNX graph (`prose`, `arithmetic`, `records`)."""
    adapters = {name.split("-")[0]: EXAMPLES / "adapters" / name for name in BUNDLED}

    def make(folder: Path) -> None:
        psoft_export.onnx.export(
            folder / "onnx", base=EXAMPLES / "base", adapters=adapters, cache=False
        )

    return made_once("many-tasks", make) / "onnx"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, and say so, what needs a GPU on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
