"""`--adapter`, once or several times, and how several become one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from psoft_export.errors import UsageError

if TYPE_CHECKING:
    from psoft_export import Combination

_COMBINING = "Combining several adapters"
AdaptersOption = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="[NAME=]ADAPTER[:WEIGHT]",
        help="Adapter: a folder or a Hub id, with @revision or not. Several times with --method.",
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="How several adapters become one: linear, lie, ties, … (docs/combining.md).",
        rich_help_panel=_COMBINING,
    ),
]
FactorOption = Annotated[
    float | None,
    typer.Option(
        "--factor",
        help="Common factor of task-arithmetic, ties and dare-ties; default: 1.",
        rich_help_panel=_COMBINING,
    ),
]
DensityOption = Annotated[
    float | None,
    typer.Option(
        "--density",
        help="Share of the entries that ties, dare-linear and dare-ties keep; default: 0.5.",
        rich_help_panel=_COMBINING,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="Of what dare-linear and dare-ties drop; default: 0.",
        rich_help_panel=_COMBINING,
    ),
]


@dataclass(frozen=True)
class Adapters:
    """What `--adapter`, `--method` and its options say.

    Attributes:
        references: name → folder or Hub id.
        weights: name → weight, where one is given.
        method: how they become one; None for one adapter as it stands.
        factor: see `Combination`.
        density: see `Combination`.
        seed: see `Combination`.
    """

    references: dict[str, str]
    weights: dict[str, float]
    method: str | None
    factor: float | None
    density: float | None
    seed: int | None

    @classmethod
    def asked(
        cls,
        given: Sequence[str],
        method: str | None,
        factor: float | None,
        density: float | None,
        seed: int | None,
    ) -> "Adapters":
        """What a command's options say.

        Raises:
            UsageError: they do not go together, or a weight is not a number.
        """
        if method is None:
            named = {"--factor": factor, "--density": density, "--seed": seed}
            if without := [name for name, value in named.items() if value is not None]:
                raise UsageError(f"{', '.join(without)}: only with --method")
            if len(given) > 1:
                raise UsageError(
                    f"--adapter {given[1]}: several adapters become one by a --method (lie, "
                    "linear, …: docs/combining.md)"
                )
            return cls({"": given[0]}, {}, None, None, None, None)
        references: dict[str, str] = {}
        weights: dict[str, float] = {}
        for text in given:
            name, reference, weight = parsed(text)
            if name in references:
                raise UsageError(f"--adapter {text}: '{name}' is there twice; give it another name")
            references[name] = reference
            if weight is not None:
                weights[name] = weight
        return cls(references, weights, method, factor, density, seed)

    @property
    def is_combination(self) -> bool:
        """Whether it is more than one adapter as it stands."""
        return self.method is not None

    def reference(self) -> "str | Combination":
        """What the package's functions take as `adapter`."""
        if self.method is None:
            return self.references[""]
        from psoft_export import Combination  # loads torch

        return Combination(
            dict(self.references), self.method, self.weights, self.factor, self.density, self.seed
        )


def parsed(text: str) -> tuple[str, str, float | None]:
    """Name, folder or Hub id, and weight of `[NAME=]ADAPTER[:WEIGHT]`.

    Without a name it is the last part of the folder or id.

    Raises:
        UsageError: the weight is not a number, or there is no adapter.
    """
    name, equals, rest = text.partition("=")
    if not equals:
        name, rest = "", text
    reference, weight = rest, None
    before, colon, after = rest.rpartition(":")
    if colon and not Path(rest).expanduser().is_dir():
        try:
            reference, weight = before, float(after)
        except ValueError as cause:
            raise UsageError(
                f"--adapter {text}: weight '{after}' is not a number; pass [NAME=]ADAPTER[:WEIGHT]"
            ) from cause
    if not reference or (equals and not name):
        raise UsageError(f"--adapter {text}: is not [NAME=]ADAPTER[:WEIGHT]")
    return name or Path(reference.partition("@")[0]).name, reference, weight
