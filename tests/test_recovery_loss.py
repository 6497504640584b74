"""The loss that signs are searched by is the loss of PEFT's model, for every kind of model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import psoft_export
from psoft_export.algebra.relaxed_signs import RelaxedSigns, couplings
from psoft_export.bases import BasisFinder
from psoft_export.errors import NonFiniteError
from psoft_export.opening import open_plan
from psoft_export.recovery.examples import IGNORED, Example
from psoft_export.recovery.polish import FlipSlopes
from psoft_export.recovery.task_loss import TaskLoss
from psoft_export.verification.models import UnmergedLoader, find_changes
from tests.models import load_task_model, load_with_peft, save_adapter
from tests.planted import told_nothing

CPU = torch.device("cpu")


def _ids(length: int, seed: int) -> Tensor:
    return torch.randint(5, 90, (length,), generator=torch.Generator().manual_seed(seed))


def _sequences() -> list[Example]:
    drawn = (_ids(9, 1), _ids(13, 2), _ids(13, 3))
    made = [Example({"input_ids": ids}, ids.clone()) for ids in drawn]
    made[1].targets[:4] = IGNORED
    return made


def _pairs() -> list[Example]:
    return [
        Example({"input_ids": _ids(7 + n, n), "decoder_input_ids": _ids(5, 9 + n)}, _ids(5, 20 + n))
        for n in range(3)
    ]


def _texts() -> list[Example]:
    return [Example({"input_ids": _ids(6 + n, n)}, torch.tensor(n % 3)) for n in range(4)]


def _images() -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    return [Example({"pixel_values": image}, torch.tensor(n)) for n, image in enumerate(pixels)]


KINDS: dict[str, tuple[str, Callable[[], list[Example]]]] = {
    "llama": ("causal", _sequences),
    "t5": ("seq2seq", _pairs),
    "minilm": ("classes", _texts),
    "vit": ("images", _images),
}


def task_loss(family: str, base: Path, adapter: Path, rows: int = 2) -> TaskLoss:
    plan = open_plan(base, adapter)
    loaded: Any = plan.adapter
    loader = UnmergedLoader(plan)
    changes: Any = find_changes(plan, BasisFinder(loaded, device=CPU), CPU)
    modules = list(changes)
    return TaskLoss(
        loader.load({}, torch.float32, CPU, attention=None).model,
        KINDS[family][0],  # type: ignore[arg-type]
        RelaxedSigns([loaded.rotations[m] for m in modules], CPU),
        {loader.skeleton.module_path(m): changes[m].basis for m in modules},
        loaded.basis_options.scaling,
        pad=0,
        rows=rows,
    )


def alone(model: Any, task: str, example: Example) -> float:
    """The loss of one example, by transformers' own words for it."""
    inputs = {name: tensor[None] for name, tensor in example.inputs.items()}
    with torch.no_grad():
        logits = model(**inputs).logits[0].double()
    targets = example.targets
    if task == "causal":
        logits, targets = logits[:-1], targets[1:]
    if not targets.ndim:
        logits, targets = logits.view(1, -1), targets[None]
    kept = targets != IGNORED
    chosen = logits[kept].log_softmax(-1).gather(1, targets[kept][:, None])
    return -float(chosen.sum())


@pytest.mark.parametrize("family", KINDS)
def test_it_is_the_loss_of_peft_and_of_the_base(
    family: str, base_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_folder(family)
    adapter = save_adapter(family, base, tmp_path / "adapter")
    psoft_export.record(base, adapter, cache=False)
    loss = task_loss(family, base, adapter)
    task, make = KINDS[family]
    examples = make()
    found = loss.losses(examples, torch.ones(loss.rotations.shape))
    peft = load_with_peft(family, base, adapter)
    for example, lost in zip(examples, found.sums.tolist(), strict=True):
        assert lost == pytest.approx(alone(peft, task, example), rel=1e-4)
    if family in ("llama", "t5"):  # the others have a new head in the adapter
        bare = load_task_model(family, base)
        for example, lost in zip(examples, loss.losses(examples, None).sums.tolist(), strict=True):
            assert lost == pytest.approx(alone(bare, task, example), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_it(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter("llama", llama, tmp_path / "adapter")
    psoft_export.record(llama, adapter, cache=False)
    loss = task_loss("llama", llama, adapter)
    loss._model.lm_head.weight.data[3] = float("inf")
    with pytest.raises(NonFiniteError, match="the loss of an example is NaN or infinite"):
        loss.losses(_sequences(), None)


def test_numbers_count_in_units_of_the_bases_errors(
    base_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_folder("minilm")
    adapter = save_adapter("minilm", base, tmp_path / "adapter")
    psoft_export.record(base, adapter, cache=False)
    loss = task_loss("minilm", base, adapter)
    examples = [replace(e, targets=torch.tensor(50.0 + 9 * n)) for n, e in enumerate(_texts())]
    signs = torch.ones(loss.rotations.shape)
    errors, found = loss.losses(examples, None), loss.losses(examples, signs)
    assert errors.mean > 1000
    for _ in range(2):
        loss.scale_to(examples)
        assert loss.losses(examples, None).mean == pytest.approx(0.5)
        scaled = found.sums / (2 * errors.mean)
        assert torch.allclose(loss.losses(examples, signs).sums, scaled)


def test_each_example_may_have_signs_of_its_own(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter("llama", llama, tmp_path / "adapter")
    psoft_export.record(llama, adapter, cache=False)
    loss = task_loss("llama", llama, adapter)
    examples = _sequences()
    generator = torch.Generator().manual_seed(5)
    signs = torch.randint(2, (3, *loss.rotations.shape), generator=generator) * 2.0 - 1
    together, counts = loss.loss(examples, loss.rotations.coupled(couplings(signs)))
    assert counts.tolist() == [8, 9, 12]
    for example, own, lost in zip(examples, signs, together.tolist(), strict=True):
        assert lost == pytest.approx(float(loss.losses([example], own).sums), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])  # the others have a new head in the adapter
def test_answers_of_a_teacher_take_the_place_of_targets(
    family: str, base_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_folder(family)
    adapter = save_adapter(family, base, tmp_path / "adapter")
    psoft_export.record(base, adapter, cache=False)
    loss = task_loss(family, base, adapter)
    task, make = KINDS[family]
    examples = make()
    teacher = loss.generators(torch.ones(loss.rotations.shape))
    peft = load_with_peft(family, base, adapter)
    untaught, targets = loss.loss(examples, torch.zeros_like(teacher))
    taught, counts = loss.loss(examples, torch.zeros_like(teacher), teacher)
    assert torch.equal(counts, targets)
    for example, lost, own in zip(examples, taught.tolist(), untaught.tolist(), strict=True):
        inputs = {name: tensor[None] for name, tensor in example.inputs.items()}
        with torch.no_grad():
            chances = peft(**inputs).logits[0].double().softmax(-1)
        expected = 0.0
        for place, target in enumerate(example.targets.tolist()):
            if target == IGNORED or (task == "causal" and place == 0):
                continue
            at = place - 1 if task == "causal" else place
            expected -= float(chances[at] @ _log_chances(loss, example, at))
        assert lost == pytest.approx(expected, rel=1e-4)
        assert lost != pytest.approx(own, rel=1e-3)
    at_teacher = teacher.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(loss.loss(examples, at_teacher, teacher)[0].sum(), at_teacher)
    elsewhere = torch.zeros_like(teacher).requires_grad_(True)
    (other,) = torch.autograd.grad(loss.loss(examples, elsewhere, teacher)[0].sum(), elsewhere)
    assert loss.rotations.moves(slope).abs().max() < 1e-3 * loss.rotations.moves(other).abs().max()


def _log_chances(loss: TaskLoss, example: Example, place: int) -> Tensor:
    """What a model whose generators are zero answers."""
    inputs = {name: tensor[None] for name, tensor in example.inputs.items()}
    with torch.no_grad(), loss._turned(torch.zeros_like(loss.rotations.stored)):
        logits = loss._model(**inputs).logits[0, place]
    return logits.double().log_softmax(-1)  # type: ignore[no-any-return]


def test_a_teachers_numbers_take_the_place_of_targets(
    base_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_folder("minilm")
    adapter = save_adapter("minilm", base, tmp_path / "adapter")
    psoft_export.record(base, adapter, cache=False)
    loss = task_loss("minilm", base, adapter)
    examples = [replace(e, targets=torch.tensor(50.0)) for e in _texts()]
    teacher = loss.generators(torch.ones(loss.rotations.shape))
    own, _ = loss.loss(examples, teacher)
    same, counts = loss.loss(examples, teacher, teacher)
    away, _ = loss.loss(examples, torch.zeros_like(teacher), teacher)
    assert counts.tolist() == [1] * 4
    assert own.min() > 1000 and same.abs().max() < 1e-6 and away.min() > 0


def test_a_model_writes_what_it_would_answer(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter("llama", llama, tmp_path / "adapter")
    psoft_export.record(llama, adapter, cache=False)
    loss = task_loss("llama", llama, adapter, rows=3)
    loss._model.lm_head.weight.data *= 1e4  # so that one token has all of the chance
    lengths = (30, 24, 40, 9, 18)
    examples = [Example({"input_ids": _ids(n, n)}, _ids(n, n)) for n in lengths]
    examples[1].targets[:20] = IGNORED
    teacher = loss.generators(torch.ones(loss.rotations.shape))
    written = loss.written(examples, teacher, torch.Generator().manual_seed(1))
    for example, other in zip(examples, written, strict=True):
        tokens, begun = other.inputs["input_ids"], 20 if example is examples[1] else 16
        assert torch.equal(tokens[:begun], example.inputs["input_ids"][:begun])
        assert torch.equal(other.targets == IGNORED, example.targets == IGNORED)
        counted = other.targets != IGNORED
        assert torch.equal(other.targets[counted], tokens[counted])
        with torch.no_grad(), loss._turned(teacher):
            best = loss._model(input_ids=tokens[None]).logits[0].argmax(-1)
        assert torch.equal(tokens[begun:], best[begun - 1 : -1])
    assert not torch.equal(written[0].inputs["input_ids"], examples[0].inputs["input_ids"])
    assert torch.equal(written[3].inputs["input_ids"], examples[3].inputs["input_ids"])


def test_a_model_draws_what_it_writes(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter("llama", llama, tmp_path / "adapter")
    psoft_export.record(llama, adapter, cache=False)
    loss = task_loss("llama", llama, adapter)
    examples = [Example({"input_ids": _ids(24, n)}, _ids(24, n)) for n in range(3)]
    teacher = loss.generators(torch.ones(loss.rotations.shape))

    def tokens(seed: int) -> list[list[int]]:
        written = loss.written(examples, teacher, torch.Generator().manual_seed(seed))
        return [example.inputs["input_ids"].tolist() for example in written]

    assert tokens(1) == tokens(1) != tokens(2)


def test_of_other_tasks_only_the_answers_are_a_teachers(
    base_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_folder("t5")
    adapter = save_adapter("t5", base, tmp_path / "adapter")
    psoft_export.record(base, adapter, cache=False)
    loss, examples = task_loss("t5", base, adapter), _pairs()
    teacher = loss.generators(torch.ones(loss.rotations.shape))
    written = loss.written(examples, teacher, torch.Generator())
    assert all(one is other for one, other in zip(written, examples, strict=True))


def test_slopes_along_flips_are_those_of_the_loss(llama: Path, tmp_path: Path) -> None:
    """Against differences of the loss itself, for a sign and for a group of a layer."""
    adapter = save_adapter("llama", llama, tmp_path / "adapter")
    psoft_export.record(llama, adapter, cache=False)
    loss = task_loss("llama", llama, adapter)
    examples = _sequences()
    signs = torch.ones(loss.rotations.shape)
    slopes = FlipSlopes.at(loss, examples, signs, rows=2)
    assert slopes.scale == 1
    step = 1e-2
    for layer, members in ((0, [3]), (5, [0, 2, 6])):
        flip = signs.clone()
        flip[layer, members] = -1
        away = couplings(flip) - couplings(signs)
        with torch.no_grad():
            up, down = (
                loss.loss(examples, loss.rotations.coupled(couplings(signs) + s * step * away))[0]
                for s in (0.5, -0.5)
            )
        rank = len(signs[0])
        inside = torch.zeros(rank, dtype=torch.bool)
        inside[members] = True
        predicted = slopes.entries[:, layer][:, inside][:, :, ~inside].sum((1, 2))
        assert torch.allclose(predicted, (up - down) / step, rtol=2e-2, atol=2e-3)
    for cost, members in slopes.groups(2, signs, told_nothing(signs)):
        assert 1 <= len(members) <= len(signs[0]) // 2
        if len(members) == 1:
            assert cost == pytest.approx(float(slopes.costs()[2, members[0]]))
