"""The names of weight files. Loads nothing, so that files can be looked for before anything is."""

from collections.abc import Iterable

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX = ".index.json"


def weight_files(names: Iterable[str]) -> list[str]:
    """Of a repository's file names, those that hold its weights, as transformers chooses them.

    safetensors before pickle, one file before a sharded one. Only top-level names count.
    """
    present = {name for name in names if "/" not in name}
    for whole, suffix in ((SAFETENSORS, ".safetensors"), (PICKLE, ".bin")):
        if whole in present:
            return [whole]
        if whole + INDEX in present:
            stem = whole.removesuffix(suffix)
            shards = (n for n in present if n.startswith(f"{stem}-") and n.endswith(suffix))
            return [whole + INDEX, *sorted(shards)]
    return []
