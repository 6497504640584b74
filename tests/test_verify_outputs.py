"""Verification by outputs: right merges pass, wrong ones do not; the report says what was run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PsoftConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import psoft_export
from psoft_export.algebra.rotation import rotation
from psoft_export.bases import BasisFinder
from psoft_export.changes.subspace import SubspaceRotation
from psoft_export.checkpoint.reader import open_checkpoint
from psoft_export.combining import plan_merge
from psoft_export.errors import CheckpointError, UsageError
from psoft_export.model.skeleton import Skeleton
from psoft_export.plan import MergePlan
from psoft_export.verification import outputs
from psoft_export.verification.distance import DistanceSum, cross_entropy, share_followed
from psoft_export.verification.figures import OutputsLevel
from psoft_export.verification.inputs import make_inputs
from psoft_export.verification.models import (
    LoadedModel,
    MergedLoader,
    UnmergedLoader,
    find_changes,
)
from psoft_export.verification.outputs import FACTOR, check_outputs
from tests import files, models
from tests.conftest import BUNDLED, EXAMPLES
from tests.test_bundled_adapters import CORPORA, load_base, load_with_peft

BASE = EXAMPLES / "base"
CPU = torch.device("cpu")
TRUTHS = {"fp32": "F64", "bf16": "F32", "fp16": "F32"}

Fault = Callable[[Tensor, SubspaceRotation], Tensor]


def checked(base: Path, adapter: Path, merged: Path, **options: Any) -> OutputsLevel:
    plan = plan_merge(base, adapter)
    return check_outputs(plan, merged, BasisFinder(plan.adapter, device=CPU), device=CPU, **options)


def changes(plan: MergePlan) -> dict[str, Any]:
    return find_changes(plan, BasisFinder(plan.adapter, device=CPU), CPU)


def unmerged(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    plan = plan_merge(base, adapter)
    return UnmergedLoader(plan).load(changes(plan), dtype, CPU)


def delta(change: SubspaceRotation, core: Tensor) -> Tensor:
    """scaling · B (R − I) A in float64, for this R − I."""
    basis = change.basis
    return change.options.scaling * (basis.b.double() @ core @ basis.a.double())


def core_of(change: SubspaceRotation) -> Tensor:
    """R − I."""
    turn = rotation(change.parameters)
    return turn - torch.eye(len(turn), dtype=turn.dtype)


def plant(base: Path, adapter: Path, merged: Path, fault: Fault, modules: str = "") -> None:
    """Replace merged weights, of the modules whose path has `modules` in it, by wrong ones."""
    plan = plan_merge(base, adapter)
    found, before = changes(plan), load_file(base / "model.safetensors")

    def change(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        changed = 0
        for target in plan.targets:
            assert target.module is not None and target.entry is not None
            if modules in target.module:
                weight = before[target.entry.name].double()
                wrong = fault(weight, found[target.module])
                tensors[target.spec.name] = wrong.to(tensors[target.spec.name].dtype)
                changed += 1
        assert changed
        return tensors

    files.edit_tensors(merged / "model.safetensors", change)


def left_out(weight: Tensor, change: SubspaceRotation) -> Tensor:
    return weight


def applied_twice(weight: Tensor, change: SubspaceRotation) -> Tensor:
    return weight + 2 * delta(change, core_of(change))


def without_scaling(weight: Tensor, change: SubspaceRotation) -> Tensor:
    return weight + delta(change, core_of(change)) / change.options.scaling


def transposed(weight: Tensor, change: SubspaceRotation) -> Tensor:
    return weight + delta(change, core_of(change).T)


def vectors_swapped(weight: Tensor, change: SubspaceRotation) -> Tensor:
    parameters = change.parameters
    assert parameters.vector_a is not None and parameters.vector_b is not None
    a, b = parameters.vector_a.double(), parameters.vector_b.double()
    core = rotation(parameters) / b[:, None] / a
    return weight + delta(change, a[:, None] * core * b - torch.eye(len(core)))


def sign_flipped(pair: int) -> Fault:
    def fault(weight: Tensor, change: SubspaceRotation) -> Tensor:
        signs = torch.ones(len(core_of(change)), dtype=torch.float64)
        signs[pair] = -1
        return weight + delta(change, signs[:, None] * core_of(change) * signs)

    return fault


FAULTS: dict[str, tuple[Fault, str]] = {
    "one module left out": (left_out, "layers.1.mlp.up_proj"),
    "one module merged twice": (applied_twice, "layers.1.self_attn.q_proj"),
    "all merged twice": (applied_twice, ""),
    "scaling forgotten": (without_scaling, ""),
    "R transposed": (transposed, ""),
    "vectors a and b swapped": (vectors_swapped, ""),
    "first pair's sign flipped in one module": (sign_flipped(0), "layers.0.mlp.down_proj"),
}


@pytest.mark.parametrize("dtype", TRUTHS)
@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_adapters_merged_are_equivalent(name: str, dtype: str, tmp_path: Path) -> None:
    adapter = EXAMPLES / "adapters" / name
    psoft_export.merge(BASE, adapter, tmp_path / "merged", device="cpu", dtype=dtype)
    level = checked(BASE, adapter, tmp_path / "merged")
    assert level.equivalent and level.skipped is None
    assert level.truth == TRUTHS[dtype] and level.output == "logits"
    assert level.positions == 840 and level.losses is None
    assert "random tokens of the tokenizer" in level.inputs and "padded on the left" in level.inputs
    assert level.merged is not None and level.unmerged is not None
    assert 0 < level.merged.rms <= level.factor * level.unmerged.rms
    assert level.merged.mean <= level.merged.rms <= level.merged.largest
    assert level.merged.divergence is not None and 0 <= level.merged.divergence < 1e-3
    assert level.merged.top1 is not None and level.merged.top1 > 0.97
    assert level.generation is not None and level.generation.tokens == 128
    if dtype == "fp32":
        assert level.merged.rms < 1e-5 and level.generation.merged == 1


@pytest.mark.parametrize("dtype", TRUTHS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_merged_is_equivalent(
    family: str, dtype: str, base_folder: Any, tmp_path: Path
) -> None:
    base = base_folder(family)
    adapter = models.save_adapter(family, base, tmp_path / "adapter")
    psoft_export.merge(base, adapter, tmp_path / "merged", device="cpu", dtype=dtype)
    level = checked(base, adapter, tmp_path / "merged")
    assert level.equivalent and level.skipped is None, level
    assert level.truth == TRUTHS[dtype] and level.output == "logits"
    assert level.merged is not None and level.merged.rms > 0
    assert (level.generation is not None) == (family in ("llama", "llama-tied", "qwen3", "t5"))
    assert ("pixels" in level.inputs) == (family == "vit")


@pytest.mark.parametrize("family", models.FAMILIES)
def test_unmerged_model_is_the_one_that_peft_runs(
    family: str, base_folder: Any, tmp_path: Path
) -> None:
    base = base_folder(family)
    adapter = models.save_adapter(family, base, tmp_path / "adapter")
    inputs = models.FAMILIES[family].inputs()
    with torch.no_grad():
        ours = unmerged(base, adapter).model(**inputs).logits
        theirs = models.load_with_peft(family, base, adapter)(**inputs).logits
        plain = models.load_task_model(family, base)(**inputs).logits
    scale = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) < 1e-5 * scale
    assert float((ours - plain).abs().max()) > 1e-2 * scale, "the adapter does something"


@pytest.mark.parametrize("name", BUNDLED)
def test_unmerged_bundled_adapters_are_those_that_peft_runs_with_the_record(name: str) -> None:
    adapter = EXAMPLES / "adapters" / name
    ids = torch.randint(0, 256, (3, 64))
    with torch.no_grad():
        ours = unmerged(BASE, adapter).model(input_ids=ids).logits
        theirs = load_with_peft(BASE, adapter)(input_ids=ids).logits
    # The recorded basis is restored to a float32 of its own on either side.
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("dtype", TRUTHS)
@pytest.mark.parametrize("name", FAULTS)
def test_wrong_merges_are_not_equivalent(
    name: str, dtype: str, llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    psoft_export.merge(llama, llama_adapter, merged, device="cpu", dtype=dtype)
    plant(llama, llama_adapter, merged, *FAULTS[name])
    level = checked(llama, llama_adapter, merged)
    (problem,) = level.problems
    assert not level.equivalent and "times the" in problem and TRUTHS[dtype] in problem


@pytest.mark.parametrize(
    "fault",
    ["one module left out", "all merged twice", "vectors a and b swapped", "R transposed"],
)
def test_wrong_merges_of_a_trained_adapter_are_not_equivalent(fault: str, tmp_path: Path) -> None:
    adapter = EXAMPLES / "adapters" / "prose-relaxed-r64"
    psoft_export.merge(BASE, adapter, tmp_path / "merged", device="cpu")
    plant(BASE, adapter, tmp_path / "merged", *FAULTS[fault])
    level = checked(BASE, adapter, tmp_path / "merged")
    assert len(level.problems) == 1, level


def test_one_weak_pair_is_seen_in_float32_and_lost_in_bfloat16(tmp_path: Path) -> None:
    # Pair 64 of 64 in one module of 28: its part of ΔW is less than bfloat16 rounds off along the
    # way. Outputs cannot show it; comparing the weights themselves does.
    adapter = EXAMPLES / "adapters" / "prose-relaxed-r64"
    found = {}
    for dtype in ("fp32", "bf16"):
        merged = tmp_path / dtype
        psoft_export.merge(BASE, adapter, merged, device="cpu", dtype=dtype)
        plant(BASE, adapter, merged, sign_flipped(-1), "layers.1.self_attn.k_proj")
        found[dtype] = checked(BASE, adapter, merged).equivalent
    assert found == {"fp32": False, "bf16": True}


def test_text_is_run_and_gives_the_task_loss(tmp_path: Path) -> None:
    adapter = EXAMPLES / "adapters" / "prose-relaxed-r64"
    text = tmp_path / "text.txt"
    text.write_text(CORPORA["prose-relaxed-r64"]().held_out, "utf-8")
    psoft_export.merge(BASE, adapter, tmp_path / "merged", device="cpu")
    level = checked(BASE, adapter, tmp_path / "merged", text=text)
    assert level.equivalent and level.inputs.startswith("text: ")
    assert level.losses is not None and set(level.losses) == {"truth", "unmerged", "merged"}
    assert all(abs(loss - level.losses["truth"]) < 5e-3 for loss in level.losses.values())

    plant(BASE, adapter, tmp_path / "merged", left_out)
    wrong = checked(BASE, adapter, tmp_path / "merged", text=text)
    assert wrong.losses is not None and wrong.losses["merged"] > wrong.losses["truth"] + 0.3


def test_text_of_an_encoder_has_no_task_loss(tmp_path: Path) -> None:
    adapter = models.save_adapter("minilm", models.MINILM, tmp_path / "adapter")
    psoft_export.merge(models.MINILM, adapter, tmp_path / "merged", device="cpu")
    text = tmp_path / "text.txt"
    text.write_text("Where a singular value stands alone, its vectors are known to a sign. " * 20)
    level = checked(models.MINILM, adapter, tmp_path / "merged", text=text)
    assert level.equivalent and level.losses is None and level.generation is None
    assert level.inputs.startswith("text: ") and "padded on the right" in level.inputs


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        (b"caf\xe9" * 200, "not UTF-8"),
        (b"too short", "has 9 tokens; at least 128 are needed"),
    ],
)
def test_texts_that_cannot_be_used(content: bytes | None, says: str, tmp_path: Path) -> None:
    adapter = EXAMPLES / "adapters" / "arithmetic-strict-r32"
    psoft_export.merge(BASE, adapter, tmp_path / "merged", device="cpu")
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(UsageError, match=says):
        checked(BASE, adapter, tmp_path / "merged", text=text)


@pytest.mark.parametrize(("family", "says"), [("llama", "no tokenizer"), ("vit", "takes images")])
def test_text_for_a_model_that_cannot_read_it(
    family: str, says: str, base_folder: Any, tmp_path: Path
) -> None:
    base = base_folder(family)
    adapter = models.save_adapter(family, base, tmp_path / "adapter")
    psoft_export.merge(base, adapter, tmp_path / "merged", device="cpu")
    text = tmp_path / "text.txt"
    text.write_text("a " * 500)
    with pytest.raises(UsageError, match=says):
        checked(base, adapter, tmp_path / "merged", text=text)


def test_a_text_longer_than_is_read_may_be_cut_inside_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psoft_export.verification.text.TEXT_BYTES", 601)
    text = tmp_path / "text.txt"
    text.write_text("é" * 1000, "utf-8")
    inputs = make_inputs(skeleton_of(BASE), BASE, text)
    assert inputs.windows is not None and inputs.windows.shape == (4, 128)


def test_too_little_memory_is_said_and_nothing_is_run(
    llama: Path, llama_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "merged", device="cpu")
    monkeypatch.setattr(outputs, "available_bytes", lambda device: 100_000)
    level = checked(llama, llama_adapter, tmp_path / "merged")
    assert level.skipped is not None and "GiB" in level.skipped
    assert level.merged is None and level.unmerged is None
    assert level.generation is None and level.losses is None
    assert level.summary()["equivalent"] is None


def test_few_positions_are_kept_of_many(
    llama: Path, llama_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "merged", device="cpu")
    monkeypatch.setattr(outputs, "_KEPT_NUMBERS", 100 * 100)
    level = checked(llama, llama_adapter, tmp_path / "merged")
    assert level.equivalent and 80 <= level.positions <= 100
    assert "evenly spaced" in level.inputs


@pytest.mark.parametrize("dtype", TRUTHS)
def test_states_before_a_head_that_nobody_holds(
    dtype: str, base_folder: Any, tmp_path: Path
) -> None:
    base = base_folder("deberta")
    headless: dict[str, Any] = {"task_type": None, "modules_to_save": None}
    adapter = models.save_adapter("deberta", base, tmp_path / "adapter", **headless)
    psoft_export.merge(base, adapter, tmp_path / "merged", device="cpu", dtype=dtype)
    level = checked(base, adapter, tmp_path / "merged")
    assert level.equivalent and level.output == "last_hidden_state"
    assert "classifier.bias" in level.inputs
    assert level.merged is not None and level.merged.top1 is level.merged.divergence is None
    plant(base, adapter, tmp_path / "merged", left_out, "encoder.layer.1.attention")
    assert not checked(base, adapter, tmp_path / "merged").equivalent


@pytest.mark.parametrize(
    ("family", "class_name", "task_type", "head", "output"),
    [
        ("llama", "LlamaForSequenceClassification", "SEQ_CLS", "score", "logits"),
        (
            "deberta",
            "DebertaV2ForQuestionAnswering",
            "QUESTION_ANS",
            "qa_outputs",
            "start_logits and end_logits",
        ),
        ("deberta", "DebertaV2ForTokenClassification", "TOKEN_CLS", "classifier", "logits"),
        ("deberta", "DebertaV2Model", "FEATURE_EXTRACTION", None, "last_hidden_state"),
    ],
)
def test_other_heads(
    family: str,
    class_name: str,
    task_type: str,
    head: str | None,
    output: str,
    base_folder: Any,
    tmp_path: Path,
) -> None:
    base = base_folder(family)
    config = PsoftConfig(
        r=8,
        psoft_alpha=16,
        target_modules=list(models.FAMILIES[family].targets),
        task_type=task_type,
        modules_to_save=[head] if head else None,
    )
    model: Any = get_peft_model(getattr(transformers, class_name).from_pretrained(base), config)
    models.perturb(model, 3)
    model.save_pretrained(tmp_path / "adapter")
    psoft_export.merge(base, tmp_path / "adapter", tmp_path / "merged", device="cpu", dtype="bf16")
    level = checked(base, tmp_path / "adapter", tmp_path / "merged")
    assert level.equivalent and level.skipped is None, level
    assert level.output == output and level.generation is None
    assert level.merged is not None
    assert (level.merged.divergence is None) == (output != "logits")


def test_a_tensor_that_the_merged_checkpoint_lacks(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "merged", device="cpu")
    name = "model.layers.1.mlp.up_proj.weight"

    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in tensors.items() if key != name}

    files.edit_tensors(tmp_path / "merged" / "model.safetensors", without)
    level = checked(llama, llama_adapter, tmp_path / "merged")
    assert f"lacks '{name}'" in level.problems[0] and "times the" in level.problems[1]


def test_a_merged_model_that_cannot_be_loaded_is_a_problem(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "merged", device="cpu")
    files.edit_json(tmp_path / "merged" / "config.json", intermediate_size=96)
    level = checked(llama, llama_adapter, tmp_path / "merged")
    (problem,) = level.problems
    assert "cannot be run" in problem and str(tmp_path / "merged") in problem
    assert level.merged is None and level.unmerged is not None and not level.equivalent


def test_another_checkpoint_is_no_merge_of_this_base(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is it a merge of this base"):
        checked(llama, llama_adapter, models.MINILM)
    with pytest.raises(CheckpointError, match="no weights"):
        checked(llama, llama_adapter, tmp_path)


def test_a_wrong_config_shows_in_the_outputs(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "merged", device="cpu", dtype="bf16")
    files.edit_json(tmp_path / "merged" / "config.json", hidden_act="gelu")
    assert not checked(llama, llama_adapter, tmp_path / "merged").equivalent


def test_infinite_outputs_are_a_problem(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "merged", device="cpu")

    def broken(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["lm_head.weight"][7, 7] = float("inf")
        return tensors

    files.edit_tensors(tmp_path / "merged" / "model.safetensors", broken)
    (problem,) = checked(llama, llama_adapter, tmp_path / "merged").problems
    assert "NaN or infinity in F32" in problem


def test_an_adapter_left_in_the_merged_folder_is_not_loaded(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "merged", device="cpu")
    for path in llama_adapter.iterdir():
        (tmp_path / "merged" / path.name).write_bytes(path.read_bytes())
    assert checked(llama, llama_adapter, tmp_path / "merged").equivalent


def test_pickled_and_sharded_bases(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "merged", device="cpu")
    for name, rewrite in (("pickled", files.as_pickle), ("sharded", files.as_shards)):
        base = files.copy_of(llama, tmp_path / name)
        rewrite(base, 2)
        assert checked(base, llama_adapter, tmp_path / "merged").equivalent


def test_steps_are_reported_and_settings_left_alone(
    llama: Path, llama_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "merged", device="cpu")
    logging: Any = transformers.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    steps: list[str] = []
    checked(llama, llama_adapter, tmp_path / "merged", note=steps.append)
    assert [step.removeprefix("running the models: ") for step in steps] == [
        "bases",
        "base and adapter in F64, the truth",
        "base and adapter in F32",
        "the merged model in F32",
    ]
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capsys.readouterr() == ("", "")


def test_two_runs_give_the_same_figures(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "merged", device="cpu", dtype="bf16")
    first, second = (checked(llama, llama_adapter, tmp_path / "merged") for _ in range(2))
    assert first == second


def skeleton_of(folder: Path) -> Skeleton:
    config = transformers.AutoConfig.from_pretrained(folder)
    return Skeleton(getattr(transformers, config.architectures[0]), config)


@pytest.mark.parametrize("family", ["llama", "qwen3", "minilm", "deberta", "t5"])
def test_padding_changes_no_output(family: str, base_folder: Any, tmp_path: Path) -> None:
    base = base_folder(family)
    adapter = models.save_adapter(family, base, tmp_path / "adapter")
    plan = plan_merge(base, adapter)
    loader = UnmergedLoader(plan)
    model = loader.load(changes(plan), torch.float32, CPU).model
    batch = make_inputs(loader.skeleton, base, None).batches[-1]
    assert "attention_mask" in batch.arguments
    valid = batch.arguments["attention_mask"].bool()
    assert (valid[0].int().diff() > 0).any() == (family in ("llama", "qwen3")), "left for decoders"
    with torch.no_grad():
        padded = model(**batch.arguments).logits
        for row, kept in enumerate(valid):
            alone = {"input_ids": batch.arguments["input_ids"][row : row + 1, kept]}
            if family == "t5":
                alone["decoder_input_ids"] = batch.arguments["decoder_input_ids"][row : row + 1]
            expected = model(**alone).logits[0]
            found = padded[row] if batch.valid is None or padded.ndim == 2 else padded[row, kept]
            assert torch.allclose(found, expected, atol=2e-6 + 1e-5 * float(expected.abs().max()))


def test_lengths_stay_within_the_models_positions(base_folder: Any) -> None:
    base = base_folder("deberta")  # 64 positions
    inputs = make_inputs(skeleton_of(base), base, None)
    assert max(batch.arguments["input_ids"].shape[1] for batch in inputs.batches) == 62
    assert all(int(batch.arguments["input_ids"].max()) < 100 for batch in inputs.batches)


def test_distances_are_those_of_the_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(50, 11, generator=generator)
    found = truth + 0.3 * torch.randn(50, 11, generator=generator)
    total = DistanceSum(are_logits=True)
    total.add(truth[:20], found[:20])
    total.add(truth[20:], found[20:])
    result = total.result()
    assert result is not None and result.divergence is not None
    difference = (truth - found).double()
    assert result.rms == pytest.approx(float(difference.square().mean().sqrt()))
    assert result.mean == pytest.approx(float(difference.abs().mean()))
    assert result.largest == pytest.approx(float(difference.abs().max()))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=truth.double()),
        torch.distributions.Categorical(logits=found.double()),
    )
    assert result.divergence == pytest.approx(float(expected.mean()))
    assert result.top1 == pytest.approx(float((truth.argmax(1) == found.argmax(1)).double().mean()))


def test_tokens_count_up_to_the_first_difference() -> None:
    truth = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert share_followed(truth, truth) == 1
    assert share_followed(truth, torch.tensor([[1, 2, 9, 4], [5, 6, 7, 8]])) == 6 / 8
    assert share_followed(truth, torch.tensor([[9, 2, 3, 4], [9, 6, 7, 8]])) == 0


def test_the_loss_is_the_one_that_transformers_computes() -> None:
    model = load_base(BASE)
    ids = torch.randint(0, 256, (3, 40))
    with torch.no_grad():
        result = model(input_ids=ids, labels=ids)
    assert cross_entropy(result.logits, ids) / ids[:, 1:].numel() == pytest.approx(
        float(result.loss), rel=1e-5
    )


def test_the_bound_is_the_one_reported(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "merged", device="cpu", dtype="bf16")
    level = checked(llama, llama_adapter, tmp_path / "merged")
    assert level.factor == FACTOR == level.summary()["factor"]


def test_merged_loader_reads_the_merged_config(llama: Path, tmp_path: Path) -> None:
    merged = files.copy_of(llama, tmp_path / "merged")
    files.edit_json(merged / "config.json", rms_norm_eps=0.5)
    loader = MergedLoader(open_checkpoint(merged), skeleton_of(llama))
    assert loader.load(torch.float32, CPU).model.config.rms_norm_eps == 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TRUTHS)
def test_on_cuda(dtype: str, llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    device = torch.device("cuda")
    psoft_export.merge(llama, llama_adapter, tmp_path / "merged", device="cuda", dtype=dtype)
    plan = plan_merge(llama, llama_adapter)
    bases = BasisFinder(plan.adapter, device=device)
    level = check_outputs(plan, tmp_path / "merged", bases, device=device)
    assert level.equivalent and level.skipped is None


@pytest.mark.parametrize("margin, problems", [(0.05, 0), (0.5, 1)])
def test_tokens_may_differ_only_at_near_ties(margin: float, problems: int) -> None:
    verdict = outputs.Verdict(4.0, tokens=True)
    check = outputs.OutputsCheck("F32", CPU, outputs.Wording(), verdict, lambda _: None)
    margins = torch.tensor([[9.0, 9.0, 9.0], [9.0, margin, 9.0]])
    truth = outputs._Observed(torch.tensor([[1, 2, 3], [4, 5, 6]]), margins)
    merged = outputs._Observed(torch.tensor([[1, 2, 3], [4, 7, 8]]))
    reference = DistanceSum(are_logits=True)
    reference.add(torch.zeros(1, 2), torch.tensor([[0.0, 0.01]]))  # so 0.08 is a near tie
    found = check._tokens_astray(truth, merged, reference)
    assert len(found) == problems
    assert all("leaves the truth's at token 2 of prompt 2" in text for text in found)
