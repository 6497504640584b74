"""What combinations of adapters do to the loss on each task's text."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from psoft_export.adapters.adapter import NeumannTerms
from psoft_export.algebra.combination import METHODS
from psoft_export.bank import AdapterBank
from psoft_export.combining import Combination, chosen_method
from psoft_export.device import choose_device
from psoft_export.errors import UnsupportedError, UsageError
from psoft_export.model.skeleton import mapped_classes
from psoft_export.opening import open_plan
from psoft_export.verification.distance import cross_entropy
from psoft_export.verification.inputs import tokens_of_text
from psoft_export.verification.models import UnmergedLoader

_WINDOW = 256  # tokens, the first of which is given
_WINDOWS = 64  # of a text, at most
_ROWS = 16  # run at a time
_BASE, _COMBINED = "base", "combination"  # what the table calls them
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)

Note = Callable[[str], None]


@dataclass(frozen=True)
class LossTable:
    """Loss on each text of the base, of each adapter alone, and of their combination.

    Attributes:
        combination: what was combined and how, in a few words.
        losses: name of the text → model (`base`, an adapter's name, `combination`) → mean loss in
            nats a token.
        tokens: name of the text → how many tokens were predicted.
    """

    combination: str
    losses: Mapping[str, Mapping[str, float]]
    tokens: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The table as one JSON-ready object."""
        return asdict(self)


@dataclass(frozen=True)
class SweepPoint:
    """One combination of a sweep.

    Attributes:
        method: how.
        scale: what the weights were multiplied by.
        losses: name of the text → mean loss in nats a token; empty where there is none.
        problem: why there is none, or None.
    """

    method: str
    scale: float
    losses: Mapping[str, float]
    problem: str | None = None

    @property
    def mean(self) -> float:
        """The mean over the texts; infinite where there is none."""
        return math.fsum(self.losses.values()) / len(self.losses) if self.losses else math.inf


@dataclass(frozen=True)
class Sweep:
    """Losses of combinations by many methods and weights.

    Attributes:
        table: of the combination asked for, with base and adapters.
        points: every other one, in the order of methods and scales.
    """

    table: LossTable
    points: Sequence[SweepPoint]

    @property
    def best(self) -> SweepPoint:
        """The one of the lowest mean loss over the texts."""
        return min(self.points, key=lambda point: point.mean)

    def to_dict(self) -> dict[str, Any]:
        """The sweep as one JSON-ready object."""
        return self.table.to_dict() | {"sweep": [asdict(point) for point in self.points]}


def evaluate(
    base: str | Path,
    combination: Combination,
    texts: Mapping[str, str | Path],
    *,
    device: str = "auto",
    svd_device: str | None = None,
    require_record: bool = False,
    neumann_terms: NeumannTerms | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    note: Note | None = None,
) -> LossTable:
    """The loss on each task's text of the base, each adapter alone, and the combination.

    Models run in float32. Up to 64 windows of 256 tokens from the start of each text are run,
    which do not share context.

    Args:
        base: folder or Hub id of the base of all; a causal language model.
        combination: the adapters and how they become one.
        texts: name → UTF-8 text, which no adapter should have been trained on.
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.
        svd_device: of adapters without a record: as for `merge`.
        require_record: refuse an adapter without a basis record.
        neumann_terms: of checkpoints of the paper's code, as of `load_adapter`.
        cache: keep bases on disk, and take them from there.
        cache_dir: folder of that cache.
        token: a Hub token.
        note: told in a few words of each model that is run.

    Raises:
        UsageError: a text cannot be read or is too short, or the base has no tokenizer.
        UnsupportedError: the model is not a causal language model.
        PsoftExportError: as `combine`.

    Example:
        >>> both = psoft_export.Combination({"math": "a1", "code": "a2"}, "lie")
        >>> psoft_export.evaluate("base", both, {"math": "math.txt", "code": "code.txt"}).losses
    """
    shared = (device, svd_device, require_record, neumann_terms, cache, cache_dir, token, note)
    with _opened(base, combination, texts, *shared) as run:
        return run.table()


def sweep(
    base: str | Path,
    combination: Combination,
    texts: Mapping[str, str | Path],
    *,
    methods: Sequence[str] | None = None,
    scales: Sequence[float] = SCALES,
    device: str = "auto",
    svd_device: str | None = None,
    require_record: bool = False,
    neumann_terms: NeumannTerms | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    note: Note | None = None,
) -> Sweep:
    """As `evaluate`, of every method with the weights times every scale.

    The combination's own `factor`, `density` and `seed` are used by the methods that take them.

    Args:
        base: as of `evaluate`.
        combination: as of `evaluate`.
        texts: as of `evaluate`.
        methods: which; by default every one that takes so many adapters.
        scales: what the combination's weights are multiplied by.
        device: as of `evaluate`.
        svd_device: as of `evaluate`.
        require_record: as of `evaluate`.
        neumann_terms: as of `evaluate`.
        cache: as of `evaluate`.
        cache_dir: as of `evaluate`.
        token: as of `evaluate`.
        note: as of `evaluate`.

    Raises:
        UsageError: no scale is given, a scale is not a number, or as `evaluate`.
        PsoftExportError: as `evaluate`.
    """
    if not scales or not all(math.isfinite(scale) for scale in scales):
        raise UsageError(f"scales {list(scales)}: numbers are needed")
    count = len(combination.adapters)
    fitting = [name for name, m in METHODS.items() if m.adapters in (None, count)]
    for name in methods or ():
        chosen_method(name, count)
    shared = (device, svd_device, require_record, neumann_terms, cache, cache_dir, token, note)
    with _opened(base, combination, texts, *shared) as run:
        table = run.table()
        points = [run.point(method, scale) for method in methods or fitting for scale in scales]
    return Sweep(table, points)


@contextmanager
def _opened(
    base: str | Path,
    combination: Combination,
    texts: Mapping[str, str | Path],
    device: str,
    svd_device: str | None,
    require_record: bool,
    neumann_terms: NeumannTerms | None,
    cache: bool,
    cache_dir: str | Path | None,
    token: str | None,
    note: Note | None,
) -> Iterator["_Evaluation"]:
    """Base and adapters in memory, and the tokens of the texts."""
    if not texts:
        raise UsageError("no text to evaluate on is given")
    if taken := [name for name in (_BASE, _COMBINED) if name in combination.adapters]:
        raise UsageError(
            f"adapter '{taken[0]}': is what the table calls another model; give it another name "
            "(NAME=ADAPTER)"
        )
    on = choose_device(device)
    first = next(iter(combination.adapters.values()))
    plan = open_plan(
        base, first, require_record=require_record, neumann_terms=neumann_terms, token=token
    )
    loader = UnmergedLoader(plan)
    causal = mapped_classes(transformers.MODEL_FOR_CAUSAL_LM_MAPPING, loader.skeleton.config)
    if loader.skeleton.model_class not in causal:
        raise UnsupportedError(
            f"{plan.base.name}: is a {loader.skeleton.class_name}; losses are evaluated for causal "
            "language models"
        )
    vocabulary = loader.skeleton.config.get_text_config().vocab_size
    tokens = {
        name: tokens_of_text(plan.base.folder, Path(text), vocabulary, _WINDOW)
        for name, text in texts.items()
    }
    tell = note or (lambda _: None)
    tell("evaluating: loading the base and its adapters")
    model = loader.load({}, torch.float32, on, attention=None).model
    bank = AdapterBank(
        model,
        svd_device=svd_device,
        require_record=require_record,
        cache=cache,
        cache_dir=cache_dir,
        token=token,
    )
    for name, adapter in combination.adapters.items():
        bank.add(name, adapter, neumann_terms=neumann_terms)
    yield _Evaluation(model, bank, combination, tokens, tell)


class _Evaluation:
    """A model with its tasks, and the texts that it is run on."""

    def __init__(
        self,
        model: PreTrainedModel,
        bank: AdapterBank,
        combination: Combination,
        tokens: Mapping[str, Tensor],
        tell: Note,
    ) -> None:
        self._model = model
        self._bank = bank
        self._combination = combination
        self._windows = {name: _windows(ids).to(model.device) for name, ids in tokens.items()}
        self._tell = tell

    def table(self) -> LossTable:
        """Losses of base, adapters, and the combination asked for."""
        models: dict[str, Mapping[str, float]] = {}
        for task in (None, *self._combination.adapters):
            self._tell(f"evaluating: {task or _BASE}")
            models[task or _BASE] = self._losses(task)
        asked = self._combination
        self._tell(f"evaluating: {asked.title}")
        models[_COMBINED] = self._combined(asked.method, 1.0)
        losses = {
            text: {model: found[text] for model, found in models.items()} for text in self._windows
        }
        counts = {name: ids.shape[0] * (ids.shape[1] - 1) for name, ids in self._windows.items()}
        return LossTable(asked.title, losses, counts)

    def point(self, method: str, scale: float) -> SweepPoint:
        """Losses of the adapters combined by a method, their weights times a scale."""
        self._tell(f"evaluating: {method}, weights times {scale:g}")
        try:
            return SweepPoint(method, scale, self._combined(method, scale))
        except (UnsupportedError, UsageError) as error:
            return SweepPoint(method, scale, {}, str(error))

    def _combined(self, method: str, scale: float) -> dict[str, float]:
        asked = self._combination
        options = {name: getattr(asked.settings, name) for name in METHODS[method].settings}
        weights = {
            name: scale * weight
            for name, weight in zip(asked.adapters, asked.ordered_weights, strict=True)
        }
        self._bank.combine(_COMBINED, weights, method, **options)
        try:
            return self._losses(_COMBINED)
        finally:
            self._bank.remove(_COMBINED)

    @torch.inference_mode()
    def _losses(self, task: str | None) -> dict[str, float]:
        """Mean loss on each text."""
        with self._bank.using(task):
            return {name: self._loss(windows) for name, windows in self._windows.items()}

    def _loss(self, windows: Tensor) -> float:
        total = 0.0
        for ids in torch.split(windows, _ROWS):
            total += cross_entropy(self._model(input_ids=ids).logits, ids)
        return total / (windows.shape[0] * (windows.shape[1] - 1))


def _windows(tokens: Tensor) -> Tensor:
    """Consecutive windows from the start: rows × length."""
    count = min(_WINDOWS, len(tokens) // _WINDOW)
    return tokens[: count * _WINDOW].view(count, _WINDOW)
