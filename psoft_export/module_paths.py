"""What a module path tells: the number of its layer, and what kind of module it is."""

import re

_NUMBER = re.compile(r"(?:^|\.)(\d{1,9})(?=\.|$)")


def layer_number(module: str) -> int | None:
    """The first number in the path (`model.layers.3.mlp.up_proj`: 3), or None without one."""
    found = _NUMBER.search(module)
    return int(found[1]) if found else None


def module_kind(module: str) -> str:
    """The module's own name (`up_proj`), the same in every layer."""
    return module.rsplit(".", 1)[-1]


def without_numbers(module: str) -> str:
    """The path with `*` for each number: the same for a module and its like in other layers."""
    return _NUMBER.sub(lambda found: found[0].replace(found[1], "*"), module)
