"""A basis recorded from a live PEFT model brings the trained adapter back anywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PsoftConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import psoft_export
from psoft_export import bases, training
from psoft_export.adapters.basis_record import FILENAME, read_record
from psoft_export.errors import (
    MismatchError,
    RecordError,
    RecordMissingError,
    UnsupportedError,
    UsageError,
)
from tests import models
from tests.machines import coarse_svd


def psoft_layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if adapter in getattr(module, "_psoft_A_cache", ())
    }


def scramble(model: nn.Module, adapter: str = "default") -> None:
    """Give every singular pair another sign at random, as the SVD of another machine would."""
    generator = torch.Generator().manual_seed(5)
    for layer in psoft_layers(model, adapter).values():
        a, b = layer._psoft_A_cache[adapter], layer._psoft_B_cache[adapter]
        signs = (torch.randint(0, 2, (len(a),), generator=generator) * 2 - 1).to(a.dtype)
        a.mul_(signs[:, None])
        b.mul_(signs)


def caches(model: nn.Module) -> list[torch.Tensor]:
    return [
        cache["default"].clone()
        for layer in psoft_layers(model).values()
        for cache in (layer._psoft_A_cache, layer._psoft_B_cache)
    ]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**models.FAMILIES["llama"].inputs()).logits.float()


def trained(base: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A model whose SVD gave other signs than the one here does, with its adapter moved."""
    settings: dict[str, Any] = {"r": 8, "psoft_alpha": 16, "task_type": "CAUSAL_LM"}
    targets = list(models.FAMILIES["llama"].targets)
    config = PsoftConfig(**{**settings, "target_modules": targets, **options})
    model = get_peft_model(models.load_task_model("llama", base, dtype), config).eval()
    scramble(model)
    models.perturb(model, seed=3)
    return model


def kind_of(folder: Path) -> str:
    record = read_record(folder)
    assert record is not None
    return record.kind


@pytest.mark.parametrize("options", [{}, {"ab_svd_init": "pissa_init"}, {"psoft_svd": "lowrank"}])
@pytest.mark.parametrize("kind", ["signs", "full", "auto"])
def test_a_restored_model_computes_what_the_trained_one_did(
    kind: Any, options: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    lowrank = "psoft_svd" in options
    model = trained(llama, **options)
    model.save_pretrained(tmp_path)
    if lowrank and kind == "signs":
        with pytest.raises(UnsupportedError, match="needs kind 'full'"):
            psoft_export.record_basis(model, tmp_path, kind=kind)
        assert not (tmp_path / FILENAME).exists()
        return

    path = psoft_export.record_basis(model, tmp_path, kind=kind)
    assert path == tmp_path / FILENAME
    assert kind_of(tmp_path) == ("full" if lowrank or kind == "full" else "signs")
    psoft_export.load_adapter(tmp_path)  # its check of the record included

    elsewhere = models.load_with_peft("llama", llama, tmp_path)
    wanted = logits(model)
    assert float((logits(elsewhere) - wanted).abs().max()) > 1e-2
    psoft_export.restore_basis(elsewhere, tmp_path)
    if kind_of(tmp_path) == "full":
        assert torch.equal(logits(elsewhere), wanted)
    else:
        # What PEFT's float32 SVD itself leaves open: about 4e-5 of ΔW here (`delta_uncertainty`).
        assert (logits(elsewhere) - wanted).norm() <= 1e-4 * wanted.norm()


def test_a_basis_held_in_bfloat16_is_recorded_whole(
    base_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_folder("llama", torch.bfloat16)
    model = trained(base, torch.bfloat16).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"bfloat16.*needs kind 'full'"):
        psoft_export.record_basis(model, tmp_path, kind="signs")
    psoft_export.record_basis(model, tmp_path)
    assert kind_of(tmp_path) == "full"

    # The base in float32 holds the same numbers: it is the recorded one.
    elsewhere = models.load_with_peft("llama", base, tmp_path, torch.float32)
    psoft_export.restore_basis(elsewhere, tmp_path)
    for mine, theirs in zip(caches(elsewhere), caches(model), strict=True):
        assert torch.equal(mine, theirs.float())


def test_auto_records_whole_what_signs_leave_uncertain(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "ADVISED_LIMIT", 1e-12)
    model = trained(llama)
    psoft_export.record_basis(model, tmp_path)
    assert kind_of(tmp_path) == "full"
    psoft_export.record_basis(model, tmp_path, kind="signs")
    assert kind_of(tmp_path) == "signs"


def test_a_basis_that_a_coarse_svd_found_is_recorded_whole(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_BELONGS", 0.1)
    model = trained(llama)
    for layer in psoft_layers(model).values():
        left, values, right = coarse_svd(layer.get_base_layer().weight.detach())
        rank = len(layer._psoft_A_cache["default"])
        layer._psoft_A_cache["default"].copy_(right[:rank])
        layer._psoft_B_cache["default"].copy_(left[:, :rank] * values[:rank] / 2)
    psoft_export.record_basis(model, tmp_path)
    assert kind_of(tmp_path) == "full"
    with pytest.warns(UserWarning, match=r"signs leave .*% of ΔW open in 'model.*kind 'full'"):
        psoft_export.record_basis(model, tmp_path, kind="signs")


def test_a_basis_with_other_singular_values_is_refused_as_signs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(training, "_BELONGS", 0.1)
    model = trained(llama)
    for layer in psoft_layers(model).values():
        layer._psoft_B_cache["default"].mul_(1.01)
    with pytest.raises(UnsupportedError, match=r"module 'model.*use kind 'full'"):
        psoft_export.record_basis(model, tmp_path, kind="signs")
    assert not any("of ΔW open" in str(warning.message) for warning in recwarn)
    assert not (tmp_path / FILENAME).exists()
    psoft_export.record_basis(model, tmp_path)
    assert kind_of(tmp_path) == "full"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["auto", "full"])
def test_what_a_gpu_trained_is_recorded(kind: Any, llama: Path, tmp_path: Path) -> None:
    targets = list(models.FAMILIES["llama"].targets)
    config = PsoftConfig(r=8, psoft_alpha=16, task_type="CAUSAL_LM", target_modules=targets)
    model = get_peft_model(models.load_task_model("llama", llama).cuda(), config).eval()
    models.perturb(model, seed=3)
    model.save_pretrained(tmp_path)
    psoft_export.record_basis(model, tmp_path, kind=kind)
    report = psoft_export.merge(llama, tmp_path, tmp_path / "merged", device="cpu")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(llama / "model.safetensors")
    truth = models.exact_weights(model)
    for module in report.modules:
        weight, exact = base[module.tensor].double(), truth[module.module].cpu()
        apart = (merged[module.tensor].double() - exact).norm() / (exact - weight).norm()
        allowed = (module.basis_uncertainty or 0) + 2 * module.relative_rounding
        assert float(apart) <= allowed <= 1e-2 + 2 * module.relative_rounding, module


def test_recording_is_repeatable_and_draws_no_random_numbers(llama: Path, tmp_path: Path) -> None:
    model = trained(llama)
    before, state = caches(model), torch.get_rng_state()
    first = psoft_export.record_basis(model, tmp_path / "one").read_bytes()
    assert psoft_export.record_basis(model, tmp_path / "two").read_bytes() == first
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, caches(model), before))


@pytest.mark.parametrize("kind", ["signs", "full"])
def test_another_base_is_refused_and_nothing_changed(
    kind: Any, llama: Path, tmp_path: Path
) -> None:
    model = trained(llama)
    model.save_pretrained(tmp_path)
    psoft_export.record_basis(model, tmp_path, kind=kind)

    elsewhere = models.load_with_peft("llama", llama, tmp_path)
    *_, last = psoft_layers(elsewhere)
    with torch.no_grad():
        elsewhere.get_submodule(last).get_base_layer().weight[0, 0] += 1e-3
    before = caches(elsewhere)
    with pytest.raises(MismatchError, match=last.removeprefix("base_model.model.")):
        psoft_export.restore_basis(elsewhere, tmp_path)
    assert all(map(torch.equal, caches(elsewhere), before))


def test_a_base_loaded_with_fewer_digits_is_refused(llama: Path, tmp_path: Path) -> None:
    model = trained(llama)
    model.save_pretrained(tmp_path)
    psoft_export.record_basis(model, tmp_path)
    elsewhere = models.load_with_peft("llama", llama, tmp_path, torch.bfloat16)
    with pytest.raises(MismatchError, match=r"and 11 more.*recorded as F32, loaded as BF16"):
        psoft_export.restore_basis(elsewhere, tmp_path)


@pytest.mark.parametrize("kind", ["signs", "full"])
def test_a_base_that_changed_under_the_adapter_is_not_recorded(
    kind: Any, llama: Path, tmp_path: Path
) -> None:
    model = trained(llama)
    layer = next(iter(psoft_layers(model).values()))
    with torch.no_grad():
        layer.get_base_layer().weight.add_(torch.randn(64, 64) * 0.05)
    with pytest.raises(MismatchError, match=r"q_proj.*changed since the adapter was added"):
        psoft_export.record_basis(model, tmp_path, kind=kind)
    assert not (tmp_path / FILENAME).exists()


def test_a_record_of_other_modules_is_refused(llama: Path, tmp_path: Path) -> None:
    few, many = trained(llama, target_modules=["q_proj"]), trained(llama)
    psoft_export.record_basis(few, tmp_path / "few")
    psoft_export.record_basis(many, tmp_path / "many")
    with pytest.raises(RecordError, match="lacks module"):
        psoft_export.restore_basis(many, tmp_path / "few")
    with pytest.raises(RecordError, match="does not adapt"):
        psoft_export.restore_basis(few, tmp_path / "many")


def test_a_missing_record_is_reported(llama: Path, llama_adapter: Path) -> None:
    model = models.load_with_peft("llama", llama, llama_adapter)
    with pytest.raises(RecordMissingError, match="record_basis"):
        psoft_export.restore_basis(model, llama_adapter)


def test_what_cannot_be_recorded_is_refused(llama: Path, tmp_path: Path) -> None:
    model = trained(llama)
    with pytest.raises(UsageError, match="must be the PeftModel itself"):
        psoft_export.record_basis(model.get_base_model(), tmp_path)
    with pytest.raises(UsageError, match="no PSOFT layer holds adapter 'other'"):
        psoft_export.record_basis(model, tmp_path, "other")
    with pytest.raises(UsageError, match="kind 'sign'"):
        psoft_export.record_basis(model, tmp_path, kind="sign")  # type: ignore[arg-type]

    *_, layer = psoft_layers(model).values()
    layer.psoft_svd["default"] = "lowrank"
    with pytest.raises(UnsupportedError, match="rank_pattern"):
        psoft_export.record_basis(model, tmp_path)
    layer.psoft_svd["default"] = "full"

    weight = layer.get_base_layer().weight
    whole, weight.data = weight.data, torch.empty(0)
    with pytest.raises(UnsupportedError, match="sharded"):
        psoft_export.record_basis(model, tmp_path)
    weight.data = whole
    assert not (tmp_path / FILENAME).exists()


def test_a_merged_adapter_is_to_be_unmerged_first(llama: Path, tmp_path: Path) -> None:
    model = trained(llama)
    psoft_export.record_basis(model, tmp_path)
    model.merge_adapter()
    for call in (psoft_export.record_basis, psoft_export.restore_basis):
        with pytest.raises(UsageError, match="unmerge first"):
            call(model, tmp_path)


def test_a_second_adapter_has_its_record_in_its_own_folder(llama: Path, tmp_path: Path) -> None:
    model = trained(llama)
    model.add_adapter("other", PsoftConfig(r=4, psoft_alpha=4, target_modules=["q_proj"]))
    scramble(model, "other")
    model.save_pretrained(tmp_path)
    assert psoft_export.record_basis(model, tmp_path) == tmp_path / FILENAME
    assert psoft_export.record_basis(model, tmp_path, "other") == tmp_path / "other" / FILENAME

    wanted = {n: m._psoft_A_cache["other"].clone() for n, m in psoft_layers(model, "other").items()}
    for module in psoft_layers(model, "other").values():
        module._psoft_A_cache["other"].zero_()
    psoft_export.restore_basis(model, tmp_path, "other")
    for name, module in psoft_layers(model, "other").items():
        torch.testing.assert_close(module._psoft_A_cache["other"], wanted[name], rtol=0, atol=1e-4)


def train(model: nn.Module, output: Path, *callbacks: Any, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    tokens = [[5 + (i * j) % 90 for j in range(12)] for i in range(4)]
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.train()
    return trainer


@pytest.mark.parametrize(("kind", "tolerance"), [("auto", 1e-4), ("full", 1e-6)])
def test_every_checkpoint_of_a_trainer_carries_the_record(
    kind: Any, tolerance: float, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(llama)
    trainer = train(model, tmp_path / "run", psoft_export.RecordBasisCallback(kind))
    trainer.save_model()
    folders = [tmp_path / "run" / name for name in ("checkpoint-1", "checkpoint-2", ".")]
    for folder in folders:
        assert psoft_export.load_adapter(folder).record is not None
    assert len({(folder / FILENAME).read_bytes() for folder in folders}) == 1

    # Nothing of the SVD on this machine goes into the merge.
    def refuse(*_: Any) -> None:
        raise AssertionError("the training's SVD was run again")

    monkeypatch.setattr(bases, "training_svd", refuse)
    psoft_export.merge(llama, folders[1], tmp_path / "merged", device="cpu")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(llama / "model.safetensors")
    for path, weight in models.exact_weights(model).items():
        delta = weight - base[f"{path}.weight"]
        error = merged[f"{path}.weight"].double() - weight
        assert error.norm() <= tolerance * delta.norm()


def test_the_callback_records_once_and_survives_rotated_checkpoints(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    record = training._record
    monkeypatch.setattr(training, "_record", lambda *a: (calls.append(a), record(*a))[1])
    run = tmp_path / "run"
    train(trained(llama), run, psoft_export.RecordBasisCallback("full"), save_total_limit=1)
    assert len(calls) == 1
    assert not (run / "checkpoint-1").exists()
    assert kind_of(run / "checkpoint-2") == "full"


def test_the_callback_refuses_before_training_starts(llama: Path, tmp_path: Path) -> None:
    callback = psoft_export.RecordBasisCallback("signs")
    with pytest.raises(UnsupportedError, match="needs kind 'full'"):
        train(trained(llama, psoft_svd="lowrank"), tmp_path / "run", callback)
    with pytest.raises(UsageError, match="active PSOFT adapter"):
        train(models.load_task_model("llama", llama), tmp_path / "bare", callback)


def test_the_callback_looks_inside_distributed_data_parallel(llama: Path) -> None:
    model = trained(llama)
    wrapper = nn.Module()
    wrapper.module = model
    assert training._unwrapped(wrapper) is model
    assert training._unwrapped(model) is model
