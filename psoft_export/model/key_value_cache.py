"""The key-value cache of a model, by whatever name its transformers has for it."""

import inspect
from typing import Any


def cache_argument(model: Any) -> str:
    """The argument of `forward` that takes the cache.

    `cache`, or `past_key_values` as it was called before transformers 5.24.
    """
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def cache_of(outputs: Any) -> Any:
    """The cache that a model returned."""
    return outputs["cache" if "cache" in outputs else "past_key_values"]
