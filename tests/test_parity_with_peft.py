"""The merged model is the model that PEFT runs, for every option that changes the result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import psoft_export
from psoft_export.verification.tiles import unit_in_last_place
from tests import models

OPTIONS: dict[str, dict[str, Any]] = {
    "relaxed": {},
    "strict": {"psoft_mag_a": False, "psoft_mag_b": False},
    "only vector_a": {"psoft_mag_b": False},
    "only vector_b": {"psoft_mag_a": False},
    "pissa": {"ab_svd_init": "pissa_init"},
    "alpha below rank": {"psoft_alpha": 3},
    "free R": {"psoft_orth": False},
    "free R without vectors": {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False},
    "lowrank": {"psoft_svd": "lowrank", "random_seed": 7, "psoft_svd_lowrank_niter": 3},
    "lowrank pissa": {"psoft_svd": "lowrank", "ab_svd_init": "pissa_init"},
    "rank 1": {"r": 1},
    "rank of the smallest matrix": {"r": 32},
    "regex targets": {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"},
    "one layer": {"layers_to_transform": [0]},
} | {
    f"series of {terms}, eps {eps}": {
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": terms,
        "cayley_neumann_eps": eps,
    }
    for terms, eps in [(1, None), (2, None), (3, None), (4, None), (5, None), (7, None), (5, 0.3)]
}


def merged_tensors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def logits(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**models.FAMILIES[family].inputs()).logits


@pytest.mark.parametrize("name", OPTIONS)
def test_every_merged_entry_is_the_nearest_number_to_the_exact_sum(
    name: str, llama: Path, tmp_path: Path
) -> None:
    adapter = models.save_adapter("llama", llama, tmp_path / "adapter", **OPTIONS[name])
    report = psoft_export.merge(llama, adapter, tmp_path / "merged", device="cpu")

    merged = merged_tensors(tmp_path / "merged")
    exact = models.exact_weights(models.load_with_peft("llama", llama, adapter))
    assert len(report.modules) == len(exact)
    for path, weight in exact.items():
        error = (merged[f"{path}.weight"].double() - weight).abs()
        # 1e-6: the two float64 sums may differ in their own last digits.
        assert float((error / unit_in_last_place(weight, torch.float32)).max()) < 0.5 + 1e-6


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_those_of_the_unmerged_adapter(name: str, llama: Path, tmp_path: Path) -> None:
    adapter = models.save_adapter("llama", llama, tmp_path / "adapter", **OPTIONS[name])
    psoft_export.merge(llama, adapter, tmp_path / "merged", device="cpu")

    merged = logits(models.load_task_model("llama", tmp_path / "merged"), "llama")
    unmerged = logits(models.load_with_peft("llama", llama, adapter), "llama")
    base = logits(models.load_task_model("llama", llama), "llama")
    scale = float(unmerged.abs().max())
    assert float((merged - unmerged).abs().max()) < 2e-5 * scale
    if OPTIONS[name].get("num_cayley_neumann_terms") != 1:
        assert float((merged - base).abs().max()) > 1e-2 * scale, "the adapter does something"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merge_is_nearer_to_the_truth_than_pefts(
    dtype: torch.dtype, base_folder: Any, tmp_path: Path
) -> None:
    base = base_folder("llama", dtype)
    weights: list[float] = []
    ours_off, theirs_off = 0.0, 0.0
    # One merge's logits are one draw of rounding errors; eight of them tell the two tools apart.
    for seed in range(8):
        adapter = models.save_adapter("llama", base, tmp_path / f"{seed}", dtype, seed)
        psoft_export.merge(base, adapter, tmp_path / "merged", device="cpu", overwrite=True)
        peft_model = models.load_with_peft("llama", base, adapter, dtype)
        exact = models.exact_weights(peft_model)
        theirs = dict(peft_model.merge_and_unload().named_parameters())
        ours = merged_tensors(tmp_path / "merged")
        for path, weight in exact.items():
            our_error = (ours[f"{path}.weight"].double() - weight).abs()
            their_error = (theirs[f"{path}.weight"].double() - weight).abs()
            assert bool((our_error <= their_error).all()), path
            weights.append(float(our_error.norm() / their_error.norm()))
        truth = logits(models.load_with_peft("llama", base, adapter), "llama")
        single = models.load_task_model("llama", tmp_path / "merged")
        ours_off += float((logits(single, "llama") - truth).square().sum())
        single.load_state_dict({n: p.float() for n, p in theirs.items()})
        theirs_off += float((logits(single, "llama") - truth).square().sum())
    assert max(weights) < 0.99, "PEFT rounds twice, so its error is larger in every module"
    assert ours_off <= theirs_off


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_stored_in_half_precision(dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
    adapter = models.save_adapter("llama", llama, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({k: t.to(dtype) for k, t in load_file(file).items()}, file)
    psoft_export.merge(llama, adapter, tmp_path / "merged", device="cpu")

    merged = merged_tensors(tmp_path / "merged")
    for path, weight in models.exact_weights(
        models.load_with_peft("llama", llama, adapter)
    ).items():
        error = (merged[f"{path}.weight"].double() - weight).abs()
        assert float((error / unit_in_last_place(weight, torch.float32)).max()) < 0.5 + 1e-6


def test_pickled_adapter_gives_the_same_files(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    psoft_export.merge(llama, llama_adapter, tmp_path / "from_safetensors", device="cpu")
    file = llama_adapter / "adapter_model.safetensors"
    torch.save(load_file(file), llama_adapter / "adapter_model.bin")
    file.unlink()
    psoft_export.merge(llama, llama_adapter, tmp_path / "from_pickle", device="cpu")
    first, second = (tmp_path / f"from_{kind}" for kind in ("safetensors", "pickle"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_reloads_and_agrees(family: str, base_folder: Any, tmp_path: Path) -> None:
    base = base_folder(family)
    adapter = models.save_adapter(family, base, tmp_path / "adapter")
    psoft_export.merge(base, adapter, tmp_path / "merged", device="cpu")

    info = models.FAMILIES[family]
    reloaded, report = info.task_class.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert reloaded.config.architectures == [info.task_class.__name__]
    merged = logits(reloaded.eval(), family)
    unmerged = logits(models.load_with_peft(family, base, adapter), family)
    assert merged.shape == unmerged.shape
    assert float((merged - unmerged).abs().max()) < 2e-5 * float(unmerged.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["relaxed", "strict", "pissa", "lowrank"])
def test_cuda_merge_is_the_model_that_peft_runs_on_cuda(
    name: str, llama: Path, tmp_path: Path
) -> None:
    adapter = models.save_adapter("llama", llama, tmp_path / "adapter", **OPTIONS[name])
    psoft_export.merge(llama, adapter, tmp_path / "merged", device="cuda")
    base = models.load_task_model("llama", llama).cuda()
    peft_model = models.PeftModel.from_pretrained(base, adapter).eval()
    merged = merged_tensors(tmp_path / "merged")
    for path, weight in models.exact_weights(peft_model).items():
        expected = weight.cpu()
        error = (merged[f"{path}.weight"].double() - expected).abs()
        assert float((error / unit_in_last_place(expected, torch.float32)).max()) < 0.5 + 1e-3
