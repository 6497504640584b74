"""What is known of the processor."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from psoft_export import device


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    device.multiplies_by_avx2.cache_clear()
    yield
    device.multiplies_by_avx2.cache_clear()


@pytest.mark.parametrize(
    ("capability", "maker", "expected"),
    [
        ("AVX2", "GenuineIntel", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", None, False),
        ("DEFAULT", "AuthenticAMD", False),
    ],
)
def test_whose_kernels_multiply(
    capability: str,
    maker: str | None,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(device, "_PROCESSOR", tmp_path / "cpuinfo")
    if maker is not None:
        one = f"processor\t: 0\nvendor_id\t: {maker}\nmodel name\t: of some kind\n\n"
        (tmp_path / "cpuinfo").write_text(2 * one)
    assert device.multiplies_by_avx2() is expected
