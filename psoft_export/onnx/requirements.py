"""The packages that ONNX needs, asked for where they are first used."""

from importlib.util import find_spec

from psoft_export.errors import MissingExtraError

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Check that what exporting and running graphs needs is installed.

    Raises:
        MissingExtraError: it is not; the message has the pip line.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{missing[0]}: is not installed; run: pip install 'psoft-export[onnx]' "
            "(for NVIDIA GPUs: 'psoft-export[onnx-gpu]')"
        )
