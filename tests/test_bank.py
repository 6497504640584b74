"""Several tasks in one model in memory."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import psoft_export
from psoft_export import AdapterBank, Combination, errors
from psoft_export import bank as bank_module
from psoft_export.verification.tiles import unit_in_last_place
from tests import files, machines, models
from tests.conftest import BUNDLED, EXAMPLES
from tests.test_combine import STRICT, adapter

BASE = EXAMPLES / "base"
TASKS = {name.split("-")[0]: EXAMPLES / "adapters" / name for name in BUNDLED}
IDS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(8))


def load(folder: Path = BASE, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(model: torch.nn.Module, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@torch.inference_mode()
def logits(model: Any, **arguments: Any) -> Tensor:
    found: Tensor = model(**({"input_ids": IDS} | arguments)).logits
    return found


@pytest.fixture(scope="module")
def merged_logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Tensor]:
    """Of each task's merged checkpoint, and of the base."""
    found: dict[str | None, Tensor] = {None: logits(load())}
    for task, folder in TASKS.items():
        merged = tmp_path_factory.mktemp(task)
        psoft_export.merge(BASE, folder, merged, device="cpu", dtype="fp32", overwrite=True)
        found[task] = logits(load(merged))
    return found


@pytest.fixture(params=["merged", "unmerged"])
def form(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def make() -> Iterator[Callable[..., AdapterBank]]:
    def of(model: Any, **options: Any) -> AdapterBank:
        bank = AdapterBank(model, **options)
        for task, folder in TASKS.items():
            bank.add(task, folder)
        return bank

    yield of


def test_each_task_is_its_merged_checkpoint(
    form: Any, make: Callable[..., AdapterBank], merged_logits: dict[str | None, Tensor]
) -> None:
    model = load()
    before = weights(model)
    bank = make(model, form=form)
    assert bank.tasks == tuple(TASKS) and bank.active is None
    assert equal(model, before), "adding changes nothing"
    for task, expected in merged_logits.items():
        bank.activate(task)
        assert bank.active == task
        torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=1e-4)
    with bank.using("prose"):
        with bank.using(None):
            torch.testing.assert_close(logits(model), merged_logits[None], atol=0, rtol=0)
        torch.testing.assert_close(logits(model), merged_logits["prose"], atol=2e-4, rtol=1e-4)
    assert bank.active == "records", "what was active before"
    bank.close()
    assert equal(model, before) and "forward" not in model.__dict__
    torch.testing.assert_close(logits(model), merged_logits[None], atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_those_that_merge_writes(
    dtype: torch.dtype, base_folder: Any, tmp_path: Path
) -> None:
    """To a unit in the last place: a bank forms the sum in float32."""
    folder = base_folder("llama", dtype)
    task = adapter(folder, tmp_path / "task", 3)
    psoft_export.merge(folder, task, tmp_path / "merged", device="cpu")
    model = load(folder, dtype)
    bank = AdapterBank(model)
    bank.add("task", task)
    bank.activate("task")
    merged = weights(load(tmp_path / "merged", dtype))
    for name, tensor in model.state_dict().items():
        expected = merged[name].double()
        error = (tensor.double() - expected).abs()
        floor = unit_in_last_place(expected.abs().amax().expand_as(expected), torch.float32)
        assert (error <= unit_in_last_place(expected, dtype) + floor).all(), name


@pytest.mark.slow
@pytest.mark.parametrize(("base", "count"), [(None, 1000), (BASE, 100)])
def test_a_thousand_switches_return_the_base_bit_for_bit(
    base: Path | None, count: int, make: Callable[..., AdapterBank]
) -> None:
    model = load(dtype=torch.bfloat16)
    before = weights(model)
    bank = make(model, base=base)
    tasks: list[str | None] = [None, *TASKS]
    seen: dict[str | None, dict[str, Tensor]] = {}
    picks = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    for number, pick in enumerate(picks):
        task = tasks[pick]
        bank.activate(task)
        if number % 50 == 0:
            known = seen.setdefault(task, weights(model))
            assert equal(model, known), "a task is always the same"
    bank.activate(None)
    assert equal(model, before)


def test_base_files_take_the_place_of_copies(
    make: Callable[..., AdapterBank], tmp_path: Path
) -> None:
    model = load()
    before = weights(model)
    kept = make(model)
    targets = sum(layer.weight.nbytes for layer in kept._layers.values())
    assert kept.memory.originals == targets
    kept.activate("prose")
    merged = weights(model)
    kept.close()
    read = make(model, base=BASE)
    assert read.memory.originals == 0 and read.memory.total == kept_total(read)
    read.activate("prose")
    assert equal(model, merged)
    read.activate(None)
    assert equal(model, before)
    read.close()
    other = files.copy_of(BASE, tmp_path / "other")
    name = "model.layers.2.mlp.up_proj.weight"
    files.edit_tensors(other / "model.safetensors", lambda t: t | {name: t[name] * 1.5})
    bank = AdapterBank(model, base=other)
    with pytest.raises(errors.MismatchError, match=r"other: its weight of 'model\.layers\.2\.mlp"):
        bank.add("prose", TASKS["prose"])
    assert bank.tasks == () and equal(model, before)


def test_hot_tasks_are_copies_and_the_last_used_stay(make: Callable[..., AdapterBank]) -> None:
    model = load()
    cold = make(model)
    expected = {}
    for task in TASKS:
        cold.activate(task)
        expected[task] = weights(model)
    cold.close()
    before = weights(model)
    bank = make(model, hot=2)
    assert bank.memory.hot == 0
    for task in ("prose", "arithmetic", "prose", "records", "prose", "arithmetic", "prose"):
        bank.activate(task)
        assert equal(model, expected[task])
    assert set(bank._hot) == {"arithmetic", "prose"}
    targets = sum(layer.weight.nbytes for layer in bank._layers.values())
    assert bank.memory.hot == 2 * targets
    bank.remove("prose")
    assert set(bank._hot) == {"arithmetic"} and equal(model, before)
    with pytest.raises(errors.UsageError, match="hot 1: a number of tasks of a merged bank"):
        AdapterBank(load(), form="unmerged", hot=1)


def kept_total(bank: AdapterBank) -> int:
    return bank.memory.basis + sum(bank.memory.tasks.values())


def test_a_task_costs_r_squared_numbers_a_module(form: Any, tmp_path: Path, llama: Path) -> None:
    bank = AdapterBank(models.load_task_model("llama", llama), form=form)
    sizes = []
    for seed in range(3):
        bank.add(str(seed), adapter(llama, tmp_path / str(seed), seed, **STRICT))
        sizes.append(bank.memory)
    modules = 14
    assert all(size.basis == sizes[0].basis for size in sizes)
    assert set(sizes[-1].tasks.values()) == {modules * (8 * 8 + 2 * 8) * 8}, "float64, and vectors"


def test_each_row_has_its_own_task(
    make: Callable[..., AdapterBank], merged_logits: dict[str | None, Tensor]
) -> None:
    model = load()
    bank = make(model, form="unmerged")
    chosen = ["records", None, "arithmetic", "prose"]
    found = logits(model, tasks=chosen)
    for row, task in enumerate(chosen):
        torch.testing.assert_close(found[row], merged_logits[task][row], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model), merged_logits[None], atol=0, rtol=0)
    bank.activate("prose")
    found = logits(model, tasks=[None, None, "prose", None])
    torch.testing.assert_close(found[0], merged_logits[None][0], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model), merged_logits["prose"], atol=2e-4, rtol=1e-4)
    for count in (1, 2, 3):
        words = f"{count} are given for a batch of 4 rows"
        with pytest.raises(errors.UsageError, match=words):
            model(input_ids=IDS, tasks=chosen[:count])
        with pytest.raises(errors.UsageError, match=words):
            model.generate(IDS, tasks=chosen[:count], max_new_tokens=2)
    with pytest.raises(errors.UsageError, match=r"task 'law': is not in the bank \(prose, "):
        model(input_ids=IDS, tasks=["law", None, None, None])
    torch.testing.assert_close(logits(model), merged_logits["prose"], atol=2e-4, rtol=1e-4)


def test_generates_for_one_task_and_for_several(make: Callable[..., AdapterBank]) -> None:
    model = load()
    bank = make(model, form="unmerged")
    chosen = ["records", None, "arithmetic"]
    ids = IDS[:3]
    for beams in (1, 2):
        options: dict[str, Any] = {
            "max_new_tokens": 6,
            "min_new_tokens": 6,
            "do_sample": False,
            "num_beams": beams,
            "pad_token_id": 258,
        }
        rows = model.generate(ids, tasks=chosen, **options)
        for row, task in enumerate(chosen):
            with bank.using(task):
                assert torch.equal(model.generate(ids[row : row + 1], **options)[0], rows[row])
    bank.close()
    merged = make(model)
    with merged.using("records"):
        assert torch.equal(model.generate(ids, **options)[0], rows[0])


def test_more_rows_than_tasks_are_only_beams(make: Callable[..., AdapterBank]) -> None:
    model = load()
    make(model, form="unmerged")
    embedded = model.get_input_embeddings()(IDS)
    words = "2 are given for a batch of 4 rows"
    with pytest.raises(errors.UsageError, match=words):
        model(inputs_embeds=embedded, tasks=["prose", None])
    with pytest.raises(errors.UsageError, match=words):
        model.generate(inputs_embeds=embedded, tasks=["prose", None], max_new_tokens=2)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": True, "pad_token_id": 258}
    found = model.generate(IDS[:2], tasks=["prose", None], num_return_sequences=3, **options)
    assert len(found) == 6


def test_a_bank_filled_in_inference_mode_works_outside(make: Callable[..., AdapterBank]) -> None:
    for form in ("merged", "unmerged"):
        model = load()
        with torch.inference_mode():
            bank = make(model, form=form)
            bank.activate("prose")
            expected = model(input_ids=IDS).logits.clone()
            if form == "unmerged":
                model(input_ids=IDS, tasks=["prose", None, None, None])
        bank.activate("records")
        bank.activate("prose")
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
        if form == "unmerged":
            mixed = model(input_ids=IDS, tasks=["prose", None, None, None]).logits
            torch.testing.assert_close(mixed[0], expected[0], atol=2e-4, rtol=1e-4)


def test_other_libraries_methods_stay_theirs(make: Callable[..., AdapterBank]) -> None:
    """As accelerate does it: `forward` of a model, or of a layer, is an attribute."""
    model = load()
    plain = model.forward
    model.forward = theirs = lambda *args, **named: plain(*args, **named)
    bank = make(model, form="unmerged")
    assert model.forward is not theirs
    bank.close()
    assert model.forward is theirs
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = layer.forward
    bank = AdapterBank(model, form="unmerged")
    with pytest.raises(errors.UnsupportedError, match=r"up_proj' is in another library's hands"):
        bank.add("prose", TASKS["prose"])


@pytest.mark.parametrize("family", ["vit", "deberta", "t5", "qwen3"])
def test_every_family_of_models(family: str, base_folder: Any, tmp_path: Path) -> None:
    """Strict, relaxed; and one of a lower rank that came first."""
    base = base_folder(family)
    heads: dict[str, Any] = {"modules_to_save": None, "task_type": None}
    model = models.load_task_model(family, base)
    before = weights(model)
    folders = {}
    for seed, (name, options) in enumerate({"low": {"r": 4}, "high": {}, "strict": STRICT}.items()):
        folder = models.save_adapter(family, base, tmp_path / name, seed=seed, **heads, **options)
        # Without the head, drawn at random, the records are of one base.
        psoft_export.record(base, folder, device="cpu")
        folders[name] = folder
    inputs = models.FAMILIES[family].inputs()
    found: dict[tuple[str, str], Tensor] = {}
    for form in ("merged", "unmerged"):
        bank = AdapterBank(model, form=form)  # type: ignore[arg-type]
        bank.add("low", folders["low"])
        bank.activate("low")
        with torch.inference_mode():
            early = model(**inputs)[0].clone()
        for name in ("high", "strict"):
            bank.add(name, folders[name])
        for name in folders:
            with bank.using(name), torch.inference_mode():
                found[form, name] = model(**inputs)[0].clone()
        scale = float(early.abs().max())
        assert float((found[form, "low"] - early).abs().max()) < 1e-4 * scale
        if form == "unmerged":
            rows = len(next(iter(inputs.values())))
            tasks = [*folders, None][:rows]
            tasks += [None] * (rows - len(tasks))
            if family == "deberta":  # it projects positions, which are no rows of the batch
                words = "gets 1 rows for a batch of .* tasks; this model cannot mix tasks"
                with pytest.raises(errors.UnsupportedError, match=words):
                    model(**inputs, tasks=tasks)
                tasks = []
            with torch.inference_mode():
                mixed = model(**inputs, tasks=tasks or None)[0]
            for row, task in enumerate(tasks):
                if task is not None:
                    off = float((mixed[row] - found[form, task][row]).abs().max())
                    assert off < 1e-4 * scale
        bank.close()
        assert equal(model, before)
    for name in folders:
        off = float((found["merged", name] - found["unmerged", name]).abs().max())
        assert off < 2e-4 * float(found["merged", name].abs().max())
        loaded = models.load_with_peft(family, base, folders[name])
        psoft_export.restore_basis(loaded, folders[name])
        if not models.FAMILIES[family].saved:  # PEFT's head is another random one
            with torch.inference_mode():
                theirs = loaded(**inputs)[0]
            assert float((found["merged", name] - theirs).abs().max()) < 2e-4 * scale


@pytest.mark.slow
def test_compiled_models_switch_and_mix(
    form: Any, make: Callable[..., AdapterBank], merged_logits: dict[str | None, Tensor]
) -> None:
    model = load()
    bank = make(model, form=form)
    compiled: Any = torch.compile(model, backend="aot_eager")
    for task in ("prose", None, "arithmetic", "prose"):
        with bank.using(task):
            torch.testing.assert_close(logits(compiled), merged_logits[task], atol=2e-4, rtol=1e-4)
    if form == "unmerged":
        chosen = ["prose", None, "arithmetic", "records"]
        found = logits(compiled, tasks=chosen)
        for row, task in enumerate(chosen):
            torch.testing.assert_close(found[row], merged_logits[task][row], atol=2e-4, rtol=1e-4)


def test_tasks_combine_in_the_bank_as_on_disk(tmp_path: Path, llama: Path) -> None:
    model = models.load_task_model("llama", llama)
    bank = AdapterBank(model)
    folders: dict[str, str | Path] = {
        "math": adapter(llama, tmp_path / "math", 1),
        "code": adapter(llama, tmp_path / "code", 2, r=4, target_modules=["q_proj", "up_proj"]),
    }
    for name, folder in folders.items():
        bank.add(name, folder)
    for method in ("lie", "dare-linear"):
        options = {"seed": 3} if method != "lie" else {}
        bank.combine("both", {"math": 0.6, "code": 0.8}, method, **options)
        combination = Combination(folders, method, {"math": 0.6, "code": 0.8}, **options)
        out = tmp_path / method
        psoft_export.combine(llama, combination, out, device="cpu")
        bank.add("disk", out)
        found = []
        for task in ("both", "disk"):
            bank.activate(task)
            found.append(model(input_ids=IDS % 100).logits.detach())
        torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
        bank.remove("both")
        bank.remove("disk")
        assert bank.active is None
    for arguments, words in [
        (({"law": 1.0},), "task 'law': is not in the bank"),
        (({"math": 1.0}, "slerp"), "takes 2 adapters, not 1"),
        (({"math": 1.0}, "mean"), "method 'mean' is not one of"),
        (({"math": "1"},), "is not a number"),
        (({},), "no adapter is given"),
    ]:
        with pytest.raises(errors.UsageError, match=words):
            bank.combine("both", *arguments)  # type: ignore[arg-type]
    assert bank.tasks == ("math", "code")


def test_an_adapter_recorded_elsewhere_means_the_same(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.save_adapter("llama", llama, tmp_path / "task")
    with monkeypatch.context() as patch:
        machines.pretend(machines.random_signs, patch)
        psoft_export.record(llama, folder, cache=False)
    psoft_export.merge(llama, folder, tmp_path / "merged", device="cpu")
    model = models.load_task_model("llama", llama)
    bank = AdapterBank(model)
    bank.add("here", adapter(llama, tmp_path / "here", 5))
    bank.add("task", folder)
    bank.activate("task")
    merged = models.load_task_model("llama", tmp_path / "merged")
    ids = IDS % 100
    torch.testing.assert_close(
        model(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4, rtol=1e-4
    )


def test_failing_half_way_leaves_the_base(
    make: Callable[..., AdapterBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()
    before = weights(model)
    bank = make(model)
    bank.activate("arithmetic")
    calls = []
    merge = bank_module._Layer.merge

    def failing(layer: Any, turn: Any) -> None:
        calls.append(layer)
        if len(calls) == 5:
            raise torch.OutOfMemoryError
        merge(layer, turn)

    monkeypatch.setattr(bank_module._Layer, "merge", failing)
    with pytest.raises(torch.OutOfMemoryError):
        bank.activate("prose")
    assert bank.active is None and equal(model, before)


def test_what_cannot_be_added_changes_nothing(
    form: Any, tmp_path: Path, llama: Path, base_folder: Any
) -> None:
    model = models.load_task_model("llama", llama)
    before = weights(model)
    bank = AdapterBank(model, form=form)
    task = adapter(llama, tmp_path / "task", 1)
    bank.add("task", task)
    basis = bank.memory.basis
    stranger_base = files.copy_of(llama, tmp_path / "stranger-base")
    name = "model.layers.1.mlp.down_proj.weight"
    files.edit_tensors(stranger_base / "model.safetensors", lambda t: t | {name: t[name] + 1e-3})
    stranger = adapter(stranger_base, tmp_path / "stranger", 2, r=16)
    words = r"task 'law': the model's weight of 'model\.layers\.1\.mlp\.down_proj' is not the one"
    with pytest.raises(errors.MismatchError, match=words):
        bank.add("law", stranger)
    minilm = base_folder("minilm")
    head = models.save_adapter("minilm", minilm, tmp_path / "head")
    with pytest.raises(errors.UnsupportedError, match=r"brings its own 'classifier\.bias'"):
        bank.add("head", head)
    bare: dict[str, Any] = {"modules_to_save": None, "task_type": None}
    elsewhere = models.save_adapter("minilm", minilm, tmp_path / "bert", **bare)
    with pytest.raises(errors.MismatchError, match=r"target module '.*' is not in the model"):
        bank.add("bert", elsewhere)
    with pytest.raises(errors.UsageError, match="task 'task': is in the bank already"):
        bank.add("task", task)
    with pytest.raises(errors.UsageError, match="a name is needed"):
        bank.add("", task)
    with pytest.raises(errors.UsageError, match=r"task 'law': is not in the bank \(task\)"):
        bank.activate("law")
    with pytest.raises(errors.UsageError, match="task 'law'"), bank.using("law"):
        pass
    with pytest.raises(errors.UsageError, match="task 'law'"):
        bank.remove("law")
    assert bank.tasks == ("task",) and bank.memory.basis == basis and equal(model, before)


def test_tied_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    model = models.load_task_model("llama", llama)
    layers = model.model.layers
    layers[0].self_attn.q_proj.weight = layers[1].self_attn.q_proj.weight
    folder = models.save_adapter("llama", llama, tmp_path / "task", target_modules=["q_proj"])
    bank = AdapterBank(model)
    with pytest.raises(errors.UnsupportedError, match=r"the weight of '.*q_proj' is tied \("):
        bank.add("task", folder)


def test_options_that_do_not_go_together(llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    with pytest.raises(errors.UsageError, match="form 'mixed': is not one of merged, unmerged"):
        AdapterBank(model, form="mixed")  # type: ignore[arg-type]
    with pytest.raises(errors.UsageError, match="base: an unmerged bank leaves the weights"):
        AdapterBank(model, form="unmerged", base=llama)
    bank = AdapterBank(model)
    with pytest.raises(errors.UsageError, match="has an AdapterBank already"):
        AdapterBank(model)
    with pytest.raises(errors.UsageError, match="a merged model does one task at a time"):
        model(input_ids=IDS % 100, tasks=[None] * 4)
    bank.close()
    AdapterBank(model, form="unmerged")


def test_a_second_thread_is_refused(make: Callable[..., AdapterBank]) -> None:
    model = load()
    bank = make(model, form="unmerged")
    bank.activate("prose")
    caught: list[Exception] = []

    def elsewhere() -> None:
        calls: list[Callable[[], Any]] = [
            lambda: bank.activate("records"),
            lambda: bank.add("more", TASKS["prose"]),
            lambda: bank.remove("prose"),
            lambda: bank.combine("both", {"prose": 1.0}),
            lambda: model(input_ids=IDS, tasks=[None] * 4),
        ]
        for call in calls:
            try:
                call()
            except errors.UsageError as error:
                caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(caught) == 5 and all("another thread" in str(error) for error in caught)
    assert bank.active == "prose" and bank.tasks == tuple(TASKS)


def test_unrecorded_adapters_warn(llama: Path, tmp_path: Path) -> None:
    folder = models.save_adapter("llama", llama, tmp_path / "bare")
    bank = AdapterBank(models.load_task_model("llama", llama))
    with pytest.warns(UserWarning, match="task 'bare': the adapter has no basis record"):
        bank.add("bare", folder)
    strict = AdapterBank(models.load_task_model("llama", llama), require_record=True)
    with pytest.raises(errors.RecordMissingError):
        strict.add("bare", folder)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(
    dtype: torch.dtype, make: Callable[..., AdapterBank], merged_logits: dict[str | None, Tensor]
) -> None:
    tolerance = 1e-3 if dtype == torch.float32 else 0.5
    for form in ("merged", "unmerged"):
        model = load(dtype=dtype).cuda()
        before = weights(model)
        bank = make(model, form=form)
        for task, expected in merged_logits.items():
            bank.activate(task)
            found = logits(model, input_ids=IDS.cuda()).float().cpu()
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=0.1)
        bank.activate(None)
        assert equal(model, before)
        if form == "unmerged":
            found = logits(model, input_ids=IDS.cuda(), tasks=["prose", None, None, "records"])
            torch.testing.assert_close(
                found[0].float().cpu(), merged_logits["prose"][0], atol=tolerance, rtol=0.1
            )
