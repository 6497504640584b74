"""Recovering signs: the relaxation, the search, the verdict, and the way to a merged checkpoint."""

import itertools
import json
import math
import re
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import psoft_export
from benchmarks.scrambled import random_signs, right_signs, scramble
from psoft_export.adapters.basis_record import FILENAME, read_record
from psoft_export.algebra.parameters import CayleyNeumann, RotationParameters
from psoft_export.algebra.relaxed_signs import RelaxedSigns, couplings
from psoft_export.algebra.rotation import conjugated, rotation
from psoft_export.basis.svd import BasisOptions, make_basis, training_svd
from psoft_export.cli.main import run
from psoft_export.errors import (
    NonFiniteError,
    NotRecoveredError,
    OutputError,
    PartlyRecoveredError,
    UnsupportedError,
    UsageError,
)
from psoft_export.model_card import merged_card
from psoft_export.recovery import readings
from psoft_export.recovery.agreement import agreement, agreement_by_chance, same_signs
from psoft_export.recovery.polish import FlipSlopes, Polished, crossed, polish
from psoft_export.recovery.readings import known_readings, own_reading, read_signs
from psoft_export.recovery.retraining import (
    Batches,
    Known,
    Mean,
    Retrained,
    kinship,
    synchronized,
)
from psoft_export.recovery.run import LEAST_STEPS, STEPS_OF_LATER, Outcome, RecoveryRun
from psoft_export.recovery.run import STEPS as DEFAULT_STEPS
from psoft_export.recovery.search import Cycle, SearchState, SignSearch, Step
from psoft_export.recovery.significance import least_sure
from psoft_export.recovery.state import StateFile
from psoft_export.recovery.task_loss import Losses
from psoft_export.recovery.verdict import judge, judged
from tests import files
from tests.conftest import EXAMPLES
from tests.machines import numpy_svd, pretend
from tests.models import save_adapter
from tests.planted import Planted, plant, told_nothing

STEPS = LEAST_STEPS + STEPS_OF_LATER
FIRST_CYCLE = 110
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def signs(planted: Planted) -> dict[str, Tensor]:
    return random_signs(planted.adapter, seed=3)


@pytest.fixture
def scrambled(planted: Planted, signs: dict[str, Tensor], tmp_path: Path) -> Path:
    return scramble(planted.adapter, tmp_path / "scrambled", signs)


FORMS: dict[str, Callable[[], RotationParameters]] = {
    "strict": lambda: _parameters(),
    "relaxed": lambda: _parameters(vectors=True),
    "series": lambda: _parameters(series=CayleyNeumann(5)),
    "bounded series": lambda: _parameters(series=CayleyNeumann(4, max_norm=0.3)),
    "paper's series": lambda: _parameters(series=CayleyNeumann(3, convention="paper")),
    "free": lambda: _parameters(free=True, vectors=True),
}


def _parameters(
    *, series: CayleyNeumann | None = None, vectors: bool = False, free: bool = False
) -> RotationParameters:
    rank = 7
    weight = torch.randn(rank, rank) if free else 0.3 * torch.randn(rank * (rank - 1) // 2)
    a, b = (torch.rand(rank) + 0.5 if vectors else None for _ in range(2))
    return RotationParameters(rank, weight, a, b, not free, series)


@pytest.mark.parametrize("form", FORMS)
def test_at_signs_the_relaxation_is_the_rotation_in_the_other_basis(form: str) -> None:
    parameters = [FORMS[form]() for _ in range(3)]
    relaxed = RelaxedSigns(parameters, CPU)
    d = torch.randint(2, (2, 3, 7)) * 2.0 - 1
    cores = relaxed.cores(relaxed.coupled(couplings(d)))
    for row in range(2):
        for module in range(3):
            expected = rotation(conjugated(parameters[module], d[row, module])) - torch.eye(7)
            assert torch.allclose(cores[row, module].double(), expected, atol=2e-6)


def test_without_signs_a_strict_rotation_is_the_identity() -> None:
    relaxed = RelaxedSigns([_parameters()], CPU)
    assert relaxed.cores(torch.zeros(1, 7, 7)).abs().max() < 1e-7


def test_agreement_knows_no_sign_of_a_whole_layer() -> None:
    first = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, -1]])
    second = first * torch.tensor([[-1.0], [1]])
    every = first.abs() > 0
    assert agreement(first, second, every) == 1
    second[0, 0] *= -1
    assert same_signs(first, second, every)[0].tolist() == [False, True, True, True]
    assert agreement(first, second, every) == 7 / 8


def test_what_does_not_matter_says_nothing_of_a_layers_sign() -> None:
    matters = torch.arange(9)[None] < 4
    first = torch.ones(1, 9)
    second = torch.where(matters, 1.0, -1.0)
    assert agreement(first, second, matters) == 1
    assert same_signs(first, second, matters)[0].tolist() == matters[0].tolist()


@pytest.mark.parametrize(
    ("count", "wanted"), [(1, 1.0), (2, 0.75), (3, 0.75), (6, 0.65625), (9, 0.63671875)]
)
def test_signs_agree_by_chance(count: int, wanted: float) -> None:
    every = torch.ones(3, count, dtype=torch.bool)
    assert agreement_by_chance(every) == wanted


@pytest.mark.parametrize("count", [2, 3, 6, 10, 11, 30])
def test_few_examples_must_gain_more_surely(count: int) -> None:
    # Student's t: the chance of more, by the density's integral, is that of 3 normal errors.
    freedom = count - 1
    x = torch.logspace(math.log10(least_sure(count)), 9, 2_000_001, dtype=torch.float64)
    height = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = math.exp(height) / math.sqrt(freedom * math.pi)
    tail = density * torch.trapezoid((1 + x.square() / freedom) ** (-(freedom + 1) / 2), x)
    assert float(tail) == pytest.approx(math.erfc(3 / math.sqrt(2)) / 2, rel=0.07)


class Pairs:
    """Generators of which each is a coupling: what a loss of couplings takes for rotations."""

    def __init__(self, shape: tuple[int, int]) -> None:
        modules, rank = shape
        self.shape = shape
        self.stored = (1 - torch.eye(rank)).expand(modules, rank, rank)

    def coupled(self, couplings: Tensor) -> Tensor:
        return couplings

    def moves(self, slopes: Tensor) -> Tensor:
        return (slopes + slopes.mT) * self.stored

    def paired(self, products: Tensor) -> Tensor:
        return (products + products.mT) / 2


class Couplings:
    """A loss whose least is known: each example adds up how well couplings fit planted ones.

    A teacher's couplings take the place of the planted ones, and have no noise.
    """

    def __init__(self, truth: Tensor, noise: float = 0.0) -> None:
        self.truth = couplings(truth)
        self.every = torch.ones_like(truth, dtype=torch.bool)
        generator = torch.Generator().manual_seed(2)
        # Small, as what one example says of one coupling is.
        self.weights = 0.01 * (torch.rand(self.truth.shape, generator=generator) + 0.1)
        self.noise = noise * torch.randn(30, *self.truth.shape, generator=generator)
        self.device = CPU
        self.mixes_examples = False
        modules, rank = truth.shape
        self.rotations: Any = Pairs((modules, rank))

    def loss(
        self, examples: Any, coupled: Tensor, teacher: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows = coupled if coupled.ndim == 4 else coupled.expand(len(examples), *coupled.shape)
        if teacher is not None:
            away = self.weights * (1 - rows * teacher)
        else:
            away = self.weights * (1 - rows * self.truth) + self.noise[list(examples)] * rows
        return away.sum((1, 2, 3)), torch.ones(len(examples))

    def generators(self, signs: Tensor) -> Tensor:
        return self.rotations.coupled(couplings(signs))

    def written(self, examples: Any, generators: Tensor, drawing: torch.Generator) -> Any:
        return examples

    def losses(self, examples: Any, signs: Tensor | None) -> Any:
        shape = self.truth.shape[:2]
        generators = self.generators(signs if signs is not None else torch.zeros(shape))
        sums, counts = self.loss(examples, generators)
        return Losses(sums.double(), counts.double())


class Generators(Couplings):
    """The same with generators as adapters have them, so that trainings can agree with them."""

    def __init__(self, truth: Tensor, noise: float = 0.0) -> None:
        super().__init__(truth, noise)
        self.rotations = skewed(*truth.shape)
        self.size = float(self.rotations.stored.abs().mean())

    def loss(
        self, examples: Any, coupled: Tensor, teacher: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # All of one size, whatever the adapter's are.
        shares = (coupled * self.rotations.stored.sign() / self.size).tanh()
        taught = None if teacher is None else teacher.sign() * self.rotations.stored.sign()
        return super().loss(examples, shares, taught)


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_signs_that_agree_best_are_those_of_a_search_of_all(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    weights = torch.randn(6, rank, rank, generator=generator)
    weights = weights + weights.mT
    every = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * rank)  # 2^r × r
    without = weights.masked_fill(torch.eye(rank).bool(), 0)
    best = torch.einsum("ki,mij,kj->mk", every, without, every).max(1).values
    signs = synchronized(weights)
    assert torch.equal(synchronized(1e-15 * weights), signs)
    assert signs.abs().unique().tolist() == [1]
    assert torch.allclose(torch.einsum("mi,mij,mj->m", signs, without, signs), best, rtol=1e-4)


def noisy(generators: Tensor, noise: float) -> Tensor:
    """Skew-symmetric generators with noise of so many times their size."""
    drawn = noise * generators.std() * torch.randn(generators.shape)
    return generators + (drawn - drawn.mT) / math.sqrt(2)


def skewed(modules: int, rank: int) -> RelaxedSigns:
    count = rank * (rank - 1) // 2
    return RelaxedSigns([RotationParameters(rank, torch.randn(count)) for _ in range(modules)], CPU)


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_a_training_tells_signs_and_how_surely(noise: float) -> None:
    torch.manual_seed(4)
    rotations = skewed(8, 48)
    truth = torch.randint(2, (8, 48)) * 2.0 - 1
    whole = 0.1 * noisy(rotations.coupled(couplings(truth)), noise)
    known = Known.by(rotations, Retrained(Mean(whole, 1)), torch.Generator())
    every = torch.ones(8, 48, dtype=torch.bool)
    assert agreement(known.signs, truth, every) > (0.999 if noise < 1 else 0.98)
    assert known.related.errors > 20
    alone = known.of_couplings(truth).sum(-1)
    assert torch.equal(alone, known.of_couplings(-truth).sum(-1))
    # What it costs to flip one sign is told as the noise has it: 2 (r − 1) / noise².
    assert alone.mean() == pytest.approx(2 * 47 / noise**2, rel=0.25)
    assert torch.allclose(known.settling().of_couplings(truth).sum(-1), alone / 4)
    assert torch.allclose(known.choosing().of_couplings(truth).sum(-1), alone / 2)
    for layer in range(8):
        flipped = truth[layer].clone()
        flipped[layer] *= -1
        cost = known.lost(layer, flipped) - known.lost(layer, truth[layer])
        assert cost == pytest.approx(float(alone[layer, layer]), rel=1e-4)
        assert known.lost(layer, -flipped) == known.lost(layer, flipped)


def test_a_quiet_row_says_more_than_a_noisy_one() -> None:
    torch.manual_seed(11)
    rotations = skewed(8, 64)
    whole = skewed(8, 64).stored
    truth = torch.randint(2, (8, 64)) * 2.0 - 1
    spread = torch.where(torch.rand(8, 64) < 0.5, 1.0, 6.0)  # a pair's variance: of both its rows
    drawn = torch.randn(8, 64, 64) * (spread[:, :, None] * spread[:, None, :]).sqrt()
    rotations.stored = (whole + (drawn - drawn.mT) / math.sqrt(2)) * couplings(truth)
    known = Known.by(rotations, Retrained(Mean(whole, 1)), torch.Generator())
    alone = known.of_couplings(truth).sum(-1)
    assert alone[spread < 2].mean() / alone[spread > 2].mean() == pytest.approx(6, rel=0.3)
    every = torch.ones(8, 64, dtype=torch.bool)
    alike = kinship(rotations, whole, torch.Generator()).signs  # where all pairs count alike
    wrong, wrong_alike = (
        int((~same_signs(signs, truth, every)).sum()) for signs in (known.signs, alike)
    )
    assert wrong < 0.7 * wrong_alike


def test_a_training_that_agrees_by_chance_says_nothing() -> None:
    torch.manual_seed(5)
    rotations, other = skewed(8, 48), skewed(8, 48)
    known = Known.by(rotations, Retrained(Mean(other.stored, 1)), torch.Generator())
    assert known.related.found.mean() > 0.1  # the signs are those that agree best
    assert abs(known.related.errors) < 5
    assert not known.weights.any()


def test_a_module_that_nothing_is_known_of_is_left_to_the_loss() -> None:
    torch.manual_seed(6)
    rotations, other = skewed(8, 48), skewed(1, 48)
    whole = torch.cat([rotations.stored[:7], other.stored])
    known = Known.by(rotations, Retrained(Mean(whole, 1)), torch.Generator())
    assert not known.weights[7].any()
    assert known.weights[:7].abs().amax((1, 2)).min() > 0


def test_batches_take_every_example_in_turn() -> None:
    batches = Batches(range(6), 2, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    for _ in range(3):
        drawn = [number for _ in range(3) for number in next(batches)]
        assert sorted(drawn) == list(range(6))  # type: ignore[type-var]


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_search_finds_planted_signs(noise: float) -> None:
    truth = torch.randint(2, (4, 9)) * 2.0 - 1
    loss: Any = Couplings(truth, noise)
    plan = [Cycle("one", trainings=2, growth=30)] * 2
    search = SignSearch(loss, range(30), plan, rows=5, seed=1)  # type: ignore[arg-type]
    steps: list[Step] = []
    for count in (1, 2):
        search.run_cycle(steps.append, search.state.found.get("one"))
        assert agreement(search.state.found["one"], truth, loss.every) == 1
        assert search.steps == search.state.steps == len(steps) == 110 * count
        assert steps[-1].undecided == 0
        assert search.state.trained["one"].whole.count == 2 * count
    assert steps[0].undecided is None


def test_signs_grow_by_the_loss_where_no_training_tells_any() -> None:
    truth = torch.randint(2, (4, 9)) * 2.0 - 1
    loss: Any = Couplings(truth)
    shared: dict[str, Any] = {"rows": 5, "seed": 1}
    search = SignSearch(loss, range(30), [], **shared)  # type: ignore[arg-type]
    grown = search.grown(told_nothing(torch.ones(4, 9)), 60, lambda _: None)
    assert agreement(grown, truth, loss.every) == 1


def test_a_search_goes_on_where_it_was_and_repeats_by_its_seed(tmp_path: Path) -> None:
    torch.manual_seed(7)
    truth = torch.randint(2, (3, 24)) * 2.0 - 1
    loss: Any = Generators(truth, noise=0.03)
    plan = [Cycle(name, trainings=2, growth=10) for name in ("one", "other")] * 4

    def run_on(search: SignSearch, until: int) -> SignSearch:
        while search.state.done < until:
            found = search.state.found.get(plan[search.state.done].search)
            search.run_cycle(lambda _: None, found)
        return search

    def new(**options: Any) -> SignSearch:
        shared = {"rows": 5, "seed": 1}
        return SignSearch(loss, range(30), plan, **shared, **options)  # type: ignore[arg-type]

    file = StateFile(tmp_path, "00")
    for done in (2, 7):
        file.write(run_on(new(), done).state)
        kept = file.read()
        assert kept is not None
        resumed, straight = run_on(new(state=kept), 8), run_on(new(), 8)
        assert set(resumed.state.found) == {"one", "other"}
        for name, signs in straight.state.found.items():
            assert torch.equal(resumed.state.found[name], signs)
            ours, theirs = resumed.state.trained[name], straight.state.trained[name]
            assert ours.whole.count == theirs.whole.count == 2
            assert torch.equal(ours.whole.value, theirs.whole.value)
            assert ours.taught is not None and theirs.taught is not None
            assert ours.taught.count == theirs.taught.count == 6
            assert torch.equal(ours.taught.value, theirs.taught.value)
        assert torch.equal(resumed.state.generator, straight.state.generator)
        assert resumed.steps == straight.steps == resumed.state.steps
    file.path.write_bytes(file.path.read_bytes()[:-7])
    assert file.read() is None


@pytest.mark.parametrize("is_its_task", [True, False])
def test_only_a_model_of_the_adapters_task_teaches(
    is_its_task: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(8)
    truth = torch.randint(2, (3, 24)) * 2.0 - 1
    loss: Any = Generators(truth)
    if not is_its_task:
        loss.truth = torch.randn(loss.truth.shape).sign()
    taught: list[Tensor] = []

    def written(examples: Any, generators: Tensor, _: torch.Generator) -> list[int]:
        assert len(examples) == 192 and set(examples) == set(range(30))
        taught.append(generators)
        return [0, 1, 2, 3, 4]

    monkeypatch.setattr(loss, "written", written)
    rows: Counter[int] = Counter()  # of a step → steps
    asked = loss.loss

    def counted(examples: Any, *options: Any) -> tuple[Tensor, Tensor]:
        if len(examples) < 30:  # else nothing is learnt
            rows[len(examples)] += 1
        result: tuple[Tensor, Tensor] = asked(examples, *options)
        return result

    monkeypatch.setattr(loss, "loss", counted)
    plan = [Cycle("one", trainings=2, growth=20), Cycle("one", trainings=4, growth=20)]
    search = SignSearch(loss, range(30), plan, rows=5, seed=1)  # type: ignore[arg-type]
    signs = search.run_cycle(lambda _: None, None).found["one"]
    trained = search.run_cycle(lambda _: None, signs).trained["one"]
    assert search.steps == 6 * 40 + 40
    # Growth takes five examples a step, and so do trainings by a teacher; those on the data four.
    on_data = 2 * 40 if is_its_task else 6 * 40
    assert rows == {4: on_data, 5: search.steps - on_data}
    if is_its_task:
        assert torch.equal(taught[0], loss.generators(signs)) and len(taught) == 1
        assert trained.taught is not None
        assert (trained.whole.count, trained.taught.count) == (2, 4)
        known = search.known_again(truth, 2, lambda _: None)
        assert torch.equal(taught[1], loss.generators(truth))
        assert agreement(known.signs, truth, loss.every) == 1
        wrong = truth.clone()
        wrong[:, ::2] *= -1  # loses more than the base
        search.known_again(wrong, 1, lambda _: None)
        assert len(taught) == 2
    else:
        assert not taught and trained.taught is None
        assert trained.whole.count == 6
        assert not search.known().weights.any()


@pytest.mark.parametrize("astray", [True, False])
def test_the_better_of_what_grew_and_what_trainings_say_is_found(
    astray: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(10)
    truth = torch.randint(2, (3, 24)) * 2.0 - 1
    loss: Any = Generators(truth)
    plan = [Cycle("one", trainings=2, growth=20)]
    search = SignSearch(loss, range(30), plan, rows=5, seed=1)  # type: ignore[arg-type]
    grew = truth.clone()
    grew[:, ::2] *= -1 if astray else 1
    monkeypatch.setattr(search, "grown", lambda *_: grew)
    found = search.run_cycle(lambda _: None, None).found["one"]
    assert agreement(found, truth, loss.every) > 0.9
    assert torch.equal(found, grew) == (not astray)


def test_trainings_on_the_data_and_by_a_teacher_count_together() -> None:
    torch.manual_seed(9)
    rotations, other = skewed(8, 48), skewed(8, 48)
    truth = torch.randint(2, (8, 48)) * 2.0 - 1
    found = rotations.coupled(couplings(truth))
    whole, taught = noisy(found, 1.5), 0.1 * noisy(found, 1.0)
    generator = torch.Generator().manual_seed(1)
    for trained, says in (
        (Retrained(Mean(whole, 1)), 1 / 1.5**2),
        (Retrained(Mean(whole, 1), Mean(taught, 1)), 1 / 1.5**2 + 1),
    ):
        known = Known.by(rotations, trained, generator)
        # Of independent noise what they say adds up, 2 (r − 1) / noise² for each.
        told = known.of_couplings(truth).sum(-1).mean()
        assert told == pytest.approx(2 * 47 * says, rel=0.2)
    alone = Known.by(rotations, Retrained(Mean(taught, 1)), generator)
    assert known.related.errors < alone.related.errors
    # It was learnt from signs found, so that it agrees with them in any case.
    unrelated = Retrained(Mean(other.stored, 1), Mean(taught, 1))
    assert not Known.by(rotations, unrelated, generator).weights.any()


def test_a_slope_that_is_not_finite_stops_a_search() -> None:
    truth = torch.ones(2, 6)
    loss: Any = Couplings(truth)
    loss.noise[7] = math.nan
    shared: dict[str, Any] = {"rows": 5, "seed": 1}
    search = SignSearch(loss, range(30), [Cycle("one", trainings=2, growth=10)], **shared)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="its slope, is NaN or infinite"):
        search.run_cycle(lambda _: None, None)
    with pytest.raises(NonFiniteError, match="its slope, is NaN or infinite"):
        search.grown(told_nothing(truth), 20, lambda _: None)


def test_layers_are_taken_from_whichever_search_has_them_right() -> None:
    truth = torch.randint(2, (4, 9)) * 2.0 - 1
    loss: Any = Couplings(truth)
    first, second = truth.clone(), truth.clone()
    first[0, :4] *= -1
    second[2, 3:] *= -1
    found = crossed(loss, range(30), first, second, told_nothing(truth))
    assert agreement(found, truth, loss.every) == 1


@pytest.mark.parametrize("wrong", [[2], [1, 5], [0, 3, 4, 8]])
def test_the_polish_flips_signs_alone_and_in_groups(wrong: list[int]) -> None:
    truth = torch.randint(2, (3, 12)) * 2.0 - 1
    loss: Any = Couplings(truth, noise=0.0005)
    # The wrong group holds together more strongly than it does with the rest.
    for first in wrong:
        for second in wrong:
            loss.weights[1, first, second] = 0.05
    signs = truth.clone()
    signs[1, wrong] *= -1
    found = polish(loss, range(30), signs, told_nothing(signs), 6, lambda _: None, rounds=6)
    assert agreement(found.signs, truth, loss.every) == 1
    assert found.flipped in (len(wrong), 12 - len(wrong))
    assert (found.costs > 0).all()


def test_the_polish_leaves_alone_what_the_data_hardly_speak_against() -> None:
    truth = torch.randint(2, (3, 12)) * 2.0 - 1
    loss: Any = Couplings(truth)
    loss.weights[1, 4] = loss.weights[1, :, 4] = 1e-3  # a flip is worth 1.3 nats
    signs = truth.clone()
    signs[1, 4] *= -1
    found = polish(loss, range(30), signs, told_nothing(signs), 6, lambda _: None, rounds=6)
    assert found.flipped == 0
    assert -6.9 < found.costs[1, 4] < 0


@pytest.mark.parametrize(("told", "flips"), [(3.0, True), (0.5, False), (-3.0, False)])
def test_the_polish_counts_what_trainings_say(told: float, flips: bool) -> None:
    truth = torch.ones(2, 12)
    loss: Any = Couplings(truth)
    loss.weights[1, 4] = loss.weights[1, :, 4] = 1e-3  # a flip is worth 1.3 nats
    signs = truth.clone()
    signs[1, 4] *= -1
    known = told_nothing(signs)
    known.weights[1, 4, :] = known.weights[1, :, 4] = told / 11
    known.weights[1, 4, 4] = 0
    found = polish(loss, range(30), signs, known, 6, lambda _: None, rounds=6)
    assert torch.equal(found.signs, truth if flips else signs)  # 2 · 3 + 1.3 nats are enough
    assert found.costs[1, 4] == pytest.approx(1.3 if flips else -1.3, abs=0.2)  # of the data alone


def test_of_a_part_of_the_examples_only_what_is_sure_counts() -> None:
    entries = torch.zeros(8, 1, 3, 3)
    entries[:, 0, 0, 1] = entries[:, 0, 1, 0] = torch.tensor([4.0, -4] * 4)  # the examples disagree
    entries[:, 0, 1, 2] = entries[:, 0, 2, 1] = 1.0
    whole, part = (FlipSlopes(entries, scale).costs()[0] for scale in (1.0, 4.0))
    assert whole.tolist() == pytest.approx([64, 8 + 72 - 4, 12])
    assert 0 < part[0] < 4 * whole[0]
    assert part[2] == 4 * whole[2]  # they agree


class Searched:
    """A recovery of planted signs by `RecoveryRun`, without a model."""

    def __init__(self, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(6)
        self.truth = torch.randint(2, (3, 24), generator=generator) * 2.0 - 1
        self.loss: Any = Couplings(self.truth, noise)
        self.told: list[str] = []

    def run(self, readings: dict[str, Tensor], **options: Any) -> Outcome:
        run = RecoveryRun(
            self.loss,
            range(24),  # type: ignore[arg-type]
            range(24, 30),  # type: ignore[arg-type]
            self.loss.every,
            rows=5,
            seed=1,
            tell=self.told.append,
        )
        settings: dict[str, Any] = {"steps": None, "time_limit": None, "file": None}
        return run.carry_out(readings, **settings | options)

    def wrong(self, *places: tuple[int, int]) -> Tensor:
        signs = self.truth.clone()
        for place in places:
            signs[place] *= -1
        return signs


def test_a_start_that_is_right_is_taken_as_it_is() -> None:
    task = Searched()
    found = task.run({"bad": -task.wrong((0, 1), (1, 2), (2, 3)).cumprod(1), "good": task.truth})
    assert found.start_name == "good"
    assert found.steps == FIRST_CYCLE
    assert found.holds
    assert bool(found.alike.all())
    assert torch.equal(found.polished.signs, task.truth)


def test_trainings_alone_turn_no_sign_of_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Searched()

    def against(*_: object) -> Known:
        known = told_nothing(task.truth)
        wrong = task.wrong((1, 5))
        return replace(known, weights=1e3 * couplings(wrong))

    monkeypatch.setattr(SignSearch, "known", against)
    found = task.run({"good": task.truth})
    assert found.holds
    assert torch.equal(found.polished.signs, task.truth)


def test_a_start_with_a_few_wrong_signs_is_searched_on() -> None:
    task = Searched()
    found = task.run({"near": task.wrong((0, 1), (1, 2), (2, 3))})
    assert found.steps > FIRST_CYCLE
    assert not found.holds
    assert agreement(found.polished.signs, task.truth, task.loss.every) == 1
    assert found.start is not None
    assert found.held_out.mean < found.start.mean


def test_a_search_that_finds_no_room_on_disk_is_not_kept(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "searches", "00")
    trained = {"first": Retrained(Mean(torch.ones(4, 32, 32), 1))}
    state = SearchState(torch.zeros(4), 1, 40, {"first": torch.ones(4, 32)}, trained)
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            file.write(state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
    assert not list(file.path.parent.iterdir())
    file.write(state)
    assert file.read() is not None


def test_searches_that_disagree_go_on_as_far_as_they_may(tmp_path: Path) -> None:
    task = Searched(noise=3.0)  # what is found is the noise of what is searched on
    file = StateFile(tmp_path, "00")
    options = {"steps": LEAST_STEPS, "file": file}
    start = {"far": torch.ones_like(task.truth)}
    found = task.run(start, **options)
    state = file.read()
    assert state is not None and state.found.keys() == {"first", "second"}
    assert (found.steps, state.steps) == (LEAST_STEPS, 2 * FIRST_CYCLE)
    assert not found.is_below_base
    assert found.returned == float(found.alike.double().mean()) < 0.97
    for signs in state.found.values():
        same = same_signs(found.polished.signs, signs, task.loss.every)
        assert bool(same[found.alike].all())
    again = task.run(start, **options | {"steps": STEPS})
    assert any("going on after 2 cycles" in text for text in task.told)
    state = file.read()
    assert state is not None and state.done == 4
    assert again.steps == STEPS


@pytest.mark.parametrize(("is_near", "is_sure"), [(True, True), (True, False), (False, True)])
def test_a_start_below_the_base_betters_what_teaches(
    is_near: bool, is_sure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Searched()
    halves = [task.wrong(*((layer, sign) for sign in range(8))) for layer in (1, 2)]
    growing = itertools.cycle(halves)
    monkeypatch.setattr(SignSearch, "grown", lambda *_: next(growing))
    half = task.wrong(*((layer, sign) for layer in range(3) for sign in range(12)))
    monkeypatch.setattr(SignSearch, "known", lambda *_: told_nothing(half))
    if not is_sure:  # that it is below by more than chance
        monkeypatch.setattr("psoft_export.recovery.run.is_below", lambda *_: False)
    teachers: list[Tensor | None] = []
    cycle = SignSearch.run_cycle

    def seen(search: SignSearch, note: Any, teacher: Tensor | None) -> Any:
        teachers.append(teacher)
        return cycle(search, note, teacher)

    monkeypatch.setattr(SignSearch, "run_cycle", seen)
    start = task.wrong((0, 3)) if is_near else half
    found = task.run({"start": start}, steps=LEAST_STEPS + STEPS_OF_LATER)
    assert found.start is not None and (found.start.mean < found.base.mean) == is_near
    assert len(teachers) == 4
    assert teachers[0] is teachers[1] is None
    for teacher, found_first in zip(teachers[2:], halves, strict=True):
        assert teacher is not None
        wanted = task.truth if is_near else found_first
        assert agreement(teacher, wanted, task.loss.every) == 1


def test_a_search_with_a_start_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Searched()
    halves = [task.wrong(*((layer, sign) for sign in range(8))) for layer in (1, 2)]
    monkeypatch.setattr(SignSearch, "grown", lambda search, *_: halves[search.state.done % 2])
    start = {"near": task.wrong((0, 1), (1, 2), (2, 3))}
    straight, stopped = (StateFile(tmp_path, key) for key in ("00", "01"))
    task.run(start, steps=STEPS, file=straight)
    assert any("of the start was found from nothing" in text for text in task.told)
    task.run(start, steps=LEAST_STEPS, file=stopped)
    task.told.clear()
    task.run(start, steps=STEPS, file=stopped)
    assert any("going on after 2 cycles" in text for text in task.told)
    assert not any("of the start was found from nothing" in text for text in task.told)
    wanted, found = straight.read(), stopped.read()
    assert wanted is not None and found is not None
    assert wanted.done == found.done == 4
    assert torch.equal(wanted.generator, found.generator)
    for name, signs in wanted.found.items():
        assert torch.equal(found.found[name], signs)


def test_of_many_examples_a_sample_crosses_and_polishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psoft_export.recovery.run._WEIGHED", 9)
    monkeypatch.setattr("psoft_export.recovery.run._SCORED", 5)
    task = Searched()
    seen: list[tuple[int, ...]] = []
    losses = task.loss.losses
    monkeypatch.setattr(
        task.loss, "losses", lambda run, signs: seen.append(tuple(run)) or losses(run, signs)
    )
    found = task.run({"near": task.wrong((0, 1), (1, 2), (2, 3))})
    assert agreement(found.polished.signs, task.truth, task.loss.every) == 1
    assert found.polished.targets == 9
    held_out = tuple(range(24, 30))
    weighed = {run for run in seen if len(run) == 9}
    assert {len(run) for run in seen if run != held_out} == {3, 5, 6, 9}  # a third is run first
    assert len(weighed) == 1
    assert all(set(run) <= set(*weighed) for run in seen if len(run) == 3)


@pytest.mark.parametrize("alike", [True, False])
def test_signs_that_two_searches_do_not_share_are_polished_in_one_round(
    alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Searched()
    other = task.truth if alike else task.wrong(*((1, sign) for sign in range(8)))
    growing = itertools.cycle([task.truth, other])
    monkeypatch.setattr(SignSearch, "grown", lambda *_: next(growing))
    rounds: list[int] = []
    nothing = torch.zeros(task.truth.shape, dtype=torch.float64)

    def polished(*arguments: Any, **options: Any) -> Polished:
        rounds.append(options["rounds"])
        return Polished(arguments[2], nothing, nothing, 0, 1.0, 1.0)

    monkeypatch.setattr("psoft_export.recovery.run.polish", polished)
    found = task.run({}, steps=LEAST_STEPS)
    assert rounds == [6 if alike else 1]
    assert (found.returned >= found.needed) == alike


def test_searches_that_agree_stop() -> None:
    assert Searched().run({}).steps == LEAST_STEPS < DEFAULT_STEPS


@pytest.mark.parametrize("start", ["far", ""])
def test_without_time_the_fewest_steps_are_done(start: str) -> None:
    task = Searched(noise=0.1)
    readings = {start: torch.ones_like(task.truth)} if start else {}
    assert task.run(readings, time_limit=1e-3).steps == LEAST_STEPS
    assert Searched(noise=0.1).run(readings).steps > LEAST_STEPS, "or there is nothing to end"


def an_outcome(**changes: Any) -> Any:
    def losses(mean: float) -> Losses:
        sums = mean + torch.tensor([-0.01, 0.0, 0.01] * 4, dtype=torch.float64)
        return Losses(sums, torch.ones(12, dtype=torch.float64))

    nothing = torch.zeros(1, 8)
    polished = Polished(torch.ones(1, 8), nothing, nothing, 0, 1.0, 1000)
    usual = {"start": None, "readings": {}, "start_name": "", "steps": 360, "returned": 1.0}
    usual |= {"base": losses(3.0), "held_out": losses(1.0), "needed": 0.97, "holds": False}
    fields = usual | changes
    return Outcome(polished=polished, alike=ALL, **fields)


COSTS = torch.tensor([40.0, 40, 40, 40, 40, 40, 5, 0])
NOTHING = torch.zeros(8)
ALL = torch.ones(8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("gain", "verdict", "reason"),
    [
        (0.0, "recovered", "held-out loss 1 against the base's 3"),
        (30.0, "recovered", "held-out loss"),
        (50.0, "partly", r"2 signs in doubt may cost 2\.5% of the gain \(2% is the limit\)"),
    ],
)
def test_signs_that_the_data_speak_against_are_in_doubt(
    gain: float, verdict: str, reason: str
) -> None:
    costs = COSTS.clone()
    costs[7] = -gain
    module = judged("a", costs, NOTHING, 1000, ALL, ALL, 0)
    assert (module.settled, module.in_doubt, module.immaterial) == (6, 2, 0)
    assert module.at_stake == pytest.approx((gain + 5 / (1 + math.exp(5))) / 1000)
    found, why = judge(an_outcome(), [module])
    assert found == verdict
    assert re.search(reason, why)


def test_trainings_settle_what_the_data_leave_open() -> None:
    told = torch.zeros(8)
    told[6:] = torch.tensor([4.0, -2.0])
    module = judged("a", COSTS, told, 1000, ALL, ALL, 0)
    assert (module.settled, module.in_doubt) == (7, 1)
    assert module.at_stake == 0  # which costs the data nothing
    costs = COSTS.clone()
    costs[7] = 3.0
    module = judged("a", costs, told, 1000, ALL, ALL, 0)
    assert module.at_stake == pytest.approx(3 / (1 + math.exp(3 - 2)) / 1000)


def test_what_only_one_search_found_is_not_settled() -> None:
    module = judged("a", COSTS, NOTHING, 1000, ALL, torch.arange(8) % 4 > 0, 0)
    assert (module.settled, module.in_doubt, module.immaterial) == (4, 4, 0)


def test_what_is_in_doubt_of_an_svd_that_holds_is_its_own() -> None:
    module = judged("a", COSTS - 39, NOTHING, 1000, ALL, ALL, 0)
    assert judge(an_outcome(), [module])[0] == "partly"
    found, why = judge(an_outcome(holds=True, start_name="cuda"), [module])
    assert found == "recovered"
    assert why == "the signs of the SVD 'cuda' hold: held-out loss 1 against the base's 3"
    assert judge(an_outcome(holds=True, returned=0.7), [module])[0] == "partly"


@pytest.mark.parametrize(
    ("out_of_reach", "reason"),
    [
        (0, "the adapter turns nothing by more than rounding"),
        (3, "rounding, but for 3 vectors that no sign pins down"),
        (8, "no sign can be found: nearly equal singular values leave every vector open"),
    ],
)
def test_why_nothing_can_be_searched_is_said(out_of_reach: int, reason: str) -> None:
    module = judged("a", COSTS, NOTHING, 1000, ~ALL, ALL, out_of_reach)
    found, why = judge(an_outcome(), [module])
    assert found == "not" and why.endswith(reason)


def test_what_does_not_matter_is_no_risk() -> None:
    costs = COSTS.clone()
    costs[7] = -500
    module = judged("a", costs, NOTHING, 1000, torch.arange(8) < 6, ALL, out_of_reach=1)
    assert (module.settled, module.in_doubt, module.immaterial) == (6, 0, 1)
    assert judge(an_outcome(), [module])[0] == "recovered"
    found, why = judge(an_outcome(returned=0.96), [module])
    assert found == "partly"
    assert "found only 96.0% of the signs that matter alike (97% is needed)" in why


def recovered(planted: Planted, adapter: Path, **options: Any) -> psoft_export.RecoveryReport:
    settings = {"window": 64, "steps": STEPS, "random_start": True, "cache": False} | options
    return psoft_export.recover(planted.base, adapter, planted.text, **settings)


def test_scrambled_recovered_merged_and_verified(
    planted: Planted, signs: dict[str, Tensor], scrambled: Path, tmp_path: Path
) -> None:
    report = recovered(planted, scrambled, random_start=True)
    assert report.verdict == "recovered", report.reason
    right = right_signs(planted.base, planted.adapter, signs, dict(report.signs))
    assert all(bool(layer.all()) for layer in right.values())
    assert report.path == scrambled / FILENAME
    assert report.loss < report.base_loss - 1
    record = read_record(scrambled)
    assert record is not None
    assert record.recovered is not None
    assert record.recovered.loss == report.loss
    assert record.recovered.base_loss == report.base_loss
    merged = psoft_export.merge(planted.base, scrambled, tmp_path / "merged", cache=False)
    told = merged.manifest["basis"]["record"]
    assert "signs recovered from data" in told["svd"]
    assert told["recovered"]["loss"] == report.loss
    wanted = psoft_export.merge(planted.base, planted.adapter, tmp_path / "wanted", cache=False)
    ours, theirs = (load_file(m.output / "model.safetensors") for m in (merged, wanted))
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], atol=1e-5), name
    verdict = psoft_export.verify(planted.base, scrambled, tmp_path / "merged", cache=False)
    assert verdict.equivalent
    assert verdict.basis["record"]["recovered"]["seed"] == 0
    card = merged_card(merged.manifest, {"model.safetensors"}, "me/merged", None)
    assert "signs recovered from data, not recorded in training" in card


def test_what_is_made_of_a_recovered_record_repeats_it(
    planted: Planted, scrambled: Path, tmp_path: Path
) -> None:
    recovered(planted, scrambled)
    full = tmp_path / "full"
    psoft_export.convert(planted.base, scrambled, full, to="full", cache=False)
    mark = read_record(scrambled)
    again = read_record(full)
    assert mark is not None
    assert again is not None
    assert again.recovered == mark.recovered
    both = psoft_export.Combination({"new": scrambled, "old": planted.adapter}, "linear")
    psoft_export.combine(planted.base, both, tmp_path / "both", cache=False)
    combined = read_record(tmp_path / "both")
    assert combined is not None
    assert combined.recovered is not None
    assert combined.recovered.adapter == "new"
    assert "signs of 'new' recovered from data" in combined.summary
    lora = psoft_export.to_lora(planted.base, scrambled, tmp_path / "lora", cache=False)
    assert "recovered from data" in lora.manifest["basis"]["record"]["svd"]
    assert "recovered from data" in str(psoft_export.inspect(scrambled).record)


def test_training_by_another_library_needs_no_search(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        pretend(numpy_svd, there)
        elsewhere = tmp_path / "elsewhere"
        psoft_export.convert(
            planted.base, planted.adapter, elsewhere, to="this-machine", cache=False
        )
    (elsewhere / FILENAME).unlink()
    report = recovered(planted, elsewhere, random_start=False)
    assert report.verdict == "recovered", report.reason
    assert report.start == "numpy"
    assert report.steps == FIRST_CYCLE  # of the search that it is checked by
    assert set(report.readings) == set(known_readings(CPU))


def test_another_base_is_not_recovered(planted: Planted, scrambled: Path, tmp_path: Path) -> None:
    other = shutil.copytree(planted.base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    for name, tensor in tensors.items():
        if "proj" in name:
            tensors[name] = 0.25 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    report = recovered(replace(planted, base=other), scrambled)
    assert report.verdict != "recovered"
    assert report.path is None
    assert not (scrambled / FILENAME).exists()


def test_random_text_is_not_recovered(planted: Planted, scrambled: Path, tmp_path: Path) -> None:
    text = tmp_path / "random.txt"
    drawn = torch.randint(32, 127, (3000,), generator=torch.Generator().manual_seed(4))
    text.write_bytes(bytes(drawn.tolist()))
    report = recovered(replace(planted, text=text), scrambled)
    assert report.verdict == "not"
    assert "not surely below the base's" in report.reason
    with pytest.raises(NotRecoveredError, match="not recovered, so nothing was written") as caught:
        report.require_recovered()
    assert caught.value.exit_code == 16
    assert caught.value.report is report


def test_an_adapter_that_turns_nothing_has_nothing_to_recover(
    planted: Planted, scrambled: Path
) -> None:
    tensors = load_file(scrambled / "adapter_model.safetensors")
    still = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(still, scrambled / "adapter_model.safetensors", {"format": "pt"})
    report = recovered(planted, scrambled)
    assert report.verdict == "not"
    assert "no sign matters" in report.reason
    assert all(module.immaterial == module.rank for module in report.modules)
    assert report.steps == 0


def test_vectors_that_no_sign_pins_down_are_out_of_reach(tmp_path: Path) -> None:
    module = "model.layers.1.self_attn.o_proj"
    task = plant(tmp_path / "task", equal=f"{module}.weight")
    (task.adapter / FILENAME).unlink()
    report = recovered(task, task.adapter)
    reach = {found.module: found.out_of_reach for found in report.modules}
    assert {name: count for name, count in reach.items() if count} == {module: 2}
    for found in report.modules:
        classes = (found.settled, found.immaterial, found.in_doubt, found.out_of_reach)
        assert sum(classes) == found.rank
        assert min(classes) >= 0


def test_a_reading_that_fails_is_left_away(
    planted: Planted, scrambled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(np.linalg, "svd", fails)
    monkeypatch.setitem(readings._ON_CPU, "cpu", fails)  # which found the basis, and is not redone
    told: list[str] = []
    report = recovered(planted, scrambled, random_start=False, note=told.append)
    assert set(report.readings) == set(known_readings(CPU)) - {"numpy"}
    (failure,) = [text for text in told if "failed" in text]
    assert failure.startswith("the SVD 'numpy' failed for 'model.layers.0.")


def test_the_svd_of_a_basis_reads_its_own_signs() -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(8))
    options = BasisOptions(16, 1.0)
    basis = make_basis(training_svd(weight, options)[0], options)
    name = own_reading(CPU)
    assert name is not None
    own = known_readings(CPU)[name]
    assert torch.equal(read_signs(weight, basis, options, own), torch.ones(16))


def test_a_cache_that_cannot_be_written_does_not_stop_it(
    planted: Planted, scrambled: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "searches").write_text("in the way")
    told: list[str] = []
    options = {"random_start": True, "cache": True, "cache_dir": cache, "note": told.append}
    assert recovered(planted, scrambled, **options).verdict == "recovered"
    assert any("the search cannot be kept" in text for text in told)


def test_a_full_output_is_refused_before_the_search(
    planted: Planted, scrambled: Path, tmp_path: Path
) -> None:
    target = tmp_path / "full"
    target.mkdir()
    (target / "file").write_text("")
    told: list[str] = []
    with pytest.raises(OutputError, match="full"):
        recovered(planted, scrambled, output=target, note=told.append)
    assert not told
    with pytest.raises(OutputError, match="input"):
        recovered(planted, scrambled, output=planted.base, overwrite=True, note=told.append)
    assert not told


def test_partly_has_its_own_exit_code() -> None:
    nothing: dict[str, Any] = dict.fromkeys(f.name for f in fields(psoft_export.RecoveryReport))
    nothing |= {"verdict": "partly", "reason": "signs are open"}
    report = psoft_export.RecoveryReport(**nothing)
    with pytest.raises(PartlyRecoveredError, match=r"partly recovered.*signs are open") as caught:
        report.require_recovered()
    assert caught.value.exit_code == 15


def test_it_repeats_by_its_seed(planted: Planted, scrambled: Path, tmp_path: Path) -> None:
    copies = [shutil.copytree(scrambled, tmp_path / name) for name in ("one", "two")]
    first, second = (recovered(planted, copy, random_start=True, seed=5) for copy in copies)
    assert first.loss == second.loss
    assert first.train_loss == second.train_loss
    for module, found in first.signs.items():
        assert torch.equal(found.sign, second.signs[module].sign)


def test_an_interrupted_recovery_goes_on(planted: Planted, scrambled: Path, tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(text: str) -> None:
        if "cycle 1 of" in text:
            notes.append("stopped")
        elif notes:
            raise StoppedError

    notes: list[str] = []
    options = {"random_start": True, "cache": True, "cache_dir": tmp_path / "cache"}
    with pytest.raises(StoppedError):
        recovered(planted, scrambled, note=stop, **options)
    assert not (scrambled / FILENAME).exists()
    told: list[str] = []
    other = shutil.copytree(planted.base, tmp_path / "base")
    name = "model.norm.weight"  # which the adapter does not change
    files.edit_tensors(other / "model.safetensors", lambda t: t | {name: t[name] * 1.5})
    with pytest.raises(StoppedError):
        notes.clear()
        recovered(replace(planted, base=other), scrambled, note=stop, **options)
    assert len(list((tmp_path / "cache" / "searches").iterdir())) == 2
    kept = shutil.copytree(tmp_path / "cache", tmp_path / "other cache")
    assert list((kept / "searches").iterdir())
    assert run(["cache", "clear", "--cache-dir", str(kept)]) == 0
    assert not list((kept / "searches").iterdir())
    report = recovered(planted, scrambled, note=told.append, **options)
    assert any("going on after 1 cycles" in text for text in told)
    assert report.verdict == "recovered", report.reason
    assert len(list((tmp_path / "cache" / "searches").iterdir())) == 1  # of the other base


def test_a_time_limit_ends_it(
    planted: Planted, scrambled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    carry_out = RecoveryRun.carry_out

    def noted(run: RecoveryRun, readings: Any, **options: Any) -> Outcome:
        asked.update(options)
        return carry_out(run, readings, **options)

    monkeypatch.setattr(RecoveryRun, "carry_out", noted)
    report = recovered(planted, scrambled, steps=None, time_limit=3, random_start=True)
    assert asked["time_limit"] == 3 and asked["steps"] is None
    assert report.seconds < 60
    assert LEAST_STEPS <= report.steps < DEFAULT_STEPS


def test_bfloat16_finds_the_same(
    planted: Planted, signs: dict[str, Tensor], scrambled: Path
) -> None:
    report = recovered(planted, scrambled, dtype="bf16", random_start=True)
    assert report.verdict == "recovered", report.reason
    right = right_signs(planted.base, planted.adapter, signs, dict(report.signs))
    assert all(bool(layer.all()) for layer in right.values())


@pytest.mark.gpu
@pytest.mark.parametrize("random_start", [True, False])
def test_cuda_finds_the_same(
    planted: Planted,
    signs: dict[str, Tensor],
    scrambled: Path,
    random_start: bool,
    tmp_path: Path,
) -> None:
    options = {"device": "cuda", "dtype": "fp32", "random_start": random_start}
    report = recovered(planted, scrambled, **options)
    assert report.verdict == "recovered", report.reason
    drivers = {"cuda", "cuda-gesvd", "cuda-gesvdj", "cuda-gesvda"}
    assert set(report.readings) == (set() if random_start else {*known_readings(CPU), *drivers})
    right = right_signs(planted.base, planted.adapter, signs, dict(report.signs))
    assert all(bool(layer.all()) for layer in right.values())
    for device in ("cuda", "cpu"):
        merged = psoft_export.merge(planted.base, scrambled, tmp_path / device, device=device)
        assert merged.manifest["basis"]["record"]["recovered"] is not None


def test_the_record_goes_into_a_copy(planted: Planted, scrambled: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    report = recovered(planted, scrambled, output=target)
    assert report.path == target / FILENAME
    assert not (scrambled / FILENAME).exists()
    assert psoft_export.load_adapter(target).record is not None


def test_a_record_is_not_replaced_without_force(planted: Planted, tmp_path: Path) -> None:
    adapter = shutil.copytree(planted.adapter, tmp_path / "adapter")
    with pytest.raises(OutputError, match=r"there is a record already.*--force"):
        recovered(planted, adapter)
    assert recovered(planted, adapter, force=True).verdict == "recovered"


def _change_config(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_has_no_signs_to_recover_is_refused(
    planted: Planted, scrambled: Path, tmp_path: Path
) -> None:
    _change_config(scrambled, psoft_svd="lowrank")
    with pytest.raises(UnsupportedError, match="random projection"):
        recovered(planted, scrambled)
    with pytest.raises(UsageError, match=r"not a folder here.*--output"):
        recovered(planted, Path("me/adapter"))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": 60}, "steps 60: at least 290 are needed"),
    "both limits": ({"time_limit": 5.0}, "steps and time: give one of them"),
    "time": ({"steps": None, "time_limit": -1.0}, "time -1: a number of seconds above 0"),
    "batch": ({"batch": 0}, "batch 0: at least 1"),
    "reading": (
        {"readings": ["scipy"], "random_start": False},
        "reading 'scipy' is not one of cpu, cpu-float64",
    ),
    "no reading": ({"readings": ["cpu"]}, "readings and random-start: give one of them"),
    "output": ({"output": "adapter"}, "is the adapter itself; leave --output away"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named(planted: Planted, scrambled: Path, case: str) -> None:
    options, message = BAD[case]
    if "output" in options:
        options = {"output": scrambled}
    with pytest.raises((UsageError, OutputError), match=message):
        recovered(planted, scrambled, **options)


def test_the_command_says_what_it_found(
    planted: Planted, scrambled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["--base", str(planted.base), "--adapter", str(scrambled), "--window", "64"]
    command = ["recover", *shared, "--text", str(planted.text), "--steps", str(STEPS)]
    command.append("--random-start")
    assert run(command) == 0
    told = capsys.readouterr()
    assert "recovered: held-out loss" in told.out
    assert f"signs record {scrambled / FILENAME}" in told.out
    assert "recovering: step 20" in told.err
    assert run(command) == OutputError.exit_code
    assert run([*command, "--force", "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "recovered"
    assert report["path"] == str(scrambled / FILENAME)


def test_a_merge_recovers_first(
    planted: Planted,
    scrambled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("psoft_export.recovery.run.STEPS", LEAST_STEPS)
    text = tmp_path / "task.jsonl"  # examples of the length that the text was written in
    whole = planted.text.read_text()
    rows = [whole[first : first + 64] for first in range(0, len(whole), 64)]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    output = tmp_path / "merged"
    command = ["merge", "--base", str(planted.base), "--adapter", str(scrambled)]
    command += ["--output", str(output), "--recover-with", str(text)]
    assert run([*command, "--dry-run"]) == UsageError.exit_code
    assert run(command) == 0
    assert (scrambled / FILENAME).exists()
    assert "recovered from data" in capsys.readouterr().out
    assert run([*command, "--overwrite"]) == 0
    told = capsys.readouterr().err
    assert f"signs stand in {scrambled / FILENAME}; what --recover-with names is not read" in told
    drawn = torch.randint(32, 127, (40, 64), generator=torch.Generator().manual_seed(4))
    rows = [bytes(row.tolist()).decode() for row in drawn]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (scrambled / FILENAME).unlink()
    shutil.rmtree(output)
    assert run(command) == NotRecoveredError.exit_code
    assert not output.exists()


def test_a_sequence_to_sequence_model_is_searched(
    base_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_folder("t5")
    AutoTokenizer.from_pretrained(EXAMPLES / "base").save_pretrained(base)
    adapter = save_adapter("t5", base, tmp_path / "adapter")
    data = tmp_path / "task.jsonl"
    rows = [{"prompt": f"{n * n % 97}", "completion": f"{n}"} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"steps": STEPS, "random_start": True, "cache": False, "batch": 2}
    report = psoft_export.recover(base, adapter, data, **options)
    assert report.verdict != "recovered"  # nobody trained it
    assert report.path is None
    assert report.steps == STEPS
    assert report.data == "40 windows of up to 256 tokens of task.jsonl"
    assert any(".EncDecAttention." in module.module for module in report.modules)
